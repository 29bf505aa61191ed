//! Events of requests: the choice of an upstream, failed attempts, and the end with its record.
//!
//! Never: report an unknown number as a value.

use std::fmt::{self, Display};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::kv::Value;
use log::{Record, debug, info, warn};

use super::decisions::Decision;
use super::metrics::{OTHER_MODEL, status_label};
use super::traffic::EndedRequest;
use super::usage::UsageLabels;
use super::{GaugeGuard, Observer};
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::pick::forecast::forecast;
use crate::pick::{self, Candidate};
use crate::reply::usage::Usage;

/// One request that has ended.
pub struct Done<'a> {
    pub id: &'a str,
    /// Formatted only when the record is written, like the error; an empty text for a client without an
    /// address.
    pub client: Option<&'a dyn Display>,
    pub method: &'a str,
    pub path: &'a str,
    /// `None` when the request names no model or a model that no upstream serves.
    pub model: Option<&'a str>,
    /// The model's name in the client's request, whether or not an upstream serves it.
    pub client_model: Option<&'a str>,
    /// The name of the configured route.
    pub route: Option<&'a str>,
    /// The printable name of the session, see `prompt::session`.
    pub session: Option<&'a str>,
    pub upstream: Option<&'a str>,
    /// The usage that the answer reports; `None` when the answer counts no tokens.
    pub usage: Option<Usage>,
    pub status: u16,
    /// The label of the reject or of the outcome.
    pub outcome: &'static str,
    pub attempts: u32,
    pub times: RequestTimes,
    /// The forecast of the time from the last choice to the first token; `None` without a choice.
    pub forecast: Option<Duration>,
    pub total: Duration,
    pub received: u64,
    pub sent: u64,
    /// The error, from the layer where it occurred.
    pub error: Option<&'a dyn Display>,
    /// Whether this is a call to the admin API: logged, but not counted among the clients' requests.
    pub admin: bool,
    /// Whether the record is for Info, in place of Debug.
    pub logged: bool,
}

/// When the phases of a request ended, from the arrival of its head. What an attempt sets is of the last one;
/// a phase that did not come is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestTimes {
    /// The time in the queue for room, over all attempts.
    pub queued: Duration,
    /// The time in which nothing was done but wait for the client to send its body, before the first choice.
    pub body_wait: Duration,
    /// The upstream was chosen.
    pub chosen: Option<Duration>,
    /// There was a connection to it.
    pub connected: Option<Duration>,
    /// The request was sent: its last byte was handed to the operating system.
    pub sent: Option<Duration>,
    /// The first event, or byte, of the model's output came.
    pub first_byte: Option<Duration>,
    /// As much of the answer had come as decides that it goes to the client.
    pub accepted: Option<Duration>,
    /// The head and the beginning of the answer were written to the client, or as much of them as its
    /// connection took at once.
    pub forwarded: Option<Duration>,
    /// The last piece of the answer, or its end, was written to the client.
    pub last_piece: Option<Duration>,
    /// The longest time in which the next piece of a stream was awaited after its beginning.
    pub max_gap: Option<Duration>,
}

// === impl RequestTimes ===

impl RequestTimes {
    /// The time from the choice of the upstream to the first byte.
    pub fn upstream_first_byte(&self) -> Option<Duration> {
        self.first_byte?.checked_sub(self.chosen?)
    }

    /// The mean time between two tokens of a stream that had so many; `None` without a second piece.
    pub fn inter_token(&self, tokens: u64) -> Option<Duration> {
        self.max_gap?;
        let gaps = u32::try_from(tokens.checked_sub(1)?).ok()?;
        self.last_piece?.checked_sub(self.first_byte?)?.checked_div(gaps)
    }

    /// The time that the balancer itself took, where the first attempt had an answer: from the head to the
    /// choice, without the waits for room and for the client's body, and from the piece of the answer that
    /// decided that it goes to the client until its beginning was written. No time in which a client does not
    /// read is in it.
    pub fn added(&self) -> Option<Duration> {
        let answering = self.forwarded?.checked_sub(self.accepted?)?;
        Some(self.chosen?.saturating_sub(self.queued + self.body_wait) + answering)
    }
}

impl Observer {
    /// Counts a request as in flight until the guard is dropped.
    pub fn request_in_flight(&self) -> GaugeGuard {
        GaugeGuard::new(&self.metrics().requests.in_flight)
    }

    /// Counts reserved memory for request bodies.
    pub fn body_memory_reserved(&self, bytes: u64) {
        self.metrics().requests.peeked_bytes.add(bytes.cast_signed());
    }

    /// Counts returned memory for request bodies.
    pub fn body_memory_released(&self, bytes: u64) {
        self.metrics().requests.peeked_bytes.sub(bytes.cast_signed());
    }

    /// Counts a request that the balancer rejected.
    pub fn rejected(&self, reason: &'static str) {
        self.traffic().rejects.fetch_add(1, Relaxed);
        self.metrics().requests.rejects.with_label_values(&[reason]).inc();
    }

    /// Records the choice of an upstream.
    pub fn chosen(&self, decision: &Decision<'_>) {
        self.metrics().requests.choices.with_label_values(&[decision.reason()]).inc();
        self.decisions().record(decision, since_1970());
        debug!(
            id = decision.id,
            model = cut(decision.model.unwrap_or_default(), MAX_SHOWN_BYTES).concat().as_str(),
            attempt = decision.attempt,
            session = decision.session.unwrap_or(""),
            prompt_tokens = decision.tokens,
            blocks = decision.blocks,
            upstream = (decision.name)(decision.choice.index),
            cost = decision.choice.cost,
            reason = decision.reason(),
            candidates:% = CandidateTerms(decision);
            "upstream chosen"
        );
    }

    /// Records a failed attempt; the record of the request's end shows whether another attempt followed.
    pub fn attempt_failed(&self, id: &str, upstream: &str, cause: &'static str, attempt: u32) {
        self.traffic().attempt_failed(upstream);
        self.metrics().requests.attempt_failures.with_label_values(&[upstream, cause]).inc();
        info!(id = id, upstream = upstream, cause = cause, attempt = attempt; "attempt failed");
    }

    /// Counts the first token of a stream and its forecast, both from the choice on.
    pub fn forecast_compared(&self, upstream: &str, forecast: Duration, actual: Duration) {
        self.metrics().forecast.compared(upstream, forecast, actual);
    }

    /// Counts an attempt that follows a failed one.
    pub fn retried(&self, cause: &'static str) {
        self.traffic().retries.fetch_add(1, Relaxed);
        self.metrics().requests.retries.with_label_values(&[cause]).inc();
    }

    /// Records a stream that failed after its beginning; its client receives an error event.
    pub fn stream_broken(&self, id: &str, upstream: &str, error: &str) {
        self.traffic().broken_streams.fetch_add(1, Relaxed);
        self.metrics().requests.broken_streams.with_label_values(&[upstream]).inc();
        warn!(id = id, upstream = upstream, error = error; "stream ended with an error");
    }

    /// Logs the beginnings of the request's and the answer's body, when `log.bodies` is set.
    pub fn bodies(&self, id: &str, request: &str, answer: &str) {
        debug!(id = id, request_body = request, answer_body = answer; "bodies");
    }

    /// Records the end of a request.
    pub fn request_done(&self, done: &Done<'_>) {
        if !done.admin {
            self.count_request(done);
        }
        if let Some(usage) = &done.usage {
            self.count_usage(done, usage);
        }
        let failed = done.error.is_some() && done.status >= 500;
        let level = match done.logged {
            _ if failed => log::Level::Warn,
            true => log::Level::Info,
            false => log::Level::Debug,
        };
        if log::log_enabled!(level) {
            write(done, level);
        }
    }

    fn count_request(&self, done: &Done<'_>) {
        let &Done { upstream, status, outcome, usage, .. } = done;
        let first_byte = done.times.first_byte;
        self.traffic().request_done(EndedRequest { upstream, status, outcome, first_byte, usage });
        let (requests, model, times) = (&self.metrics().requests, done.model_label(), &done.times);
        let (route, upstream) = (done.route.unwrap_or(""), done.upstream.unwrap_or(""));
        let labels = [model, route, upstream, status_label(done.status), done.outcome];
        requests.ended.with_label_values(&labels).inc();
        requests.seconds.with_label_values(&[model]).observe_time(done.total);
        if let Some(first) = times.first_byte {
            requests.first_byte_seconds.with_label_values(&[model]).observe_time(first);
        }
        if let Some(time) = times.upstream_first_byte() {
            requests.upstream_first_byte_seconds.with_label_values(&[upstream]).observe_time(time);
        }
        if !times.queued.is_zero() {
            requests.queue_seconds.with_label_values(&[model]).observe_time(times.queued);
        }
        if let Some(gap) = times.max_gap {
            requests.stream_gap_seconds.with_label_values(&[model]).observe_time(gap);
        }
        if let Some(mean) = done.usage.and_then(|usage| times.inter_token(usage.output_tokens?)) {
            requests.inter_token_seconds.with_label_values(&[model]).observe_time(mean);
        }
        if let (1, Some(added)) = (done.attempts, times.added()) {
            requests.added_seconds.observe_time(added);
        }
    }

    /// Counts the tokens that an answer reports. Numbers that the answer omits are not counted as 0.
    fn count_usage(&self, done: &Done<'_>, usage: &Usage) {
        let (model, route) = (done.model_label(), done.route.unwrap_or(""));
        for (kind, _, tokens) in kinds(usage) {
            if let Some(tokens) = tokens {
                self.metrics().cache.tokens.with_label_values(&[model, route, kind]).inc_by(tokens);
            }
        }
        self.usage().add(UsageLabels { model, route, session: done.session }, usage, since_1970());
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Formats the candidates of a choice with the terms of their costs.
struct CandidateTerms<'d, 'a>(&'d Decision<'a>);

impl Display for CandidateTerms<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, candidate) in self.0.candidates.iter().enumerate() {
            let gap = if place == 0 { "" } else { "; " };
            let name = (self.0.name)(candidate.index);
            let cost = pick::cost(candidate, self.0.knobs);
            let Candidate { backlog, missing, active, context, weight, hit, uncached, .. } = candidate;
            let penalty = candidate.session_penalty;
            write!(f, "{gap}{name} cost {cost:.1} hit {hit} uncached {uncached} missing {missing}")?;
            write!(f, " backlog {backlog} active {active} context {context} session_penalty {penalty}")?;
            write!(f, " weight {weight} forecast_ms {:.1}", millis(forecast(candidate)))?;
        }
        Ok(())
    }
}

/// Writes the log record. Unknown values of route, session, tokens and phases are omitted.
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
        ("first_byte_ms", done.times.first_byte.map_or(-1.0, millis).into()),
        ("total_ms", millis(done.total).into()),
        ("received", done.received.into()),
        ("sent", done.sent.into()),
        ("error", Value::from_dyn_display(done.error.unwrap_or(nothing))),
    ];
    let client_model = done.client_model.filter(|name| done.model != Some(name));
    let client_model = client_model.map(|name| cut(name, MAX_SHOWN_BYTES).concat());
    let names = [("client_model", client_model.as_deref()), ("route", done.route), ("session", done.session)];
    fields.extend(names.iter().filter_map(|(name, value)| Some((*name, (*value)?.into()))));
    fields.extend(done.forecast.map(|forecast| ("forecast_ms", millis(forecast).into())));
    let usage = done.usage.unwrap_or_default();
    let counts = kinds(&usage).map(|(_, name, tokens)| (name, tokens));
    fields.extend(counts.iter().filter_map(|(name, tokens)| Some((*name, (*tokens)?.into()))));
    let phases = done.times.phases(done.total);
    fields.extend(phases.iter().filter_map(|(name, time)| Some((*name, millis((*time)?).into()))));
    let mut record = Record::builder();
    record.level(level).target(module_path!()).module_path_static(Some(module_path!()));
    record.file_static(Some(file!())).line(Some(line!())).key_values(&fields);
    log::logger().log(&record.args(format_args!("request done")).build());
}

/// The label of the metric, the name of the record's field, and the value of each kind of token.
fn kinds(usage: &Usage) -> [(&'static str, &'static str, Option<u64>); 4] {
    [
        ("prompt", "input_tokens", usage.prompt_tokens),
        ("cached", "cached_tokens", usage.cached_tokens),
        ("output", "output_tokens", usage.output_tokens),
        ("reasoning", "reasoning_tokens", usage.reasoning_tokens),
    ]
}

impl RequestTimes {
    /// The fields of the record with the lengths of the phases; `None` for a phase that did not end.
    fn phases(&self, total: Duration) -> [(&'static str, Option<Duration>); 7] {
        let between = |start: Option<Duration>, end: Option<Duration>| Some(end?.saturating_sub(start?));
        [
            ("body_wait_ms", Some(self.body_wait)),
            ("queue_ms", Some(self.queued)),
            ("connect_ms", between(self.chosen, self.connected)),
            ("send_ms", between(self.connected, self.sent)),
            ("prefill_ms", between(self.sent, self.first_byte)),
            ("stream_ms", between(self.first_byte, Some(total))),
            ("max_gap_ms", self.max_gap),
        ]
    }
}

impl Done<'_> {
    /// The value of the label `model`.
    fn model_label(&self) -> &str {
        self.model.unwrap_or(OTHER_MODEL)
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
