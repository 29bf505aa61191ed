//! The encoding of messages.
//!
//! The first releases know the parts 1 to 8 and skip all others. Parts that they must read in a fleet of two
//! releases (1, 2, 3, 5 to 8) keep their form for ever; new data has a new kind.

use std::borrow::Cow;
use std::collections::HashMap;

use super::served;
use super::wire::{WireReader, put_bytes, put_hash, put_number};
use super::{
    BalancerInfo, Binding, BindingUpdate, ChainRequest, ChainUpdate, GaugeUpdate, MAX_MESSAGE_BYTES, Message,
    MessageError, SiblingLoad, TakeBack, UpstreamReport, VERSION,
};

/// The kinds of parts on the wire.
mod kind {
    /// The name and the address of the sender.
    pub(super) const BALANCER: u64 = 1;
    /// The names of upstreams that the other parts number.
    pub(super) const NAMES: u64 = 2;
    /// The load in flight by upstream.
    pub(super) const GAUGES: u64 = 3;
    /// Chains of the first releases, without a depth; read only.
    pub(super) const FIRST_CHAINS: u64 = 4;
    /// The upstreams of sessions and stored responses.
    pub(super) const BOUND: u64 = 5;
    /// Requests for whole chains.
    pub(super) const CHAIN_REQUESTS: u64 = 6;
    /// The list of members has changed.
    pub(super) const MEMBERS: u64 = 7;
    /// The balancer shuts down.
    pub(super) const LEAVING: u64 = 8;
    /// The way in which the sender makes chains.
    pub(super) const FINGERPRINT: u64 = 9;
    /// What the sender found about upstreams.
    pub(super) const REPORTS: u64 = 10;
    /// Chains that never reached an engine.
    pub(super) const TAKE_BACKS: u64 = 11;
    /// The prompts that upstreams were sent.
    pub(super) const CHAINS: u64 = 12;
    /// The upstreams that the sender serves.
    pub(super) const SERVED: u64 = 13;
}

// === writing ===

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

/// Appends the number of hashes of a chain, with the marks of its optional hashes in the two lowest bits, and
/// the optional hashes.
fn put_chain_head(out: &mut Vec<u8>, hashes: &[u64], parent: Option<u64>, end: Option<u64>) {
    let marks = u64::from(parent.is_some()) | u64::from(end.is_some()) << 1;
    put_number(out, (hashes.len() as u64) << 2 | marks);
    parent.iter().chain(&end).for_each(|hash| put_hash(out, *hash));
}

/// Appends a part with its kind and its length.
pub(super) fn put_part(out: &mut Vec<u8>, kind: u64, part: &[u8]) {
    put_number(out, kind);
    put_bytes(out, part);
}

impl<'a> Message<'a> {
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
        if let Some(fingerprint) = self.fingerprint {
            put_part(&mut parts, kind::FINGERPRINT, &fingerprint.to_le_bytes());
        }
        self.put_chains(&mut parts, &mut names);
        self.put_take_backs(&mut parts, &mut names);
        self.put_bound(&mut parts, &mut names);
        self.put_chain_requests(&mut parts, &mut names);
        if !self.reports.is_empty() {
            let mut part = Vec::new();
            self.reports.iter().for_each(|report| report.write(&mut part));
            put_part(&mut parts, kind::REPORTS, &part);
        }
        if self.members {
            put_part(&mut parts, kind::MEMBERS, &[]);
        }
        if !self.served.is_empty() {
            put_part(&mut parts, kind::SERVED, &served::encode(&self.served));
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

    fn put_chains(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let mut part = Vec::new();
        for chain in &self.chains {
            put_number(&mut part, names.number(chain.upstream));
            put_chain_head(&mut part, &chain.hashes, chain.parent, chain.end);
            put_number(&mut part, chain.depth);
            chain.hashes.iter().for_each(|hash| put_hash(&mut part, *hash));
        }
        if !part.is_empty() {
            put_part(out, kind::CHAINS, &part);
        }
    }

    fn put_take_backs(&self, out: &mut Vec<u8>, names: &mut MessageNames<'a>) {
        let mut part = Vec::new();
        for chain in &self.take_backs {
            put_number(&mut part, names.number(chain.upstream));
            put_chain_head(&mut part, &chain.hashes, chain.parent, chain.end);
            chain.hashes.iter().for_each(|hash| put_hash(&mut part, *hash));
        }
        if !part.is_empty() {
            put_part(out, kind::TAKE_BACKS, &part);
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

// === reading ===

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
                kind::FINGERPRINT => message.fingerprint = Some(part.hash()?),
                kind::REPORTS => message.reports.extend(UpstreamReport::read_all(part)?),
                kind::MEMBERS => message.members = true,
                kind::LEAVING => message.leaving = true,
                _ => {}
            }
            while !part.is_empty() {
                match kind {
                    kind::NAMES => names.push(part.text()?),
                    kind::GAUGES => message.gauges.as_mut()?.rows.push(row(part, &names)?),
                    kind::FIRST_CHAINS => message.chains.push(first_chain(part, &names)?),
                    kind::CHAINS => message.chains.push(chain(part, &names)?),
                    kind::TAKE_BACKS => message.take_backs.push(take_back(part, &names)?),
                    kind::BOUND => message.bound.extend(bound(part, &names)?),
                    kind::SERVED => message.served.push(served::read(part)?),
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

/// Reads the optional parent and end of a chain.
fn ends(part: &mut WireReader<'_>, marks: u64) -> Option<(Option<u64>, Option<u64>)> {
    let parent = if marks & 1 != 0 { Some(part.hash()?) } else { None };
    let end = if marks & 2 != 0 { Some(part.hash()?) } else { None };
    Some((parent, end))
}

/// Reads what `put_chain_head` wrote: the number of hashes, the parent and the end.
fn chain_head(part: &mut WireReader<'_>) -> Option<(u64, Option<u64>, Option<u64>)> {
    let head = part.number()?;
    let (parent, end) = ends(part, head)?;
    Some((head >> 2, parent, end))
}

/// Reads a chain of the first releases.
fn first_chain<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<ChainUpdate<'a>> {
    let (upstream, marks) = (name(part, names)?, part.byte()?);
    let (parent, end) = ends(part, u64::from(marks))?;
    Some(ChainUpdate { upstream, parent, depth: 0, hashes: Cow::Owned(part.hashes()?), end })
}

fn chain<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<ChainUpdate<'a>> {
    let (upstream, (count, parent, end)) = (name(part, names)?, chain_head(part)?);
    let (depth, hashes) = (part.number()?, Cow::Owned(part.hash_list(count)?));
    Some(ChainUpdate { upstream, parent, depth, hashes, end })
}

fn take_back<'a>(part: &mut WireReader<'a>, names: &[&'a str]) -> Option<TakeBack<'a>> {
    let (upstream, (count, parent, end)) = (name(part, names)?, chain_head(part)?);
    Some(TakeBack { upstream, parent, hashes: Cow::Owned(part.hash_list(count)?), end })
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
