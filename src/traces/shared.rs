//! What captures, the writer and the API of traces share.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::cumulative::{LastTurns, PendingTurn};
use super::known_prompts::KnownPrompts;
use super::queue::{CaptureQueue, TraceMessage};
use super::record::CallFacts;
use super::store::Store;
use crate::config::types::TracesConfig;
use crate::observe::Observer;

/// The number that represents "no weight version".
pub(super) const NO_VERSION: i64 = i64::MIN;

/// What captures, the writer and the API of traces share.
pub(super) struct SharedTraces {
    pub settings: ArcSwap<TracesConfig>,
    pub queue: CaptureQueue,
    pub last_turns: Arc<LastTurns>,
    pub known_prompts: KnownPrompts,
    /// `None`: a database that could not be reached yet.
    pub store: ArcSwapOption<Store>,
    pub weight_version: AtomicI64,
    pub marks: AtomicU64,
    pub observer: Observer,
}

impl SharedTraces {
    /// `version`: the stored weight version.
    pub(super) fn new(
        config: &TracesConfig,
        store: Option<Arc<Store>>,
        version: Option<i64>,
        observer: Observer,
    ) -> Self {
        SharedTraces {
            settings: ArcSwap::from_pointee(config.clone()),
            queue: CaptureQueue::new(config.queue),
            last_turns: Arc::default(),
            known_prompts: KnownPrompts::default(),
            store: ArcSwapOption::new(store),
            weight_version: AtomicI64::new(version.unwrap_or(NO_VERSION)),
            marks: AtomicU64::new(0),
            observer,
        }
    }

    /// Counts a call that has ended among those for which the next turn of its session waits.
    pub(super) fn pending_turn(&self, facts: &CallFacts) -> Option<PendingTurn> {
        if self.settings.load().cumulative { self.last_turns.expect(facts) } else { None }
    }

    /// The number of the next captured answer.
    pub(super) fn next_mark(&self) -> u64 {
        self.marks.fetch_add(1, Ordering::Relaxed)
    }

    /// Puts a message into the queue, and counts the calls that are dropped for it.
    pub(super) fn push(&self, message: TraceMessage) {
        match self.queue.push(message) {
            0 => {}
            dropped => self.observer.traces_dropped(dropped, "full"),
        }
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
