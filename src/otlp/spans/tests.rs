//! The spans of requests that went in different ways.

use super::*;

const MS: Duration = Duration::from_millis(1);

/// The offset of a phase in milliseconds.
fn at(ms: u32) -> Option<Duration> {
    Some(MS * ms)
}

/// A request that took 100 ms.
pub(in crate::otlp) fn record(times: RequestTimes) -> SpanRecord {
    SpanRecord {
        trace: RequestTrace { trace_id: [7; 16], span_id: [0xff; 8], parent_id: Some([9; 8]), flags: 1 },
        start: Duration::from_secs(1_790_000_000),
        total: 100 * MS,
        times,
        id: "r-1".into(),
        client: Some("10.0.0.7:4711".into()),
        method: "POST".into(),
        path: "/sessions/s-1/v1/chat/completions".into(),
        model: Some("qwen".into()),
        route: Some("fast".into()),
        session: Some("s-1".into()),
        upstream: Some("gpu-0".into()),
        usage: Usage { prompt_tokens: Some(5), cached_tokens: Some(0), ..Usage::default() },
        status: 200,
        outcome: "ok",
        attempts: 2,
        forecast: at(250),
        received: 11,
        sent: 12,
        error: None,
    }
}

fn whole() -> RequestTimes {
    RequestTimes {
        queued: 10 * MS,
        chosen: at(12),
        connected: at(15),
        sent: at(16),
        first_byte: at(60),
        ..RequestTimes::default()
    }
}

fn value(attributes: &[KeyValue], name: &str) -> Option<Value> {
    attributes.iter().find(|attribute| attribute.key == name)?.value.clone()?.value
}

fn is_text(attributes: &[KeyValue], name: &str, wanted: &str) -> bool {
    value(attributes, name) == Some(Value::StringValue(wanted.into()))
}

#[test]
fn a_request_has_a_span_and_one_for_each_phase() {
    let record = record(whole());
    let spans = record.spans(false);
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["POST /v1/chat/completions", "queue", "connect", "prefill", "stream"]);
    assert_eq!(spans.len(), record.span_count());
    let (server, phases) = spans.split_first().expect("five spans");
    assert_eq!((server.kind, server.parent_span_id.as_slice()), (SpanKind::Server as i32, &[9; 8][..]));
    assert_eq!(server.flags, 0x301, "sampled, and the parent is another service's");
    assert_eq!(server.end_time_unix_nano - server.start_time_unix_nano, 100_000_000);
    assert_eq!(server.start_time_unix_nano, 1_790_000_000_000_000_000);
    let mut ids = vec![&server.span_id];
    let mut before = server.start_time_unix_nano;
    for phase in phases {
        assert_eq!((&phase.trace_id, &phase.parent_span_id), (&server.trace_id, &server.span_id));
        assert_eq!((phase.kind, phase.flags), (SpanKind::Internal as i32, 0x101));
        assert!(before <= phase.start_time_unix_nano, "{}", phase.name);
        assert!(phase.start_time_unix_nano <= phase.end_time_unix_nano, "{}", phase.name);
        assert!(!ids.contains(&&phase.span_id));
        ids.push(&phase.span_id);
        before = phase.end_time_unix_nano;
    }
    assert_eq!(before, server.end_time_unix_nano);
    assert!(spans.iter().all(|span| span.status.is_none()));
}

#[test]
fn a_trace_that_begins_here_has_no_parent() {
    let mut record = record(whole());
    record.trace.parent_id = None;
    let server = record.spans(false).remove(0);
    assert_eq!((server.parent_span_id.len(), server.flags), (0, 0x101));
}

#[test]
fn attributes_leave_out_what_is_unknown() {
    let attributes = record(whole()).spans(false).remove(0).attributes;
    for (name, wanted) in [
        ("http.request.method", "POST"),
        ("url.path", "/sessions/s-1/v1/chat/completions"),
        ("http.route", "/v1/chat/completions"),
        ("client.address", "10.0.0.7"),
        ("vllm_lb.request_id", "r-1"),
        ("vllm_lb.outcome", "ok"),
        ("vllm_lb.upstream", "gpu-0"),
        ("vllm_lb.route", "fast"),
        ("vllm_lb.model", "qwen"),
        ("vllm_lb.session", "s-1"),
    ] {
        assert!(is_text(&attributes, name, wanted), "{name}: {attributes:?}");
    }
    for (name, wanted) in [
        ("http.response.status_code", 200),
        ("vllm_lb.attempts", 2),
        ("vllm_lb.forecast_ms", 250),
        ("vllm_lb.tokens.input", 5),
        ("vllm_lb.tokens.cached", 0),
        ("http.request.body.size", 11),
        ("http.response.body.size", 12),
    ] {
        assert_eq!(value(&attributes, name), Some(Value::IntValue(wanted)), "{name}");
    }
    for name in ["vllm_lb.tokens.output", "vllm_lb.tokens.reasoning", "error.type", "gen_ai.provider.name"] {
        assert_eq!(value(&attributes, name), None, "{name}");
    }
    let plain = SpanRecord { upstream: None, session: None, status: 0, ..record(RequestTimes::default()) };
    let attributes = plain.spans(false).remove(0).attributes;
    for name in ["vllm_lb.upstream", "vllm_lb.session", "http.response.status_code"] {
        assert_eq!(value(&attributes, name), None, "{name}");
    }
}

#[test]
fn conventions_for_generative_ai_replace_own_names() {
    let attributes = record(whole()).spans(true).remove(0).attributes;
    for (name, wanted) in [
        ("gen_ai.request.model", "qwen"),
        ("gen_ai.conversation.id", "s-1"),
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.provider.name", "vllm"),
        ("vllm_lb.upstream", "gpu-0"),
    ] {
        assert!(is_text(&attributes, name, wanted), "{name}: {attributes:?}");
    }
    assert_eq!(value(&attributes, "gen_ai.usage.input_tokens"), Some(Value::IntValue(5)));
    assert_eq!(value(&attributes, "gen_ai.usage.cache_read.input_tokens"), Some(Value::IntValue(0)));
    for name in ["vllm_lb.model", "vllm_lb.session", "vllm_lb.tokens.input"] {
        assert_eq!(value(&attributes, name), None, "{name}");
    }
}

/// The name of a span, its begin and end in milliseconds, and whether it failed.
type ExpectedSpan = (&'static str, u32, u32, bool);

#[test]
fn a_phase_that_did_not_begin_has_no_span() {
    let none = RequestTimes::default();
    let table: [(RequestTimes, &[ExpectedSpan]); 8] = [
        (none, &[]),
        // The client left, or the wait ended, before there was room.
        (RequestTimes { queued: 90 * MS, ..none }, &[("queue", 10, 100, true)]),
        // No connection.
        (RequestTimes { chosen: at(5), ..none }, &[("connect", 5, 100, true)]),
        // A second attempt: the wait of the first one counts too.
        (
            RequestTimes { queued: 50 * MS, chosen: at(40), ..none },
            &[("queue", 0, 40, false), ("connect", 40, 100, true)],
        ),
        // The upload did not end.
        (
            RequestTimes { chosen: at(5), connected: at(6), ..none },
            &[("connect", 5, 6, false), ("prefill", 6, 100, true)],
        ),
        // The answer began before the request was sent whole.
        (
            RequestTimes { chosen: at(5), connected: at(6), sent: at(80), first_byte: at(70), ..none },
            &[("connect", 5, 6, false), ("prefill", 70, 70, false), ("stream", 70, 100, false)],
        ),
        // Clocks of different steps differ by less than a phase, and the total was read first.
        (
            RequestTimes { chosen: at(99), connected: at(101), first_byte: at(102), ..none },
            &[("connect", 99, 100, false), ("prefill", 100, 100, false), ("stream", 100, 100, false)],
        ),
        (
            whole(),
            &[
                ("queue", 2, 12, false),
                ("connect", 12, 15, false),
                ("prefill", 16, 60, false),
                ("stream", 60, 100, false),
            ],
        ),
    ];
    for (times, wanted) in table {
        let found: Vec<_> = record(times).phases().collect();
        let wanted: Vec<_> = wanted
            .iter()
            .map(|(name, start, end, failed)| PhaseTimes {
                name,
                start: MS * *start,
                end: MS * *end,
                failed: *failed,
            })
            .collect();
        assert_eq!(found, wanted);
    }
}

#[test]
fn a_failed_request_has_an_error_on_the_phase_that_failed() {
    for (status, outcome, failed) in [
        (200, "ok", false),
        (404, "client_error", false),
        (429, "full", false),
        (0, "client_gone", false),
        (200, "server_error", true),
        (200, "broken", true),
        (502, "unreached", true),
        (503, "not_ready", true),
    ] {
        let times = RequestTimes { first_byte: None, ..whole() };
        let spans = SpanRecord { status, outcome, ..record(times) }.spans(false);
        let codes: Vec<_> = spans.iter().map(|span| span.status.as_ref().map(|status| status.code)).collect();
        let error = failed.then_some(StatusCode::Error as i32);
        assert_eq!(codes, [error, None, None, error], "{outcome}");
        assert_eq!(is_text(&spans[0].attributes, "error.type", outcome), failed, "{outcome}");
    }
    let broken = SpanRecord { outcome: "broken", error: Some("reset".into()), ..record(whole()) };
    let spans = broken.spans(false);
    let messages: Vec<_> =
        spans.iter().map(|span| span.status.as_ref().map(|status| &*status.message)).collect();
    assert_eq!(messages, [Some("reset"), None, None, None, Some("broken")]);
}

#[test]
fn the_address_of_a_client_has_no_port() {
    for (client, wanted) in [("10.0.0.7:1", "10.0.0.7"), ("[::1]:4711", "::1"), ("unix", "unix")] {
        assert_eq!(address(client), wanted);
    }
    for client in ["203.0.113.7", "2001:db8::7", "::1"] {
        assert_eq!(address(client), client, "an address that a proxy has named");
    }
}
