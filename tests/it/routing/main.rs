//! Which upstream or route serves a request: choice, sessions, prefixes, models, virtual models, usage.

mod burst_spreading;
mod choice;
#[path = "../common/mod.rs"]
mod common;
mod conformance;
mod forecast;
mod many_upstreams;
mod matching;
mod messages_chat;
mod models;
mod responses_chat;
mod training;
mod usage;
mod virtual_models;
