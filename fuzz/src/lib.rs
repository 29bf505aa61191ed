//! What must hold of any bytes, a module each. `run` panics where it does not.
//!
//! Inputs are the bytes that the product would read, with nothing in front of them, so that a seed is a file
//! that people can read. Whatever else a target needs, such as where to cut, follows from the bytes.

pub mod canon;
pub mod config;
mod cuts;
pub mod edits;
pub mod exchange;
pub mod form;
mod json;
pub mod scan;
pub mod sse;
pub mod upstream;
