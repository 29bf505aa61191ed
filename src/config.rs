//! Configuration: what was written, checked as a whole, becomes what runs.
//!
//! `raw` reads the file as it was written, `check` turns it into `types` and reports every problem
//! with its path. Nothing here opens a socket or changes the process.

pub mod check;
pub mod raw;
pub mod secret;
pub mod types;
