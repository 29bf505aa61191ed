//! Records what the balancers log, so that a test can read it and a failure can show it.
//!
//! Tests of one process share the logger, and each has a runtime of its own: a test reads the records that
//! were written on its runtime.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write;
use std::sync::{LazyLock, Mutex, MutexGuard, Once, PoisonError};

use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Metadata, Record};
use tokio::runtime::{Handle, Id};

/// The most records of one runtime that are kept.
const MAX_RECORDS: usize = 1_000;

/// The last records of each runtime.
type RecordsByRuntime = HashMap<Option<Id>, VecDeque<String>>;

struct Logs(LazyLock<Mutex<RecordsByRuntime>>);

static LOGS: Logs = Logs(LazyLock::new(Mutex::default));

/// Starts to record; further calls do nothing.
pub fn remember() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&LOGS).expect("tests set no other logger");
        log::set_max_level(LevelFilter::Debug);
    });
}

/// The records of the runtime that this is called on, one a line: level, message, fields.
pub fn all() -> Vec<String> {
    LOGS.records().get(&runtime()).into_iter().flatten().cloned().collect()
}

/// The records of all runtimes, for a test whose balancer has a runtime of its own.
pub fn of_all_runtimes() -> Vec<String> {
    LOGS.records().values().flatten().cloned().collect()
}

fn runtime() -> Option<Id> {
    Handle::try_current().ok().map(|handle| handle.id())
}

// === impl Logs ===

impl Logs {
    fn records(&self) -> MutexGuard<'_, RecordsByRuntime> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl log::Log for Logs {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Debug && metadata.target().starts_with("vllm_lb")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut line = Line(format!("{} {}", record.level(), record.args()));
        // Writing to a string does not fail.
        drop(record.key_values().visit(&mut line));
        let mut records = self.records();
        let lines = records.entry(runtime()).or_default();
        if lines.len() == MAX_RECORDS {
            // A test under load writes thousands of these, and its other records are what it counts.
            let debug = lines.iter().position(|line| line.starts_with("DEBUG"));
            lines.remove(debug.unwrap_or(0));
        }
        lines.push_back(line.0);
    }

    fn flush(&self) {}
}

struct Line(String);

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        write!(self.0, " {key}={value}").map_err(Error::from)
    }
}
