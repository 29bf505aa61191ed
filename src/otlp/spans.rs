//! The spans of a request, as messages of OTLP.
//!
//! ```text
//! POST /v1/chat/completions      server: from the head to the end of the answer
//!   queue                        waits for room on an upstream
//!   connect                      from the choice of the upstream to a connection
//!   prefill                      from the sent request to the first byte of the model's output
//!   stream                       from there to the end
//! ```
//!
//! Phases are those of the last attempt; a phase that did not begin has no span. Attributes follow the
//! conventions for HTTP; those without a convention begin with `vllm_lb.`.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, SpanFlags, Status};

use super::trace_context::{RequestTrace, SpanId};
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::observe::request::{Done, RequestTimes};
use crate::reply::usage::Usage;
use crate::route::api_paths;

/// The longest path and the longest error in a span, in bytes.
const MAX_TEXT_BYTES: usize = 1024;

/// The longest name of a model in a span, in bytes.
const MAX_NAME_BYTES: usize = 256;

/// Outcomes that are failures whatever the status.
const FAILURES: [&str; 3] = ["server_error", "unreached", "broken"];

/// The most child spans of a request.
const MAX_PHASES: usize = 4;

/// The facts of a request that has ended, until its spans are made.
pub(super) struct SpanRecord {
    trace: RequestTrace,
    /// When the head of the request came, since 1970.
    start: Duration,
    total: Duration,
    times: RequestTimes,
    id: Box<str>,
    client: Option<Box<str>>,
    method: Box<str>,
    path: Box<str>,
    model: Option<Box<str>>,
    route: Option<Box<str>>,
    session: Option<Box<str>>,
    upstream: Option<Box<str>>,
    usage: Usage,
    status: u16,
    outcome: &'static str,
    attempts: u32,
    forecast: Option<Duration>,
    received: u64,
    sent: u64,
    error: Option<Box<str>>,
}

/// One phase of a request, by its offsets from the request's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PhaseTimes {
    name: &'static str,
    start: Duration,
    end: Duration,
    /// The phase did not come to its end.
    failed: bool,
}

// === impl SpanRecord ===

impl SpanRecord {
    /// Copies the facts.
    pub(super) fn new(trace: &RequestTrace, done: &Done<'_>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let short = |text: &str, limit| cut(text, limit).concat().into_boxed_str();
        SpanRecord {
            trace: *trace,
            start: now.saturating_sub(done.total),
            total: done.total,
            times: done.times,
            id: done.id.into(),
            client: done
                .client
                .map(|client| client.to_string().into_boxed_str())
                .filter(|client| !client.is_empty()),
            method: short(done.method, MAX_SHOWN_BYTES),
            path: short(done.path, MAX_TEXT_BYTES),
            model: done.model.map(|model| short(model, MAX_NAME_BYTES)),
            route: done.route.map(|route| short(route, MAX_NAME_BYTES)),
            session: done.session.map(Into::into),
            upstream: done.upstream.map(Into::into),
            usage: done.usage.unwrap_or_default(),
            status: done.status,
            outcome: done.outcome,
            attempts: done.attempts,
            forecast: done.forecast,
            received: done.received,
            sent: done.sent,
            error: done.error.map(|error| short(&error.to_string(), MAX_TEXT_BYTES)),
        }
    }

    /// The number of spans that `spans` makes.
    pub(super) fn span_count(&self) -> usize {
        1 + self.phases().count()
    }

    /// Makes the span of the request and those of its phases. `gen_ai`: with the names of the conventions for
    /// generative AI where these have one.
    pub(super) fn spans(&self, gen_ai: bool) -> Vec<Span> {
        let template = api_paths::template(&self.path);
        let name = match template {
            Some(template) => format!("{} {template}", self.method),
            None => self.method.to_string(),
        };
        let failed = self.is_failed();
        let mut spans = vec![Span {
            parent_span_id: self.trace.parent_id.map(|id| id.to_vec()).unwrap_or_default(),
            attributes: self.attributes(template, gen_ai),
            status: failed.then(|| Status {
                message: self.error.as_deref().unwrap_or(self.outcome).to_owned(),
                code: StatusCode::Error.into(),
            }),
            flags: self.flags(self.trace.parent_id.is_some()),
            ..self.span(self.trace.span_id, &name, SpanKind::Server, Duration::ZERO, self.total)
        }];
        for (number, phase) in (1..).zip(self.phases()) {
            let id = child_id(self.trace.span_id, number);
            let status = (phase.failed && failed)
                .then(|| Status { message: self.outcome.to_owned(), code: StatusCode::Error.into() });
            spans.push(Span {
                parent_span_id: self.trace.span_id.to_vec(),
                status,
                flags: self.flags(false),
                ..self.span(id, phase.name, SpanKind::Internal, phase.start, phase.end)
            });
        }
        spans
    }

    fn span(&self, id: SpanId, name: &str, kind: SpanKind, start: Duration, end: Duration) -> Span {
        Span {
            trace_id: self.trace.trace_id.to_vec(),
            span_id: id.to_vec(),
            name: name.to_owned(),
            kind: kind.into(),
            start_time_unix_nano: nanos(self.start + start),
            end_time_unix_nano: nanos(self.start + end),
            ..Span::default()
        }
    }

    /// The flags of the trace, and whether the parent is a span of another service.
    fn flags(&self, remote: bool) -> u32 {
        let is_remote = if remote { SpanFlags::ContextIsRemoteMask as u32 } else { 0 };
        u32::from(self.trace.flags) | SpanFlags::ContextHasIsRemoteMask as u32 | is_remote
    }

    fn is_failed(&self) -> bool {
        self.status >= 500 || FAILURES.contains(&self.outcome)
    }

    /// The phases that began, in their order, within the request and one after the other.
    fn phases(&self) -> impl Iterator<Item = PhaseTimes> {
        let RequestTimes { queued, chosen, connected, sent, first_byte, .. } = self.times;
        let total = self.total;
        let mut phases: [Option<PhaseTimes>; MAX_PHASES] = [None; MAX_PHASES];
        let phase = |name, start: Duration, end: Option<Duration>| {
            let end_at = end.unwrap_or(total).min(total);
            Some(PhaseTimes { name, start: start.min(end_at), end: end_at, failed: end.is_none() })
        };
        if !queued.is_zero() {
            let end = chosen.unwrap_or(total);
            phases[0] = phase("queue", end.saturating_sub(queued), chosen);
        }
        if let Some(chosen) = chosen {
            phases[1] = phase("connect", chosen, connected);
        }
        if let Some(connected) = connected {
            // An answer that begins before the request is sent whole has no time between the two.
            let start = sent.unwrap_or(connected).min(first_byte.unwrap_or(total)).max(connected);
            phases[2] = phase("prefill", start, first_byte);
        }
        if let Some(first_byte) = first_byte {
            phases[3] = phase("stream", first_byte, Some(total));
            let failed = self.is_failed();
            phases[3].iter_mut().for_each(|stream| stream.failed = failed);
        }
        phases.into_iter().flatten()
    }

    /// The attributes of the request's span. Unknown values are left out.
    fn attributes(&self, template: Option<&'static str>, gen_ai: bool) -> Vec<KeyValue> {
        let own_or = |own: &'static str, convention: &'static str| if gen_ai { convention } else { own };
        let Usage { prompt_tokens, cached_tokens, output_tokens, reasoning_tokens, .. } = self.usage;
        let texts = [
            ("http.request.method", Some(&*self.method)),
            ("url.path", Some(&*self.path)),
            ("http.route", template),
            ("client.address", self.client.as_deref().map(address)),
            ("error.type", self.is_failed().then_some(self.outcome)),
            ("vllm_lb.request_id", Some(&*self.id)),
            ("vllm_lb.outcome", Some(self.outcome)),
            ("vllm_lb.upstream", self.upstream.as_deref()),
            ("vllm_lb.route", self.route.as_deref()),
            (own_or("vllm_lb.model", "gen_ai.request.model"), self.model.as_deref()),
            (own_or("vllm_lb.session", "gen_ai.conversation.id"), self.session.as_deref()),
            ("gen_ai.provider.name", gen_ai.then_some("vllm")),
            ("gen_ai.operation.name", template.filter(|_| gen_ai).and_then(operation)),
        ];
        let numbers = [
            ("http.response.status_code", (self.status != 0).then_some(u64::from(self.status))),
            ("http.request.body.size", Some(self.received)),
            ("http.response.body.size", Some(self.sent)),
            ("vllm_lb.attempts", Some(u64::from(self.attempts))),
            ("vllm_lb.forecast_ms", self.forecast.map(millis)),
            (own_or("vllm_lb.tokens.input", "gen_ai.usage.input_tokens"), prompt_tokens),
            (own_or("vllm_lb.tokens.cached", "gen_ai.usage.cache_read.input_tokens"), cached_tokens),
            (own_or("vllm_lb.tokens.output", "gen_ai.usage.output_tokens"), output_tokens),
            (own_or("vllm_lb.tokens.reasoning", "gen_ai.usage.reasoning.output_tokens"), reasoning_tokens),
        ];
        let texts = texts.into_iter().filter_map(|(name, value)| Some(text(name, value?)));
        texts.chain(numbers.into_iter().filter_map(|(name, value)| Some(number(name, value?)))).collect()
    }
}

/// The operation of a path by the conventions for generative AI.
fn operation(template: &'static str) -> Option<&'static str> {
    match template {
        "/v1/chat/completions" | "/v1/messages" | "/v1/responses" => Some("chat"),
        "/v1/completions" => Some("text_completion"),
        "/v1/embeddings" => Some("embeddings"),
        _ => None,
    }
}

/// The address of a client without its port, which an address that a proxy has named does not have; a unix
/// socket has none.
fn address(client: &str) -> &str {
    if client.parse::<IpAddr>().is_ok() {
        return client;
    }
    let address = client.rsplit_once(':').map_or(client, |(address, _)| address);
    address.trim_start_matches('[').trim_end_matches(']')
}

/// An attribute with a text.
pub(super) fn text(name: &str, value: &str) -> KeyValue {
    attribute(name, Value::StringValue(value.to_owned()))
}

fn number(name: &str, value: u64) -> KeyValue {
    attribute(name, Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn attribute(name: &str, value: Value) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

/// The id of a child span: unique in the trace as far as the parent's is.
fn child_id(parent: SpanId, number: u64) -> SpanId {
    // Odd, so that different parents keep different children.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    u64::from_be_bytes(parent).wrapping_add(number.wrapping_mul(STEP)).max(1).to_be_bytes()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(super) mod tests;
