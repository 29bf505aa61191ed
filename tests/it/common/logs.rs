//! Remembers what the balancer logs, so that a test can ask for it and a failure can show it.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Mutex, Once, PoisonError};

use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Metadata, Record};

/// Records remembered.
const MOST: usize = 1_000;

struct Logs(Mutex<VecDeque<String>>);

static LOGS: Logs = Logs(Mutex::new(VecDeque::new()));

/// Starts to remember; once a process is enough.
pub fn remember() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&LOGS).expect("tests set no other logger");
        log::set_max_level(LevelFilter::Debug);
    });
}

/// What was logged, one record a line: level, message, fields.
pub fn all() -> Vec<String> {
    LOGS.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}

// === impl Logs ===

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
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == MOST {
            lines.pop_front();
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
