//! The Responses that can be asked for again: in memory, and bounded, unlike vLLM's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use tokio::task::AbortHandle;

const LIMIT: usize = 1_000;

/// A stored answer, and the conversation up to and including it.
#[derive(Debug, Clone)]
pub struct Kept {
    pub response: Value,
    pub turns: Vec<Value>,
    /// The task of a response in the background.
    pub task: Option<AbortHandle>,
}

#[derive(Debug, Default)]
pub struct Store(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kept: HashMap<String, Kept>,
    order: VecDeque<String>,
}

impl Store {
    pub fn put(&self, id: String, kept: Kept) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.kept.insert(id.clone(), kept).is_none() {
            inner.order.push_back(id);
        }
        if inner.order.len() > LIMIT
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.kept.remove(&oldest);
        }
    }

    /// Says which task works on a response that is not done.
    pub fn attach(&self, id: &str, task: AbortHandle) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = inner.kept.get_mut(id) {
            kept.task = Some(task);
        }
    }

    pub fn get(&self, id: &str) -> Option<Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).kept.get(id).cloned()
    }

    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for task in old.kept.into_values().filter_map(|kept| kept.task) {
            task.abort();
        }
    }
}
