//! Shares scrapes: concurrent requests for the same page cause one scrape of the upstreams, and its page is
//! shared for a second.
//!
//! Any client may request the page on the public listener, and each page costs every upstream work and the
//! balancer memory: sharing prevents amplification. A page is
//! never older than `MAX_PAGE_AGE` when a request arrives.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use tokio::time::Instant;

/// How long a page is shared. Scrapers scrape every few seconds.
const MAX_PAGE_AGE: Duration = Duration::from_secs(1);

/// A page, and when it was made.
type CachedPage = tokio::sync::Mutex<Option<(Instant, Response<Bytes>)>>;

/// The pages that one balancer shares.
#[derive(Default)]
pub(super) struct CachedPages {
    pub load: CachedPage,
    pub metrics: CachedPage,
}

/// Returns the page if it is fresh, else makes a new one. Requests that arrive meanwhile wait for it; if the
/// request that makes it is dropped, the next one makes it.
pub(super) async fn shared(
    page: &CachedPage,
    make: impl Future<Output = Response<Bytes>>,
) -> Response<Bytes> {
    let mut page = page.lock().await;
    if let Some((made, answer)) = &*page
        && made.elapsed() < MAX_PAGE_AGE
    {
        return answer.clone();
    }
    let answer = make.await;
    *page = Some((Instant::now(), answer.clone()));
    answer
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn makes_a_page_once_for_concurrent_requests_and_again_when_it_is_old() {
        let (page, made) = (CachedPage::default(), AtomicU32::new(0));
        let ask = || {
            shared(&page, async {
                tokio::time::sleep(Duration::from_secs(2)).await;
                Response::new(Bytes::from(made.fetch_add(1, Relaxed).to_string()))
            })
        };
        let answers = futures_util::future::join_all((0..9).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| answer.body() == "0"), "also those who waited for it");
        tokio::time::advance(MAX_PAGE_AGE - Duration::from_millis(1)).await;
        assert_eq!(ask().await.body(), "0");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(ask().await.body(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_request_makes_the_page_when_the_first_is_dropped() {
        let page = CachedPage::default();
        let endless = shared(&page, std::future::pending());
        assert!(tokio::time::timeout(Duration::from_secs(1), endless).await.is_err());
        let next = shared(&page, async { Response::new(Bytes::from_static(b"next")) });
        assert_eq!(next.await.body(), "next");
    }
}
