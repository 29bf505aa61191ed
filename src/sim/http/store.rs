//! The Responses that can be asked for again: in memory, and bounded, unlike vLLM's.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

const LIMIT: usize = 1_000;

/// A stored answer, and the conversation up to and including it.
#[derive(Debug, Clone)]
pub struct Kept {
    pub response: Value,
    pub turns: Vec<Value>,
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

    pub fn get(&self, id: &str) -> Option<Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).kept.get(id).cloned()
    }

    pub fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Inner::default();
    }
}
