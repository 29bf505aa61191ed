//! Saying what is new, at most every `interval`, and that we are there, at least thrice in `gauge_ttl`.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Pipeline;
use tokio::time::MissedTickBehavior;

use super::connect::RedisLink;
use super::reply::FIELD;
use super::stored_binding::StoredBinding;
use super::trouble::Trouble;
use super::{SiblingExchange, now};
use crate::state::exchange::{BalancerInfo, GaugeUpdate, Message, OutboxEvent, SiblingLoad};

/// The most bytes of events in one message.
const MAX_EVENT_BYTES: usize = 256 << 10;

/// While requests are in flight, a message is sent at least every this many intervals: siblings tell by it
/// the age of their data.
const MAX_QUIET_INTERVALS: u32 = 5;

/// The pause before the next attempt when Redis is out of memory.
const FULL_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// What was published so far.
pub struct Publisher {
    sequence: u64,
    gauges: HashMap<String, PublishedLoad>,
    /// The next message carries all gauges, and the balancer's name.
    whole: bool,
    /// When all gauges were published last, and when anything was.
    whole_at: Instant,
    published_at: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct PublishedLoad {
    now: SiblingLoad,
    said: SiblingLoad,
}

// === impl Mouth ===

impl Publisher {
    pub fn new() -> Self {
        let now = now();
        Publisher { sequence: 0, gauges: HashMap::new(), whole: true, whole_at: now, published_at: now }
    }

    /// Starts anew: siblings may have no earlier message.
    pub fn begin(&mut self) {
        self.whole = true;
    }

    /// Reads what is in flight; whether it is another than was said, and whether there is any.
    fn look(&mut self, read: impl FnOnce(&mut dyn FnMut(&str, SiblingLoad))) -> (bool, bool) {
        self.gauges.values_mut().for_each(|gauge| gauge.now = SiblingLoad::default());
        read(&mut |name, gauges| match self.gauges.get_mut(name) {
            Some(gauge) => gauge.now = gauges,
            None if gauges == SiblingLoad::default() => {}
            None => drop(
                self.gauges.insert(name.into(), PublishedLoad { now: gauges, said: SiblingLoad::default() }),
            ),
        });
        let changed = self.gauges.values().any(|gauge| gauge.now != gauge.said);
        (changed, self.gauges.values().any(|gauge| gauge.now != SiblingLoad::default()))
    }

    fn gauge_update(&self) -> Option<GaugeUpdate<'_>> {
        let says = |gauge: &PublishedLoad| match self.whole {
            true => gauge.now != SiblingLoad::default(),
            false => gauge.now != gauge.said,
        };
        let rows = self.gauges.iter().filter(|(_, gauge)| says(gauge));
        let rows: Vec<_> = rows.map(|(name, gauge)| (name.as_str(), gauge.now)).collect();
        (self.whole || !rows.is_empty()).then_some(GaugeUpdate { whole: self.whole, rows })
    }

    /// It was said, and taken in.
    fn published(&mut self, now: Instant) {
        self.gauges.values_mut().for_each(|gauge| gauge.said = gauge.now);
        self.gauges.retain(|_, gauge| gauge.said != SiblingLoad::default());
        if self.whole {
            self.whole_at = now;
        }
        (self.whole, self.published_at) = (false, now);
    }
}

// === impl Exchange ===

impl SiblingExchange {
    pub(super) async fn publish_forever(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<std::convert::Infallible, Trouble> {
        let options = &self.settings.options;
        let mut tick = tokio::time::interval(options.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            match self.turn(publisher, link).await {
                Err(trouble) if trouble.full => {
                    self.troubles.met(&trouble, now());
                    publisher.begin();
                    tokio::time::sleep(FULL_RETRY_PAUSE).await;
                }
                other => other?,
            }
        }
    }

    /// Says what there is to say.
    async fn turn(&self, publisher: &mut Publisher, link: &mut RedisLink) -> Result<(), Trouble> {
        let options = &self.settings.options;
        let start = now();
        let (changed, busy) = publisher.look(|tell| self.memory.gauges(tell));
        publisher.whole |= start.saturating_duration_since(publisher.whole_at) >= options.gauge_ttl / 3;
        let quiet =
            start.saturating_duration_since(publisher.published_at) >= options.interval * MAX_QUIET_INTERVALS;
        if publisher.whole || self.members.has_unwritten() || self.members_changed() {
            self.sync_members(publisher, link).await?;
        }
        let events = self.outbox.take(MAX_EVENT_BYTES);
        self.observer.exchange_dropped(self.outbox.dropped());
        if !(publisher.whole || changed || busy && quiet || !events.is_empty()) {
            return Ok(());
        }
        let mut message = self.message(publisher);
        message.gauges = publisher.gauge_update();
        events.iter().for_each(|event| event.fill(&mut message));
        let bytes = message.encode();
        let mut commands = self.entry(&bytes);
        self.keep(&events, &mut commands);
        if let Err(trouble) = link.pipe(&commands).await {
            self.observer.exchange_dropped(events.len() as u64);
            return Err(trouble);
        }
        self.observer.exchange_sent(bytes.len());
        publisher.published(start);
        if self.hearing.load(Relaxed) {
            self.troubles.over(now());
        }
        Ok(())
    }

    /// Builds the next message; a complete one names this balancer.
    fn message(&self, publisher: &mut Publisher) -> Message<'_> {
        publisher.sequence += 1;
        let who = BalancerInfo { name: &self.settings.name, address: &self.settings.address };
        let who = publisher.whole.then_some(who);
        Message { who, ..Message::new(self.id, publisher.sequence) }
    }

    fn entry(&self, bytes: &[u8]) -> Pipeline {
        let mut commands = Pipeline::new();
        let length = self.settings.options.stream_length;
        let add = commands.cmd("XADD").arg(&self.keys.stream).arg("MAXLEN").arg("~").arg(length);
        add.arg("*").arg(FIELD).arg(bytes).ignore();
        commands
    }

    /// Bindings are kept where a balancer that starts finds them.
    fn keep(&self, events: &[OutboxEvent], commands: &mut Pipeline) {
        let seconds = self.settings.bindings.as_secs().max(1);
        for event in events {
            if let OutboxEvent::Bound { kind, key, upstream, number, keep: true } = event {
                let key = self.keys.binding(*kind, key);
                let text = StoredBinding::write(upstream, *number);
                commands.cmd("SET").arg(key).arg(text).arg("EX").arg(seconds).ignore();
            }
        }
    }

    pub(super) async fn sync_members(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<(), Trouble> {
        let mark = format!("{:016x}-{}", self.id, publisher.sequence);
        let synced = self.members.sync(link, &self.keys, &mark).await?;
        // Own changes are reported too: applying them again changes nothing, and the follower of the list
        // then has the stored text.
        if synced.changed || synced.written {
            self.take_members();
        }
        if synced.written {
            self.outbox.put(OutboxEvent::Members);
        }
        Ok(())
    }

    /// Publishes the last message, so that siblings do not wait for another.
    pub(super) async fn leave(&self, publisher: &mut Publisher, link: &mut RedisLink) -> Result<(), Trouble> {
        self.members_news.store(false, Relaxed);
        let message = Message { leaving: true, ..self.message(publisher) };
        link.pipe(&self.entry(&message.encode())).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauges(active: u64) -> SiblingLoad {
        SiblingLoad { active, backlog: active, context: active }
    }

    /// What is said when these are in flight, in the order of names; whether it is all there is.
    fn says(publisher: &mut Publisher, flight: &[(&str, u64)]) -> Option<(bool, Vec<(String, u64)>)> {
        let (changed, _) =
            publisher.look(|tell| flight.iter().for_each(|(name, number)| tell(name, gauges(*number))));
        let told = publisher.gauge_update()?;
        let mut rows: Vec<(String, u64)> =
            told.rows.iter().map(|(name, gauges)| (name.to_string(), gauges.active)).collect();
        rows.sort();
        assert!(changed || told.whole);
        Some((told.whole, rows))
    }

    fn rows(all: &[(&str, u64)]) -> Vec<(String, u64)> {
        all.iter().map(|(name, number)| (name.to_string(), *number)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_moved_is_said_and_all_of_it_after_a_loss() {
        let mut publisher = Publisher::new();
        let first = [("a", 1), ("b", 2), ("c", 0)];
        assert_eq!(says(&mut publisher, &first), Some((true, rows(&[("a", 1), ("b", 2)]))));
        assert_eq!(
            says(&mut publisher, &first),
            Some((true, rows(&[("a", 1), ("b", 2)]))),
            "it was not taken in"
        );
        publisher.published(now());
        assert_eq!(says(&mut publisher, &first), None);
        assert_eq!(says(&mut publisher, &[("a", 1), ("b", 5)]), Some((false, rows(&[("b", 5)]))));
        publisher.published(now());
        // An upstream without requests in flight, or one that is gone, is reported once.
        assert_eq!(says(&mut publisher, &[("b", 0)]), Some((false, rows(&[("a", 0), ("b", 0)]))));
        publisher.published(now());
        assert_eq!((says(&mut publisher, &[("b", 0)]), publisher.gauges.len()), (None, 0));
        says(&mut publisher, &[("b", 1)]);
        publisher.published(now());
        publisher.begin();
        assert_eq!(says(&mut publisher, &[("b", 1)]), Some((true, rows(&[("b", 1)]))));
    }
}
