//! Limits the client connections that are open at once, over all listeners (`limits.connections`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::Notify;

/// Counts open connections and grants permits for new ones up to a limit.
pub(crate) struct ConnectionLimiter {
    /// 0: unlimited.
    limit: AtomicUsize,
    open: AtomicUsize,
    released: Notify,
}

/// Counts one connection as open until it is dropped.
pub(crate) struct ConnectionPermit(Arc<ConnectionLimiter>);

impl ConnectionLimiter {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(ConnectionLimiter {
            limit: AtomicUsize::new(limit),
            open: AtomicUsize::new(0),
            released: Notify::new(),
        })
    }

    /// Changes the limit. Open connections above the new limit stay open.
    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Relaxed);
        self.released.notify_waiters();
    }

    /// Returns a permit if the limit allows another connection.
    pub(crate) fn try_acquire(self: &Arc<Self>) -> Option<ConnectionPermit> {
        let limit = self.limit.load(Relaxed);
        let more = |open: usize| (limit == 0 || open < limit).then_some(open + 1);
        self.open.fetch_update(Relaxed, Relaxed, more).ok().map(|_| ConnectionPermit(self.clone()))
    }

    /// Returns a permit even where the limit is reached.
    pub(crate) fn acquire_beyond_limit(self: &Arc<Self>) -> ConnectionPermit {
        self.open.fetch_add(1, Relaxed);
        ConnectionPermit(self.clone())
    }

    /// Waits until the limit allows another connection.
    pub(crate) async fn acquire(self: &Arc<Self>) -> ConnectionPermit {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            // Registered before the check: a release between the two must not be missed.
            released.as_mut().enable();
            if let Some(permit) = self.try_acquire() {
                return permit;
            }
            released.await;
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn grants_permits_up_to_the_limit_until_one_is_released_or_the_limit_is_raised() {
        let limiter = ConnectionLimiter::new(2);
        let room = async || tokio::time::timeout(Duration::from_secs(1), limiter.acquire()).await.ok();
        let (first, second) = (room().await, room().await);
        assert!(first.is_some() && second.is_some() && room().await.is_none());
        drop(first);
        let third = room().await;
        assert!(third.is_some() && room().await.is_none());
        limiter.set_limit(0);
        let more = [room().await, room().await];
        assert!(more.iter().all(Option::is_some));
        limiter.set_limit(1);
        drop((second, third));
        assert!(room().await.is_none(), "two are still open");
        drop(more);
        assert!(room().await.is_some());
    }
}
