//! Tests of `capture`: what goes into a body, and that an answer after its cleanup is the one without it.

mod cleanup;
mod request;
mod stream_end;
mod streams;
