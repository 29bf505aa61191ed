//! `limits.connections`: how many connections of clients there may be at once, over all listeners.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::Notify;

pub struct Connections {
    /// 0 is no limit.
    most: AtomicUsize,
    open: AtomicUsize,
    left: Notify,
}

/// One connection, for as long as it lives.
pub struct Seat(Arc<Connections>);

impl Connections {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Connections { most: AtomicUsize::new(most), open: AtomicUsize::new(0), left: Notify::new() })
    }

    /// Sets another limit. Who is there stays, also when there are more.
    pub fn limit(&self, most: usize) {
        self.most.store(most, Relaxed);
        self.left.notify_waiters();
    }

    /// A seat, if there is room for one more.
    pub fn try_seat(self: &Arc<Self>) -> Option<Seat> {
        let most = self.most.load(Relaxed);
        let more = |open: usize| (most == 0 || open < most).then_some(open + 1);
        self.open.fetch_update(Relaxed, Relaxed, more).ok().map(|_| Seat(self.clone()))
    }

    /// Waits until there is room for one more.
    pub async fn seat(self: &Arc<Self>) -> Seat {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            // Listening begins before looking, so that nothing is missed in between.
            left.as_mut().enable();
            if let Some(seat) = self.try_seat() {
                return seat;
            }
            left.await;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn so_many_and_no_more_until_one_leaves_or_the_limit_is_raised() {
        let connections = Connections::new(2);
        let room = async || tokio::time::timeout(Duration::from_secs(1), connections.seat()).await.ok();
        let (first, second) = (room().await, room().await);
        assert!(first.is_some() && second.is_some() && room().await.is_none());
        drop(first);
        let third = room().await;
        assert!(third.is_some() && room().await.is_none());
        connections.limit(0);
        let more = [room().await, room().await];
        assert!(more.iter().all(Option::is_some));
        connections.limit(1);
        drop((second, third));
        assert!(room().await.is_none(), "two are still there");
        drop(more);
        assert!(room().await.is_some());
    }
}
