//! The messages that balancers on one Redis exchange, and their encoding.
//!
//! A message is one entry of the stream:
//!
//! ```text
//! version (1 byte)  balancer (8 bytes)  sequence  { kind  length  bytes }*
//! ```
//!
//! Every part carries its length, so that a part of a newer version is skipped; a message of another version
//! is skipped as a whole. Upstreams are identified by their names, since slots and ids differ between
//! processes; a part of its own lists each name once.
//!
//! Gauges are absolute, never increments: the next message corrects a balancer that missed one. Of a chain
//! only the new tail is sent, with the block that it follows. A balancer without that block requests the
//! whole chain.
//!
//! Two balancers can share chains only when they cut and hash prompts in the same way. A message with chains
//! or take-backs therefore has the sender's `fingerprint`; a receiver with another one ignores both. All
//! other parts are independent of prompts, and keep their form over releases.
//!
//! Pure: no clock, no socket, no task. Decoding never panics, and takes memory in proportion to the bytes.

mod chain_requests;
mod encoding;
mod fingerprint;
mod outbox;
mod probe_report;
mod recent_messages;
pub mod served;
mod siblings;
mod totals;
mod wire;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use chain_requests::{ChainRequests, WaitingRequest};
pub use fingerprint::{ChainAdmission, FingerprintFilter, fingerprint};
pub use outbox::{Outbox, OutboxEvent};
pub use probe_report::{EngineFinding, MAX_CARDS_BYTES, ProbeFinding, UpstreamReport};
pub use recent_messages::RecentMessages;
pub use siblings::{SiblingRow, SiblingTable};

/// The version of the encoding.
const VERSION: u8 = 1;

/// The largest message that is decoded, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The load on one upstream by one balancer, or by several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SiblingLoad {
    pub active: u64,
    pub backlog: u64,
    pub context: u64,
}

/// One message of one balancer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message<'a> {
    /// The random id of the balancer's process.
    pub balancer: u64,
    /// Increases with every message of the process.
    pub sequence: u64,
    pub who: Option<BalancerInfo<'a>>,
    pub gauges: Option<GaugeUpdate<'a>>,
    /// How the sender cuts and hashes prompts: see `fingerprint`.
    pub fingerprint: Option<u64>,
    pub chains: Vec<ChainUpdate<'a>>,
    pub take_backs: Vec<TakeBack<'a>>,
    pub bound: Vec<BindingUpdate<'a>>,
    pub chain_requests: Vec<ChainRequest<'a>>,
    /// What the balancer found about upstreams, mostly those that it probes for all.
    pub reports: Vec<UpstreamReport>,
    /// The list of members has changed: upstreams were added, drained or removed.
    pub members: bool,
    /// Hashes of the names of the upstreams that the balancer serves.
    pub served: Vec<u32>,
    /// The balancer is shutting down; this is its last message.
    pub leaving: bool,
}

/// The name and address of a balancer, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalancerInfo<'a> {
    pub name: &'a str,
    pub address: &'a str,
}

/// Gauges by upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GaugeUpdate<'a> {
    /// Whether all other upstreams are idle; otherwise the rows are only the changed ones.
    pub whole: bool,
    pub rows: Vec<(&'a str, SiblingLoad)>,
}

/// An upstream was sent a chain: the blocks up to `parent`, and these behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainUpdate<'a> {
    pub upstream: &'a str,
    pub parent: Option<u64>,
    /// The number of blocks of the prompt up to and including `parent`, also of blocks whose hashes are
    /// neither published nor stored. 0 without a parent, and in messages of the first releases.
    pub depth: u64,
    pub hashes: Cow<'a, [u64]>,
    pub end: Option<u64>,
}

/// Undoes a chain: the request never reached the engine of the upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TakeBack<'a> {
    pub upstream: &'a str,
    /// The block that the hashes follow; the upstream keeps it.
    pub parent: Option<u64>,
    /// The blocks to release.
    pub hashes: Cow<'a, [u64]>,
    pub end: Option<u64>,
}

/// The upstream of a session or of a stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindingUpdate<'a> {
    pub kind: Binding,
    pub key: &'a str,
    pub upstream: &'a str,
    /// For a session, the tokens of its last request there; for a response, the number of the model name
    /// that its client used. Older balancers send 0, which is no name.
    pub number: u64,
}

/// The kind of a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binding {
    Session,
    Response,
}

/// A request to one balancer for the whole chain up to this block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainRequest<'a> {
    pub balancer: u64,
    pub upstream: &'a str,
    pub hash: u64,
}

/// The memory to which messages of siblings are applied, and from which own messages are built. No method
/// waits.
pub trait ExchangeMemory: Send + Sync {
    /// Visits the requests in flight through this balancer, by upstream; idle upstreams may be left out.
    fn gauges(&self, visit: &mut dyn FnMut(&str, SiblingLoad));

    /// Sets the sums of all siblings' requests in flight on the upstreams where they have changed; `age` is
    /// the age of the oldest report among all sums, in seconds.
    fn siblings(&self, changed: &[(Arc<str>, SiblingLoad)], age: f64);

    /// Applies a chain that a sibling sent to an upstream. Returns `false` when no upstream here holds the
    /// block that the chain follows.
    fn learn(&self, chain: &ChainUpdate<'_>) -> bool;

    /// Undoes a chain of a sibling that never reached the engine.
    fn take_back(&self, chain: &TakeBack<'_>);

    /// Returns the whole chain up to a block that the upstream holds.
    fn chain_to(&self, upstream: &str, hash: u64) -> Option<Vec<u64>>;

    /// Applies a binding of a sibling.
    fn bound(&self, bound: &BindingUpdate<'_>);

    /// Sets the balancers that exchange messages: this one, and the siblings; without siblings while Redis is
    /// away.
    fn balancers(&self, _own: u64, _siblings: &[u64]) {}

    /// Removes and returns reports on upstreams for the next message, of about `max_bytes` at most, but at
    /// least one where there are any.
    fn take_reports(&self, _max_bytes: usize) -> Vec<UpstreamReport> {
        Vec::new()
    }

    /// Applies the reports of a sibling, which were published `age` ago.
    fn apply_reports(&self, _from: u64, _reports: &[UpstreamReport], _age: Duration) {}

    /// Applies the list of members: a record for each upstream that was ever changed at run time.
    fn members(&self, all: &HashMap<String, String>);
}

/// Why a message cannot be decoded.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum MessageError {
    #[error("unknown version {0}")]
    Version(u8),
    #[error("longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    #[error("damaged")]
    Broken,
}

// === impl Message ===

impl<'a> Message<'a> {
    /// Creates an empty message of a balancer.
    pub fn new(balancer: u64, sequence: u64) -> Self {
        Message { balancer, sequence, ..Message::default() }
    }

    /// The number of chains and take-backs, which only balancers with the same fingerprint can apply.
    pub fn chain_count(&self) -> usize {
        self.chains.len() + self.take_backs.len()
    }
}

#[cfg(test)]
mod tests;
