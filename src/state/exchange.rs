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
//! Pure: no clock, no socket, no task. Decoding never panics, and takes memory in proportion to the bytes.

mod outbox;
mod siblings;
mod wire;

use std::borrow::Cow;
use std::collections::HashMap;

use thiserror::Error;

pub use outbox::{Outbox, OutboxEvent};
pub use siblings::{SiblingRow, SiblingTable};

use wire::{WireReader, put_bytes, put_hash, put_number};

/// The version of the encoding.
const VERSION: u8 = 1;

/// The largest message that is decoded, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The kinds of parts on the wire.
mod kind {
    /// The kinds of the parts of a message.
    pub const BALANCER: u64 = 1;
    pub const NAMES: u64 = 2;
    pub const GAUGES: u64 = 3;
    pub const CHAINS: u64 = 4;
    pub const BOUND: u64 = 5;
    pub const CHAIN_REQUESTS: u64 = 6;
    pub const MEMBERS: u64 = 7;
    pub const LEAVING: u64 = 8;
}

/// The load on one upstream by one balancer, or by several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SiblingLoad {
    pub active: u64,
    pub backlog: u64,
    pub context: u64,
}

/// One message of one balancer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// The random id of the balancer's process.
    pub balancer: u64,
    /// Increases with every message of the process.
    pub sequence: u64,
    pub who: Option<BalancerInfo<'a>>,
    pub gauges: Option<GaugeUpdate<'a>>,
    pub chains: Vec<ChainUpdate<'a>>,
    pub bound: Vec<BindingUpdate<'a>>,
    pub chain_requests: Vec<ChainRequest<'a>>,
    /// The list of members has changed: upstreams were added, drained or removed.
    pub members: bool,
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

    /// Sets the sums of all siblings' requests in flight; `age` is the age of the oldest report among them,
    /// in seconds.
    fn siblings(&self, sums: &HashMap<&str, SiblingLoad>, age: f64);

    /// Applies a chain that a sibling sent to an upstream. Returns `false` when no upstream here holds the
    /// block that the chain follows.
    fn learn(&self, upstream: &str, parent: Option<u64>, hashes: &[u64], end: Option<u64>) -> bool;

    /// Returns the whole chain up to a block that the upstream holds.
    fn chain_to(&self, upstream: &str, hash: u64) -> Option<Vec<u64>>;

    /// Applies a binding of a sibling.
    fn bound(&self, bound: &BindingUpdate<'_>);

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

// === impl Message: writing ===

/// Numbers the upstream names of a message.
#[derive(Default)]
struct MessageNames<'a> {
    all: Vec<&'a str>,
    numbers: HashMap<&'a str, u64>,
}

impl<'a> MessageNames<'a> {
    fn number(&mut self, name: &'a str) -> u64 {
        *self.numbers.entry(name).or_insert_with(|| {
            self.all.push(name);
            self.all.len() as u64 - 1
        })
    }
}

fn put_part(out: &mut Vec<u8>, kind: u64, part: &[u8]) {
    put_number(out, kind);
    put_bytes(out, part);
}

impl<'a> Message<'a> {
    /// Creates an empty message of a balancer.
    pub fn new(balancer: u64, sequence: u64) -> Self {
        Message { balancer, sequence, ..Message::default() }
    }

    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        let mut names = MessageNames::default();
        let mut parts = Vec::new();
        if let Some(who) = self.who {
            let mut part = Vec::new();
            put_bytes(&mut part, who.name.as_bytes());
            put_bytes(&mut part, who.address.as_bytes());
            put_part(&mut parts, kind::BALANCER, &part);
        }
        self.put_gauges(&mut parts, &mut names);
        self.put_learnt(&mut parts, &mut names);
        self.put_bound(&mut parts, &mut names);
        self.put_chain_requests(&mut parts, &mut names);
        if self.members {
            put_part(&mut parts, kind::MEMBERS, &[]);
        }
        if self.leaving {
            put_part(&mut parts, kind::LEAVING, &[]);
        }
        let mut out = vec![VERSION];
        put_hash(&mut out, self.balancer);
        put_number(&mut out, self.sequence);
        if !names.all.is_empty() {
            let mut part = Vec::new();
            names.all.iter().for_each(|name| put_bytes(&mut part, name.as_bytes()));
            put_part(&mut out, kind::NAMES, &part);
        }
        out.append(&mut parts);
        out
    }

    fn put_gauges(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let Some(update) = &self.gauges else { return };
        let mut part = vec![u8::from(update.whole)];
        for (name, gauges) in &update.rows {
            for number in [names.number(name), gauges.active, gauges.backlog, gauges.context] {
                put_number(&mut part, number);
            }
        }
        put_part(out, kind::GAUGES, &part);
    }

    fn put_learnt(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let mut part = Vec::new();
        for chains in &self.chains {
            put_number(&mut part, names.number(chains.upstream));
            part.push(u8::from(chains.parent.is_some()) | u8::from(chains.end.is_some()) << 1);
            chains.parent.iter().chain(&chains.end).for_each(|hash| put_hash(&mut part, *hash));
            put_number(&mut part, chains.hashes.len() as u64);
            chains.hashes.iter().for_each(|hash| put_hash(&mut part, *hash));
        }
        if !part.is_empty() {
            put_part(out, kind::CHAINS, &part);
        }
    }

    fn put_bound(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let mut part = Vec::new();
        for bound in &self.bound {
            part.push(bound.kind.number());
            put_bytes(&mut part, bound.key.as_bytes());
            put_number(&mut part, names.number(bound.upstream));
            put_number(&mut part, bound.number);
        }
        if !part.is_empty() {
            put_part(out, kind::BOUND, &part);
        }
    }

    fn put_chain_requests(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let mut part = Vec::new();
        for request in &self.chain_requests {
            put_hash(&mut part, request.balancer);
            put_number(&mut part, names.number(request.upstream));
            put_hash(&mut part, request.hash);
        }
        if !part.is_empty() {
            put_part(out, kind::CHAIN_REQUESTS, &part);
        }
    }
}

// === impl Message: reading ===

impl<'a> Message<'a> {
    /// Decodes a message.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(MessageError::TooLong);
        }
        let mut reader = WireReader::new(bytes);
        match reader.byte() {
            Some(VERSION) => Self::read(&mut reader).ok_or(MessageError::Broken),
            Some(other) => Err(MessageError::Version(other)),
            None => Err(MessageError::Broken),
        }
    }

    fn read(reader: &mut WireReader<'a>) -> Option<Self> {
        let mut message = Message::new(reader.hash()?, reader.number()?);
        let mut names: Vec<&str> = Vec::new();
        while !reader.is_empty() {
            let (kind, mut part) = (reader.number()?, WireReader::new(reader.bytes()?));
            let part = &mut part;
            match kind {
                kind::BALANCER => {
                    message.who = Some(BalancerInfo { name: part.text()?, address: part.text()? })
                }
                kind::GAUGES => {
                    message.gauges = Some(GaugeUpdate { whole: part.byte()? != 0, rows: Vec::new() })
                }
                kind::MEMBERS => message.members = true,
                kind::LEAVING => message.leaving = true,
                _ => {}
            }
            while !part.is_empty() {
                match kind {
                    kind::NAMES => names.push(part.text()?),
                    kind::GAUGES => message.gauges.as_mut()?.rows.push(row(part, &names)?),
                    kind::CHAINS => message.chains.push(chains(part, &names)?),
                    kind::BOUND => message.bound.extend(bound(part, &names)?),
                    kind::CHAIN_REQUESTS => message.chain_requests.push(chain_request(part, &names)?),
                    // A part of a newer version, or further fields behind the known ones.
                    _ => break,
                }
            }
        }
        Some(message)
    }
}

fn name<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<&'a str> {
    names.get(usize::try_from(part.number()?).ok()?).copied()
}

fn row<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<(&'a str, SiblingLoad)> {
    let name = name(part, names)?;
    Some((name, SiblingLoad { active: part.number()?, backlog: part.number()?, context: part.number()? }))
}

fn chains<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<ChainUpdate<'a>> {
    let (upstream, marks) = (name(part, names)?, part.byte()?);
    let parent = if marks & 1 != 0 { Some(part.hash()?) } else { None };
    let end = if marks & 2 != 0 { Some(part.hash()?) } else { None };
    Some(ChainUpdate { upstream, parent, hashes: Cow::Owned(part.hashes()?), end })
}

/// Reads a binding; the inner `None` is an unknown kind of binding, which is skipped.
fn bound<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<Option<BindingUpdate<'a>>> {
    let (kind, key, upstream, number) = (part.byte()?, part.text()?, name(part, names)?, part.number()?);
    Some(Binding::from_number(kind).map(|kind| BindingUpdate { kind, key, upstream, number }))
}

fn chain_request<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<ChainRequest<'a>> {
    Some(ChainRequest { balancer: part.hash()?, upstream: name(part, names)?, hash: part.hash()? })
}

impl Binding {
    fn number(self) -> u8 {
        match self {
            Binding::Session => 1,
            Binding::Response => 2,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Binding::Session, Binding::Response].into_iter().find(|kind| kind.number() == number)
    }
}

#[cfg(test)]
mod tests;
