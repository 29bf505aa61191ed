//! What is logged, and in which form.

use crate::config::setting::{
    NamedChoice, SettingRow, SettingsTable, choice, integer, maybe, row, switch, value,
};

/// The settings of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// `None`: txt on a terminal, else json.
    pub format: Option<LogFormat>,
    pub level: LogLevel,
    /// Whether the record of each request is logged at Info, in place of Debug.
    pub requests: bool,
    /// Whether the beginnings of request and answer bodies are logged at Debug.
    pub bodies: bool,
    /// Characters of a body that a record shows.
    pub truncate: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { format: None, level: LogLevel::Info, requests: false, bodies: false, truncate: 180 }
    }
}

/// The form of log records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Txt,
    Json,
    Yaml,
}

impl LogFormat {
    /// Parses the first letter alone, as on the command line and in the environment.
    pub fn from_initial(text: &str) -> Option<Self> {
        match text.chars().next()?.to_ascii_lowercase() {
            't' => Some(LogFormat::Txt),
            'j' => Some(LogFormat::Json),
            'y' => Some(LogFormat::Yaml),
            _ => None,
        }
    }
}

impl NamedChoice for LogFormat {
    const NAMES: &'static [&'static str] = &["txt", "json", "yaml", "yml"];
    const VALUES: &'static [Self] = &[LogFormat::Txt, LogFormat::Json, LogFormat::Yaml, LogFormat::Yaml];
}

/// The seven levels of verbosity, quietest first. Errors are always logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Quiet,
    Error,
    Warning,
    Info,
    Debug,
    Verbose,
    Loud,
}

impl LogLevel {
    /// All levels in the order of the variants.
    pub const ALL: [LogLevel; 7] = [
        LogLevel::Quiet,
        LogLevel::Error,
        LogLevel::Warning,
        LogLevel::Info,
        LogLevel::Debug,
        LogLevel::Verbose,
        LogLevel::Loud,
    ];

    /// Parses the first character alone, as in the environment; `0` and `1` are kept for older set-ups.
    pub fn from_initial(text: &str) -> Option<Self> {
        match text.chars().next()?.to_ascii_lowercase() {
            'q' => Some(LogLevel::Quiet),
            'e' | '0' => Some(LogLevel::Error),
            'w' => Some(LogLevel::Warning),
            'i' => Some(LogLevel::Info),
            'd' => Some(LogLevel::Debug),
            'v' => Some(LogLevel::Verbose),
            'l' | '1' => Some(LogLevel::Loud),
            _ => None,
        }
    }

    /// The level that is this many steps louder, or quieter below zero, within the ends.
    pub fn step(self, steps: i32) -> Self {
        let last = LogLevel::ALL.len() as i32 - 1;
        LogLevel::ALL[(self as i32).saturating_add(steps).clamp(0, last) as usize]
    }
}

impl NamedChoice for LogLevel {
    const NAMES: &'static [&'static str] = &["quiet", "error", "warning", "info", "debug", "verbose", "loud"];
    const VALUES: &'static [Self] = &LogLevel::ALL;

    /// Ignores case.
    fn parse(name: &str) -> Option<Self> {
        LogLevel::ALL.into_iter().find(|level| level.name().eq_ignore_ascii_case(name))
    }
}

// === impl LogConfig ===

impl SettingsTable for LogConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "format",
            "Form of the records; without it txt on a terminal, else json.",
            &value(|log: &mut Self| &mut log.format, maybe(choice())),
        )
        .restart(),
        row(
            "level",
            "Lowest level that is logged; `-v` and `-q` move it by a step.",
            &value(|log: &mut Self| &mut log.level, choice()),
        ),
        row(
            "requests",
            "Whether the record of each request is logged at info, in place of debug.",
            &value(|log: &mut Self| &mut log.requests, switch()),
        ),
        row(
            "bodies",
            "Whether the beginnings of request and answer bodies are logged at debug.",
            &value(|log: &mut Self| &mut log.bodies, switch()),
        ),
        row(
            "truncate",
            "Characters of a body that a record shows.",
            &value(|log: &mut Self| &mut log.truncate, integer(0, 1_000_000)),
        ),
    ];

    fn defaults() -> Self {
        LogConfig::default()
    }
}
