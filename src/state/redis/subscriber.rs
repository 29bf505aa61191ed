//! Hearing what siblings say: first the tail of the stream, then every message as it comes.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Value;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::reply::{self, StreamEntry, StreamId};
use super::trouble::Trouble;
use super::{READ_BLOCK_TIME, SiblingExchange, now};
use crate::state::exchange::{Message, OutboxEvent};

/// How much of the stream's tail is read at the start: entries in one read, and bytes altogether. Earlier
/// chains are requested when a later message continues them.
const TAIL_PAGE_ENTRIES: usize = 500;
const MAX_TAIL_BYTES: usize = 64 << 20;

/// The most entries of one read.
const READ_ENTRIES: usize = 100;

/// Messages that are handled before the task yields.
const MESSAGES_PER_TURN: usize = 32;

/// The least interval between two reads, so that many siblings' messages are handled together.
const MIN_READ_INTERVAL: Duration = Duration::from_millis(4);

/// The most chain requests that are remembered, so that none is repeated too soon.
const MAX_CHAIN_REQUESTS: usize = 1024;

/// How far we have heard.
#[derive(Default)]
pub struct Subscriber {
    last: Option<StreamId>,
    /// Redis' clock, and when it was read.
    clock: Option<(u64, Instant)>,
    /// Chains that were asked for lately.
    asked: HashSet<u64>,
    asked_at: Option<Instant>,
}

impl Subscriber {
    /// When an entry was published, by the clock of Redis for entries from before the start.
    fn published_at(&self, id: StreamId, now: Instant) -> Instant {
        let Some((clock, read_at)) = self.clock else { return now };
        match clock.checked_sub(id.millis) {
            Some(age) if age > 0 => read_at.checked_sub(Duration::from_millis(age)).unwrap_or(read_at),
            _ => now,
        }
    }

    /// Whether to ask for a chain: not for the same one again and again.
    fn may_request(&mut self, hash: u64, now: Instant) -> bool {
        if self.asked_at.is_none_or(|at| now.saturating_duration_since(at) > READ_BLOCK_TIME) {
            self.asked.clear();
            self.asked_at = Some(now);
        }
        self.asked.len() < MAX_CHAIN_REQUESTS && self.asked.insert(hash)
    }
}

impl SiblingExchange {
    /// Reads what was said before we listened, as far as it is still there.
    pub(super) async fn catch_up(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<(), Trouble> {
        let time = link.call(&redis::cmd("TIME"), COMMAND_TIMEOUT).await?;
        subscriber.clock = reply::time(&time).map(|millis| (millis, now()));
        let newest = self.page(link, None, 1).await?;
        let newest = reply::entries(&newest).first().map(|entry| entry.id);
        match (subscriber.last, newest) {
            // It was emptied, or is another than before: all there is, is new.
            (Some(last), newest) if newest.is_none_or(|newest| newest < last) => {
                subscriber.last = Some(StreamId::default());
            }
            (Some(_), _) => {}
            (None, newest) => {
                self.tail(subscriber, link, newest).await?;
                // Only now: what was cut off is to be read again.
                subscriber.last = Some(newest.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Takes in the tail of the stream, from old to new, as much of it as may be.
    async fn tail(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
        newest: Option<StreamId>,
    ) -> Result<(), Trouble> {
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
            self.take_in(subscriber, entries.into_iter().rev()).await;
        }
        self.apply_sibling_loads();
        Ok(())
    }

    async fn page(
        &self,
        link: &mut RedisLink,
        until: Option<StreamId>,
        count: usize,
    ) -> Result<Value, Trouble> {
        let until = until.map_or_else(|| "+".to_string(), |id| id.to_string());
        let mut command = redis::cmd("XREVRANGE");
        command.arg(&self.keys.stream).arg(until).arg("-").arg("COUNT").arg(count);
        link.call(&command, COMMAND_TIMEOUT).await
    }

    pub(super) async fn subscribe(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<std::convert::Infallible, Trouble> {
        loop {
            let start = now();
            let last = subscriber.last.unwrap_or_default().to_string();
            let mut command = redis::cmd("XREAD");
            command.arg("COUNT").arg(READ_ENTRIES).arg("BLOCK").arg(READ_BLOCK_TIME.as_millis() as u64);
            command.arg("STREAMS").arg(&self.keys.stream).arg(last);
            let answer = link.call(&command, READ_BLOCK_TIME + COMMAND_TIMEOUT).await?;
            let entries = reply::read(&answer);
            if let Some(last) = entries.last() {
                let last = last.id;
                self.take_in(subscriber, entries.into_iter()).await;
                subscriber.last = Some(last);
                self.apply_sibling_loads();
            }
            tokio::time::sleep(MIN_READ_INTERVAL.saturating_sub(now().saturating_duration_since(start)))
                .await;
        }
    }

    async fn take_in<'v>(&self, subscriber: &mut Subscriber, entries: impl Iterator<Item = StreamEntry<'v>>) {
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
        for learnt in &message.learnt {
            let placed = self.memory.learn(learnt.upstream, learnt.parent, &learnt.hashes, learnt.end);
            let hash = learnt.hashes.last().copied().or(learnt.parent);
            if let Some(hash) = hash.filter(|_| !placed) {
                self.request_chain(subscriber, message.balancer, learnt.upstream, hash, now);
            }
        }
        for bound in &message.bound {
            self.memory.bound(bound);
        }
        if message.members {
            self.members_news.store(true, Relaxed);
        }
        for ask in message.asks.iter().filter(|ask| ask.balancer == self.id) {
            self.publish_chain(ask.upstream, ask.hash);
        }
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
        // Events of requests take precedence; the sibling will repeat its request.
        if let Some(chain) = self.memory.chain_to(upstream, hash).filter(|_| self.outbox.has_room()) {
            self.outbox.put(OutboxEvent::learnt(upstream, None, &chain, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_is_as_old_as_redis_says() {
        let now = Instant::now();
        let mut subscriber = Subscriber::default();
        let id = |millis| StreamId { millis, number: 0 };
        assert_eq!(subscriber.published_at(id(5), now), now, "without a clock all is new");
        subscriber.clock = Some((10_000, now));
        let later = now + Duration::from_secs(7);
        let table = [(9_000, now - Duration::from_secs(1)), (10_000, later), (10_500, later)];
        for (millis, said) in table {
            assert_eq!(subscriber.published_at(id(millis), later), said, "{millis}");
        }
        assert!(subscriber.published_at(id(0), later) <= now);
    }

    #[test]
    fn a_chain_is_asked_for_once_in_a_while_and_not_too_many() {
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
        let asked =
            (10..5000).filter(|hash| subscriber.may_request(*hash, now + 2 * READ_BLOCK_TIME)).count();
        assert_eq!(asked, MAX_CHAIN_REQUESTS - 1);
    }
}
