//! Reads `traces:`.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::{GIB, HOUR, KIB, SECOND, set};
use crate::config::postgres;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::section::Section;
use crate::config::types::{CaptureScope, TraceStore, TracesConfig};
use crate::config::url::masked;
use crate::config::values::{ReadResult, boolean, duration_in, file_path, integer_in, number_in, size_in};

const MEMORY: RangeInclusive<u64> = 64 * KIB..=1024 * GIB;
const STORED: RangeInclusive<u64> = 1024 * KIB..=1024 * 1024 * GIB;
const KEEP: RangeInclusive<Duration> = SECOND..=HOUR.saturating_mul(24 * 3650);
const WAITING: RangeInclusive<usize> = 1..=1_000_000;
const SHARE: RangeInclusive<f64> = 0.0..=1.0;

pub fn read(mut section: Section<'_, '_>, traces: &mut TracesConfig) {
    set(&mut traces.store, section.get("store", store));
    set(&mut traces.memory, section.get("memory", size_in(MEMORY)));
    set(&mut traces.capture, section.get("capture", capture));
    set(&mut traces.keep, section.get("keep", duration_in(KEEP)));
    set(&mut traces.max_bytes, section.get("max_bytes", size_in(STORED)));
    set(&mut traces.queue, section.get("queue", integer_in(WAITING)));
    set(&mut traces.sync, section.get("sync", boolean));
    set(&mut traces.cumulative, section.get("cumulative", boolean));
}

/// Reads a store; the error never shows a password.
pub fn store(text: &str) -> ReadResult<TraceStore> {
    match text {
        "none" => return Ok(TraceStore::None),
        "memory" => return Ok(TraceStore::Memory),
        "sqlite" | "sqlite:" => return Ok(TraceStore::Sqlite(None)),
        _ => {}
    }
    if let Some(path) = text.strip_prefix("sqlite:") {
        // Both `sqlite:///path` and `sqlite:/path` are written.
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

fn capture(text: &str) -> ReadResult<CaptureScope> {
    match text {
        "sessions" => Ok(CaptureScope::Sessions),
        "all" => Ok(CaptureScope::All),
        _ => number_in(SHARE)(text).map(CaptureScope::Share).map_err(|what| {
            format!("{what}: write sessions, all, or the share of calls to record, such as 0.05")
        }),
    }
}
