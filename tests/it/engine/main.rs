//! The simulated engine, over real sockets: is it true to vLLM 0.32, and does it break as told?

#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall say where")]

mod client;
mod errors;
mod faults;
mod life;
mod samples;
mod semantics;
