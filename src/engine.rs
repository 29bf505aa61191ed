//! A simulated vLLM: its prefix cache and its batches (pure), and its HTTP face.
//!
//! `cache` and `batch` have no clock and no socket; `http` puts them behind vLLM's API, so that the whole
//! product can be tried, tested and measured without a GPU. The balancer never imports any of it; `simulate`
//! runs loads through the pure parts.

pub mod batch;
pub mod cache;
pub mod dice;
pub mod http;
