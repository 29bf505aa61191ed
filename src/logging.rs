//! The log: records of the `log` facade with named fields, to standard output.
//!
//! ```ignore
//! log::info!(upstream = name, status = 200; "request done");
//! ```
//!
//! The message is a fixed string; everything that varies is a field. Records of our own have a target that
//! begins with `vllm_lb`, the default; dependencies have a lower level. `RUST_LOG` is not read: the level
//! comes from the configuration. This is the only module that writes records; `observe` decides which ones.

pub(crate) mod format;

use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::SystemTime;

use env_logger::{Builder, Target};
use log::{Level, LevelFilter, Metadata, Record, SetLoggerError};

use crate::config::types::{LogConfig, LogFormat, LogLevel};
use format::{LogStyle, Origin};

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

/// Starts the log of this process; `terminal` says whether standard output is one.
pub fn init(log: &LogConfig, terminal: bool) -> Result<(), SetLoggerError> {
    let format = log.format.unwrap_or(if terminal { LogFormat::Txt } else { LogFormat::Json });
    let pid = std::process::id();
    let written = Builder::new()
        .filter(None, LevelFilter::Trace)
        .target(Target::Stdout)
        .format(move |out, record| {
            let Some(level) = shown_as(record, present().1) else { return Ok(()) };
            let detail = !terminal || level == Level::Error;
            let style = LogStyle { format, detail, colour: terminal && format == LogFormat::Txt };
            let thread = std::thread::current();
            let origin = Origin { time: SystemTime::now(), thread: thread.name().unwrap_or("unnamed"), pid };
            out.write_all(format::format(record, level, style, origin).as_bytes())
        })
        .build();
    log::set_boxed_logger(Box::new(Switch(written)))?;
    set_level(log.level);
    Ok(())
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

/// A logger whose level can be changed.
struct Switch(env_logger::Logger);

impl log::Log for Switch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let (ours, theirs) = present();
        metadata.level() <= if metadata.target().starts_with(OURS) { ours } else { theirs }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
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
