//! Saying what is new, at most every `interval`, and that we are there, at least thrice in `gauge_ttl`.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Pipeline;
use tokio::time::MissedTickBehavior;

use super::connect::Link;
use super::kept::Kept;
use super::reply::FIELD;
use super::trouble::Trouble;
use super::{Exchange, now};
use crate::observe;
use crate::state::exchange::{Event, Gauges, Message, Told, Who};

/// Of events, in one message.
const PIECE: usize = 256 << 10;

/// While something is in flight, at least every so many intervals something is said: siblings tell by it how
/// old what they know is.
const QUIET: u32 = 5;

/// Before a Redis that takes nothing in is tried again.
const FULL: Duration = Duration::from_millis(250);

/// What was said so far.
pub struct Mouth {
    sequence: u64,
    gauges: HashMap<String, Gauge>,
    /// All gauges are to be said, and who says them.
    whole: bool,
    /// When all were said last, and when anything was.
    whole_at: Instant,
    said_at: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Gauge {
    now: Gauges,
    said: Gauges,
}

// === impl Mouth ===

impl Mouth {
    pub fn new() -> Self {
        let now = now();
        Mouth { sequence: 0, gauges: HashMap::new(), whole: true, whole_at: now, said_at: now }
    }

    /// Nobody may know anything.
    pub fn begin(&mut self) {
        self.whole = true;
    }

    /// Reads what is in flight; whether it is another than was said, and whether there is any.
    fn look(&mut self, read: impl FnOnce(&mut dyn FnMut(&str, Gauges))) -> (bool, bool) {
        self.gauges.values_mut().for_each(|gauge| gauge.now = Gauges::default());
        read(&mut |name, gauges| match self.gauges.get_mut(name) {
            Some(gauge) => gauge.now = gauges,
            None if gauges == Gauges::default() => {}
            None => drop(self.gauges.insert(name.into(), Gauge { now: gauges, said: Gauges::default() })),
        });
        let changed = self.gauges.values().any(|gauge| gauge.now != gauge.said);
        (changed, self.gauges.values().any(|gauge| gauge.now != Gauges::default()))
    }

    fn told(&self) -> Option<Told<'_>> {
        let says = |gauge: &Gauge| match self.whole {
            true => gauge.now != Gauges::default(),
            false => gauge.now != gauge.said,
        };
        let rows = self.gauges.iter().filter(|(_, gauge)| says(gauge));
        let rows: Vec<_> = rows.map(|(name, gauge)| (name.as_str(), gauge.now)).collect();
        (self.whole || !rows.is_empty()).then_some(Told { whole: self.whole, rows })
    }

    /// It was said, and taken in.
    fn said(&mut self, now: Instant) {
        self.gauges.values_mut().for_each(|gauge| gauge.said = gauge.now);
        self.gauges.retain(|_, gauge| gauge.said != Gauges::default());
        if self.whole {
            self.whole_at = now;
        }
        (self.whole, self.said_at) = (false, now);
    }
}

// === impl Exchange ===

impl Exchange {
    pub(super) async fn speak(
        &self,
        mouth: &mut Mouth,
        link: &mut Link,
    ) -> Result<std::convert::Infallible, Trouble> {
        let options = &self.settings.options;
        let mut tick = tokio::time::interval(options.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            match self.turn(mouth, link).await {
                Err(trouble) if trouble.full => {
                    self.troubles.met(&trouble, now());
                    mouth.begin();
                    tokio::time::sleep(FULL).await;
                }
                other => other?,
            }
        }
    }

    /// Says what there is to say.
    async fn turn(&self, mouth: &mut Mouth, link: &mut Link) -> Result<(), Trouble> {
        let options = &self.settings.options;
        let start = now();
        let (changed, busy) = mouth.look(|tell| self.memory.gauges(tell));
        mouth.whole |= start.saturating_duration_since(mouth.whole_at) >= options.gauge_ttl / 3;
        let quiet = start.saturating_duration_since(mouth.said_at) >= options.interval * QUIET;
        if mouth.whole || self.members.wants_writing() || self.members_changed() {
            self.sync_members(mouth, link).await?;
        }
        let events = self.outbox.take(PIECE);
        observe::unsaid(self.outbox.dropped());
        if !(mouth.whole || changed || busy && quiet || !events.is_empty()) {
            return Ok(());
        }
        let mut message = self.message(mouth);
        message.gauges = mouth.told();
        events.iter().for_each(|event| event.say(&mut message));
        let bytes = message.encode();
        let mut commands = self.entry(&bytes);
        self.keep(&events, &mut commands);
        if let Err(trouble) = link.pipe(&commands).await {
            observe::unsaid(events.len() as u64);
            return Err(trouble);
        }
        observe::said(bytes.len());
        mouth.said(start);
        if self.hearing.load(Relaxed) {
            self.troubles.over(now());
        }
        Ok(())
    }

    /// With a number of its own, and who we are where all is said.
    fn message(&self, mouth: &mut Mouth) -> Message<'_> {
        mouth.sequence += 1;
        let who = Who { name: &self.settings.name, address: &self.settings.address };
        let who = mouth.whole.then_some(who);
        Message { who, ..Message::new(self.id, mouth.sequence) }
    }

    fn entry(&self, bytes: &[u8]) -> Pipeline {
        let mut commands = Pipeline::new();
        let length = self.settings.options.stream_length;
        let add = commands.cmd("XADD").arg(&self.keys.stream).arg("MAXLEN").arg("~").arg(length);
        add.arg("*").arg(FIELD).arg(bytes).ignore();
        commands
    }

    /// Bindings are kept where a balancer that starts finds them.
    fn keep(&self, events: &[Event], commands: &mut Pipeline) {
        let seconds = self.settings.bindings.as_secs().max(1);
        for event in events {
            if let Event::Bound { kind, key, upstream, number, keep: true } = event {
                let key = self.keys.binding(*kind, key);
                let text = Kept::write(upstream, *number);
                commands.cmd("SET").arg(key).arg(text).arg("EX").arg(seconds).ignore();
            }
        }
    }

    pub(super) async fn sync_members(&self, mouth: &mut Mouth, link: &mut Link) -> Result<(), Trouble> {
        let mark = format!("{:016x}-{}", self.id, mouth.sequence);
        let synced = self.members.sync(link, &self.keys, &mark).await?;
        // Also what was written by us: carried out again it changes nothing, and whoever follows the list
        // knows then which text stands there.
        if synced.changed || synced.written {
            self.take_members();
        }
        if synced.written {
            self.outbox.put(Event::Members);
        }
        Ok(())
    }

    /// The last word, so that nobody waits for another.
    pub(super) async fn leave(&self, mouth: &mut Mouth, link: &mut Link) -> Result<(), Trouble> {
        self.members_news.store(false, Relaxed);
        let message = Message { leaving: true, ..self.message(mouth) };
        link.pipe(&self.entry(&message.encode())).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauges(active: u64) -> Gauges {
        Gauges { active, backlog: active, context: active }
    }

    /// What is said when these are in flight, in the order of names; whether it is all there is.
    fn says(mouth: &mut Mouth, flight: &[(&str, u64)]) -> Option<(bool, Vec<(String, u64)>)> {
        let (changed, _) =
            mouth.look(|tell| flight.iter().for_each(|(name, number)| tell(name, gauges(*number))));
        let told = mouth.told()?;
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
        let mut mouth = Mouth::new();
        let first = [("a", 1), ("b", 2), ("c", 0)];
        assert_eq!(says(&mut mouth, &first), Some((true, rows(&[("a", 1), ("b", 2)]))));
        assert_eq!(
            says(&mut mouth, &first),
            Some((true, rows(&[("a", 1), ("b", 2)]))),
            "it was not taken in"
        );
        mouth.said(now());
        assert_eq!(says(&mut mouth, &first), None);
        assert_eq!(says(&mut mouth, &[("a", 1), ("b", 5)]), Some((false, rows(&[("b", 5)]))));
        mouth.said(now());
        // Who has nothing in flight any more, or is gone, is said once.
        assert_eq!(says(&mut mouth, &[("b", 0)]), Some((false, rows(&[("a", 0), ("b", 0)]))));
        mouth.said(now());
        assert_eq!((says(&mut mouth, &[("b", 0)]), mouth.gauges.len()), (None, 0));
        says(&mut mouth, &[("b", 1)]);
        mouth.said(now());
        mouth.begin();
        assert_eq!(says(&mut mouth, &[("b", 1)]), Some((true, rows(&[("b", 1)]))));
    }
}
