//! One scrape at a time, whoever asks: the upstreams are asked once for all who want the same page, and
//! the page is shared for a second.
//!
//! Anybody may ask the public listener for it, and each page costs every upstream some work and us its
//! memory: without this a client could make much of little. Pages of one fleet are never shared with
//! another's, and never older than `FRESH` when somebody comes to ask.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use tokio::time::Instant;

use crate::fleet::Fleet;

/// How long a page is shared. Whoever scrapes does so every few seconds.
const FRESH: Duration = Duration::from_secs(1);

/// A page, and when it was made.
type Page = tokio::sync::Mutex<Option<(Instant, Response<Bytes>)>>;

/// The pages of one fleet.
#[derive(Default)]
pub struct Pages {
    pub load: Page,
    pub metrics: Page,
}

/// All fleets of this process, which is one but for tests. Looked through by scrapes alone, for
/// nanoseconds; a fleet that is no more is forgotten by the next one.
static FLEETS: Mutex<Vec<(Weak<Fleet>, Arc<Pages>)>> = Mutex::new(Vec::new());

pub fn pages(fleet: &Arc<Fleet>) -> Arc<Pages> {
    let mut fleets = FLEETS.lock().unwrap_or_else(PoisonError::into_inner);
    fleets.retain(|(known, _)| known.strong_count() > 0);
    let this = Arc::downgrade(fleet);
    if let Some((_, pages)) = fleets.iter().find(|(known, _)| known.ptr_eq(&this)) {
        return pages.clone();
    }
    let pages = Arc::<Pages>::default();
    fleets.push((this, pages.clone()));
    pages
}

/// The page if it is fresh, else a new one. Whoever comes while it is made waits for that one; if its
/// maker leaves, the next in line makes it.
pub async fn shared(page: &Page, make: impl Future<Output = Response<Bytes>>) -> Response<Bytes> {
    let mut page = page.lock().await;
    if let Some((made, answer)) = &*page
        && made.elapsed() < FRESH
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
    async fn a_page_is_made_once_for_all_who_want_it_and_again_when_it_is_old() {
        let (page, made) = (Page::default(), AtomicU32::new(0));
        let ask = || {
            shared(&page, async {
                tokio::time::sleep(Duration::from_secs(2)).await;
                Response::new(Bytes::from(made.fetch_add(1, Relaxed).to_string()))
            })
        };
        let answers = futures_util::future::join_all((0..9).map(|_| ask())).await;
        assert!(answers.iter().all(|answer| answer.body() == "0"), "also those who waited for it");
        tokio::time::advance(FRESH - Duration::from_millis(1)).await;
        assert_eq!(ask().await.body(), "0");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(ask().await.body(), "1");
    }

    #[tokio::test(start_paused = true)]
    async fn a_maker_who_leaves_leaves_the_page_to_the_next() {
        let page = Page::default();
        let endless = shared(&page, std::future::pending());
        assert!(tokio::time::timeout(Duration::from_secs(1), endless).await.is_err());
        let next = shared(&page, async { Response::new(Bytes::from_static(b"next")) });
        assert_eq!(next.await.body(), "next");
    }
}
