//! What goes through the balancer: bytes, heads, framing, connections, streams, and its own answers.

mod api_surface;
mod bodies;
mod client_address;
mod client_connections;
mod client_disconnect;
#[path = "../common/mod.rs"]
mod common;
mod differential;
mod edit_memory;
mod exposure;
mod held_answers;
mod hygiene;
mod listeners;
mod nginx;
mod own_answers;
mod request_path;
mod smuggling;
mod streams;
