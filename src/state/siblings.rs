//! What is remembered, as it is said to siblings and heard from them. They call an upstream by its name, and
//! a session by its key in hexadecimal digits.
//!
//! A request that never arrives is taken back here and not there: for a while siblings believe too much of
//! one upstream, which costs one of them a prefill at the most.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::State;
use super::exchange::{self, Binding, Event};
use super::local::Receipt;
use super::responses::Made;
use super::sessions::Bound;
use crate::pick;

impl State {
    // === saying ===

    pub(super) fn say_learnt(&self, chain: &[u64], receipt: &Receipt, id: usize) {
        let Some(outbox) = &self.outbox else { return };
        let (parent, new) = receipt.news(chain);
        if parent.is_none() && new.is_empty() {
            return;
        }
        if let Some(name) = self.places.load().name(id) {
            outbox.put(Event::learnt(name, parent, new, receipt.end()));
        }
    }

    /// Said to siblings only: a balancer that starts hears the latest of the stream, nobody waits for Redis
    /// to find a session, and keys that nobody reads would fill it.
    pub(super) fn say_bound(&self, key: u64, bound: Bound) {
        let Some(outbox) = &self.outbox else { return };
        if let Some(name) = self.places.load().name(bound.upstream) {
            let (key, upstream) = (format!("{key:x}").into(), name.into());
            outbox.put(Event::Bound {
                kind: Binding::Session,
                key,
                upstream,
                number: bound.tokens,
                keep: false,
            });
        }
    }

    // === hearing ===

    /// A sibling sent an upstream a chain; `false` when nobody here holds what it goes on from. What is said
    /// of upstreams that are not there says nothing.
    pub fn hear_learnt(&self, name: &str, parent: Option<u64>, hashes: &[u64], end: Option<u64>) -> bool {
        let places = self.places.load();
        let Some(slot) = places.id(name).and_then(|id| places.slot(id)).filter(|_| self.remembers) else {
            return true;
        };
        match parent {
            Some(parent) => self.index.learn_after(parent, hashes, end, slot).is_some(),
            None => {
                self.index.learn(hashes, end, slot);
                true
            }
        }
    }

    /// The whole chain up to a block that the upstream holds.
    pub fn chain_to(&self, name: &str, hash: u64) -> Option<Vec<u64>> {
        let places = self.places.load();
        self.index.chain_to(hash, places.slot(places.id(name)?)?)
    }

    /// A sibling has had a session's request, or knows who made a response.
    pub fn hear_bound(&self, bound: &exchange::Bound<'_>, now: Instant) {
        let Some(id) = self.places.load().id(bound.upstream) else { return };
        match (bound.kind, u64::from_str_radix(bound.key, 16)) {
            (Binding::Session, Ok(key)) => self.sessions.bind(key, id, bound.number, self.millis(now)),
            (Binding::Session, Err(_)) => {}
            (Binding::Response, _) => {
                self.bind_response(bound.key, Made { upstream: id, name: bound.number }, now);
            }
        }
    }

    /// What is known of siblings' requests is so old, in seconds.
    pub fn set_siblings_age(&self, seconds: f64) {
        self.siblings_age.store((seconds * 1e6) as u64, Relaxed);
    }

    /// The most that a cost is raised by at random: see `pick::Seed`.
    pub fn haze(&self) -> f64 {
        let age = self.siblings_age.load(Relaxed) as f64 / 1e6;
        pick::haze(age)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::exchange::{Message, Outbox};
    use super::super::{Asked, Present, State};
    use super::*;
    use crate::config::types::PrefixIndex;
    use crate::prompt::session::{Session, Source};

    const HOUR: Duration = Duration::from_secs(3600);

    /// Two balancers that call the same upstreams by other numbers.
    fn pair() -> [(Arc<State>, Arc<Outbox>); 2] {
        [[0, 1], [5, 3]].map(|ids| {
            let outbox = Arc::<Outbox>::default();
            let config = PrefixIndex { blocks: 1000, block_bytes: 100 };
            let state = State::among(config, HOUR, 7, Some(outbox.clone()));
            let names = ["a", "b"].into_iter().zip(ids);
            let present = |(name, id)| Present { id, name, incarnation: 0, cache_tokens: None, model: None };
            state.follow(&names.map(present).collect::<Vec<_>>());
            (state, outbox)
        })
    }

    fn asked(chain: &[u64], session: Option<u64>) -> Asked {
        let session = session.map(|key| Session { key, source: Source::Header });
        Asked { chain: chain.to_vec(), seen: 100 * chain.len() as u64, session, ..Asked::default() }
    }

    /// Carries what one has to say to the other; how many blocks that were.
    fn carry(from: &Outbox, to: &State) -> usize {
        let events = from.take(usize::MAX);
        let mut message = Message::default();
        events.iter().for_each(|event| event.say(&mut message));
        for learnt in &message.learnt {
            assert!(to.hear_learnt(learnt.upstream, learnt.parent, &learnt.hashes, learnt.end));
        }
        message.bound.iter().for_each(|bound| to.hear_bound(bound, Instant::now()));
        message.learnt.iter().map(|learnt| learnt.hashes.len()).sum()
    }

    #[test]
    fn a_conversation_is_known_to_both_by_its_tails() {
        let [(one, ours), (other, theirs)] = pair();
        one.learn(&asked(&[1, 2, 3], Some(9)), 1, Instant::now());
        assert_eq!(carry(&ours, &other), 3);
        assert_eq!(other.chain_to("b", 3), Some(vec![1, 2, 3]));
        assert_eq!(other.sessions.find(9, 0).map(|bound| bound.upstream), Some(3));
        other.learn(&asked(&[1, 2, 3, 4], Some(9)), 3, Instant::now());
        assert_eq!(carry(&theirs, &one), 1, "one block is new");
        assert_eq!((one.chain_to("b", 4), one.chain_to("a", 4)), (Some(vec![1, 2, 3, 4]), None));
        one.learn_rest(&asked(&[1, 2, 3, 4, 5, 6], None), 4, 1, None);
        assert_eq!(carry(&ours, &other), 2);
        assert_eq!(other.chain_to("b", 6), Some(vec![1, 2, 3, 4, 5, 6]));
    }

    #[test]
    fn what_is_said_of_strangers_says_nothing() {
        let [(one, ours), _] = pair();
        assert!(one.hear_learnt("x", Some(7), &[8], None), "there is nothing to ask for");
        assert!(!one.hear_learnt("a", Some(7), &[8], None));
        let bound = |key, kind| exchange::Bound { kind, key, upstream: "a", number: 5 };
        one.hear_bound(&bound("no number", Binding::Session), Instant::now());
        one.hear_bound(&exchange::Bound { upstream: "x", ..bound("a", Binding::Response) }, Instant::now());
        assert!(one.sessions.is_empty() && one.responses.is_empty());
        // Nobody has told what this one is called.
        one.learn(&asked(&[1], None), 17, Instant::now());
        assert_eq!(ours.take(usize::MAX), []);
    }

    #[test]
    fn a_response_is_known_to_both_and_to_be_found_by_its_key() {
        let [(one, ours), (other, _)] = pair();
        one.keep_response("mine", Made { upstream: 1, name: 7 }, Instant::now());
        let events = ours.take(usize::MAX);
        assert!(matches!(&events[..], [Event::Bound { kind: Binding::Response, keep: true, .. }]));
        let mut message = Message::default();
        events.iter().for_each(|event| event.say(&mut message));
        message.bound.iter().for_each(|bound| other.hear_bound(bound, Instant::now()));
        assert_eq!(other.response("mine", Instant::now()), Some(Made { upstream: 3, name: 7 }));
        assert!(other.sessions.is_empty());
    }

    #[test]
    fn haze_rises_with_the_age_of_what_is_known() {
        let [(state, _), _] = pair();
        for (age, haze) in [(0.0, 0.0), (0.02, 0.008), (0.25, 0.1), (0.5, 0.2), (3.0, 0.2)] {
            state.set_siblings_age(age);
            assert!((state.haze() - haze).abs() < 1e-9, "{age}");
        }
    }
}
