//! The stored responses: in memory, and bounded, unlike vLLM's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::task::AbortHandle;

use super::event_log::EventLog;

/// The largest number of stored responses.
const MAX_STORED_ANSWERS: usize = 1_000;

/// A stored answer, and the conversation up to and including it.
#[derive(Debug, Clone)]
pub(super) struct StoredAnswer {
    pub response: Value,
    pub turns: Vec<Value>,
    /// The task of a response in the background.
    pub task: Option<AbortHandle>,
    /// The events of a background response that was requested as a stream.
    pub log: Option<Arc<EventLog>>,
}

/// The stored responses of an engine.
#[derive(Debug, Default)]
pub(super) struct StoredAnswers(Mutex<StoreInner>);

#[derive(Debug, Default)]
struct StoreInner {
    kept: HashMap<String, StoredAnswer>,
    order: VecDeque<String>,
}

impl StoredAnswers {
    /// Stores an answer or replaces it; the events stay.
    pub(super) fn put(&self, id: String, mut kept: StoredAnswer) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.log = kept.log.or_else(|| inner.kept.get(&id)?.log.clone());
        if inner.kept.insert(id.clone(), kept).is_none() {
            inner.order.push_back(id);
        }
        if inner.order.len() > MAX_STORED_ANSWERS
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.kept.remove(&oldest);
        }
    }

    /// Sets the task that generates a background response.
    pub(super) fn attach(&self, id: &str, task: AbortHandle) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = inner.kept.get_mut(id) {
            kept.task = Some(task);
        }
    }

    /// Attaches the log of events to a stored response.
    pub(super) fn attach_log(&self, id: &str, log: Option<Arc<EventLog>>) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = inner.kept.get_mut(id) {
            kept.log = log;
        }
    }

    pub(super) fn get(&self, id: &str) -> Option<StoredAnswer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).kept.get(id).cloned()
    }

    /// Removes all responses and cancels their tasks.
    pub(super) fn clear(&self) {
        let old = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for task in old.kept.into_values().filter_map(|kept| kept.task) {
            task.abort();
        }
    }
}
