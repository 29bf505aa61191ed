//! A simulated vLLM: its prefix cache and its batches (pure), and its HTTP server.
//!
//! `cache` and `batch` have no clock and no socket; `http` serves them by vLLM's API, so that the whole
//! product can be tried, tested and measured without a GPU. The balancer imports none of it; `simulate` runs
//! loads through the pure parts.

pub mod batch;
pub(crate) mod cache;
pub mod dice;
pub mod http;
