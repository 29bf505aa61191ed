//! What it costs to count a request, and to write the page of metrics of a large fleet:
//! `cargo bench --bench metrics` (or with `--profile quick`).
//!
//! The fleet has 64 upstreams that serve 32 models each, and every model has a route. Each pair of model and
//! upstream has requests that ended well, in an error of either side, and by a client that left.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vllm_lb::fleet::sight::SightState;
use vllm_lb::observe::request::{Done, RequestTimes};
use vllm_lb::observe::{ExpositionFormat, Observer, UpstreamGauges};
use vllm_lb::reply::usage::Usage;

const UPSTREAMS: usize = 64;
const MODELS: usize = 32;

/// The ways in which requests end at an upstream.
const ENDS: [(u16, &str); 5] =
    [(200, "ok"), (200, "broken"), (400, "client_error"), (500, "server_error"), (0, "client_gone")];

/// Refusals of the balancer's own.
const REFUSALS: [(u16, &str); 4] = [(429, "full"), (502, "upstream"), (503, "not_ready"), (413, "too_large")];

/// Causes of failed attempts.
const CAUSES: [&str; 5] = ["connect", "reset", "503", "status", "ended"];

/// A stream that ended.
fn done<'a>(
    model: &'a str,
    route: Option<&'a str>,
    upstream: Option<&'a str>,
    end: (u16, &'static str),
) -> Done<'a> {
    let at = |millis| Some(Duration::from_millis(millis));
    Done {
        id: "5b2c8e8a4f9d4c0f",
        client: None,
        method: "POST",
        path: "/v1/chat/completions",
        model: Some(model),
        client_model: Some(model),
        route,
        session: None,
        upstream,
        usage: upstream.map(|_| Usage {
            prompt_tokens: Some(1_000),
            cached_tokens: Some(800),
            output_tokens: Some(200),
            reasoning_tokens: Some(50),
        }),
        status: end.0,
        outcome: end.1,
        attempts: 1,
        forecast: Some(Duration::from_millis(80)),
        logged: false,
        times: RequestTimes {
            queued: Duration::from_millis(1),
            chosen: at(2),
            connected: at(3),
            sent: at(3),
            first_byte: at(90),
            accepted: at(90),
            forwarded: at(91),
            last_piece: at(3_000),
            max_gap: at(30),
            ..RequestTimes::default()
        },
        total: Duration::from_secs(3),
        received: 4_000,
        sent: 60_000,
        error: None,
        admin: false,
    }
}

fn names(kind: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{kind}-{number:02}.some-cluster.example:8000")).collect()
}

/// A balancer behind traffic of all kinds.
fn observer(upstreams: &[String], models: &[String]) -> Observer {
    let observer = Observer::default();
    for model in models {
        for route in [None, Some(model.as_str())] {
            for upstream in upstreams {
                for end in ENDS {
                    observer.request_done(&done(model, route, Some(upstream), end));
                }
            }
            for end in REFUSALS {
                observer.request_done(&done(model, route, None, end));
                observer.rejected(end.1);
            }
        }
    }
    for upstream in upstreams {
        for cause in CAUSES {
            observer.attempt_failed("id", upstream, cause, 1);
            observer.retried(cause);
        }
        for state in ["ready", "suspect", "down", "draining", "tripped"] {
            observer.upstream_changed(upstream, "unknown", state);
        }
        observer.probed(upstream);
        observer.probe_failed(upstream, "refused", false, 2, log::Level::Debug);
        observer.probe_report_applied(upstream);
        observer.stream_broken("id", upstream, "reset");
        observer.upstream_busy(upstream);
        observer.cache_compared(upstream, 1_000, 900, 800);
    }
    observer
}

fn gauges(upstreams: &[String]) -> Vec<UpstreamGauges<'_>> {
    let states = ["unknown", "ready", "suspect", "down", "draining", "tripped"];
    let row = |upstream| UpstreamGauges {
        upstream,
        ready: true,
        states: states.map(|state| (state, state == "ready")),
        active: 12,
        siblings_active: 7,
        backlog: 30_000,
        context: 400_000,
        incarnation: 1,
        sight: SightState::Exact,
        foreign: Some(0),
        unaccounted: Some(-1),
        kv_usage: Some(0.731_25),
        cache_tokens: Some(262_144),
    };
    upstreams.iter().map(|name| row(name.as_str())).collect()
}

fn metrics(criterion: &mut Criterion) {
    let (upstreams, models) = (names("gpu", UPSTREAMS), names("model", MODELS));
    let observer = observer(&upstreams, &models);
    let gauges = gauges(&upstreams);
    let page = observer.render(ExpositionFormat::Text, &gauges);
    let series = page.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#")).count();
    let mut group = criterion.benchmark_group(format!("{series} samples, {} KiB", page.len() >> 10));
    for (name, format) in [("text", ExpositionFormat::Text), ("openmetrics", ExpositionFormat::OpenMetrics)] {
        group.bench_function(format!("write {name}"), |bencher| {
            bencher.iter(|| black_box(observer.render(format, &gauges)));
        });
    }
    group.bench_function("look for series that have gone", |bencher| {
        bencher.iter(|| {
            observer.forget_series(|name| name.starts_with("gpu"), |name| name.starts_with("model"))
        });
    });
    let ended = done(&models[7], Some(&models[7]), Some(&upstreams[11]), ENDS[0]);
    group.bench_function("count a request", |bencher| {
        bencher.iter(|| observer.request_done(black_box(&ended)));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(3)).sample_size(20);
    targets = metrics
}
criterion_main!(benches);
