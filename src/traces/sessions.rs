//! A cache of the session settings that operators have set, in front of the store: a request must not wait
//! for a database because of a session without settings.
//!
//! Never: an unlimited number of sessions, a lock across an await.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::record::SessionSettings;

/// The most sessions that are known at a time; the oldest are forgotten first.
const MAX_SESSIONS: usize = 100_000;

/// The longest use of an entry from a store that siblings write to.
const MAX_SHARED_AGE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
struct RegisteredSession {
    /// `None`: the store has none.
    settings: Option<Arc<SessionSettings>>,
    read_at: Instant,
    /// The number of its place in the order.
    place: u64,
}

#[derive(Default)]
struct RegistryState {
    sessions: HashMap<Box<str>, RegisteredSession>,
    /// In the order of their first use, with the numbers of their places. A session that was removed leaves
    /// its place behind, and has another one when it comes again.
    order: VecDeque<(Box<str>, u64)>,
    next_place: u64,
}

/// The answer to a lookup.
#[derive(Clone, Debug)]
pub(super) enum KnownSettings {
    /// As they are now; `None`: the session was not made by the API.
    Current(Option<Arc<SessionSettings>>),
    /// To be read from the store; what was read before may be out of date.
    Outdated(Option<Arc<SessionSettings>>),
}

/// The settings of sessions.
pub(super) struct SessionRegistry {
    /// Held for a lookup or an insertion.
    state: Mutex<RegistryState>,
    max_sessions: usize,
    /// Other balancers write to the store, too.
    is_shared: bool,
    /// The store remembers sessions that this process has never seen.
    is_durable: bool,
    /// A session was made. It stays so.
    has_any: AtomicBool,
    /// Sessions were forgotten because there were too many: the store may know them.
    has_evicted: AtomicBool,
}

impl SessionRegistry {
    pub(super) fn new(is_durable: bool, is_shared: bool) -> Self {
        SessionRegistry {
            state: Mutex::default(),
            max_sessions: MAX_SESSIONS,
            is_shared,
            is_durable,
            has_any: AtomicBool::new(false),
            has_evicted: AtomicBool::new(false),
        }
    }

    /// Whether there may be sessions that the API has made.
    pub(super) fn may_have_any(&self) -> bool {
        self.is_durable || self.has_any.load(Ordering::Acquire)
    }

    /// Looks up the settings of a session.
    pub(super) fn get(&self, id: &str, now: Instant) -> KnownSettings {
        match self.lock().sessions.get(id) {
            None if self.is_durable || self.has_evicted.load(Ordering::Acquire) => {
                KnownSettings::Outdated(None)
            }
            None => KnownSettings::Current(None),
            Some(known) => {
                let settings = known.settings.clone();
                let is_old = self.is_shared && now.saturating_duration_since(known.read_at) > MAX_SHARED_AGE;
                if is_old { KnownSettings::Outdated(settings) } else { KnownSettings::Current(settings) }
            }
        }
    }

    /// Keeps the settings of a session; `None`: the API has not created it.
    pub(super) fn put(&self, id: &str, settings: Option<Arc<SessionSettings>>, now: Instant) {
        self.has_any.fetch_or(settings.is_some(), Ordering::AcqRel);
        let mut state = self.lock();
        let RegistryState { sessions, order, next_place } = &mut *state;
        match sessions.get_mut(id) {
            Some(known) => (known.settings, known.read_at) = (settings, now),
            None => {
                let place = *next_place;
                *next_place += 1;
                sessions.insert(id.into(), RegisteredSession { settings, read_at: now, place });
                order.push_back((id.into(), place));
            }
        }
        let stands = |sessions: &HashMap<Box<str>, RegisteredSession>, id: &str, place: u64| {
            sessions.get(id).is_some_and(|known| known.place == place)
        };
        while sessions.len() > self.max_sessions {
            let Some((oldest, place)) = order.pop_front() else { break };
            if stands(sessions, &oldest, place) {
                sessions.remove(&oldest);
                self.has_evicted.store(true, Ordering::Release);
            }
        }
        // Both stay within twice the limit.
        if order.len() > 2 * self.max_sessions {
            order.retain(|(id, place)| stands(sessions, id, *place));
        }
    }

    /// Forgets a session that was deleted.
    pub(super) fn remove(&self, id: &str) {
        self.lock().sessions.remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, RegistryState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(id: &str) -> Option<Arc<SessionSettings>> {
        Some(Arc::new(SessionSettings { session_id: id.into(), ..SessionSettings::default() }))
    }

    fn is_current(registry: &SessionRegistry, id: &str, now: Instant) -> bool {
        matches!(registry.get(id, now), KnownSettings::Current(_))
    }

    #[test]
    fn entries_of_a_shared_store_are_read_again() {
        let now = Instant::now();
        for (durable, shared, unknown, young, old) in [
            (false, false, true, true, true),
            (true, false, false, true, true),
            (true, true, false, true, false),
        ] {
            let registry = SessionRegistry::new(durable, shared);
            assert_eq!(is_current(&registry, "a", now), unknown);
            registry.put("a", settings("a"), now);
            assert_eq!(is_current(&registry, "a", now + Duration::from_secs(1)), young);
            assert_eq!(is_current(&registry, "a", now + Duration::from_secs(3)), old);
            registry.remove("a");
            assert!(!matches!(registry.get("a", now), KnownSettings::Current(Some(_))));
        }
    }

    #[test]
    fn the_oldest_sessions_are_forgotten_first() {
        let registry = SessionRegistry { max_sessions: 3, ..SessionRegistry::new(false, false) };
        let now = Instant::now();
        for id in 0..10 {
            registry.put(&id.to_string(), settings("x"), now);
            registry.remove(&(id * 2).to_string());
        }
        for id in 0..100 {
            registry.put(&id.to_string(), settings("x"), now);
        }
        assert!(matches!(registry.get("96", now), KnownSettings::Outdated(None)), "the store may know it");
        let is_known = |id: &str| matches!(registry.get(id, now), KnownSettings::Current(Some(_)));
        assert!(is_known("99") && is_known("97") && !is_known("96"));
        assert!(registry.lock().order.len() <= 6);
    }

    /// Each of its names stayed in the order for ever, and was searched at every insertion.
    #[test]
    fn a_session_that_comes_again_and_again_has_one_place() {
        let registry = SessionRegistry { max_sessions: 3, ..SessionRegistry::new(false, false) };
        let now = Instant::now();
        for _ in 0..100 {
            registry.remove("a");
            registry.put("b", settings("b"), now);
            registry.put("a", settings("a"), now);
        }
        assert!(registry.lock().order.len() <= 6);
        for id in ["c", "d"] {
            registry.put(id, settings(id), now);
        }
        let is_known = |id: &str| matches!(registry.get(id, now), KnownSettings::Current(Some(_)));
        assert!(is_known("a") && !is_known("b"), "the place is that of the last time");
    }
}
