//! The end of a request: its record, its counters, and what it adds to the totals.
//!
//! Never: a number that is not known, told as one.

use std::fmt::Display;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::Record;
use log::kv::Value;

use super::metrics::{self, METRICS};
use super::usage::{TOTALS, UsageLabels};
use crate::reply::usage::Usage;

/// One request, as it ended.
pub struct Done<'a> {
    pub id: &'a str,
    /// Shown only where it is told, like the error: a name of its own would be made for every request.
    pub client: Option<&'a dyn Display>,
    pub method: &'a str,
    pub path: &'a str,
    /// `None` where the request names no model, or one that no upstream serves.
    pub model: Option<&'a str>,
    /// Of the configuration.
    pub route: Option<&'a str>,
    /// As it is told, see `prompt::session`.
    pub session: Option<&'a str>,
    pub upstream: Option<&'a str>,
    /// What the answer said that it took; `None` without an answer that counts tokens.
    pub usage: Option<Usage>,
    pub status: u16,
    /// Label of the refusal, or of the outcome.
    pub outcome: &'static str,
    pub attempts: u32,
    pub first_byte: Option<Duration>,
    pub total: Duration,
    pub received: u64,
    pub sent: u64,
    /// What went wrong, in the words of the layer that saw it.
    pub error: Option<&'a dyn Display>,
    /// A call to the admin room: told, but not counted among the clients' requests.
    pub admin: bool,
}

/// A request has ended, however it did.
pub fn request_done(done: &Done<'_>) {
    if !done.admin {
        count(done);
    }
    if let Some(usage) = &done.usage {
        tokens(done, usage);
    }
    let level = if done.error.is_some() && done.status >= 500 { log::Level::Warn } else { log::Level::Debug };
    if log::log_enabled!(level) {
        write(done, level);
    }
}

/// The record, in which what is not known of route, session and tokens is left out.
fn write(done: &Done<'_>, level: log::Level) {
    let nothing: &dyn Display = &"";
    let mut fields: Vec<(&str, Value<'_>)> = vec![
        ("id", done.id.into()),
        ("client", Value::from_dyn_display(done.client.unwrap_or(nothing))),
        ("method", done.method.into()),
        ("path", done.path.into()),
        ("model", done.model.unwrap_or("").into()),
        ("upstream", done.upstream.unwrap_or("").into()),
        ("status", done.status.into()),
        ("outcome", done.outcome.into()),
        ("attempts", done.attempts.into()),
        ("first_byte_ms", done.first_byte.map_or(-1.0, millis).into()),
        ("total_ms", millis(done.total).into()),
        ("received", done.received.into()),
        ("sent", done.sent.into()),
        ("error", Value::from_dyn_display(done.error.unwrap_or(nothing))),
    ];
    let names = [("route", done.route), ("session", done.session)];
    fields.extend(names.iter().filter_map(|(name, value)| Some((*name, (*value)?.into()))));
    let usage = done.usage.unwrap_or_default();
    let counts = kinds(&usage).map(|(_, name, tokens)| (name, tokens));
    fields.extend(counts.iter().filter_map(|(name, tokens)| Some((*name, (*tokens)?.into()))));
    let mut record = Record::builder();
    record.level(level).target(module_path!()).module_path_static(Some(module_path!()));
    record.file_static(Some(file!())).line(Some(line!())).key_values(&fields);
    log::logger().log(&record.args(format_args!("request done")).build());
}

/// Label of the metric, name of the record's field, and number.
fn kinds(usage: &Usage) -> [(&'static str, &'static str, Option<u64>); 4] {
    [
        ("prompt", "input_tokens", usage.prompt_tokens),
        ("cached", "cached_tokens", usage.cached_tokens),
        ("output", "output_tokens", usage.output_tokens),
        ("reasoning", "reasoning_tokens", usage.reasoning_tokens),
    ]
}

fn count(done: &Done<'_>) {
    let (model, upstream) = (done.model(), done.upstream.unwrap_or(""));
    let status = metrics::status_label(done.status);
    METRICS.requests.with_label_values(&[model, upstream, status, done.outcome]).inc();
    METRICS.seconds.with_label_values(&[model]).observe(done.total.as_secs_f64());
    if let Some(first) = done.first_byte {
        METRICS.first_byte.with_label_values(&[model]).observe(first.as_secs_f64());
    }
}

/// An answer said how many tokens it took; what it did not say is not counted.
fn tokens(done: &Done<'_>, usage: &Usage) {
    let (model, route) = (done.model(), done.route.unwrap_or(""));
    for (kind, _, tokens) in kinds(usage) {
        if let Some(tokens) = tokens {
            METRICS.cache.tokens.with_label_values(&[model, route, kind]).inc_by(tokens);
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    TOTALS.add(UsageLabels { model, route, session: done.session }, usage, now);
}

impl Done<'_> {
    /// The label.
    fn model(&self) -> &str {
        self.model.unwrap_or("other")
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
