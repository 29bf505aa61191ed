//! Captured calls: what is recorded, stores, the API of sessions and traces, export, cumulative turns.

mod api;
mod capture;
#[path = "../common/mod.rs"]
mod common;
mod cumulative;
mod durability;
mod export;
mod store;

// `store` shares files with the unit tests of the crate, which name its module `crate::traces`.
use vllm_lb::traces;
