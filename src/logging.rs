//! The log: records of the `log` facade with named fields, to standard output.
//!
//! ```ignore
//! log::info!(upstream = name, status = 200; "request done");
//! ```
//!
//! The message is a fixed string; everything that varies is a field. Records of our own have a target that
//! begins with `vllm_lb`, the default; dependencies have a lower level. `RUST_LOG` is not read: the level
//! comes from the configuration. This is the only module that writes records; `observe` decides which ones.
//!
//! A record is formatted by the thread that logs, and written by a thread of its own (`queue`): whatever
//! reads standard output cannot hold up a thread that serves requests.

pub(crate) mod format;
mod queue;

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, SystemTime};

use log::{Level, LevelFilter, Metadata, Record};

use crate::config::types::{LogConfig, LogFormat, LogLevel};
use format::{LogStyle, Origin};
use queue::{LogQueue, LogQueueLimits};

/// The root of the targets of our own records.
const OURS: &str = "vllm_lb";

/// Records of dependencies that alarm without need: target, beginning of the message, reason. They are
/// demoted to Debug, and shown from `verbose` on.
const NOISE: &[(&str, &str, &str)] = &[
    ("pingora_proxy", "Fail to proxy", "our record of the request says the same, with its upstream"),
    ("pingora_proxy", "failed to send error response", "the client has gone, our record says so"),
    ("pingora_proxy::proxy_h1", "Error finish sending body", "the client has gone, our record says so"),
    ("pingora_proxy::proxy_h2", "Error finish sending body", "the client has gone, our record says so"),
    (
        "pingora_core::services::listening",
        "Downstream handshake",
        "port scans and TCP probes do this all day",
    ),
    ("pingora_core::apps", "H2 handshake error", "port scans and TCP probes do this all day"),
    ("pingora_core::apps::http_app", "HTTP server fails to", "a client of the admin listener has gone"),
];

/// The beginnings of the targets of the database library, of the Kubernetes client and of the DNS resolver,
/// which warns of every forged answer. What they warn of is noise, too: one record of ours says what failed,
/// once and with a remedy.
const QUIET_LIBRARIES: [&str; 3] = ["sqlx", "kube_client", "hickory_"];

/// The step of verbosity; a reload may change it.
static LEVEL: AtomicU8 = AtomicU8::new(LogLevel::Info as u8);

/// The most records, and bytes of them, that wait for standard output.
const QUEUE_LIMITS: LogQueueLimits = LogQueueLimits { records: 8_192, bytes: 8 << 20 };

/// The longest time for which the end of the process waits for standard output.
const MAX_FLUSH_TIME: Duration = Duration::from_secs(1);

/// The message of the record in the place of dropped ones.
const DROPPED: &str = "log records dropped: standard output did not take them in time; check what reads it, \
                       or log less with log.level or log.requests";

/// The records of this process that are not written yet.
static QUEUE: LazyLock<LogQueue> = LazyLock::new(|| LogQueue::new(QUEUE_LIMITS));

/// Writes what was logged before the process ends, as far as standard output takes it, when this is dropped.
#[must_use = "records that are not written when the process ends are lost"]
pub struct LogFlush(());

impl Drop for LogFlush {
    fn drop(&mut self) {
        log::logger().flush();
    }
}

/// Starts the log of this process; `terminal` says whether standard output is one.
pub fn init(log: &LogConfig, terminal: bool) -> Result<LogFlush, String> {
    let format = log.format.unwrap_or(if terminal { LogFormat::Txt } else { LogFormat::Json });
    let formatter = LogFormatter { format, terminal, pid: std::process::id() };
    // A handle of its own: `print!` may wait for its reader, and holds a lock meanwhile.
    let output = std::io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let output = output.map_err(|error| error.to_string())?;
    let write = move || QUEUE.write_to(output, |count| formatter.dropped(count));
    thread::Builder::new().name("log".into()).spawn(write).map_err(|error| error.to_string())?;
    log::set_boxed_logger(Box::new(Switch(formatter))).map_err(|error| error.to_string())?;
    set_level(log.level);
    Ok(LogFlush(()))
}

/// Returns the number of records that were dropped because standard output did not take them.
pub(crate) fn dropped() -> u64 {
    QUEUE.dropped()
}

/// Says more, or less, from now on.
pub fn set_level(level: LogLevel) {
    LEVEL.store(level as u8, Relaxed);
    let (ours, theirs) = levels(level);
    log::set_max_level(ours.max(theirs));
}

/// What our own records and the dependencies' must at least be now.
fn present() -> (LevelFilter, LevelFilter) {
    let step = usize::from(LEVEL.load(Relaxed));
    levels(LogLevel::ALL.get(step).copied().unwrap_or(LogLevel::Info))
}

/// Formats records for one standard output.
#[derive(Clone, Copy)]
struct LogFormatter {
    format: LogFormat,
    terminal: bool,
    pid: u32,
}

impl LogFormatter {
    fn format(&self, record: &Record<'_>, level: Level) -> String {
        let detail = !self.terminal || level == Level::Error;
        let style =
            LogStyle { format: self.format, detail, colour: self.terminal && self.format == LogFormat::Txt };
        let thread = thread::current();
        let origin =
            Origin { time: SystemTime::now(), thread: thread.name().unwrap_or("unnamed"), pid: self.pid };
        format::format(record, level, style, origin)
    }

    /// Formats the record in the place of so many dropped ones. Every level shows it.
    fn dropped(&self, count: u64) -> String {
        let fields = [("dropped", count)];
        let mut record = Record::builder();
        record.level(Level::Warn).target(module_path!()).module_path_static(Some(module_path!()));
        record.file_static(Some(file!())).line(Some(line!())).key_values(&fields);
        self.format(&record.args(format_args!("{DROPPED}")).build(), Level::Warn)
    }
}

/// A logger whose level can be changed.
struct Switch(LogFormatter);

impl log::Log for Switch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let (ours, theirs) = present();
        metadata.level() <= if metadata.target().starts_with(OURS) { ours } else { theirs }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata())
            && let Some(level) = shown_as(record, present().1)
        {
            QUEUE.push(self.0.format(record, level));
        }
    }

    /// Waits until all records are written, for at most `MAX_FLUSH_TIME`.
    fn flush(&self) {
        QUEUE.flush(MAX_FLUSH_TIME);
    }
}

/// What our own records and the dependencies' must at least be, at each of the seven steps.
fn levels(level: LogLevel) -> (LevelFilter, LevelFilter) {
    match level {
        LogLevel::Quiet => (LevelFilter::Error, LevelFilter::Off),
        LogLevel::Error => (LevelFilter::Error, LevelFilter::Error),
        LogLevel::Warning => (LevelFilter::Warn, LevelFilter::Warn),
        LogLevel::Info => (LevelFilter::Info, LevelFilter::Warn),
        LogLevel::Debug => (LevelFilter::Debug, LevelFilter::Info),
        LogLevel::Verbose => (LevelFilter::Trace, LevelFilter::Debug),
        LogLevel::Loud => (LevelFilter::Trace, LevelFilter::Trace),
    }
}

/// The level that a record is shown at; `None` for noise that the level leaves out.
fn shown_as(record: &Record<'_>, theirs: LevelFilter) -> Option<Level> {
    if record.level() >= Level::Debug || !is_noise(record) {
        return Some(record.level());
    }
    (theirs >= LevelFilter::Debug).then_some(Level::Debug)
}

fn is_noise(record: &Record<'_>) -> bool {
    if QUIET_LIBRARIES.iter().any(|library| record.target().starts_with(library)) {
        return true;
    }
    let mut candidates = NOISE.iter().filter(|(target, ..)| *target == record.target()).peekable();
    if candidates.peek().is_none() {
        return false;
    }
    let message = record.args().to_string();
    candidates.any(|(_, start, _)| message.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_never_silent_and_each_step_shows_more() {
        let steps = LogLevel::ALL.map(levels);
        assert!(steps.iter().all(|(ours, _)| *ours >= LevelFilter::Error));
        for pair in steps.windows(2) {
            assert!(pair[0] != pair[1] && pair[0].0 <= pair[1].0 && pair[0].1 <= pair[1].1, "{pair:?}");
        }
    }

    #[test]
    fn noise_is_demoted_and_nothing_else() {
        let shown = |target: &str, message: &str, theirs| {
            let make = |args: std::fmt::Arguments<'_>| {
                shown_as(&Record::builder().args(args).level(Level::Error).target(target).build(), theirs)
            };
            make(format_args!("{message}"))
        };
        let listening = "pingora_core::services::listening";
        assert_eq!(shown(listening, "Downstream handshake error from x", LevelFilter::Warn), None);
        assert_eq!(shown(listening, "Downstream handshake timeout", LevelFilter::Debug), Some(Level::Debug));
        assert_eq!(shown(listening, "Accept() failed", LevelFilter::Warn), Some(Level::Error));
        assert_eq!(shown("vllm_lb::proxy", "Fail to proxy", LevelFilter::Warn), Some(Level::Error));
        let sqlx = ["sqlx::pool::acquire", "sqlx::postgres::notice", "sqlx_core::pool::inner"];
        let others = ["kube_client::client::builder", "hickory_net::udp::udp_client_stream"];
        for target in sqlx.into_iter().chain(others) {
            assert_eq!(shown(target, "slow", LevelFilter::Warn), None);
            assert_eq!(shown(target, "slow", LevelFilter::Debug), Some(Level::Debug));
        }
    }
}
