//! Where a request may go, and what is made of it and of its answer on the way.
//!
//! `paths` has vLLM's routes and what a balancer does with each; `table` has the virtual models of a
//! configuration, `resolve` what they come to over the upstreams of one moment, `rewrite` edits what is sent
//! and `edit` makes a value of that, `answer` edits what comes back, `stored` gives responses ids by which
//! they are found again, `translate` says a Responses request as a chat, and `usage` asks streams for their
//! tokens and takes out again what that adds, as `capture` does for what the record of a call needs;
//! `cumulative` makes completions of chats that continue from recorded tokens.

pub mod answer;
pub mod capture;
pub mod cumulative;
pub mod dialect;
pub mod edit;
pub mod paths;
pub mod refusal;
pub mod resolve;
pub mod rewrite;
mod splice;
pub mod stored;
pub mod table;
pub mod token_ids;
pub mod translate;
pub mod usage;
