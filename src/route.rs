//! Finds the route of a request, and edits its body and its answer.
//!
//! ```text
//! api_paths      vLLM's API routes, and the policy of the balancer for each
//! virtual_models the virtual models of a configuration
//! resolve        the virtual models over the upstreams of one moment
//! rewrite        edits a request's body; edit makes a value of one such edit
//! answer         edits an upstream's answer
//! stored         ids of stored responses that carry their upstream
//! translate      turns a Responses request into a chat, and the chat's answer into a response
//! usage          requests the usage of streams, and removes from the answer what that adds
//! capture        the same for the fields that the record of a call needs
//! upstreams      the upstreams of a route as a set, for one snapshot of the fleet
//! cumulative     turns chats that continue from recorded tokens into completions
//! ```

pub mod answer;
pub mod api_paths;
pub mod capture;
pub(crate) mod cumulative;
pub mod dialect;
pub mod edit;
pub mod resolve;
pub mod rewrite;
mod splice;
pub(crate) mod stored;
pub(crate) mod token_ids;
pub mod translate;
pub(crate) mod upstreams;
pub mod usage;
pub mod virtual_models;
