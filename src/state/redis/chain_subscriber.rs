//! Receives the chains of siblings: first the tails of the streams, then every new entry.
//!
//! Messages of chains have no order among streams. A message that was published twice, or that is read twice
//! after a failure, is applied once: see `recent_messages`. Of a message that a failure interrupts the rest
//! is applied. A reader that falls behind the trimmed streams misses chains, and requests those that a later
//! message continues.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::PoisonError;
use std::time::Instant;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply::{self, StreamEntry, StreamId};
use super::streams::SharedStream;
use super::subscriber::MIN_READ_INTERVAL;
use super::work_slice::WorkSlice;
use super::{READ_BLOCK_TIME, SiblingExchange, now};
use crate::state::exchange::{
    ChainAdmission, ChainRequest, ChainUpdate, Message, Outbox, OutboxEvent, WaitingRequest,
};

/// The largest number of entries of one stream in one read. A message of chains has up to 64 KiB, and Redis
/// holds the answers to all readers in its memory.
const MAX_READ_ENTRIES: usize = 64;

/// The largest number of entries in one read of a tail.
const TAIL_PAGE_ENTRIES: usize = 64;

/// The largest size of all streams' tails that are read at the start, in bytes. Earlier chains are requested
/// when a later message continues them.
const MAX_TAIL_BYTES: usize = 64 << 20;

/// The positions in the served streams of chains, in their order.
#[derive(Default)]
pub(super) struct ChainSubscriber {
    positions: Vec<ChainPosition>,
}

/// The position in one stream of chains.
struct ChainPosition {
    /// The last entry that was applied; `None` before the first.
    last: Option<StreamId>,
    /// When an entry came last, or the end of the stream was read.
    read_at: Instant,
    /// The message that is being applied. A loss of the connection interrupts that.
    partial: Option<PartialMessage>,
}

/// A message of chains of which a part is applied.
struct PartialMessage {
    balancer: u64,
    sequence: u64,
    /// The number of its chains and take-backs that are applied.
    applied: usize,
}

// === impl ChainPosition ===

impl ChainPosition {
    fn begin() -> Self {
        ChainPosition { last: None, read_at: now(), partial: None }
    }

    /// Whether this message was interrupted.
    fn has_begun(&self, message: &Message<'_>) -> bool {
        let sender = self.partial.as_ref().map(|partial| (partial.balancer, partial.sequence));
        sender == Some((message.balancer, message.sequence))
    }
}

// === impl SiblingExchange ===

impl SiblingExchange {
    /// Reads the chains from before the subscription, as far as the streams still hold them.
    pub(super) async fn catch_up_chains(
        &self,
        subscriber: &mut ChainSubscriber,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let streams = &self.streams.chains;
        subscriber.positions.resize_with(streams.len(), ChainPosition::begin);
        for (chains, position) in streams.iter().zip(&mut subscriber.positions) {
            self.catch_up_stream(&chains.stream, position, link).await?;
        }
        Ok(())
    }

    async fn catch_up_stream(
        &self,
        stream: &SharedStream,
        position: &mut ChainPosition,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let max_bytes = MAX_TAIL_BYTES / self.streams.chains.len();
        let tail = self.tail(&stream.key, position.last, (TAIL_PAGE_ENTRIES, max_bytes), link).await?;
        for page in tail.pages.iter().rev() {
            self.receive_chains(stream, position, reply::entries(page).into_iter().rev()).await;
        }
        match tail.was_replaced {
            true => position.last = Some(StreamId::default()),
            false => drop(position.last.get_or_insert(tail.newest)),
        }
        position.read_at = now();
        Ok(())
    }

    /// Reads new entries until a failure.
    pub(super) async fn subscribe_chains(
        &self,
        subscriber: &mut ChainSubscriber,
        link: &mut RedisLink,
    ) -> Result<Infallible, RedisFailure> {
        loop {
            let mut command = redis::cmd("XREAD");
            command.arg("COUNT").arg(MAX_READ_ENTRIES).arg("BLOCK").arg(READ_BLOCK_TIME.as_millis() as u64);
            command.arg("STREAMS");
            for chains in &self.streams.chains {
                command.arg(&chains.stream.key);
            }
            for position in &subscriber.positions {
                command.arg(position.last.unwrap_or_default().to_string());
            }
            let start = now();
            let answer = link.call(&command, READ_BLOCK_TIME + COMMAND_TIMEOUT).await?;
            let mut is_full = false;
            for (key, entries) in reply::read(&answer) {
                let mut streams = self.streams.chains.iter().zip(&mut subscriber.positions);
                let found = streams.find(|(chains, _)| chains.stream.key == key);
                let Some((chains, position)) = found else { continue };
                is_full |= entries.len() >= MAX_READ_ENTRIES;
                self.receive_chains(&chains.stream, position, entries.into_iter()).await;
            }
            self.check_silent_streams(subscriber, link).await?;
            if !is_full {
                let spent = now().saturating_duration_since(start);
                tokio::time::sleep(MIN_READ_INTERVAL.saturating_sub(spent)).await;
            }
        }
    }

    /// Looks at the ends of the streams without new entries. A stream that was emptied or replaced, and
    /// begins with lower ids again, has no entry behind the last one, while the others go on.
    async fn check_silent_streams(
        &self,
        subscriber: &mut ChainSubscriber,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        for (chains, position) in self.streams.chains.iter().zip(&mut subscriber.positions) {
            if now().saturating_duration_since(position.read_at) >= READ_BLOCK_TIME {
                self.catch_up_stream(&chains.stream, position, link).await?;
            }
        }
        Ok(())
    }

    /// Applies entries, which are in their order. Where the connection is lost meanwhile, the next one reads
    /// the entry again that was being applied, and those behind it.
    async fn receive_chains<'v>(
        &self,
        stream: &SharedStream,
        position: &mut ChainPosition,
        entries: impl Iterator<Item = StreamEntry<'v>>,
    ) {
        let mut slice = WorkSlice::begin();
        for entry in entries {
            stream.count(entry.id, entry.bytes.len());
            match Message::decode(entry.bytes) {
                Ok(message) if message.balancer == self.id => {}
                Ok(message) => {
                    let bytes = entry.bytes.len();
                    self.receive_chain_message(&message, bytes, position, &mut slice).await;
                }
                Err(why) => self.observer.message_unreadable(&why),
            }
            (position.last, position.read_at) = (Some(entry.id), now());
            slice.yield_if_due().await;
        }
    }

    /// Applies a message of chains, or what is left of it.
    async fn receive_chain_message(
        &self,
        message: &Message<'_>,
        bytes: usize,
        position: &mut ChainPosition,
        slice: &mut WorkSlice,
    ) {
        if !position.has_begun(message) {
            if !self.is_first_receipt(message) {
                return;
            }
            self.observer.exchange_received(bytes);
            position.partial = None;
        }
        let Message { balancer, sequence, .. } = *message;
        let partial = position.partial.get_or_insert(PartialMessage { balancer, sequence, applied: 0 });
        self.receive_chains_of(message, &mut partial.applied, slice).await;
        position.partial = None;
    }

    /// Whether the message of chains comes for the first time.
    fn is_first_receipt(&self, message: &Message<'_>) -> bool {
        let mut known = self.chain_messages.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(message.balancer, message.sequence)
    }

    /// Applies the chains and take-backs of a message with the own fingerprint, except for the first
    /// `applied` of them, which grows with each.
    pub(super) async fn receive_chains_of(
        &self,
        message: &Message<'_>,
        applied: &mut usize,
        slice: &mut WorkSlice,
    ) {
        let admission = self.fingerprints.lock().unwrap_or_else(PoisonError::into_inner).check(message);
        if let ChainAdmission::Foreign { first } = admission {
            let sibling = first.then(|| self.siblings().name(message.balancer));
            self.observer.chains_foreign(message.chain_count(), sibling.as_deref());
            return;
        }
        for chain in message.chains.iter().skip(*applied) {
            match self.memory.learn(chain) {
                true => self.chain_requests().see_chain(chain),
                false => self.miss_chain(message.balancer, chain),
            }
            *applied += 1;
            slice.yield_if_due().await;
        }
        for chain in message.take_backs.iter().skip(applied.saturating_sub(message.chains.len())) {
            self.memory.take_back(chain);
            *applied += 1;
            slice.yield_if_due().await;
        }
    }

    /// Notes a tail whose beginning is unknown, for a request to its sender if that still exists.
    fn miss_chain(&self, balancer: u64, chain: &ChainUpdate<'_>) {
        self.observer.chain_unplaced();
        if self.siblings().contains(balancer) {
            let draw = RandomState::new().hash_one(balancer);
            self.chain_requests().miss(balancer, chain, now(), draw);
        }
    }

    /// Adds the requests for whole chains whose time has come to the urgent events.
    pub(super) fn put_chain_requests(&self) {
        for WaitingRequest { balancer, upstream, hash, .. } in self.chain_requests().take_due(now()) {
            self.urgent_events.put(OutboxEvent::Ask { balancer, upstream, hash });
        }
    }

    /// Notes a sibling's request for a whole chain, and answers a request to this balancer.
    pub(super) fn receive_chain_request(&self, request: &ChainRequest<'_>) {
        let ChainRequest { balancer, upstream, hash } = *request;
        let now = now();
        let is_answered = {
            let mut requests = self.chain_requests();
            requests.see_request(request, now);
            balancer != self.id || requests.has_answered(upstream, hash, now)
        };
        // Only an answer counts: the next request for a chain without one is not a repeated one.
        if !is_answered
            && let Some((waiting, answer)) = self.chain_answer(upstream, hash)
            && self.chain_requests().begin_answer(upstream, hash, now)
        {
            waiting.put(answer);
        }
    }

    /// Returns the event of a whole chain that a sibling has requested, and where it is to wait; `None` when
    /// the chain is unknown, or chains of requests need the room. The sibling will repeat its request.
    fn chain_answer(&self, upstream: &str, hash: u64) -> Option<(&Outbox, OutboxEvent)> {
        let chain = self.memory.chain_to(upstream, hash)?;
        let waiting = &self.streams.of_opening(*chain.first()?).waiting;
        waiting.has_room().then(|| (waiting, OutboxEvent::chain(upstream, None, 0, &chain, None)))
    }
}
