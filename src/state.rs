//! What a balancer remembers between requests: which upstream was sent which prompts.
//!
//! Decisions read local memory only. It must never wait for anything on a request's path but the short
//! lock of a writer, and never know the fleet: who an upstream is stays with whoever asks for a slot.

pub mod exchange;
pub mod local;
pub mod redis;
