//! The stores of traces: in memory, or in a database.
//!
//! Never: called on the way of a request.
