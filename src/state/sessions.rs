//! Which upstream had a session last, and how many tokens of it that upstream has seen.
//!
//! A session is a key of 64 bits ([`prompt::session`](crate::prompt::session)); an upstream is the fleet's
//! id of it, which means something in this process alone: messages to other balancers carry names. An id is
//! never reused, so a session whose upstream has left is bound to one that is no candidate, until its next
//! request binds it anew.
//!
//! Time comes in as milliseconds that never go back. A session is forgotten when it was silent for longer
//! than its time to live, or, when there are too many, as the one that was silent longest.
//!
//! The sessions are spread over shards by their keys, each with its own lock that is held for some
//! hundred nanoseconds: two requests hardly ever meet at one. Each shard takes its part of the limit.
//!
//! Never: a clock, a task, more memory than the limit says (some 100 bytes a session).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Enough that threads do not meet, and a power of two.
const SHARDS: usize = 64;

/// No place.
const NIL: u32 = u32::MAX;

/// Where a session was last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionBinding {
    /// The fleet's id of the upstream.
    pub upstream: usize,
    /// The prompt tokens of its last request there, and what was generated, if that was told.
    pub tokens: u64,
}

/// The sessions of this balancer.
#[derive(Debug)]
pub struct Sessions {
    shards: Box<[Mutex<SessionShard>]>,
    /// Milliseconds.
    ttl: AtomicU64,
}

/// Sessions in the order of their last requests.
#[derive(Debug)]
struct SessionShard {
    limit: usize,
    places: HashMap<u64, u32>,
    entries: Vec<SessionEntry>,
    /// Places of forgotten sessions, which are in no list.
    vacant: Vec<u32>,
    /// Of the list: the one that was bound last, and the one whose last request is the longest ago.
    newest: u32,
    oldest: u32,
}

#[derive(Clone, Copy, Debug)]
struct SessionEntry {
    key: u64,
    bound: SessionBinding,
    at: u64,
    newer: u32,
    older: u32,
}

// === impl Sessions ===

impl Sessions {
    /// The most sessions that are kept when nothing else is said.
    pub const LIMIT: usize = 1_000_000;

    /// Keeps about `limit` sessions, each for `ttl` milliseconds.
    pub fn new(limit: usize, ttl: u64) -> Self {
        Sessions::with_shards(limit, ttl, SHARDS)
    }

    fn with_shards(limit: usize, ttl: u64, shards: usize) -> Self {
        let part = limit.div_ceil(shards).min(NIL as usize);
        let shards = (0..shards).map(|_| Mutex::new(SessionShard::new(part))).collect();
        Sessions { shards, ttl: AtomicU64::new(ttl) }
    }

    /// Another time to live, also for the sessions that are there.
    pub fn set_ttl(&self, millis: u64) {
        self.ttl.store(millis, Ordering::Relaxed);
    }

    /// A request of the session goes to this upstream, with so many tokens.
    pub fn bind(&self, key: u64, upstream: usize, tokens: u64, now: u64) {
        self.shard(key).bind(key, SessionBinding { upstream, tokens }, now);
    }

    /// Where the session was last, unless that is too long ago.
    pub fn find(&self, key: u64, now: u64) -> Option<SessionBinding> {
        let entry = self.shard(key).entry(key)?;
        (now.saturating_sub(entry.at) <= self.ttl.load(Ordering::Relaxed)).then_some(entry.bound)
    }

    /// The request did not reach the upstream after all: unless the session has gone on meanwhile, it is as
    /// it was `before`.
    pub fn unbind(&self, key: u64, upstream: usize, before: Option<SessionBinding>) {
        self.shard(key).unbind(key, upstream, before);
    }

    /// The session has ended: its next request is one of a new session. Returns whether it was known.
    pub fn forget(&self, key: u64) -> bool {
        self.shard(key).forget(key)
    }

    /// How many are kept, those included that would no longer be found.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).places.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, SessionShard> {
        // Keys are hashes: their upper bits are as good as any.
        let place = (key >> 48) as usize % self.shards.len();
        lock(&self.shards[place])
    }
}

/// A thread that panicked held the lock between two whole states, or lost one session.
fn lock(shard: &Mutex<SessionShard>) -> MutexGuard<'_, SessionShard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Shard ===

impl SessionShard {
    fn new(limit: usize) -> Self {
        SessionShard {
            limit,
            places: HashMap::new(),
            entries: Vec::new(),
            vacant: Vec::new(),
            newest: NIL,
            oldest: NIL,
        }
    }

    fn entry(&self, key: u64) -> Option<SessionEntry> {
        self.places.get(&key).map(|place| self.entries[*place as usize])
    }

    fn bind(&mut self, key: u64, bound: SessionBinding, now: u64) {
        if self.limit == 0 {
            return;
        }
        let place = match self.places.get(&key) {
            Some(place) => {
                let place = *place;
                self.unlink(place);
                place
            }
            None => {
                let place = self.free();
                self.places.insert(key, place);
                place
            }
        };
        self.entries[place as usize] = SessionEntry { key, bound, at: now, newer: NIL, older: NIL };
        self.link(place);
    }

    fn unbind(&mut self, key: u64, upstream: usize, before: Option<SessionBinding>) {
        let Some(place) = self.places.get(&key).copied() else { return };
        let entry = &mut self.entries[place as usize];
        if entry.bound.upstream == upstream {
            // Its place in the order stays: no hole is left in the list.
            entry.bound = before.unwrap_or(SessionBinding { tokens: 0, ..entry.bound });
        }
    }

    fn forget(&mut self, key: u64) -> bool {
        let Some(place) = self.places.remove(&key) else { return false };
        self.unlink(place);
        self.vacant.push(place);
        true
    }

    /// A place for one more session; when all are taken, that of the oldest.
    fn free(&mut self) -> u32 {
        if let Some(place) = self.vacant.pop() {
            return place;
        }
        if self.entries.len() < self.limit {
            let place = self.entries.len() as u32;
            let bound = SessionBinding { upstream: 0, tokens: 0 };
            self.entries.push(SessionEntry { key: 0, bound, at: 0, newer: NIL, older: NIL });
            return place;
        }
        let oldest = self.oldest;
        self.unlink(oldest);
        self.places.remove(&self.entries[oldest as usize].key);
        oldest
    }

    fn unlink(&mut self, place: u32) {
        let SessionEntry { newer, older, .. } = self.entries[place as usize];
        match self.entries.get_mut(newer as usize) {
            Some(entry) => entry.older = older,
            None => self.newest = older,
        }
        match self.entries.get_mut(older as usize) {
            Some(entry) => entry.newer = newer,
            None => self.oldest = newer,
        }
    }

    /// Puts it where the newest is.
    fn link(&mut self, place: u32) {
        let before = std::mem::replace(&mut self.newest, place);
        self.entries[place as usize].older = before;
        match self.entries.get_mut(before as usize) {
            Some(entry) => entry.newer = place,
            None => self.oldest = place,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3_600_000;

    /// Spreads small numbers as a hash would.
    fn key(number: u64) -> u64 {
        number.wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }

    fn bound(upstream: usize, tokens: u64) -> Option<SessionBinding> {
        Some(SessionBinding { upstream, tokens })
    }

    #[test]
    fn a_session_is_where_it_was_last_until_it_was_silent_for_too_long() {
        let sessions = Sessions::new(100, HOUR);
        assert_eq!(sessions.find(1, 0), None);
        sessions.bind(1, 7, 500, 10);
        sessions.bind(2, 8, 600, 10);
        sessions.bind(1, 9, 700, 20);
        assert_eq!(sessions.find(1, 20 + HOUR), bound(9, 700));
        assert_eq!(sessions.find(1, 21 + HOUR), None);
        assert_eq!(sessions.find(2, 10 + HOUR), bound(8, 600));
        assert_eq!(sessions.len(), 2);
        sessions.set_ttl(5);
        assert_eq!((sessions.find(1, 25), sessions.find(1, 26)), (bound(9, 700), None));
        assert_eq!(sessions.find(1, 0), bound(9, 700), "a moment that was taken before it was bound");
    }

    #[test]
    fn what_did_not_arrive_is_taken_back() {
        let sessions = Sessions::new(100, HOUR);
        sessions.bind(1, 7, 500, 0);
        sessions.bind(1, 8, 900, 1);
        sessions.unbind(1, 8, bound(7, 500));
        assert_eq!(sessions.find(1, 1), bound(7, 500));
        sessions.unbind(1, 8, None);
        assert_eq!(sessions.find(1, 1), bound(7, 500), "it has gone on elsewhere");
        sessions.unbind(1, 7, None);
        assert_eq!(sessions.find(1, 1), bound(7, 0), "nothing is there to be lost");
        sessions.unbind(2, 7, None);
        assert_eq!(sessions.find(2, 1), None);
    }

    #[test]
    fn a_forgotten_session_is_a_new_one() {
        let sessions = Sessions::new(100, HOUR);
        sessions.bind(1, 7, 500, 0);
        sessions.bind(2, 8, 600, 0);
        assert_eq!((sessions.forget(1), sessions.forget(3)), (true, false));
        assert_eq!((sessions.find(1, 0), sessions.find(2, 0)), (None, bound(8, 600)));
        sessions.unbind(1, 7, bound(9, 100));
        assert_eq!((sessions.find(1, 0), sessions.len()), (None, 1), "a request that was still on its way");
        sessions.bind(1, 6, 10, 1);
        assert_eq!((sessions.find(1, 1), sessions.len()), (bound(6, 10), 2));
    }

    #[test]
    fn nothing_is_kept_without_room() {
        let sessions = Sessions::new(0, HOUR);
        sessions.bind(1, 7, 500, 0);
        assert_eq!((sessions.find(1, 0), sessions.is_empty()), (None, true));
    }

    #[test]
    fn there_are_never_more_than_the_limit_and_the_spread_uses_it() {
        let sessions = Sessions::new(64_000, HOUR);
        (0..200_000).for_each(|n| sessions.bind(key(n), 1, n, n));
        assert!((60_000..=64_000).contains(&sessions.len()), "{}", sessions.len());
        assert!((190_000..200_000).all(|n| sessions.find(key(n), n) == bound(1, n)));
        assert!((0..100_000).all(|n| sessions.find(key(n), n).is_none()));
    }

    #[test]
    fn many_threads_find_what_they_have_bound() {
        let sessions = Arc::new(Sessions::new(100_000, HOUR));
        let run = |thread: u64| {
            let sessions = sessions.clone();
            move || {
                for round in 0..2000 {
                    let mine = key(thread * 1000 + round % 100);
                    sessions.bind(mine, thread as usize, round, round);
                    assert_eq!(sessions.find(mine, round), bound(thread as usize, round));
                    // Every reader sees complete entries, whichever thread wrote them.
                    sessions.bind(key(7), thread as usize, thread * 3, round);
                    let shared = sessions.find(key(7), round).unwrap();
                    assert_eq!(shared.tokens, shared.upstream as u64 * 3);
                }
            }
        };
        let threads: Vec<_> = (1..9).map(|thread| std::thread::spawn(run(thread))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(sessions.len(), 801);
    }

    /// The same as a list, in the order of the last requests.
    #[derive(Default)]
    struct SessionModel(Vec<(u64, SessionBinding, u64)>);

    impl SessionModel {
        fn bind(&mut self, key: u64, bound: SessionBinding, now: u64, limit: usize) {
            self.0.retain(|(known, ..)| *known != key);
            self.0.push((key, bound, now));
            if self.0.len() > limit {
                self.0.remove(0);
            }
        }

        fn find(&self, key: u64, now: u64, ttl: u64) -> Option<SessionBinding> {
            let (_, bound, at) = self.0.iter().find(|(known, ..)| *known == key)?;
            (now - at <= ttl).then_some(*bound)
        }
    }

    proptest! {
        #[test]
        fn a_shard_keeps_what_a_list_keeps(
            limit in 1usize..8,
            ttl in 0u64..30,
            calls in prop::collection::vec((0u64..12, 0usize..4, 0u64..1000, 0u64..5, 0..5), 0..120),
        ) {
            let sessions = Sessions::with_shards(limit, ttl, 1);
            let mut model = SessionModel::default();
            let mut now = 0;
            for (number, upstream, tokens, pause, call) in calls {
                now += pause;
                if call == 0 {
                    let before = model.find(key(number), now, ttl);
                    sessions.unbind(key(number), upstream, before);
                    let entry = model.0.iter_mut().find(|(known, ..)| *known == key(number));
                    if let Some((_, bound, _)) = entry.filter(|(_, bound, _)| bound.upstream == upstream) {
                        *bound = before.unwrap_or(SessionBinding { upstream, tokens: 0 });
                    }
                } else if call == 1 {
                    sessions.forget(key(number));
                    model.0.retain(|(known, ..)| *known != key(number));
                } else {
                    sessions.bind(key(number), upstream, tokens, now);
                    model.bind(key(number), SessionBinding { upstream, tokens }, now, limit);
                }
                prop_assert_eq!(sessions.len(), model.0.len());
                for number in 0..12 {
                    let expected = model.find(key(number), now, ttl);
                    prop_assert_eq!(sessions.find(key(number), now), expected);
                }
            }
        }
    }
}
