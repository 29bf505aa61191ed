//! A simulated vLLM: its prefix cache and its pace (pure), and its HTTP face.
//!
//! `cache` and `engine` know no clock and no socket; `http` puts them behind vLLM's API so that the whole
//! product can be tried, tested and measured without a GPU; `replay` runs loads through them and the
//! product's choice on a virtual clock. The balancer never imports any of it.

pub mod cache;
pub mod dice;
pub mod engine;
pub mod http;
pub mod replay;
