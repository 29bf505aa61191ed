//! Where a request may go: vLLM's routes and what a balancer does with each.

pub mod paths;
