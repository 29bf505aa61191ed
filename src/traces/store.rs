//! The stores of traces: in memory, or in a database.
//!
//! Never: a call from a request's path.

mod contents;
#[cfg(test)]
mod contract;
mod memory;
mod prompts;
#[cfg(test)]
pub(crate) mod samples;
mod sql;
#[cfg(test)]
mod sqlite_tests;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::contents::{StoreError, StoreTimeouts, StoredTrace};
use self::contents::{database_limits, memory_limits};
use self::memory::MemoryStore;
use self::sql::SqlStore;
use super::record::{SessionSettings, SessionSummary, TraceRecord};
use crate::config::types::{TraceStore, TracesConfig};
use crate::observe::Observer;

/// The directory of this program under a directory of states.
const STATE_DIRECTORY: &str = "vllm-lb";

/// The name of the database in the state directory.
const DATABASE_FILE: &str = "traces.db";

/// A store of traces. Its methods can run on any runtime, several at a time.
pub enum Store {
    None,
    Memory(MemoryStore),
    Sql(SqlStore),
}

// === impl Store ===

impl Store {
    /// Opens the configured store. Creates a database that does not exist.
    pub async fn open(config: &TracesConfig, observer: &Observer) -> Result<Store, StoreError> {
        Self::open_with(config, StoreTimeouts::default(), observer).await
    }

    /// Opens a store with limits of its own.
    pub async fn open_with(
        config: &TracesConfig,
        timeouts: StoreTimeouts,
        observer: &Observer,
    ) -> Result<Store, StoreError> {
        match &config.store {
            TraceStore::None => Ok(Store::None),
            TraceStore::Memory => Ok(Store::Memory(MemoryStore::new(memory_limits(config)))),
            TraceStore::Sqlite(path) => {
                // The environment was looked at when the configuration was read.
                let path = sqlite_path(path.as_deref(), |_| None);
                Ok(Store::Sql(SqlStore::open_sqlite(&path, config, timeouts).await?))
            }
            TraceStore::Postgres(url) => {
                Ok(Store::Sql(SqlStore::open_postgres(url.expose(), config, timeouts, observer).await?))
            }
        }
    }

    /// Applies the limits of `config` from the next write or expiry on.
    pub fn set_limits(&self, config: &TracesConfig) {
        match self {
            Store::None => {}
            Store::Memory(store) => store.limits.store(Arc::new(memory_limits(config))),
            Store::Sql(store) => store.limits.store(Arc::new(database_limits(config))),
        }
    }

    /// Stores all records of a batch or none. `now` is in seconds since 1970. Records that are stored already
    /// stay as they are.
    pub async fn put(&self, batch: &[Arc<TraceRecord>], now: f64) -> Result<(), StoreError> {
        match self {
            Store::None => Ok(()),
            Store::Memory(memory) => {
                memory.put(batch, now);
                Ok(())
            }
            Store::Sql(sql) => sql.put(batch, now).await,
        }
    }

    /// The sessions with traces, and of these the ones that had one at `since` or later. The session with the
    /// most recent first trace comes first.
    pub async fn sessions(
        &self,
        since: Option<f64>,
        limit: Option<usize>,
    ) -> Result<Vec<SessionSummary>, StoreError> {
        match self {
            Store::None => Ok(Vec::new()),
            Store::Memory(memory) => Ok(memory.sessions(since, limit)),
            Store::Sql(sql) => sql.sessions(since, limit).await,
        }
    }

    /// A session that has settings or traces.
    pub async fn session(&self, id: &str) -> Result<Option<SessionSummary>, StoreError> {
        match self {
            Store::None => Ok(None),
            Store::Memory(memory) => Ok(memory.session(id)),
            Store::Sql(sql) => sql.session(id).await,
        }
    }

    /// The traces of a session that were stored at `since` or later, the oldest first. The next page begins
    /// at `created_at.next_up()` of the last trace.
    pub async fn traces(
        &self,
        session: &str,
        since: Option<f64>,
        limit: Option<usize>,
    ) -> Result<Vec<StoredTrace>, StoreError> {
        match self {
            Store::None => Ok(Vec::new()),
            Store::Memory(memory) => memory.traces(session, since, limit).await,
            Store::Sql(sql) => sql.traces(session, since, limit).await,
        }
    }

    /// One trace.
    pub async fn trace(&self, trace_id: &str) -> Result<Option<StoredTrace>, StoreError> {
        match self {
            Store::None => Ok(None),
            Store::Memory(memory) => Ok(memory.trace(trace_id)),
            Store::Sql(sql) => sql.trace(trace_id).await,
        }
    }

    /// The trace of a session that was stored last.
    pub async fn latest_trace(&self, session: &str) -> Result<Option<StoredTrace>, StoreError> {
        match self {
            Store::None => Ok(None),
            Store::Memory(memory) => Ok(memory.latest_trace(session)),
            Store::Sql(sql) => sql.latest_trace(session).await,
        }
    }

    /// Deletes sessions, their traces and their settings. Returns the number of deleted traces.
    pub async fn delete_sessions(&self, ids: &[String]) -> Result<u64, StoreError> {
        match self {
            Store::None => Ok(0),
            Store::Memory(memory) => Ok(memory.delete_sessions(ids)),
            Store::Sql(sql) => sql.delete_sessions(ids).await,
        }
    }

    /// Replaces the settings of a session.
    pub async fn put_session(&self, settings: &SessionSettings) -> Result<(), StoreError> {
        match self {
            Store::None => Ok(()),
            Store::Memory(memory) => {
                memory.put_session(settings);
                Ok(())
            }
            Store::Sql(sql) => sql.put_session(settings).await,
        }
    }

    /// The settings of a session.
    pub async fn load_session(&self, id: &str) -> Result<Option<SessionSettings>, StoreError> {
        match self {
            Store::None => Ok(None),
            Store::Memory(memory) => Ok(memory.load_session(id)),
            Store::Sql(sql) => sql.load_session(id).await,
        }
    }

    /// Stores the weight version.
    pub async fn set_weight_version(&self, version: Option<i64>) -> Result<(), StoreError> {
        match self {
            Store::None => Ok(()),
            Store::Memory(memory) => {
                memory.set_weight_version(version);
                Ok(())
            }
            Store::Sql(sql) => sql.set_weight_version(version).await,
        }
    }

    /// The stored weight version.
    pub async fn weight_version(&self) -> Result<Option<i64>, StoreError> {
        match self {
            Store::None => Ok(None),
            Store::Memory(memory) => Ok(memory.weight_version()),
            Store::Sql(sql) => sql.weight_version().await,
        }
    }

    /// Drops sessions that are too old and, the least recently active first, sessions above the size limit.
    /// Returns the number of traces dropped since the last call.
    pub async fn expire(&self, now: f64) -> Result<u64, StoreError> {
        match self {
            Store::None => Ok(0),
            Store::Memory(memory) => Ok(memory.expire(now)),
            Store::Sql(sql) => sql.expire(now).await,
        }
    }

    /// The memory that the traces take, or the size of the database when it was last measured.
    pub fn bytes(&self) -> u64 {
        match self {
            Store::None => 0,
            Store::Memory(memory) => memory.bytes(),
            Store::Sql(sql) => sql.bytes(),
        }
    }

    /// Closes the connections of a database after their statements in progress.
    pub async fn close(&self) {
        match self {
            Store::None | Store::Memory(_) => {}
            Store::Sql(sql) => sql.close().await,
        }
    }
}

/// The path of the database: the one that the configuration names, with `~` expanded, else `traces.db` in the
/// state directory of the service manager, of the user, or where temporary files are.
pub fn sqlite_path(named: Option<&Path>, env: impl Fn(&str) -> Option<String>) -> PathBuf {
    let directory = |name: &str| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = named {
        return match (named.strip_prefix("~"), directory("HOME")) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => named.to_path_buf(),
        };
    }
    // systemd separates several state directories with colons.
    let of_service = env("STATE_DIRECTORY").and_then(|list| list.split(':').next().map(PathBuf::from));
    let state = of_service
        .filter(|path| !path.as_os_str().is_empty())
        .or_else(|| Some(directory("XDG_STATE_HOME")?.join(STATE_DIRECTORY)))
        .or_else(|| Some(directory("HOME")?.join(".local/state").join(STATE_DIRECTORY)))
        .unwrap_or_else(|| std::env::temp_dir().join(STATE_DIRECTORY));
    state.join(DATABASE_FILE)
}
