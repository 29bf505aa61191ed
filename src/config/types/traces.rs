//! Which calls are recorded, where, and for how long.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::config::postgres;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::setting::{
    SettingRow, SettingsTable, custom, duration, integer, row, show_number, size, switch, text, value,
};
use crate::config::url::masked;
use crate::config::values::{DAY, KIB, MIB, ReadResult, SECOND, TIB, file_path, number_in};

/// The settings of the recording of calls.
#[derive(Clone, Debug, PartialEq)]
pub struct TracesConfig {
    pub store: TraceStore,
    /// The size of the store in memory, in bytes.
    pub memory: u64,
    pub capture: CaptureScope,
    /// How long a trace is kept.
    pub keep: Duration,
    /// The most bytes of traces in a database.
    pub max_bytes: u64,
    /// The most calls that wait to be stored.
    pub queue: usize,
    /// Whether the last event of an answer waits until its trace is stored.
    pub sync: bool,
    /// Whether a turn continues from the recorded tokens of the turn before it.
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

/// The calls that are recorded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CaptureScope {
    /// Calls of sessions that the path names, or that were created through the API.
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

// === impl TracesConfig ===

impl SettingsTable for TracesConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "store",
            "Where traces are stored: none, memory, sqlite, sqlite:PATH or a postgres:// URL.",
            &value(|traces: &mut Self| &mut traces.store, text("store", TraceStore::parse).partly_masked()),
        )
        .restart(),
        row(
            "memory",
            "Memory of the store in memory; the oldest traces make room for new ones.",
            &value(|traces: &mut Self| &mut traces.memory, size(64 * KIB, TIB)),
        ),
        row(
            "capture",
            "Calls that are recorded: those of sessions, all, or sessions and a share of the others.",
            &value(
                |traces: &mut Self| &mut traces.capture,
                custom("sessions, all or a share", CaptureScope::parse, CaptureScope::shown),
            ),
        ),
        row(
            "keep",
            "Time for which traces are kept after the last one of their session.",
            &value(|traces: &mut Self| &mut traces.keep, duration(SECOND, DAY.saturating_mul(3650))),
        ),
        row(
            "max_bytes",
            "Size of the traces in a database; the sessions idle for longest are deleted first.",
            &value(|traces: &mut Self| &mut traces.max_bytes, size(MIB, 1024 * TIB)),
        ),
        row(
            "queue",
            "Calls that may wait to be stored; of more, the oldest are dropped.",
            &value(|traces: &mut Self| &mut traces.queue, integer(1, 1_000_000)),
        ),
        row(
            "sync",
            "Whether the last event of an answer waits until its trace is stored.",
            &value(|traces: &mut Self| &mut traces.sync, switch()),
        ),
        row(
            "cumulative",
            "Whether a turn of a session continues from the recorded tokens of the turn before it.",
            &value(|traces: &mut Self| &mut traces.cumulative, switch()),
        ),
    ];

    fn defaults() -> Self {
        TracesConfig::default()
    }
}

// === impl TraceStore ===

impl TraceStore {
    /// Parses a store; the error never shows a password.
    pub fn parse(text: &str) -> ReadResult<Self> {
        match text {
            "none" => return Ok(TraceStore::None),
            "memory" => return Ok(TraceStore::Memory),
            "sqlite" | "sqlite:" => return Ok(TraceStore::Sqlite(None)),
            _ => {}
        }
        if let Some(path) = text.strip_prefix("sqlite:") {
            // Both `sqlite:///path` and `sqlite:/path` are common.
            let path = path.strip_prefix("//").unwrap_or(path);
            if path == ":memory:" {
                return Err(format!("{} is no file: write memory for the store in memory", seen(text)));
            }
            return file_path(path).map(|path| TraceStore::Sqlite(Some(path)));
        }
        if postgres::is_url(text) {
            return postgres::check(text).map(|()| TraceStore::Postgres(Secret::new(text)));
        }
        let remedy = "write none, memory, sqlite, sqlite:PATH or postgres://user:password@host/database";
        Err(format!("{} is no store of traces: {remedy}", seen(&masked(text))))
    }
}

/// The store as the file would hold it, with the secrets of a URL masked.
impl fmt::Display for TraceStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TraceStore::None => f.write_str("none"),
            TraceStore::Memory => f.write_str("memory"),
            TraceStore::Sqlite(None) => f.write_str("sqlite"),
            TraceStore::Sqlite(Some(path)) => write!(f, "sqlite:{}", path.display()),
            TraceStore::Postgres(url) => f.write_str(&postgres::shown(url.expose())),
        }
    }
}

// === impl CaptureScope ===

impl CaptureScope {
    fn parse(text: &str) -> ReadResult<Self> {
        match text {
            "sessions" => Ok(CaptureScope::Sessions),
            "all" => Ok(CaptureScope::All),
            _ => number_in(0.0..=1.0)(text).map(CaptureScope::Share).map_err(|what| {
                format!("{what}: write sessions, all, or the share of calls to record, such as 0.05")
            }),
        }
    }

    fn shown(&self) -> Value {
        match self {
            CaptureScope::Sessions => json!("sessions"),
            CaptureScope::All => json!("all"),
            CaptureScope::Share(share) => show_number(*share),
        }
    }
}
