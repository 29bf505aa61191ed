//! Searches the upstreams for stored responses whose place no other source reports: requests the response
//! from every upstream.
//!
//! A client can send unknown ids at any rate, so searches are bounded: requests for the same response share
//! one search, at most `MAX_SEARCHES` run at a time, and a failed search is remembered for
//! `MAX_NOWHERE_AGE`. A search ends when the last request that waits for it is dropped.
//!
//! Never: choose an upstream, run a search without a request.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http::{HeaderValue, Request, StatusCode, header};
use tokio::time::Instant;

use crate::fleet::client::FetchError;
use crate::fleet::{Fleet, Snapshot};

/// Searches that run at the same time.
const MAX_SEARCHES: usize = 64;

/// How long a failed search is remembered. A response that is made meanwhile is found without a search by
/// the balancer that forwarded its request.
const MAX_NOWHERE_AGE: Duration = Duration::from_secs(1);

/// The most failed searches that are remembered.
const MAX_NOWHERE: usize = 4096;

/// How long an upstream may take to answer a search.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);

/// The result of a search for a stored response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResponseSearchResult {
    /// At the upstream of this id.
    At(usize),
    Nowhere,
    /// An upstream did not answer, or too many searches run.
    Unsure,
}

type SearchFuture = BoxFuture<'static, ResponseSearchResult>;

/// Identifies a search: upstreams may answer differently to another API key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SearchKey {
    pub id: String,
    /// The ids of the searched upstreams, each with the `authorization` that it receives.
    pub upstreams: Vec<(usize, Option<HeaderValue>)>,
}

/// The searches of a balancer.
///
/// The lock is a plain mutex: it is held for a look at the tables, never across an await.
#[derive(Default)]
pub(super) struct ResponseSearches(Mutex<SearchTable>);

#[derive(Default)]
struct SearchTable {
    running: HashMap<SearchKey, WeakShared<SearchFuture>>,
    /// The longest known first.
    nowhere: VecDeque<(Instant, SearchKey)>,
}

/// The state in which a request finds a search.
enum StartedSearch {
    Known(ResponseSearchResult),
    Running(Shared<SearchFuture>),
}

// === impl ResponseSearches ===

impl ResponseSearches {
    fn lock(&self) -> MutexGuard<'_, SearchTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests a response from the upstreams of `snapshot`.
    pub(super) async fn locate(
        &self,
        fleet: &Arc<Fleet>,
        snapshot: &Arc<Snapshot>,
        key: SearchKey,
    ) -> ResponseSearchResult {
        let (fleet, snapshot, wanted) = (fleet.clone(), snapshot.clone(), key.clone());
        let search = async move { locate_response(&fleet, &snapshot, &wanted).await };
        self.share(key, search.boxed()).await
    }

    /// Runs `search`, or joins a running search for the same key, or returns the remembered result.
    async fn share(&self, key: SearchKey, search: SearchFuture) -> ResponseSearchResult {
        let begun = self.lock().begin(&key, search);
        let search = match begun {
            StartedSearch::Known(located) => return located,
            StartedSearch::Running(search) => search,
        };
        let located = search.await;
        if located == ResponseSearchResult::Nowhere {
            self.lock().remember(key);
        }
        located
    }
}

// === impl SearchTable ===

impl SearchTable {
    fn begin(&mut self, key: &SearchKey, search: SearchFuture) -> StartedSearch {
        while self.nowhere.front().is_some_and(|(since, _)| since.elapsed() >= MAX_NOWHERE_AGE) {
            self.nowhere.pop_front();
        }
        if self.nowhere.iter().any(|(_, known)| known == key) {
            return StartedSearch::Known(ResponseSearchResult::Nowhere);
        }
        if let Some(running) = self.running.get(key).and_then(WeakShared::upgrade) {
            return StartedSearch::Running(running);
        }
        self.running.retain(|_, running| running.upgrade().is_some());
        if self.running.len() >= MAX_SEARCHES {
            return StartedSearch::Known(ResponseSearchResult::Unsure);
        }
        let search = search.shared();
        self.running.extend(search.downgrade().map(|search| (key.clone(), search)));
        StartedSearch::Running(search)
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

/// Requests a stored response from every upstream that may hold it: responses are in the memory of the
/// engine that made them. The id must be valid in a path.
async fn locate_response(fleet: &Fleet, snapshot: &Snapshot, wanted: &SearchKey) -> ResponseSearchResult {
    let path = format!("/v1/responses/{}", wanted.id);
    let upstreams = wanted.upstreams.iter();
    let entries = upstreams.filter_map(|(id, key)| Some((snapshot.by_id(*id)?, key)));
    let asked = entries.map(async |(entry, key)| {
        let mut request = Request::get(&path);
        if let Some(key) = key {
            request = request.header(header::AUTHORIZATION, key);
        }
        let Ok(request) = request.body(Bytes::new()) else { return ResponseSearchResult::Nowhere };
        match fleet.client().request_with_key(&entry.upstream, request, LOOKUP_TIMEOUT).await {
            Ok(answer) if answer.status() == StatusCode::OK => ResponseSearchResult::At(entry.upstream.id),
            Ok(answer) if !answer.status().is_server_error() => ResponseSearchResult::Nowhere,
            // An upstream that is gone has no responses.
            Err(FetchError::Connect(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                ResponseSearchResult::Nowhere
            }
            Ok(_) | Err(_) => ResponseSearchResult::Unsure,
        }
    });
    let (mut asked, mut unsure) = (asked.collect::<FuturesUnordered<_>>(), false);
    // The first upstream that has the response ends the search: the others may hang.
    while let Some(located) = asked.next().await {
        match located {
            ResponseSearchResult::At(_) => return located,
            ResponseSearchResult::Unsure => unsure = true,
            ResponseSearchResult::Nowhere => {}
        }
    }
    if unsure { ResponseSearchResult::Unsure } else { ResponseSearchResult::Nowhere }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    fn key(id: &str) -> SearchKey {
        SearchKey { id: id.into(), upstreams: Vec::new() }
    }

    fn search(count: &Arc<AtomicUsize>, found: ResponseSearchResult) -> SearchFuture {
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
        let same = (0..9).map(|_| searches.share(key("a"), search(&count, ResponseSearchResult::Nowhere)));
        let found = futures_util::future::join_all(same).await;
        assert!(found.iter().all(|located| *located == ResponseSearchResult::Nowhere));
        assert_eq!(count.load(Relaxed), 1);
        assert_eq!(
            searches.share(key("a"), search(&count, ResponseSearchResult::At(1))).await,
            ResponseSearchResult::Nowhere
        );
        tokio::time::advance(MAX_NOWHERE_AGE).await;
        assert_eq!(
            searches.share(key("a"), search(&count, ResponseSearchResult::At(1))).await,
            ResponseSearchResult::At(1)
        );
        assert_eq!(count.load(Relaxed), 2);
        assert!(searches.lock().running.values().all(|search| search.upgrade().is_none()));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_than_so_many_run_and_one_that_is_dropped_counts_no_more() {
        let (searches, count) = (ResponseSearches::default(), Arc::new(AtomicUsize::new(0)));
        let many = (0..MAX_SEARCHES + 5).map(|number| {
            let search = search(&count, ResponseSearchResult::At(number));
            searches.share(key(&number.to_string()), search)
        });
        let second = Duration::from_millis(100);
        let dropped = tokio::time::timeout(second, futures_util::future::join_all(many)).await;
        assert!(dropped.is_err());
        assert_eq!(count.load(Relaxed), MAX_SEARCHES);
        assert_eq!(
            searches.share(key("next"), search(&count, ResponseSearchResult::At(1))).await,
            ResponseSearchResult::At(1)
        );
    }
}
