//! Receives the messages of siblings: first the tail of the stream, then every new entry.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Value;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply::{self, StreamEntry, StreamId};
use super::{READ_BLOCK_TIME, SiblingExchange, now};
use crate::state::exchange::{ChainAdmission, Message, OutboxEvent};

/// The number of entries in one read of the stream's tail.
const TAIL_PAGE_ENTRIES: usize = 500;

/// The largest size of the stream's tail that is read at the start, in bytes. Earlier chains are requested
/// when a later message continues them.
const MAX_TAIL_BYTES: usize = 64 << 20;

/// The largest number of entries in one read.
const MAX_READ_ENTRIES: usize = 100;

/// The number of messages that are handled before the task yields.
const MESSAGES_PER_TURN: usize = 32;

/// The least interval between two reads, so that many siblings' messages are handled together.
const MIN_READ_INTERVAL: Duration = Duration::from_millis(4);

/// The largest number of recent chain requests, kept so that none is repeated too soon.
const MAX_CHAIN_REQUESTS: usize = 1024;

/// The position in the stream.
#[derive(Default)]
pub struct Subscriber {
    last: Option<StreamId>,
    /// The clock of Redis in milliseconds, and when it was read.
    clock: Option<(u64, Instant)>,
    /// The chains that were requested recently.
    requested: HashSet<u64>,
    requested_at: Option<Instant>,
}

impl Subscriber {
    /// Returns when an entry was published; for entries from before the start, by the clock of Redis.
    fn published_at(&self, id: StreamId, now: Instant) -> Instant {
        let Some((clock, read_at)) = self.clock else { return now };
        match clock.checked_sub(id.millis) {
            Some(age) if age > 0 => read_at.checked_sub(Duration::from_millis(age)).unwrap_or(read_at),
            _ => now,
        }
    }

    /// Whether to request a chain: the same one only once in `READ_BLOCK_TIME`.
    fn may_request(&mut self, hash: u64, now: Instant) -> bool {
        if self.requested_at.is_none_or(|at| now.saturating_duration_since(at) > READ_BLOCK_TIME) {
            self.requested.clear();
            self.requested_at = Some(now);
        }
        self.requested.len() < MAX_CHAIN_REQUESTS && self.requested.insert(hash)
    }
}

impl SiblingExchange {
    /// Reads the messages from before the subscription, as far as the stream still holds them.
    pub(super) async fn catch_up(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let time = link.call(&redis::cmd("TIME"), COMMAND_TIMEOUT).await?;
        subscriber.clock = reply::time(&time).map(|millis| (millis, now()));
        let newest = self.page(link, None, 1).await?;
        let newest = reply::entries(&newest).first().map(|entry| entry.id);
        match (subscriber.last, newest) {
            // The stream was emptied or replaced: all entries are new.
            (Some(last), newest) if newest.is_none_or(|newest| newest < last) => {
                subscriber.last = Some(StreamId::default());
            }
            (Some(_), _) => {}
            (None, newest) => {
                self.read_tail(subscriber, link, newest).await?;
                // Set after success, so that an interrupted tail is read again.
                subscriber.last = Some(newest.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Applies the tail of the stream from old to new, up to `MAX_TAIL_BYTES`.
    async fn read_tail(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
        newest: Option<StreamId>,
    ) -> Result<(), RedisFailure> {
        let (mut pages, mut bytes, mut until) = (Vec::new(), 0, newest);
        while let Some(id) = until.filter(|_| bytes < MAX_TAIL_BYTES) {
            let page = self.page(link, Some(id), TAIL_PAGE_ENTRIES).await?;
            let entries = reply::entries(&page);
            bytes += entries.iter().map(|entry| entry.bytes.len()).sum::<usize>();
            until = entries
                .last()
                .and_then(|oldest| oldest.id.before())
                .filter(|_| entries.len() == TAIL_PAGE_ENTRIES);
            pages.push(page);
        }
        for page in pages.iter().rev() {
            let entries = reply::entries(page);
            self.receive_all(subscriber, entries.into_iter().rev()).await;
        }
        self.apply_sibling_loads();
        Ok(())
    }

    async fn page(
        &self,
        link: &mut RedisLink,
        until: Option<StreamId>,
        count: usize,
    ) -> Result<Value, RedisFailure> {
        let until = until.map_or_else(|| "+".to_string(), |id| id.to_string());
        let mut command = redis::cmd("XREVRANGE");
        command.arg(&self.keys.stream).arg(until).arg("-").arg("COUNT").arg(count);
        link.call(&command, COMMAND_TIMEOUT).await
    }

    /// Reads new entries until a failure.
    pub(super) async fn subscribe(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<std::convert::Infallible, RedisFailure> {
        loop {
            let start = now();
            let last = subscriber.last.unwrap_or_default().to_string();
            let mut command = redis::cmd("XREAD");
            command.arg("COUNT").arg(MAX_READ_ENTRIES).arg("BLOCK").arg(READ_BLOCK_TIME.as_millis() as u64);
            command.arg("STREAMS").arg(&self.keys.stream).arg(last);
            let answer = link.call(&command, READ_BLOCK_TIME + COMMAND_TIMEOUT).await?;
            let entries = reply::read(&answer);
            if let Some(last) = entries.last() {
                let last = last.id;
                self.receive_all(subscriber, entries.into_iter()).await;
                subscriber.last = Some(last);
                self.apply_sibling_loads();
            }
            tokio::time::sleep(MIN_READ_INTERVAL.saturating_sub(now().saturating_duration_since(start)))
                .await;
        }
    }

    async fn receive_all<'v>(
        &self,
        subscriber: &mut Subscriber,
        entries: impl Iterator<Item = StreamEntry<'v>>,
    ) {
        for (number, entry) in entries.enumerate() {
            if number % MESSAGES_PER_TURN == MESSAGES_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
            match Message::decode(entry.bytes) {
                Ok(message) => self.receive(subscriber, &message, entry.id, entry.bytes.len()),
                Err(why) => self.observer.message_unreadable(&why),
            }
        }
    }

    fn receive(&self, subscriber: &mut Subscriber, message: &Message<'_>, id: StreamId, bytes: usize) {
        let now = now();
        let published_at = subscriber.published_at(id, now);
        if !self.siblings().receive(message, published_at, now) {
            return;
        }
        self.observer.exchange_received(bytes);
        self.served().receive(message.balancer, &message.served);
        self.receive_chains(subscriber, message, now);
        for bound in &message.bound {
            self.memory.bound(bound);
        }
        if !message.reports.is_empty() {
            let age = now.saturating_duration_since(published_at);
            self.memory.apply_reports(message.balancer, &message.reports, age);
        }
        if message.members {
            self.members_dirty.store(true, Relaxed);
        }
        for request in message.chain_requests.iter().filter(|request| request.balancer == self.id) {
            self.publish_chain(request.upstream, request.hash);
        }
    }

    /// Applies the chains and take-backs of a message with the own fingerprint.
    fn receive_chains(&self, subscriber: &mut Subscriber, message: &Message<'_>, now: Instant) {
        let admission = self.fingerprints.lock().unwrap_or_else(PoisonError::into_inner).check(message);
        if let ChainAdmission::Foreign { first } = admission {
            let sibling = first.then(|| self.siblings().name(message.balancer));
            self.observer.chains_foreign(message.chain_count(), sibling.as_deref());
            return;
        }
        for chain in &message.chains {
            let placed = self.memory.learn(chain);
            let hash = chain.hashes.last().copied().or(chain.parent);
            if let Some(hash) = hash.filter(|_| !placed) {
                self.request_chain(subscriber, message.balancer, chain.upstream, hash, now);
            }
        }
        message.take_backs.iter().for_each(|chain| self.memory.take_back(chain));
    }

    /// Requests the whole chain of a tail whose beginning is unknown, if its sender still exists.
    fn request_chain(
        &self,
        subscriber: &mut Subscriber,
        balancer: u64,
        upstream: &str,
        hash: u64,
        now: Instant,
    ) {
        self.observer.chain_unplaced();
        if self.siblings().contains(balancer) && subscriber.may_request(hash, now) {
            self.outbox.put(OutboxEvent::Ask { balancer, upstream: upstream.into(), hash });
        }
    }

    fn publish_chain(&self, upstream: &str, hash: u64) {
        // The outbox keeps room for the events of requests; the sibling will repeat its request.
        if let Some(chain) = self.memory.chain_to(upstream, hash).filter(|_| self.outbox.has_room()) {
            self.outbox.put(OutboxEvent::chain(upstream, None, 0, &chain, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_earlier_entries_by_the_clock_of_redis() {
        let now = Instant::now();
        let mut subscriber = Subscriber::default();
        let id = |millis| StreamId { millis, number: 0 };
        assert_eq!(subscriber.published_at(id(5), now), now, "without a clock every entry is new");
        subscriber.clock = Some((10_000, now));
        let later = now + Duration::from_secs(7);
        let table = [(9_000, now - Duration::from_secs(1)), (10_000, later), (10_500, later)];
        for (millis, wanted) in table {
            assert_eq!(subscriber.published_at(id(millis), later), wanted, "{millis}");
        }
        assert!(subscriber.published_at(id(0), later) <= now);
    }

    #[test]
    fn limits_chain_requests_by_time_and_number() {
        let now = Instant::now();
        let mut subscriber = Subscriber::default();
        assert!(
            subscriber.may_request(1, now)
                && !subscriber.may_request(1, now)
                && subscriber.may_request(2, now)
        );
        assert!(
            !subscriber.may_request(1, now + READ_BLOCK_TIME)
                && subscriber.may_request(1, now + 2 * READ_BLOCK_TIME)
        );
        let requested =
            (10..5000).filter(|hash| subscriber.may_request(*hash, now + 2 * READ_BLOCK_TIME)).count();
        assert_eq!(requested, MAX_CHAIN_REQUESTS - 1);
    }
}
