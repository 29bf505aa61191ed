//! The settings of `traces:`, with their defaults.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::secret::Secret;

/// Which calls are recorded, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct TracesConfig {
    pub store: TraceStore,
    /// The most memory of the store in memory, in bytes.
    pub memory: u64,
    pub capture: CaptureScope,
    /// How long a trace is kept.
    pub keep: Duration,
    /// The most that the traces of a database take, in bytes.
    pub max_bytes: u64,
    /// The most calls that wait to be stored.
    pub queue: usize,
    /// The last event of an answer waits until its trace is stored.
    pub sync: bool,
    /// A turn continues from the recorded tokens of the turn before it.
    pub cumulative: bool,
}

/// Where traces are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum TraceStore {
    None,
    Memory,
    /// `None`: `traces.db` in the state directory.
    Sqlite(Option<PathBuf>),
    /// The URL, which may hold a password.
    Postgres(Secret),
}

/// Which calls are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CaptureScope {
    /// Those of sessions that the path names, or that were made by the API.
    Sessions,
    All,
    /// Sessions, and this share of all other calls.
    Share(f64),
}

impl Default for TracesConfig {
    fn default() -> Self {
        TracesConfig {
            store: TraceStore::Memory,
            memory: 256 << 20,
            capture: CaptureScope::Sessions,
            keep: Duration::from_secs(7 * 24 * 3600),
            max_bytes: 10 << 30,
            queue: 10_000,
            sync: false,
            cumulative: false,
        }
    }
}
