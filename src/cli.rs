//! The command line. Replaced by the whole one.

pub mod engine;
