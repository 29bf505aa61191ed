//! The simulated engine, over real sockets: is it true to vLLM 0.32, and does it break as told?

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
