//! Receives the urgent messages of siblings: first the tail of the stream, then every new entry.
//!
//! When reading lags, as after a pause of this process, the gauges at the end of the stream are applied
//! before the entries between; those follow in their order, without their outdated gauges.

use std::convert::Infallible;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply::{self, StreamEntry, StreamId};
use super::work_slice::WorkSlice;
use super::{READ_BLOCK_TIME, SiblingExchange, now};
use crate::state::exchange::Message;

/// The largest number of entries in one read. Urgent messages are small, and a slow Redis must not limit how
/// many are read in a second.
const MAX_READ_ENTRIES: usize = 1_000;

/// The largest size of the stream's tail that is read at the start, in bytes.
const MAX_TAIL_BYTES: usize = 64 << 20;

/// The least interval between two reads, so that many siblings' messages are handled together.
pub(super) const MIN_READ_INTERVAL: Duration = Duration::from_millis(4);

/// The age of read entries from which on the gauges at the end of the stream are applied first.
const MAX_GAUGE_LAG: Duration = Duration::from_millis(500);

/// The interval between two readings of the clock of Redis.
const CLOCK_INTERVAL: Duration = Duration::from_secs(2);

/// The position in the urgent stream.
#[derive(Default)]
pub(super) struct Subscriber {
    /// The last entry that was applied; `None` before the first.
    last: Option<StreamId>,
    /// The last entry with applied gauges: ahead of `last` while reading lags.
    gauges_last: StreamId,
}

impl SiblingExchange {
    /// Reads the messages from before the subscription, as far as the stream still holds them.
    pub(super) async fn catch_up(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let tail = self
            .tail(&self.streams.urgent.key, subscriber.last, (MAX_READ_ENTRIES, MAX_TAIL_BYTES), link)
            .await?;
        if tail.was_replaced {
            *subscriber = Subscriber { last: Some(StreamId::default()), ..Subscriber::default() };
        }
        for page in tail.pages.iter().rev() {
            self.receive_all(subscriber, reply::entries(page).into_iter().rev(), link).await?;
        }
        // Set after success, so that an interrupted tail is read again.
        subscriber.last.get_or_insert(tail.newest);
        self.apply_sibling_loads();
        Ok(())
    }

    /// Reads new entries until a failure.
    pub(super) async fn subscribe(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<Infallible, RedisFailure> {
        loop {
            let start = now();
            let last = subscriber.last.unwrap_or_default().to_string();
            let mut command = redis::cmd("XREAD");
            command.arg("COUNT").arg(MAX_READ_ENTRIES).arg("BLOCK").arg(READ_BLOCK_TIME.as_millis() as u64);
            command.arg("STREAMS").arg(&self.streams.urgent.key).arg(last);
            let answer = link.call(&command, READ_BLOCK_TIME + COMMAND_TIMEOUT).await?;
            let entries = reply::read(&answer).into_iter().flat_map(|(_, entries)| entries);
            let entries: Vec<StreamEntry<'_>> = entries.collect();
            let Some(newest) = entries.last().map(|entry| entry.id) else {
                // A stream that was emptied, and begins with lower ids again, has no entry behind the last.
                self.catch_up(subscriber, link).await?;
                continue;
            };
            let is_full = entries.len() >= MAX_READ_ENTRIES;
            let lag = self.clock().age(newest, now());
            self.observer.exchange_lag(lag);
            if is_full && lag > MAX_GAUGE_LAG {
                self.receive_newest_gauges(subscriber, link).await?;
            }
            self.receive_all(subscriber, entries.into_iter(), link).await?;
            subscriber.last = Some(newest);
            if !is_full {
                let spent = now().saturating_duration_since(start);
                tokio::time::sleep(MIN_READ_INTERVAL.saturating_sub(spent)).await;
            }
        }
    }

    /// Applies the gauges at the end of the stream: of the time in which every live sibling publishes all its
    /// gauges at least once.
    async fn receive_newest_gauges(
        &self,
        subscriber: &mut Subscriber,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let window = self.settings.options.gauge_ttl / 2;
        let time = self.clock().redis_time(now()).unwrap_or_default().saturating_sub(window);
        let millis = u64::try_from(time.as_millis()).unwrap_or(0);
        let mut from = subscriber.gauges_last.after().max(StreamId { millis, number: 0 });
        let mut slice = WorkSlice::begin();
        loop {
            let mut command = redis::cmd("XRANGE");
            command.arg(&self.streams.urgent.key).arg(from.to_string()).arg("+");
            command.arg("COUNT").arg(MAX_READ_ENTRIES);
            let answer = link.call(&command, COMMAND_TIMEOUT).await?;
            let entries = reply::entries(&answer);
            for entry in &entries {
                slice.yield_if_due().await;
                if let Ok(message) = Message::decode(entry.bytes) {
                    self.receive_gauges(&message, entry.id);
                }
                subscriber.gauges_last = entry.id;
                from = entry.id.after();
            }
            if entries.len() < MAX_READ_ENTRIES {
                break;
            }
        }
        self.apply_sibling_loads();
        Ok(())
    }

    /// Applies entries: first all gauges, then what takes longer, with later gauges between.
    async fn receive_all<'v>(
        &self,
        subscriber: &mut Subscriber,
        entries: impl Iterator<Item = StreamEntry<'v>>,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let (mut slice, mut received) = (WorkSlice::begin(), Vec::new());
        for entry in entries {
            slice.yield_if_due().await;
            self.streams.urgent.count(entry.id, entry.bytes.len());
            let message = match Message::decode(entry.bytes) {
                Ok(message) => message,
                Err(why) => {
                    self.observer.message_unreadable(&why);
                    continue;
                }
            };
            let is_new = match entry.id > subscriber.gauges_last {
                true => self.receive_gauges(&message, entry.id),
                false => message.balancer != self.id,
            };
            subscriber.gauges_last = subscriber.gauges_last.max(entry.id);
            if is_new {
                self.observer.exchange_received(entry.bytes.len());
                received.push((entry.id, message));
            }
        }
        self.apply_sibling_loads();
        let mut gauges_read_at = now();
        for (id, message) in &received {
            if now().saturating_duration_since(gauges_read_at) > MAX_GAUGE_LAG / 2 {
                self.receive_newest_gauges(subscriber, link).await?;
                gauges_read_at = now();
            }
            self.receive_events(message, *id, &mut slice).await;
        }
        Ok(())
    }

    /// Applies the sender and the gauges of a message. Returns `false` for a message to ignore.
    fn receive_gauges(&self, message: &Message<'_>, id: StreamId) -> bool {
        let now = now();
        self.siblings().receive(message, self.published_at(id, now), now)
    }

    /// Returns when an entry was published, by the clock of Redis.
    fn published_at(&self, id: StreamId, now: Instant) -> Instant {
        let age = self.clock().age(id, now);
        let ttl = self.settings.options.gauge_ttl;
        // A machine that has just started has no earlier times; the gauges are too old in any case.
        now.checked_sub(age).or_else(|| now.checked_sub(ttl)).unwrap_or(now)
    }

    /// Applies the events of a message.
    async fn receive_events(&self, message: &Message<'_>, id: StreamId, slice: &mut WorkSlice) {
        self.served().receive(message.balancer, &message.served);
        // Older balancers publish chains here.
        self.receive_chains_of(message, &mut 0, slice).await;
        for bound in &message.bound {
            self.memory.bound(bound);
            slice.yield_if_due().await;
        }
        if !message.reports.is_empty() {
            let age = self.clock().age(id, now());
            self.memory.apply_reports(message.balancer, &message.reports, age);
        }
        if message.members {
            self.members_dirty.store(true, Relaxed);
        }
        for request in &message.chain_requests {
            self.receive_chain_request(request);
            slice.yield_if_due().await;
        }
    }

    /// Reads the clock of Redis.
    pub(super) async fn read_clock(&self, link: &mut RedisLink) -> Result<(), RedisFailure> {
        let sent = now();
        let answer = link.call(&redis::cmd("TIME"), COMMAND_TIMEOUT).await?;
        let received = now();
        if let Some(time) = reply::time(&answer) {
            self.observer.redis_round_trip(received.saturating_duration_since(sent));
            self.clock().add(time, sent, received);
        }
        Ok(())
    }

    /// Reads the clock of Redis at every interval until a failure.
    pub(super) async fn read_clock_forever(&self, link: &mut RedisLink) -> Result<Infallible, RedisFailure> {
        loop {
            tokio::time::sleep(CLOCK_INTERVAL).await;
            self.read_clock(link).await?;
        }
    }
}
