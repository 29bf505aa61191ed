//! The command line and the configuration file.

mod cli;
mod corpus;
mod reference;
