//! The records of the server: the latest requests, and counts.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use serde::Serialize;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

/// The largest number of kept requests.
const MAX_RECORDS: usize = 1_000;
/// The largest kept part of a body, in bytes.
const MAX_RECORDED_BODY_BYTES: usize = 64 * 1_024;

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Recorded {
    pub method: Method,
    /// The path with its query.
    pub path: String,
    pub headers: HeaderMap,
    pub body_length: usize,
    /// xxh3-64 of the whole body.
    pub body_hash: u64,
    /// The first 64 KiB of the body.
    pub body: Bytes,
}

/// The counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Requests other than polls of health, models, metrics and the like.
    pub received: u64,
    /// Polls of health, models, metrics and the like.
    pub polled: u64,
    /// Sequences in the engine.
    pub running: usize,
    pub waiting: usize,
    /// Sequences that ended by themselves, were aborted, or were rejected.
    pub finished: u64,
    pub aborted: u64,
    pub refused: u64,
    /// Connections open now, and accepted so far.
    pub connections: usize,
    pub accepted: u64,
    /// Open connections, without those that have carried only polls.
    pub used: usize,
    /// Prompt tokens that were looked up in the prefix cache, and those that were found.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    pub kv_usage: f64,
    pub restarts: u64,
}

/// The generation for one request: the engine's own log, to compare with clients and captured calls.
#[derive(Debug, Clone, PartialEq)]
pub struct RecordedGeneration {
    /// The request's `x-request-id`; empty without one.
    pub request_id: String,
    pub prompt: Vec<u32>,
    /// The token ids of each choice, as planned when the request starts.
    pub choices: Vec<Vec<u32>>,
}

/// A bounded queue of the latest entries.
#[derive(Debug)]
pub(super) struct Ring<T>(Mutex<VecDeque<T>>);

// === impl Recorded ===

impl Recorded {
    pub fn new(method: Method, uri: &Uri, headers: HeaderMap, body: &Bytes) -> Self {
        Self {
            method,
            path: uri.path_and_query().map_or_else(|| uri.path().to_owned(), ToString::to_string),
            headers,
            body_length: body.len(),
            body_hash: xxh3_64(body),
            // Copied, since a slice would keep the whole body alive.
            body: Bytes::copy_from_slice(&body[..body.len().min(MAX_RECORDED_BODY_BYTES)]),
        }
    }

    /// Returns a header's value, if it is present and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the kept body as JSON; `Null` when it is not JSON or was cut.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    /// The record as `/sim/requests` lists it.
    pub(super) fn to_json(&self) -> Value {
        let headers: Vec<Value> = self
            .headers
            .iter()
            .map(|(name, value)| json!([name.as_str(), String::from_utf8_lossy(value.as_bytes())]))
            .collect();
        json!({
            "method": self.method.as_str(),
            "path": self.path,
            "headers": headers,
            "body_length": self.body_length,
            "body_hash": format!("{:016x}", self.body_hash),
            "body": String::from_utf8_lossy(&self.body),
        })
    }
}

// === impl Ring ===

impl<T> Default for Ring<T> {
    fn default() -> Self {
        Ring(Mutex::default())
    }
}

impl<T: Clone> Ring<T> {
    /// Appends a record; the oldest one goes where the log is full.
    pub(super) fn push(&self, recorded: T) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.len() == MAX_RECORDS {
            ring.pop_front();
        }
        ring.push_back(recorded);
    }

    /// Returns all entries, oldest first.
    pub(super) fn all(&self) -> Vec<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
