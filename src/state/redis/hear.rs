//! Hearing what siblings say: first the tail of the stream, then every message as it comes.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use redis::Value;

use super::connect::{Link, PATIENCE};
use super::reply::{self, Entry, Id};
use super::trouble::Trouble;
use super::{BLOCK, Exchange, now};
use crate::observe;
use crate::state::exchange::{Event, Message};

/// Of the tail, what is read at the start: entries at once, and bytes altogether. What was said before that
/// is asked for when somebody goes on from it.
const PAGE: usize = 500;
const TAIL: usize = 64 << 20;

/// Entries that one answer brings.
const COUNT: usize = 100;

/// So many messages are taken in without letting others have their turn.
const AT_ONCE: usize = 32;

/// Between two answers, at the least: many siblings' words are taken in together.
const BREATH: Duration = Duration::from_millis(4);

/// Chains that are asked for, and not yet again.
const ASKED: usize = 1024;

/// How far we have heard.
#[derive(Default)]
pub struct Ear {
    last: Option<Id>,
    /// Redis' clock, and when it was read.
    clock: Option<(u64, Instant)>,
    /// Chains that were asked for lately.
    asked: HashSet<u64>,
    asked_at: Option<Instant>,
}

impl Ear {
    /// When an entry was said, by Redis' clock for those that were there before we listened.
    fn said_at(&self, id: Id, now: Instant) -> Instant {
        let Some((clock, read_at)) = self.clock else { return now };
        match clock.checked_sub(id.millis) {
            Some(age) if age > 0 => read_at.checked_sub(Duration::from_millis(age)).unwrap_or(read_at),
            _ => now,
        }
    }

    /// Whether to ask for a chain: not for the same one again and again.
    fn asks(&mut self, hash: u64, now: Instant) -> bool {
        if self.asked_at.is_none_or(|at| now.saturating_duration_since(at) > BLOCK) {
            self.asked.clear();
            self.asked_at = Some(now);
        }
        self.asked.len() < ASKED && self.asked.insert(hash)
    }
}

impl Exchange {
    /// Reads what was said before we listened, as far as it is still there.
    pub(super) async fn catch_up(&self, ear: &mut Ear, link: &mut Link) -> Result<(), Trouble> {
        let time = link.ask(&redis::cmd("TIME"), PATIENCE).await?;
        ear.clock = reply::time(&time).map(|millis| (millis, now()));
        let newest = self.page(link, None, 1).await?;
        let newest = reply::entries(&newest).first().map(|entry| entry.id);
        match (ear.last, newest) {
            // It was emptied, or is another than before: all there is, is new.
            (Some(last), newest) if newest.is_none_or(|newest| newest < last) => {
                ear.last = Some(Id::default());
            }
            (Some(_), _) => {}
            (None, newest) => {
                self.tail(ear, link, newest).await?;
                // Only now: what was cut off is to be read again.
                ear.last = Some(newest.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Takes in the tail of the stream, from old to new, as much of it as may be.
    async fn tail(&self, ear: &mut Ear, link: &mut Link, newest: Option<Id>) -> Result<(), Trouble> {
        let (mut pages, mut bytes, mut until) = (Vec::new(), 0, newest);
        while let Some(id) = until.filter(|_| bytes < TAIL) {
            let page = self.page(link, Some(id), PAGE).await?;
            let entries = reply::entries(&page);
            bytes += entries.iter().map(|entry| entry.bytes.len()).sum::<usize>();
            until = entries.last().and_then(|oldest| oldest.id.before()).filter(|_| entries.len() == PAGE);
            pages.push(page);
        }
        for page in pages.iter().rev() {
            let entries = reply::entries(page);
            self.take_in(ear, entries.into_iter().rev()).await;
        }
        self.publish();
        Ok(())
    }

    async fn page(&self, link: &mut Link, until: Option<Id>, count: usize) -> Result<Value, Trouble> {
        let until = until.map_or_else(|| "+".to_string(), |id| id.to_string());
        let mut command = redis::cmd("XREVRANGE");
        command.arg(&self.keys.stream).arg(until).arg("-").arg("COUNT").arg(count);
        link.ask(&command, PATIENCE).await
    }

    pub(super) async fn hear(
        &self,
        ear: &mut Ear,
        link: &mut Link,
    ) -> Result<std::convert::Infallible, Trouble> {
        loop {
            let start = now();
            let last = ear.last.unwrap_or_default().to_string();
            let mut command = redis::cmd("XREAD");
            command.arg("COUNT").arg(COUNT).arg("BLOCK").arg(BLOCK.as_millis() as u64);
            command.arg("STREAMS").arg(&self.keys.stream).arg(last);
            let answer = link.ask(&command, BLOCK + PATIENCE).await?;
            let entries = reply::read(&answer);
            if let Some(last) = entries.last() {
                let last = last.id;
                self.take_in(ear, entries.into_iter()).await;
                ear.last = Some(last);
                self.publish();
            }
            tokio::time::sleep(BREATH.saturating_sub(now().saturating_duration_since(start))).await;
        }
    }

    async fn take_in<'v>(&self, ear: &mut Ear, entries: impl Iterator<Item = Entry<'v>>) {
        for (number, entry) in entries.enumerate() {
            if number % AT_ONCE == AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
            match Message::decode(entry.bytes) {
                Ok(message) => self.listen_to(ear, &message, entry.id, entry.bytes.len()),
                Err(why) => observe::unreadable(&why),
            }
        }
    }

    fn listen_to(&self, ear: &mut Ear, message: &Message<'_>, id: Id, bytes: usize) {
        let now = now();
        let said_at = ear.said_at(id, now);
        if !self.siblings().hear(message, said_at, now) {
            return;
        }
        observe::heard(bytes);
        for learnt in &message.learnt {
            let placed = self.memory.learn(learnt.upstream, learnt.parent, &learnt.hashes, learnt.end);
            let hash = learnt.hashes.last().copied().or(learnt.parent);
            if let Some(hash) = hash.filter(|_| !placed) {
                self.ask_for(ear, message.balancer, learnt.upstream, hash, now);
            }
        }
        for bound in &message.bound {
            self.memory.bound(bound);
        }
        if message.members {
            self.members_news.store(true, Relaxed);
        }
        for ask in message.asks.iter().filter(|ask| ask.balancer == self.id) {
            self.say_whole(ask.upstream, ask.hash);
        }
    }

    /// A tail that nobody here can place: who said it, and is still there, is to say the chain whole.
    fn ask_for(&self, ear: &mut Ear, balancer: u64, upstream: &str, hash: u64, now: Instant) {
        observe::unplaced();
        if self.siblings().knows(balancer) && ear.asks(hash, now) {
            self.outbox.put(Event::Ask { balancer, upstream: upstream.into(), hash });
        }
    }

    fn say_whole(&self, upstream: &str, hash: u64) {
        // What requests have to say goes before; who asked will ask again.
        if let Some(chain) = self.memory.chain_to(upstream, hash).filter(|_| self.outbox.has_room()) {
            self.outbox.put(Event::learnt(upstream, None, &chain, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_before_is_as_old_as_redis_says() {
        let now = Instant::now();
        let mut ear = Ear::default();
        let id = |millis| Id { millis, number: 0 };
        assert_eq!(ear.said_at(id(5), now), now, "without a clock all is new");
        ear.clock = Some((10_000, now));
        let later = now + Duration::from_secs(7);
        let table = [(9_000, now - Duration::from_secs(1)), (10_000, later), (10_500, later)];
        for (millis, said) in table {
            assert_eq!(ear.said_at(id(millis), later), said, "{millis}");
        }
        assert!(ear.said_at(id(0), later) <= now);
    }

    #[test]
    fn a_chain_is_asked_for_once_in_a_while_and_not_too_many() {
        let now = Instant::now();
        let mut ear = Ear::default();
        assert!(ear.asks(1, now) && !ear.asks(1, now) && ear.asks(2, now));
        assert!(!ear.asks(1, now + BLOCK) && ear.asks(1, now + 2 * BLOCK));
        let asked = (10..5000).filter(|hash| ear.asks(*hash, now + 2 * BLOCK)).count();
        assert_eq!(asked, ASKED - 1);
    }
}
