//! The admin listener: the fleet at run time, and what is read from the metrics of engines.

#[path = "../common/mod.rs"]
mod common;
mod doctor;
mod engine_metrics;
mod fleet;
mod live;
mod overview;
