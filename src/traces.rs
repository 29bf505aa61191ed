//! Recorded calls: captured on the way of an answer, assembled and stored on a thread of their own.
//!
//! ```text
//! proxy: Capture  ->  CaptureQueue (bounded)  ->  assemble (pure)  ->  Store: memory | SQL
//! ```
//!
//! Never: an await on the way of a request (but where `traces.sync` requests it), an unlimited queue, a
//! trace that a public listener can read.

pub mod assemble;
pub mod record;
pub mod store;
