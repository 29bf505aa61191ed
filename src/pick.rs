//! Stub: comes with its own change.
