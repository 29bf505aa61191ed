//! Bounds the time for which a task works without giving way to others.

use std::time::{Duration, Instant};

use super::now;

/// The longest time of work before the task yields. Requests run on the same threads.
const MAX_WORK_TIME: Duration = Duration::from_millis(1);

/// The work since the task last yielded.
pub(super) struct WorkSlice {
    start: Instant,
}

// === impl WorkSlice ===

impl WorkSlice {
    /// Begins to measure.
    pub(super) fn begin() -> Self {
        WorkSlice { start: now() }
    }

    /// Yields when the task has worked for `MAX_WORK_TIME`.
    pub(super) async fn yield_if_due(&mut self) {
        if now().saturating_duration_since(self.start) >= MAX_WORK_TIME {
            tokio::task::yield_now().await;
            self.start = now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn yields_by_time_and_not_by_number() {
        let turns = AtomicU64::new(0);
        let work = async {
            let mut slice = WorkSlice::begin();
            for _ in 0..10_000 {
                slice.yield_if_due().await;
            }
            let quick = turns.load(Relaxed);
            for _ in 0..10 {
                tokio::time::advance(MAX_WORK_TIME / 2).await;
                slice.yield_if_due().await;
            }
            quick
        };
        let other = async {
            loop {
                turns.fetch_add(1, Relaxed);
                tokio::task::yield_now().await;
            }
        };
        let quick = tokio::select! { biased; quick = work => quick, never = other => never };
        assert_eq!(quick, 0, "no time has passed");
        assert!(turns.load(Relaxed) >= 5);
    }
}
