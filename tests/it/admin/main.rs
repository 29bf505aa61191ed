//! The admin listener: the fleet at run time, the balancer's metrics, and what is read from those of engines.

#[path = "../common/mod.rs"]
mod common;
mod decisions;
mod doctor;
mod engine_metrics;
mod fleet;
mod live;
mod metrics;
mod overview;
mod upstream_state;
