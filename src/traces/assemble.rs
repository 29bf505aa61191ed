//! Assembles a record from the bytes of a request and of its answer.
//!
//! Never: I/O, a clock, a panic on bytes that are not what they should be.
