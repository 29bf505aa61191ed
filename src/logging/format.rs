//! One log record as text: txt for people, JSON and YAML for programs.
//!
//! Pure: the record goes in with the time, text comes out. Whatever a client can put into a message or a
//! field is escaped, in all formats, so that a client cannot forge a record, a field or a colour. A record
//! is one line (txt, JSON) or one document (YAML). Never cuts a value: the caller decides how much to show.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use log::kv::{Error, Key, Value, VisitSource, VisitValue};
use log::{Level, Record};

use crate::config::types::LogFormat;

/// How a record is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogStyle {
    pub format: LogFormat,
    /// Date, target, module, file, thread and process too.
    pub detail: bool,
    pub colour: bool,
}

/// The origin of a record, as far as the record itself does not have it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin<'a> {
    pub time: SystemTime,
    pub thread: &'a str,
    pub pid: u32,
}

/// Formats a record as text with its line end. `level` is the record's own unless it was demoted.
pub(crate) fn format(record: &Record<'_>, level: Level, style: LogStyle, origin: Origin<'_>) -> String {
    let mut fields = RecordFields(Vec::new());
    // The visitor never fails, so neither does the visit.
    let _ = record.key_values().visit(&mut fields);
    if style.detail {
        fields.add_details(record, origin);
    }
    let message = record.args().to_string();
    match style.format {
        LogFormat::Txt => txt(record, level, &message, &fields, style, origin),
        LogFormat::Json => json(record, level, &message, &fields, origin),
        LogFormat::Yaml => yaml(record, level, &message, &fields, origin),
    }
}

// === fields ===

/// The value of a field, with or without quotes in JSON and YAML.
enum RecordValue {
    Bare(String),
    Text(String),
}

struct RecordFields(Vec<(String, RecordValue)>);

/// The members of every record; a field of such a name gets an underscore.
const OWN: [&str; 4] = ["time", "level", "target", "message"];

impl RecordFields {
    fn push(&mut self, name: &str, value: RecordValue) {
        let mut name = name.to_string();
        while OWN.contains(&name.as_str()) || self.0.iter().any(|(earlier, _)| *earlier == name) {
            name.push('_');
        }
        self.0.push((name, value));
    }

    fn add_details(&mut self, record: &Record<'_>, origin: Origin<'_>) {
        if let Some(module) = record.module_path() {
            self.push("module", RecordValue::Text(module.into()));
        }
        if let Some(file) = record.file() {
            let line = record.line().map(|line| format!(":{line}")).unwrap_or_default();
            self.push("file", RecordValue::Text(format!("{}{line}", short_path(file))));
        }
        self.push("thread", RecordValue::Text(origin.thread.into()));
        self.push("pid", RecordValue::Bare(origin.pid.to_string()));
    }
}

/// Returns the path of a dependency's file without the directory of this machine.
fn short_path(file: &str) -> &str {
    let in_registry = file.split_once("/registry/src/").and_then(|(_, rest)| rest.split_once('/'));
    in_registry.map_or(file, |(_, path)| path)
}

impl<'kvs> VisitSource<'kvs> for RecordFields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let mut read = ReadValue(None);
        // A value that cannot be visited is shown by its `Display`.
        let field = match value.visit(&mut read) {
            Ok(()) => read.0.unwrap_or_else(|| RecordValue::Text(value.to_string())),
            Err(_) => RecordValue::Text(value.to_string()),
        };
        self.push(key.as_str(), field);
        Ok(())
    }
}

struct ReadValue(Option<RecordValue>);

impl ReadValue {
    fn bare(&mut self, text: String) -> Result<(), Error> {
        self.0 = Some(RecordValue::Bare(text));
        Ok(())
    }
}

impl<'v> VisitValue<'v> for ReadValue {
    fn visit_any(&mut self, value: Value<'_>) -> Result<(), Error> {
        self.0 = Some(RecordValue::Text(value.to_string()));
        Ok(())
    }

    fn visit_null(&mut self) -> Result<(), Error> {
        self.bare("null".into())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), Error> {
        self.bare(value.to_string())
    }

    fn visit_i64(&mut self, value: i64) -> Result<(), Error> {
        self.bare(value.to_string())
    }

    fn visit_bool(&mut self, value: bool) -> Result<(), Error> {
        self.bare(value.to_string())
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), Error> {
        // JSON has neither infinity nor not-a-number.
        self.0 = Some(if value.is_finite() {
            RecordValue::Bare(value.to_string())
        } else {
            RecordValue::Text(value.to_string())
        });
        Ok(())
    }
}

// === the three formats ===

fn txt(
    record: &Record<'_>,
    level: Level,
    message: &str,
    fields: &RecordFields,
    style: LogStyle,
    origin: Origin<'_>,
) -> String {
    let (time, date_end) = (rfc3339(origin.time), 11);
    let (on, dim, off) = match (style.colour, level) {
        (false, _) => ("", "", ""),
        (_, Level::Error) => ("\x1b[1;31m", "\x1b[2m", "\x1b[0m"),
        (_, Level::Warn) => ("\x1b[33m", "\x1b[2m", "\x1b[0m"),
        (_, Level::Info) => ("\x1b[32m", "\x1b[2m", "\x1b[0m"),
        (_, Level::Debug) => ("\x1b[36m", "\x1b[2m", "\x1b[0m"),
        (_, Level::Trace) => ("\x1b[2m", "\x1b[2m", "\x1b[0m"),
    };
    let mut line = String::with_capacity(160);
    let when = if style.detail { &time[..] } else { time[date_end..].trim_end_matches('Z') };
    let _ = write!(line, "{when} {on}{level:<5}{off} ");
    if style.detail {
        let _ = write!(line, "{}: ", word(record.target()));
    }
    line.push_str(&sentence(message));
    for (name, value) in &fields.0 {
        let value = match value {
            RecordValue::Bare(text) => Cow::Borrowed(text.as_str()),
            RecordValue::Text(text) => word(text),
        };
        let _ = write!(line, " {dim}{}={off}{value}", word(name));
    }
    line.push('\n');
    line
}

fn json(
    record: &Record<'_>,
    level: Level,
    message: &str,
    fields: &RecordFields,
    origin: Origin<'_>,
) -> String {
    let mut line = format!(
        "{{\"time\":\"{}\",\"level\":\"{}\",\"target\":{},\"message\":{}",
        rfc3339(origin.time),
        level_name(level),
        quoted(record.target()),
        quoted(message)
    );
    for (name, value) in &fields.0 {
        let _ = write!(line, ",{}:{}", quoted(name), scalar(value));
    }
    line.push_str("}\n");
    line
}

fn yaml(
    record: &Record<'_>,
    level: Level,
    message: &str,
    fields: &RecordFields,
    origin: Origin<'_>,
) -> String {
    let mut document = format!(
        "---\ntime: {}\nlevel: {}\ntarget: {}\nmessage: {}\n",
        rfc3339(origin.time),
        level_name(level),
        quoted(record.target()),
        quoted(message)
    );
    for (name, value) in &fields.0 {
        let _ = writeln!(document, "{}: {}", quoted_unless_plain(name), scalar(value));
    }
    document
}

fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warn",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

// === quoting ===

fn scalar(value: &RecordValue) -> Cow<'_, str> {
    match value {
        RecordValue::Bare(text) => Cow::Borrowed(text),
        RecordValue::Text(text) => Cow::Owned(quoted(text)),
    }
}

/// Quotes a text, in a form that JSON and YAML both parse.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if invisible(c) => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Whether a character is a control character, a line end, or changes the writing direction; all below
/// U+10000.
fn invisible(c: char) -> bool {
    let turns_or_hides =
        matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || turns_or_hides || matches!(c, '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

/// Formats a value in txt: bare where that is unambiguous.
fn word(text: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-:/@+,%*~()[]{}".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { quoted(text).into() }
}

fn quoted_unless_plain(name: &str) -> Cow<'_, str> {
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if plain { name.into() } else { quoted(name).into() }
}

/// Formats a message in txt: bare unless it looks like fields or needs escapes.
fn sentence(text: &str) -> Cow<'_, str> {
    let mistakable = |c: char| invisible(c) || matches!(c, '=' | '"' | '\\');
    if text.is_empty() || text.chars().any(mistakable) { quoted(text).into() } else { text.into() }
}

// === time ===

/// Formats UTC with milliseconds, as `2026-11-20T08:18:53.123Z`.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Returns the date `days` after 1970-01-01. Counts in years that begin in March, so that the leap day is
/// the last of its year, and in eras of 400 years, which all have the same length.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_PER_ERA: u64 = 146_097;
    // From 0000-03-01, the first day of an era, to 1970-01-01.
    let days = days + 719_468;
    let (era, day) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Months from March on have 153 days in every five.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next_year, month, day)
}

#[cfg(test)]
mod tests;
