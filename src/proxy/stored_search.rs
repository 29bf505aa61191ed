//! Searches for stored responses among the upstreams, when nothing that the balancer knows tells where one
//! is: every upstream is asked.
//!
//! A client can ask for unknown ids as fast as it likes, so searches are bounded: requests for the same
//! response share one, at most `MAX_SEARCHES` run at a time, and that a response is nowhere is remembered
//! for `NOWHERE_FRESH`. A search ends when the last request that waits for it is dropped.
//!
//! Never: a choice of upstream, a search that outlives its requests.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use http::HeaderValue;
use tokio::time::Instant;

use super::own_answers::{self, Located};
use crate::fleet::{Fleet, Snapshot};

/// Searches that run at the same time.
const MAX_SEARCHES: usize = 64;

/// How long it is remembered that a response is nowhere. One that is made meanwhile is known to the balancer
/// that made it without a search.
const NOWHERE_FRESH: Duration = Duration::from_secs(1);

/// Responses of which it is remembered that they are nowhere.
const MAX_NOWHERE: usize = 4096;

type Search = BoxFuture<'static, Located>;

/// What is searched for: upstreams may answer differently to another key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SearchKey {
    pub id: String,
    /// The ids of the upstreams that are asked, each with the `authorization` that it is shown.
    pub upstreams: Vec<(usize, Option<HeaderValue>)>,
}

/// The searches of a balancer.
///
/// The lock is a plain mutex: it is held for a look at the tables, never across an await.
#[derive(Default)]
pub struct ResponseSearches(Mutex<Searches>);

#[derive(Default)]
struct Searches {
    running: HashMap<SearchKey, WeakShared<Search>>,
    /// The longest known first.
    nowhere: VecDeque<(Instant, SearchKey)>,
}

/// What is known when a search is asked for.
enum Begun {
    Known(Located),
    Running(Shared<Search>),
}

// === impl ResponseSearches ===

impl ResponseSearches {
    fn lock(&self) -> MutexGuard<'_, Searches> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks upstreams of `snapshot` for a response.
    pub async fn locate(&self, fleet: &Arc<Fleet>, snapshot: &Arc<Snapshot>, key: SearchKey) -> Located {
        let (fleet, snapshot, wanted) = (fleet.clone(), snapshot.clone(), key.clone());
        let search = async move { own_answers::locate_response(&fleet, &snapshot, &wanted).await };
        self.share(key, search.boxed()).await
    }

    /// Runs `search`, unless one for the same runs already, or its end is known.
    async fn share(&self, key: SearchKey, search: Search) -> Located {
        let begun = self.lock().begin(&key, search);
        let search = match begun {
            Begun::Known(located) => return located,
            Begun::Running(search) => search,
        };
        let located = search.await;
        if located == Located::Nowhere {
            self.lock().remember(key);
        }
        located
    }
}

// === impl Searches ===

impl Searches {
    fn begin(&mut self, key: &SearchKey, search: Search) -> Begun {
        while self.nowhere.front().is_some_and(|(since, _)| since.elapsed() >= NOWHERE_FRESH) {
            self.nowhere.pop_front();
        }
        if self.nowhere.iter().any(|(_, known)| known == key) {
            return Begun::Known(Located::Nowhere);
        }
        if let Some(running) = self.running.get(key).and_then(WeakShared::upgrade) {
            return Begun::Running(running);
        }
        self.running.retain(|_, running| running.upgrade().is_some());
        if self.running.len() >= MAX_SEARCHES {
            return Begun::Known(Located::Unsure);
        }
        let search = search.shared();
        self.running.extend(search.downgrade().map(|search| (key.clone(), search)));
        Begun::Running(search)
    }

    fn remember(&mut self, key: SearchKey) {
        self.running.remove(&key);
        if self.nowhere.iter().any(|(_, known)| *known == key) {
            return;
        }
        if self.nowhere.len() >= MAX_NOWHERE {
            self.nowhere.pop_front();
        }
        self.nowhere.push_back((Instant::now(), key));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    fn key(id: &str) -> SearchKey {
        SearchKey { id: id.into(), upstreams: Vec::new() }
    }

    fn search(count: &Arc<AtomicUsize>, found: Located) -> Search {
        let count = count.clone();
        let search = async move {
            count.fetch_add(1, Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            found
        };
        search.boxed()
    }

    #[tokio::test(start_paused = true)]
    async fn requests_for_one_response_share_a_search_and_its_end_is_remembered() {
        let (searches, count) = (ResponseSearches::default(), Arc::new(AtomicUsize::new(0)));
        let same = (0..9).map(|_| searches.share(key("a"), search(&count, Located::Nowhere)));
        let found = futures_util::future::join_all(same).await;
        assert!(found.iter().all(|located| *located == Located::Nowhere));
        assert_eq!(count.load(Relaxed), 1);
        assert_eq!(searches.share(key("a"), search(&count, Located::At(1))).await, Located::Nowhere);
        tokio::time::advance(NOWHERE_FRESH).await;
        assert_eq!(searches.share(key("a"), search(&count, Located::At(1))).await, Located::At(1));
        assert_eq!(count.load(Relaxed), 2);
        assert!(searches.lock().running.values().all(|search| search.upgrade().is_none()));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_so_many_run_and_one_that_is_dropped_counts_no_more() {
        let (searches, count) = (ResponseSearches::default(), Arc::new(AtomicUsize::new(0)));
        let many = (0..MAX_SEARCHES + 5).map(|number| {
            let search = search(&count, Located::At(number));
            searches.share(key(&number.to_string()), search)
        });
        let second = Duration::from_millis(100);
        let dropped = tokio::time::timeout(second, futures_util::future::join_all(many)).await;
        assert!(dropped.is_err());
        assert_eq!(count.load(Relaxed), MAX_SEARCHES);
        assert_eq!(searches.share(key("next"), search(&count, Located::At(1))).await, Located::At(1));
    }
}
