//! Publishes urgent updates, at most once an `interval`, and a complete message at least three times in
//! `gauge_ttl`. Chains follow behind them: see `chain_publisher`.
//!
//! A request that is sent after an `interval` without a message is published at once: siblings that choose in
//! the same moment would send theirs to the same upstream. Other updates wait for the next tick.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Pipeline;
use tokio::time::{Interval, MissedTickBehavior};

use super::connect::RedisLink;
use super::failure::RedisFailure;
use super::reply::FIELD;
use super::stored_binding::StoredBinding;
use super::streams::SharedStream;
use super::taken_events::TakenEvents;
use super::{SiblingExchange, now};
use crate::state::exchange::{
    BalancerInfo, GaugeUpdate, Message, Outbox, OutboxEvent, SiblingLoad, UpstreamReport,
};

/// The largest size of the events in one message, in bytes.
const MAX_EVENT_BYTES: usize = 256 << 10;

/// The largest size of the reports on upstreams in one message, in bytes.
const MAX_REPORT_BYTES: usize = 128 << 10;

/// The largest number of intervals without a message while requests are in flight: siblings derive the age of
/// their data from the messages.
const MAX_QUIET_INTERVALS: u32 = 5;

/// The pause before the next attempt when Redis is out of memory.
pub(super) const FULL_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// The gauges that were published so far.
pub(super) struct Publisher {
    sequence: u64,
    /// The number of marks of the list of members.
    marks: u64,
    gauges: HashMap<String, PublishedLoad>,
    /// The next message has all gauges and the balancer's name.
    whole: bool,
    /// When all gauges were last published.
    whole_at: Instant,
    /// When the last message was published.
    published_at: Instant,
    /// The reports on upstreams for the next message.
    reports: Vec<UpstreamReport>,
}

/// The present and the last published load of an upstream.
#[derive(Clone, Copy, Debug, Default)]
struct PublishedLoad {
    now: SiblingLoad,
    published: SiblingLoad,
}

/// The times of publishing: a tick at every interval, or a request after an interval without a message.
struct PublishRounds {
    tick: Interval,
    /// The last interval was without a message.
    is_quiet: bool,
    /// A request began the present round.
    is_early: bool,
}

// === impl PublishRounds ===

impl PublishRounds {
    fn new(interval: Duration) -> Self {
        let mut tick = tokio::time::interval(interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        PublishRounds { tick, is_quiet: false, is_early: false }
    }

    /// Waits for the next round.
    async fn next(&mut self, outbox: &Outbox) {
        self.is_early = tokio::select! {
            _ = self.tick.tick() => false,
            () = outbox.wait_for_request(), if self.is_quiet => true,
        };
        if self.is_early {
            self.tick.reset();
        }
    }

    /// Ends the round. After an early round a whole interval passes, even if there was nothing to publish.
    fn end(&mut self, has_published: bool) {
        self.is_quiet = !has_published && !self.is_early;
    }
}

// === impl Publisher ===

impl Publisher {
    /// Builds a publisher that has published nothing.
    pub(super) fn new() -> Self {
        let now = now();
        Publisher {
            sequence: 0,
            marks: 0,
            gauges: HashMap::new(),
            whole: true,
            whole_at: now,
            published_at: now,
            reports: Vec::new(),
        }
    }

    /// Returns a mark of the list of members that no write had before: a sibling that has read the list under
    /// an equal one would not read it again.
    pub(super) fn next_mark(&mut self, balancer: u64) -> String {
        self.marks += 1;
        format!("{balancer:016x}-{}", self.marks)
    }

    /// Makes the next message complete: siblings may have missed earlier ones.
    pub(super) fn republish_all(&mut self) {
        self.whole = true;
        // Their ages were computed when they were taken: an outage has made them stale.
        self.reports.clear();
    }

    /// Reads the present load. Returns whether it differs from the published load, and whether any is in
    /// flight.
    fn read_gauges(&mut self, read: impl FnOnce(&mut dyn FnMut(&str, SiblingLoad))) -> (bool, bool) {
        self.gauges.values_mut().for_each(|gauge| gauge.now = SiblingLoad::default());
        read(&mut |name, gauges| match self.gauges.get_mut(name) {
            Some(gauge) => gauge.now = gauges,
            None if gauges == SiblingLoad::default() => {}
            None => drop(
                self.gauges
                    .insert(name.into(), PublishedLoad { now: gauges, published: SiblingLoad::default() }),
            ),
        });
        let changed = self.gauges.values().any(|gauge| gauge.now != gauge.published);
        (changed, self.gauges.values().any(|gauge| gauge.now != SiblingLoad::default()))
    }

    fn gauge_update(&self) -> Option<GaugeUpdate<'_>> {
        let is_due = |gauge: &PublishedLoad| match self.whole {
            true => gauge.now != SiblingLoad::default(),
            false => gauge.now != gauge.published,
        };
        let rows = self.gauges.iter().filter(|(_, gauge)| is_due(gauge));
        let rows: Vec<_> = rows.map(|(name, gauge)| (name.as_str(), gauge.now)).collect();
        (self.whole || !rows.is_empty()).then_some(GaugeUpdate { whole: self.whole, rows })
    }

    /// Records that the message was accepted.
    fn published(&mut self, now: Instant) {
        self.gauges.values_mut().for_each(|gauge| gauge.published = gauge.now);
        self.gauges.retain(|_, gauge| gauge.published != SiblingLoad::default());
        if self.whole {
            self.whole_at = now;
        }
        (self.whole, self.published_at) = (false, now);
        self.reports.clear();
    }
}

// === impl SiblingExchange ===

impl SiblingExchange {
    /// Publishes at every interval until a failure.
    pub(super) async fn publish_forever(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<std::convert::Infallible, RedisFailure> {
        let mut rounds = PublishRounds::new(self.settings.options.interval);
        loop {
            rounds.next(&self.outbox).await;
            let mut published = self.publish_once(publisher, link).await;
            if let Err(failure) = &published
                && self.relieve(failure, link).await?
            {
                publisher.republish_all();
                published = self.publish_once(publisher, link).await;
            }
            match published {
                Err(failure) if failure.is_full() => {
                    self.failures.report(&failure, now());
                    publisher.republish_all();
                    tokio::time::sleep(FULL_RETRY_PAUSE).await;
                }
                other => rounds.end(other?),
            }
            self.chains_waiting.notify_one();
        }
    }

    /// Publishes one urgent message if there is an update. Returns whether there was one.
    async fn publish_once(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<bool, RedisFailure> {
        let options = &self.settings.options;
        let start = now();
        let (changed, busy) = publisher.read_gauges(|tell| self.memory.gauges(tell));
        publisher.whole |= start.saturating_duration_since(publisher.whole_at) >= options.gauge_ttl / 3;
        let quiet =
            start.saturating_duration_since(publisher.published_at) >= options.interval * MAX_QUIET_INTERVALS;
        if publisher.whole || self.has_members_to_write() || self.members_changed() {
            self.sync_members(publisher, link).await?;
        }
        if publisher.reports.is_empty() {
            publisher.reports = self.memory.take_reports(MAX_REPORT_BYTES);
        }
        self.sort_events();
        self.put_chain_requests();
        let batch = TakenEvents::take(&self.urgent_events, MAX_EVENT_BYTES);
        let has_events = !batch.events().is_empty() || !publisher.reports.is_empty();
        if !(publisher.whole || changed || busy && quiet || has_events) {
            return Ok(false);
        }
        let mut message = self.message(publisher);
        let tells_of_members = batch.events().iter().any(|event| matches!(event, OutboxEvent::Members));
        if publisher.whole || tells_of_members {
            // A sibling that learns of a drain has to know that its upstream is served.
            message.served = self.served_upstreams();
        }
        message.gauges = publisher.gauge_update();
        message.reports = publisher.reports.clone();
        batch.fill(&mut message);
        let bytes = message.encode();
        let mut commands = Pipeline::new();
        self.add_entry(&mut commands, &self.streams.urgent, &bytes);
        self.store_bindings(batch.events(), &mut commands);
        link.pipe(&commands).await?;
        batch.published();
        self.observer.exchange_sent(bytes.len());
        publisher.published(start);
        if self.receiving.load(Relaxed) {
            self.failures.clear(now());
        }
        Ok(true)
    }

    /// Moves the events of requests to where they wait for their messages.
    fn sort_events(&self) {
        for event in self.outbox.take(usize::MAX) {
            match event.opening() {
                Some(opening) => self.streams.of_opening(opening).waiting.put(event),
                None => self.urgent_events.put(event),
            }
        }
        let waiting = self.streams.chains.iter().map(|chains| &chains.waiting);
        let dropped = waiting.chain([&*self.outbox, &self.urgent_events]).map(Outbox::dropped).sum();
        self.observer.exchange_dropped(dropped);
    }

    /// Builds the next message; a complete one names this balancer.
    fn message(&self, publisher: &mut Publisher) -> Message<'_> {
        publisher.sequence += 1;
        let who = BalancerInfo { name: &self.settings.name, address: &self.settings.address };
        let who = publisher.whole.then_some(who);
        Message { who, ..Message::new(self.id, publisher.sequence) }
    }

    /// Adds the command that publishes a message.
    pub(super) fn add_entry(&self, commands: &mut Pipeline, stream: &SharedStream, bytes: &[u8]) {
        let length = self.settings.options.stream_length;
        let add = commands.cmd("XADD").arg(&stream.key).arg("MAXLEN").arg("~").arg(length);
        add.arg("*").arg(FIELD).arg(bytes).ignore();
    }

    /// Adds the commands that store bindings by key, for balancers that start later, and that list the keys:
    /// see `trimming`.
    fn store_bindings(&self, events: &[OutboxEvent], commands: &mut Pipeline) {
        let seconds = self.settings.bindings.as_secs().max(1);
        for event in events {
            if let OutboxEvent::Bound { kind, key, upstream, number, keep: true } = event {
                let key = self.keys.binding(*kind, key);
                let text = StoredBinding::write(upstream, *number);
                // Listed first: when memory ends between the two, no key is left out of the list.
                commands.cmd("XADD").arg(&self.keys.stored).arg("*").arg(FIELD).arg(&key).ignore();
                commands.cmd("SET").arg(&key).arg(text).arg("EX").arg(seconds).ignore();
            }
        }
    }

    /// Publishes the last message, so that siblings remove this balancer at once.
    pub(super) async fn publish_shutdown(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        self.members_dirty.store(false, Relaxed);
        let message = Message { leaving: true, ..self.message(publisher) };
        let mut commands = Pipeline::new();
        self.add_entry(&mut commands, &self.streams.urgent, &message.encode());
        link.pipe(&commands).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
