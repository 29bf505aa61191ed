//! What balancers on one Redis tell each other, and how it is written down.
//!
//! A message is one entry of the stream:
//!
//! ```text
//! version (1 byte)  balancer (8 bytes)  sequence  { kind  length  bytes }*
//! ```
//!
//! Every part says how long it is, so that one which a newer balancer knows, and this one does not, is
//! passed over; a message of another version is passed over as a whole. Upstreams are called by their
//! names, which stand once in a part of their own: numbers of slots mean nothing to another process.
//!
//! Gauges are absolute, never increments: whoever misses a message is right again with the next. Of a chain
//! only the tail that is new is said, with the block that it goes on from. Who does not know that block asks,
//! and gets the chain whole.
//!
//! Pure: no clock, no socket, no task. Reading never panics, and takes memory in proportion to the bytes.

mod outbox;
mod siblings;
mod wire;

use std::borrow::Cow;
use std::collections::HashMap;

use thiserror::Error;

pub use outbox::{Event, Outbox};
pub use siblings::{Row, Siblings};

use wire::{Reader, put_bytes, put_hash, put_number};

/// Of everything that comes before the parts.
const VERSION: u8 = 1;

/// What nobody would send: not read at all.
pub const LARGEST: usize = 4 << 20;

mod kind {
    pub const WHO: u64 = 1;
    pub const NAMES: u64 = 2;
    pub const GAUGES: u64 = 3;
    pub const LEARNT: u64 = 4;
    pub const BOUND: u64 = 5;
    pub const ASKS: u64 = 6;
    pub const MEMBERS: u64 = 7;
    pub const LEAVING: u64 = 8;
}

/// In flight on one upstream, by one balancer or by several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    pub active: u64,
    pub backlog: u64,
    pub context: u64,
}

/// All that one balancer says at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message<'a> {
    /// Random, of one process.
    pub balancer: u64,
    /// Rises with every message of the process.
    pub sequence: u64,
    pub who: Option<Who<'a>>,
    pub gauges: Option<Told<'a>>,
    pub learnt: Vec<Learnt<'a>>,
    pub bound: Vec<Bound<'a>>,
    pub asks: Vec<Ask<'a>>,
    /// Upstreams were added, drained or removed: look at the list.
    pub members: bool,
    /// This was its last word.
    pub leaving: bool,
}

/// A balancer, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who<'a> {
    pub name: &'a str,
    pub address: &'a str,
}

/// Gauges by upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Told<'a> {
    /// All there are, and the rest is idle; else those that changed.
    pub whole: bool,
    pub rows: Vec<(&'a str, Gauges)>,
}

/// An upstream was sent a chain: all up to `parent`, which the reader may know, and these behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learnt<'a> {
    pub upstream: &'a str,
    pub parent: Option<u64>,
    pub hashes: Cow<'a, [u64]>,
    pub end: Option<u64>,
}

/// A session, or a stored response, is at this upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound<'a> {
    pub kind: Binding,
    pub key: &'a str,
    pub upstream: &'a str,
    /// Of a session, the tokens of its last request there; of a response, the number of the name that its
    /// client gave the model, where older balancers say 0, which is no name.
    pub number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Binding {
    Session,
    Response,
}

/// To one balancer: say the chain up to this block whole, which was not to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask<'a> {
    pub balancer: u64,
    pub upstream: &'a str,
    pub hash: u64,
}

/// Where the words of siblings go, and where one's own come from. All of it is memory: nothing waits.
pub trait Memory: Send + Sync {
    /// What is in flight through this balancer now, by upstream; who is idle may be left out.
    fn gauges(&self, tell: &mut dyn FnMut(&str, Gauges));

    /// What is in flight through all siblings together, in place of what was told before; `age` is how old
    /// the oldest word in it is, in seconds.
    fn siblings(&self, sums: &HashMap<&str, Gauges>, age: f64);

    /// A sibling sent an upstream a chain. `false` when nobody here holds what it goes on from.
    fn learn(&self, upstream: &str, parent: Option<u64>, hashes: &[u64], end: Option<u64>) -> bool;

    /// The whole chain up to a block that the upstream holds.
    fn chain_to(&self, upstream: &str, hash: u64) -> Option<Vec<u64>>;

    /// A sibling bound a session or a response.
    fn bound(&self, bound: &Bound<'_>);

    /// The list of members, as it is now: a text for each upstream that was ever changed at run time.
    fn members(&self, all: &HashMap<String, String>);
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Unreadable {
    #[error("its version is {0}")]
    Version(u8),
    #[error("it is longer than anybody writes")]
    TooLong,
    #[error("it is broken")]
    Broken,
}

// === impl Message: writing ===

/// The names of a message by number.
#[derive(Default)]
struct Names<'a> {
    all: Vec<&'a str>,
    numbers: HashMap<&'a str, u64>,
}

impl<'a> Names<'a> {
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
    /// Nothing to say but who says it.
    pub fn new(balancer: u64, sequence: u64) -> Self {
        Message { balancer, sequence, ..Message::default() }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut names = Names::default();
        let mut parts = Vec::new();
        if let Some(who) = self.who {
            let mut part = Vec::new();
            put_bytes(&mut part, who.name.as_bytes());
            put_bytes(&mut part, who.address.as_bytes());
            put_part(&mut parts, kind::WHO, &part);
        }
        self.put_gauges(&mut parts, &mut names);
        self.put_learnt(&mut parts, &mut names);
        self.put_bound(&mut parts, &mut names);
        self.put_asks(&mut parts, &mut names);
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

    fn put_gauges(&self, out: &mut Vec<u8>, names: &mut Names<'a>) {
        let Some(told) = &self.gauges else { return };
        let mut part = vec![u8::from(told.whole)];
        for (name, gauges) in &told.rows {
            for number in [names.number(name), gauges.active, gauges.backlog, gauges.context] {
                put_number(&mut part, number);
            }
        }
        put_part(out, kind::GAUGES, &part);
    }

    fn put_learnt(&self, out: &mut Vec<u8>, names: &mut Names<'a>) {
        let mut part = Vec::new();
        for learnt in &self.learnt {
            put_number(&mut part, names.number(learnt.upstream));
            part.push(u8::from(learnt.parent.is_some()) | u8::from(learnt.end.is_some()) << 1);
            learnt.parent.iter().chain(&learnt.end).for_each(|hash| put_hash(&mut part, *hash));
            put_number(&mut part, learnt.hashes.len() as u64);
            learnt.hashes.iter().for_each(|hash| put_hash(&mut part, *hash));
        }
        if !part.is_empty() {
            put_part(out, kind::LEARNT, &part);
        }
    }

    fn put_bound(&self, out: &mut Vec<u8>, names: &mut Names<'a>) {
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

    fn put_asks(&self, out: &mut Vec<u8>, names: &mut Names<'a>) {
        let mut part = Vec::new();
        for ask in &self.asks {
            put_hash(&mut part, ask.balancer);
            put_number(&mut part, names.number(ask.upstream));
            put_hash(&mut part, ask.hash);
        }
        if !part.is_empty() {
            put_part(out, kind::ASKS, &part);
        }
    }
}

// === impl Message: reading ===

impl<'a> Message<'a> {
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Unreadable> {
        if bytes.len() > LARGEST {
            return Err(Unreadable::TooLong);
        }
        let mut reader = Reader::new(bytes);
        match reader.byte() {
            Some(VERSION) => Self::read(&mut reader).ok_or(Unreadable::Broken),
            Some(other) => Err(Unreadable::Version(other)),
            None => Err(Unreadable::Broken),
        }
    }

    fn read(reader: &mut Reader<'a>) -> Option<Self> {
        let mut message = Message::new(reader.hash()?, reader.number()?);
        let mut names: Vec<&str> = Vec::new();
        while !reader.is_empty() {
            let (kind, mut part) = (reader.number()?, Reader::new(reader.bytes()?));
            let part = &mut part;
            match kind {
                kind::WHO => message.who = Some(Who { name: part.text()?, address: part.text()? }),
                kind::GAUGES => message.gauges = Some(Told { whole: part.byte()? != 0, rows: Vec::new() }),
                kind::MEMBERS => message.members = true,
                kind::LEAVING => message.leaving = true,
                _ => {}
            }
            while !part.is_empty() {
                match kind {
                    kind::NAMES => names.push(part.text()?),
                    kind::GAUGES => message.gauges.as_mut()?.rows.push(row(part, &names)?),
                    kind::LEARNT => message.learnt.push(learnt(part, &names)?),
                    kind::BOUND => message.bound.extend(bound(part, &names)?),
                    kind::ASKS => message.asks.push(ask(part, &names)?),
                    // Of a newer balancer, or what it has put behind what is known.
                    _ => break,
                }
            }
        }
        Some(message)
    }
}

fn name<'a>(part: &mut Reader<'a>, names: &[&'a str]) -> Option<&'a str> {
    names.get(usize::try_from(part.number()?).ok()?).copied()
}

fn row<'a>(part: &mut Reader<'a>, names: &[&'a str]) -> Option<(&'a str, Gauges)> {
    let name = name(part, names)?;
    Some((name, Gauges { active: part.number()?, backlog: part.number()?, context: part.number()? }))
}

fn learnt<'a>(part: &mut Reader<'a>, names: &[&'a str]) -> Option<Learnt<'a>> {
    let (upstream, marks) = (name(part, names)?, part.byte()?);
    let parent = if marks & 1 != 0 { Some(part.hash()?) } else { None };
    let end = if marks & 2 != 0 { Some(part.hash()?) } else { None };
    Some(Learnt { upstream, parent, hashes: Cow::Owned(part.hashes()?), end })
}

/// Inside there is nothing for a kind of binding that is not known.
fn bound<'a>(part: &mut Reader<'a>, names: &[&'a str]) -> Option<Option<Bound<'a>>> {
    let (kind, key, upstream, number) = (part.byte()?, part.text()?, name(part, names)?, part.number()?);
    Some(Binding::numbered(kind).map(|kind| Bound { kind, key, upstream, number }))
}

fn ask<'a>(part: &mut Reader<'a>, names: &[&'a str]) -> Option<Ask<'a>> {
    Some(Ask { balancer: part.hash()?, upstream: name(part, names)?, hash: part.hash()? })
}

impl Binding {
    fn number(self) -> u8 {
        match self {
            Binding::Session => 1,
            Binding::Response => 2,
        }
    }

    fn numbered(number: u8) -> Option<Self> {
        [Binding::Session, Binding::Response].into_iter().find(|kind| kind.number() == number)
    }
}

#[cfg(test)]
mod tests;
