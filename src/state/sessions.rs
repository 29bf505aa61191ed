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
pub(crate) struct SessionBinding {
    /// The fleet's id of the upstream.
    pub upstream: usize,
    /// The prompt tokens of the last request there.
    pub tokens: u64,
}

/// The sessions of this balancer.
#[derive(Debug)]
pub(crate) struct Sessions {
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
    pub(crate) const MAX_SESSIONS: usize = 1_000_000;

    /// Builds a table of about `limit` sessions, each kept for `ttl` milliseconds.
    pub(crate) fn new(limit: usize, ttl: u64) -> Self {
        Sessions::with_shards(limit, ttl, SHARD_COUNT)
    }

    fn with_shards(limit: usize, ttl: u64, shards: usize) -> Self {
        let part = limit.div_ceil(shards).min(NO_ENTRY as usize);
        let shards = (0..shards).map(|_| Mutex::new(SessionShard::new(part))).collect();
        Sessions { shards, ttl: AtomicU64::new(ttl) }
    }

    /// Sets the time to live, also for existing sessions.
    pub(crate) fn set_ttl(&self, millis: u64) {
        self.ttl.store(millis, Ordering::Relaxed);
    }

    /// Binds the session to the upstream of its latest request, which has `tokens`.
    pub(crate) fn bind(&self, key: u64, upstream: usize, tokens: u64, now: u64) {
        self.shard(key).bind(key, SessionBinding { upstream, tokens }, now);
    }

    /// Returns the binding of the session, unless it has expired.
    pub(crate) fn find(&self, key: u64, now: u64) -> Option<SessionBinding> {
        let entry = self.shard(key).entry(key)?;
        (now.saturating_sub(entry.at) <= self.ttl.load(Ordering::Relaxed)).then_some(entry.bound)
    }

    /// Undoes `bind` for a request that did not reach the upstream: restores the binding `before`, unless the
    /// session was bound to another upstream meanwhile.
    pub(crate) fn unbind(&self, key: u64, upstream: usize, before: Option<SessionBinding>) {
        self.shard(key).unbind(key, upstream, before);
    }

    /// Removes a session that has ended. Returns whether it was known.
    pub(crate) fn forget(&self, key: u64) -> bool {
        self.shard(key).forget(key)
    }

    /// Returns the number of sessions, including expired ones.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).places.len()).sum()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
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
mod tests;
