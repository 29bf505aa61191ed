//! Configuration: what was written, checked as a whole, becomes what runs.
//!
//! `raw` reads the file as it was written, `expand` fills in variables, `check` turns the tree into
//! `types` and reports every problem with its path; `render` shows what runs, secrets masked. Nothing here
//! opens a file or a socket, reads the environment or changes the process.

pub mod check;
pub mod diff;
pub mod expand;
pub mod free;
pub mod keys;
pub mod member;
pub mod postgres;
pub mod problem;
pub mod raw;
pub mod redis;
pub mod render;
pub mod secret;
pub mod section;
pub mod types;
pub mod url;
pub mod values;
