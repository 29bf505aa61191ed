//! The simulated engine, over real sockets: is it true to vLLM 0.32, and does it break as told?

#![allow(clippy::unwrap_used, reason = "a test that cannot go on shall say where")]

#[path = "engine/client.rs"]
mod client;
#[path = "engine/errors.rs"]
mod errors;
#[path = "engine/faults.rs"]
mod faults;
#[path = "engine/life.rs"]
mod life;
#[path = "engine/samples.rs"]
mod samples;
#[path = "engine/semantics.rs"]
mod semantics;
