//! Configuration: reads a file, checks the whole, and gives the values that run.
//!
//! `types` has every setting with its default and its row of the table of settings (`setting`): keys, ranges,
//! rendering and the comparison of a reload come from the rows. `yaml` reads the file as a tree, `expand`
//! fills in variables, `check` reports every problem with its path. Nothing here opens a file or a socket,
//! reads the environment or changes the process.

pub mod check;
pub mod diff;
pub(crate) mod expand;
pub(crate) mod free;
pub mod keys;
pub(crate) mod member;
pub(crate) mod postgres;
pub mod problem;
pub mod redis;
pub mod render;
pub mod secret;
pub(crate) mod section;
pub mod setting;
pub(crate) mod spelling;
pub mod types;
pub mod url;
pub mod values;
pub(crate) mod yaml;
