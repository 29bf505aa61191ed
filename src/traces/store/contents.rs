//! What a store of traces holds, its limits, and its failures.

use std::sync::Arc;
use std::time::Duration;

use crate::config::types::TracesConfig;
use crate::traces::record::{SessionSettings, TraceRecord};

/// The least time between two traces of a session, in seconds: their order is that of their times. A power of
/// two, so that sums of it are exact.
pub(super) const CREATED_STEP: f64 = 1.0 / (1 << 20) as f64;

/// A trace with the time at which it was stored.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredTrace {
    pub record: Arc<TraceRecord>,
    /// In seconds since 1970; it grows within a session.
    pub created_at: f64,
}

/// The failure of an operation. A batch that fails is not stored, not even in part.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open {place}: {reason}")]
    Open { place: String, reason: String },
    #[error("calls are not recorded: traces.store is none; set it to memory, sqlite or a postgres:// URL")]
    Off,
    #[error("the database of the traces has not been reached yet")]
    Unreached,
    #[error("the database of the traces: {reason}")]
    Database { reason: String },
    #[error("the database of the traces did not answer within {limit:?}")]
    Timeout { limit: Duration },
    #[error("the database of the traces has schema {found}, this version knows {known}: use a newer vllm-lb")]
    NewerSchema { found: usize, known: usize },
    #[error("the row of trace {trace_id} cannot be read: {reason}")]
    Damaged { trace_id: String, reason: String },
}

/// The limits of a store, which a reload changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoreLimits {
    /// How long traces stay after the last one of their session.
    pub keep: Duration,
    pub max_bytes: u64,
}

/// How long parts of a database operation may take.
#[derive(Clone, Copy, Debug)]
pub struct StoreTimeouts {
    /// The wait for a lock of SQLite that another process has.
    pub busy: Duration,
    /// The wait for a connection.
    pub acquire: Duration,
    /// One statement.
    pub statement: Duration,
}

impl Default for StoreTimeouts {
    fn default() -> Self {
        StoreTimeouts {
            busy: Duration::from_secs(20),
            acquire: Duration::from_secs(5),
            statement: Duration::from_secs(30),
        }
    }
}

/// The limits of a store in memory.
pub(super) fn memory_limits(config: &TracesConfig) -> StoreLimits {
    StoreLimits { keep: config.keep, max_bytes: config.memory }
}

/// The limits of a database.
pub(super) fn database_limits(config: &TracesConfig) -> StoreLimits {
    StoreLimits { keep: config.keep, max_bytes: config.max_bytes }
}

/// The metadata of a session as JSON.
pub(super) fn metadata_text(settings: &SessionSettings) -> String {
    serde_json::to_string(&settings.metadata).unwrap_or_else(|_| "{}".into())
}
