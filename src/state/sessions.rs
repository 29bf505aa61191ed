//! The last upstream of each session, and the tokens of the session's last request there.
//!
//! A session is identified by a key of 64 bits ([`prompt::session`](crate::prompt::session)), an upstream by
//! the fleet's id, which is valid in this process only: messages to siblings carry names. An id is never
//! reused, so a session whose upstream has left stays bound to an id that is no candidate until its next
//! request.
//!
//! Time comes in as milliseconds that never decrease. A session expires after its time to live without
//! requests; beyond the limit, the session that was idle longest is evicted.
//!
//! The sessions are spread over shards by their keys. Each shard has its own lock, held for some hundred
//! nanoseconds, so that two requests rarely contend, and its part of the limit.
//!
//! Pure: no clock, no task. The memory is bounded by the limit, at some 100 bytes a session.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of shards: enough that threads rarely contend, and a power of two.
const SHARD_COUNT: usize = 64;

/// The end of the list.
const NO_ENTRY: u32 = u32::MAX;

/// The last upstream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionBinding {
    /// The fleet's id of the upstream.
    pub upstream: usize,
    /// The prompt tokens of the last request there.
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
    /// The places of forgotten sessions, which are not in the list.
    vacant: Vec<u32>,
    /// The most recently bound session.
    newest: u32,
    /// The session that was idle longest.
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
    /// The largest number of sessions of a balancer.
    pub const MAX_SESSIONS: usize = 1_000_000;

    /// Builds a table of about `limit` sessions, each kept for `ttl` milliseconds.
    pub fn new(limit: usize, ttl: u64) -> Self {
        Sessions::with_shards(limit, ttl, SHARD_COUNT)
    }

    fn with_shards(limit: usize, ttl: u64, shards: usize) -> Self {
        let part = limit.div_ceil(shards).min(NO_ENTRY as usize);
        let shards = (0..shards).map(|_| Mutex::new(SessionShard::new(part))).collect();
        Sessions { shards, ttl: AtomicU64::new(ttl) }
    }

    /// Sets the time to live, also for existing sessions.
    pub fn set_ttl(&self, millis: u64) {
        self.ttl.store(millis, Ordering::Relaxed);
    }

    /// Binds the session to the upstream of its latest request, which has `tokens`.
    pub fn bind(&self, key: u64, upstream: usize, tokens: u64, now: u64) {
        self.shard(key).bind(key, SessionBinding { upstream, tokens }, now);
    }

    /// Returns the binding of the session, unless it has expired.
    pub fn find(&self, key: u64, now: u64) -> Option<SessionBinding> {
        let entry = self.shard(key).entry(key)?;
        (now.saturating_sub(entry.at) <= self.ttl.load(Ordering::Relaxed)).then_some(entry.bound)
    }

    /// Undoes `bind` for a request that did not reach the upstream: restores the binding `before`, unless the
    /// session was bound to another upstream meanwhile.
    pub fn unbind(&self, key: u64, upstream: usize, before: Option<SessionBinding>) {
        self.shard(key).unbind(key, upstream, before);
    }

    /// Removes a session that has ended. Returns whether it was known.
    pub fn forget(&self, key: u64) -> bool {
        self.shard(key).forget(key)
    }

    /// Returns the number of sessions, including expired ones.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).places.len()).sum()
    }

    /// Whether there are no sessions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, SessionShard> {
        // Keys are hashes, so the upper bits are evenly distributed.
        let place = (key >> 48) as usize % self.shards.len();
        lock(&self.shards[place])
    }
}

/// Locks a shard. A thread that panicked with the lock held has lost at most one session.
fn lock(shard: &Mutex<SessionShard>) -> MutexGuard<'_, SessionShard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl SessionShard ===

impl SessionShard {
    fn new(limit: usize) -> Self {
        SessionShard {
            limit,
            places: HashMap::new(),
            entries: Vec::new(),
            vacant: Vec::new(),
            newest: NO_ENTRY,
            oldest: NO_ENTRY,
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
        self.entries[place as usize] = SessionEntry { key, bound, at: now, newer: NO_ENTRY, older: NO_ENTRY };
        self.link(place);
    }

    fn unbind(&mut self, key: u64, upstream: usize, before: Option<SessionBinding>) {
        let Some(place) = self.places.get(&key).copied() else { return };
        let entry = &mut self.entries[place as usize];
        if entry.bound.upstream == upstream {
            // The place in the order stays.
            entry.bound = before.unwrap_or(SessionBinding { tokens: 0, ..entry.bound });
        }
    }

    fn forget(&mut self, key: u64) -> bool {
        let Some(place) = self.places.remove(&key) else { return false };
        self.unlink(place);
        self.vacant.push(place);
        true
    }

    /// Returns a place for one more session; when the shard is full, evicts the oldest.
    fn free(&mut self) -> u32 {
        if let Some(place) = self.vacant.pop() {
            return place;
        }
        if self.entries.len() < self.limit {
            let place = self.entries.len() as u32;
            let bound = SessionBinding { upstream: 0, tokens: 0 };
            self.entries.push(SessionEntry { key: 0, bound, at: 0, newer: NO_ENTRY, older: NO_ENTRY });
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

    /// Links the entry as the newest.
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
    fn finds_the_last_upstream_of_a_session_until_it_expires() {
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
        assert_eq!(sessions.find(1, 0), bound(9, 700), "a time before the session was bound");
    }

    #[test]
    fn restores_the_previous_binding_when_a_request_did_not_arrive() {
        let sessions = Sessions::new(100, HOUR);
        sessions.bind(1, 7, 500, 0);
        sessions.bind(1, 8, 900, 1);
        sessions.unbind(1, 8, bound(7, 500));
        assert_eq!(sessions.find(1, 1), bound(7, 500));
        sessions.unbind(1, 8, None);
        assert_eq!(sessions.find(1, 1), bound(7, 500), "the session was bound elsewhere meanwhile");
        sessions.unbind(1, 7, None);
        assert_eq!(sessions.find(1, 1), bound(7, 0), "no tokens are held there");
        sessions.unbind(2, 7, None);
        assert_eq!(sessions.find(2, 1), None);
    }

    #[test]
    fn a_forgotten_session_starts_anew() {
        let sessions = Sessions::new(100, HOUR);
        sessions.bind(1, 7, 500, 0);
        sessions.bind(2, 8, 600, 0);
        assert_eq!((sessions.forget(1), sessions.forget(3)), (true, false));
        assert_eq!((sessions.find(1, 0), sessions.find(2, 0)), (None, bound(8, 600)));
        sessions.unbind(1, 7, bound(9, 100));
        assert_eq!((sessions.find(1, 0), sessions.len()), (None, 1), "a request that was in flight");
        sessions.bind(1, 6, 10, 1);
        assert_eq!((sessions.find(1, 1), sessions.len()), (bound(6, 10), 2));
    }

    #[test]
    fn keeps_no_session_with_a_limit_of_zero() {
        let sessions = Sessions::new(0, HOUR);
        sessions.bind(1, 7, 500, 0);
        assert_eq!((sessions.find(1, 0), sessions.is_empty()), (None, true));
    }

    #[test]
    fn fills_the_limit_and_never_exceeds_it() {
        let sessions = Sessions::new(64_000, HOUR);
        (0..200_000).for_each(|n| sessions.bind(key(n), 1, n, n));
        assert!((60_000..=64_000).contains(&sessions.len()), "{}", sessions.len());
        assert!((190_000..200_000).all(|n| sessions.find(key(n), n) == bound(1, n)));
        assert!((0..100_000).all(|n| sessions.find(key(n), n).is_none()));
    }

    #[test]
    fn threads_find_the_sessions_that_they_bound() {
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

    /// The sessions as a list, in the order of their last requests.
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
