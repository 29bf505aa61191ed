//! Tests of the rules: each fault gives its finding and no other one, and a sound set-up gives none.

mod setup;

use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::facts::{
    ClockDifference, EnginePage, MissingBalancer, QuestionFailure, RedisFacts, RedisRefusal, RedisServer,
    SightReading, SourceFacts, UpstreamFacts, UsageReading,
};
use super::finding::Severity;
use super::*;
use crate::aggregate::{parse_engine_info, parse_engine_metrics, parse_models};
use crate::config::check;
use crate::config::types::{Config, UpstreamConfig};
use crate::config::url;

const PAGE: &[u8] = include_bytes!("../../tests/data/vllm-0.32/metrics.body");
const MODELS: &[u8] = include_bytes!("../../tests/data/vllm-0.32/models.body");

fn page(text: &[u8]) -> EnginePage {
    EnginePage { metrics: parse_engine_metrics(text), info: parse_engine_info(text) }
}

/// The facts of a real server that works.
fn sound(number: u16) -> UpstreamFacts {
    let url = format!("http://gpu-{number}:8000");
    let mut config = UpstreamConfig::new(url::upstream(&url).expect("a URL"));
    config.name = format!("gpu-{number}");
    let mut metrics = page(PAGE);
    metrics.metrics.started = Some(1.79e9 + f64::from(number));
    UpstreamFacts {
        address: Some(SocketAddr::from(([10, 0, 0, 1], 8000 + number))),
        health: Ok(()),
        models: parse_models(MODELS).map_err(QuestionFailure::Garbled),
        version: Some("0.32.0".into()),
        metrics: Ok(metrics),
        clock: Some(ClockDifference { ahead: 0.4, error: 1.0 }),
        usage: Some(Ok(UsageReading { prompt_tokens: Some(400), cached_tokens: Some(384) })),
        ..UpstreamFacts::unasked(config)
    }
}

fn config(text: &str) -> Config {
    let text = format!("upstreams: [\"http://gpu-0:8000\"]\n{text}");
    check::check(&text, &|_| None).expect("a valid configuration")
}

fn setup(config: &Config, upstreams: Vec<UpstreamFacts>) -> SetupFacts<'_> {
    SetupFacts {
        config,
        upstreams,
        sources: Vec::new(),
        redis: None,
        unusable_certificates: Vec::new(),
        open_files: Some(1 << 20),
        balancer: None,
        missing_balancer: None,
    }
}

fn codes(found: &[Finding]) -> Vec<(&str, &str)> {
    found.iter().map(|finding| (finding.subject.as_str(), finding.code)).collect()
}

/// Three sound upstreams, of which the second one has a fault.
fn with_fault(fault: impl FnOnce(&mut UpstreamFacts)) -> Vec<Finding> {
    let mut upstreams: Vec<UpstreamFacts> = (0..3).map(sound).collect();
    fault(&mut upstreams[1]);
    diagnose(&setup(&config(""), upstreams))
}

#[track_caller]
fn gives(code: &'static str, severity: Severity, fault: impl FnOnce(&mut UpstreamFacts)) -> Finding {
    let found = with_fault(fault);
    assert_eq!(codes(&found), [("gpu-1", code)], "{found:?}");
    assert_eq!(found[0].severity, severity, "{code}");
    assert!(!found[0].remedy.is_empty());
    found[0].clone()
}

#[test]
fn a_sound_fleet_gives_no_finding() {
    assert_eq!(with_fault(|_| {}), []);
    assert_eq!(diagnose(&setup(&config(""), vec![])), []);
}

#[test]
fn an_upstream_that_fails_its_health_check_gives_one_finding() {
    let failures = [
        (QuestionFailure::Unreached("cannot connect".into()), "unreachable"),
        (QuestionFailure::Silent("no answer".into()), "silent"),
        (QuestionFailure::Garbled("no HTTP".into()), "not_vllm"),
        (QuestionFailure::Status(503, String::new()), "unhealthy"),
        (QuestionFailure::Settings("tls.ca".into()), "settings"),
    ];
    for (failure, code) in failures {
        gives(code, Severity::Error, |upstream| {
            *upstream =
                UpstreamFacts { health: Err(failure), ..UpstreamFacts::unasked(upstream.config.clone()) };
        });
    }
}

#[test]
fn models_that_cannot_be_used_give_a_finding() {
    let refused = || Err(QuestionFailure::Status(401, String::new()));
    let finding = gives("key_refused", Severity::Error, |upstream| upstream.models = refused());
    assert!(finding.remedy.starts_with("set upstreams[].api_key"), "{finding:?}");
    let finding = gives("key_refused", Severity::Error, |upstream| {
        upstream.models = refused();
        upstream.config.api_key_env = Some("VLLM_LB_KEY_A".into());
    });
    assert!(finding.remedy.contains("must be the key"), "{finding:?}");
    gives("models_unreadable", Severity::Error, |upstream| {
        upstream.models = Err(QuestionFailure::Garbled("no JSON".into()));
    });
    gives("no_models", Severity::Error, |upstream| upstream.models = Ok(Vec::new()));
    let finding = gives("model_missing", Severity::Error, |upstream| {
        upstream.config.models = Some(vec!["tiny".into(), "llama".into()]);
    });
    assert_eq!(finding.seen, "does not serve \"llama\": it serves \"tiny\"");
    // The keys of clients may be right where the list need not be read.
    let found = with_fault(|upstream| {
        upstream.models = refused();
        upstream.config.models = Some(vec!["tiny".into()]);
    });
    assert_eq!(found, []);
}

#[test]
fn settings_of_an_engine_give_findings() {
    let off = |upstream: &mut UpstreamFacts| {
        upstream.metrics.as_mut().expect("a page").metrics.prefix_caching = Some(false);
    };
    gives("prefix_caching_off", Severity::Warning, off);
    gives("prefix_caching_off", Severity::Warning, |upstream| {
        off(upstream);
        upstream.usage = Some(Ok(UsageReading::default()));
        upstream.sight = Some(reading("blind", "prefix caching is off: start vLLM"));
    });
    gives("asleep", Severity::Error, |upstream| {
        upstream.metrics.as_mut().expect("a page").info.asleep = Some(true);
    });
    for metrics in [
        Err(QuestionFailure::Status(404, String::new())),
        Err(QuestionFailure::Silent("no answer".into())),
        Ok(page(b"process_start_time_seconds 1.7e9\n")),
    ] {
        gives("no_metrics", Severity::Warning, |upstream| upstream.metrics = metrics);
    }
    gives("dev_routes", Severity::Warning, |upstream| upstream.has_dev_routes = true);
    for ahead in [-90.0, 4.0] {
        gives("clock", Severity::Warning, |upstream| {
            upstream.clock = Some(ClockDifference { ahead, error: 1.0 });
        });
    }
    assert_eq!(with_fault(|upstream| upstream.clock = Some(ClockDifference { ahead: 3.0, error: 1.5 })), []);
}

#[test]
fn metrics_that_are_not_read_are_not_missed() {
    let config = config("health: {metrics: false}");
    let mut upstream = sound(0);
    upstream.metrics = Err(QuestionFailure::Status(404, String::new()));
    assert_eq!(diagnose(&setup(&config, vec![upstream])), []);
}

fn reading(sight: &str, reason: &str) -> SightReading {
    SightReading { sight: sight.into(), reason: reason.into(), drained: false }
}

#[test]
fn usage_without_cached_tokens_gives_a_finding() {
    gives("usage_details_off", Severity::Warning, |upstream| {
        upstream.usage = Some(Ok(UsageReading { prompt_tokens: Some(400), cached_tokens: None }));
    });
    gives("usage_details_off", Severity::Warning, |upstream| {
        upstream.usage = None;
        upstream.sight = Some(reading("learnt", "no usage details: start vLLM"));
    });
    gives("sight_blind", Severity::Warning, |upstream| {
        upstream.sight = Some(reading("blind", "predictions are wrong by 73 %"));
    });
    gives("request_failed", Severity::Warning, |upstream| {
        upstream.usage = Some(Err(QuestionFailure::Status(500, "engine dead".into())));
    });
    // A pooling model has no completions.
    assert_eq!(
        with_fault(|upstream| upstream.usage = Some(Err(QuestionFailure::Status(404, String::new())))),
        []
    );
    // Without metrics, two equal prompts show it.
    let found = with_fault(|upstream| {
        upstream.metrics = Err(QuestionFailure::Status(404, String::new()));
        upstream.usage = Some(Ok(UsageReading { prompt_tokens: Some(400), cached_tokens: Some(0) }));
    });
    assert_eq!(codes(&found), [("gpu-1", "no_metrics"), ("gpu-1", "prefix_caching_off")]);
}

#[test]
fn a_drained_upstream_gives_a_note() {
    let drained = || Some(SightReading { drained: true, ..reading("exact", "") });
    let finding = gives("drained", Severity::Note, |upstream| upstream.sight = drained());
    assert!(finding.remedy.contains("/admin/upstreams/gpu-1 "), "{finding:?}");
    let found = with_fault(|upstream| {
        upstream.health = Err(QuestionFailure::Unreached("cannot connect".into()));
        upstream.sight = drained();
    });
    assert_eq!(codes(&found), [("gpu-1", "unreachable"), ("gpu-1", "drained")], "its engine may be replaced");
}

#[test]
fn the_report_names_the_running_balancer() {
    let config = config("");
    let mut upstreams: Vec<UpstreamFacts> = (0..3).map(sound).collect();
    upstreams[1].sight = Some(SightReading { drained: true, ..reading("exact", "") });
    upstreams[2].sight = Some(reading("exact", ""));
    let facts = SetupFacts { balancer: Some("http://127.0.0.1:9092".into()), ..setup(&config, upstreams) };
    let text = report::text(&facts, &diagnose(&facts), Duration::ZERO, false);
    let head = "3 upstreams, 3 healthy, 1 drained; a balancer runs, with its admin listener at \
                http://127.0.0.1:9092; 0.0 s\n";
    assert!(text.starts_with(head), "{text}");
    let json = report::json(&facts, &diagnose(&facts), Duration::ZERO);
    assert_eq!((&json["balancer"], &json["balancer_runs"]), (&"http://127.0.0.1:9092".into(), &true.into()));
    let drained: Vec<_> = (0..3).map(|at| json["upstreams"][at]["drained"].as_bool()).collect();
    assert_eq!(drained, [None, Some(true), Some(false)]);
    assert_eq!((&json["errors"], &json["notes"]), (&0.into(), &1.into()));
}

/// Replaces a part of the model list.
fn models(from: &str, to: &str) -> Result<Vec<crate::aggregate::ModelCard>, QuestionFailure> {
    let list = String::from_utf8_lossy(MODELS).replace(from, to);
    assert_ne!(list.as_bytes(), MODELS, "{from} is in the sample");
    parse_models(list.as_bytes()).map_err(QuestionFailure::Garbled)
}

#[test]
fn an_upstream_that_differs_from_the_others_gives_a_finding() {
    let finding = gives("different_models", Severity::Error, |upstream| {
        upstream.models = models("/models/tiny", "/models/other");
    });
    let seen = "model \"tiny\" has root \"/models/other\", and \"/models/tiny\" on \"gpu-0\" and 1 more";
    assert_eq!(finding.seen, seen);
    gives("different_models", Severity::Note, |upstream| {
        upstream.models = models("/models/tiny", "/data/tiny/");
    });
    gives("max_model_len", Severity::Warning, |upstream| upstream.models = models("4096", "2048"));
    gives("version", Severity::Warning, |upstream| upstream.version = Some("0.31.0".into()));
    let info = |upstream: &mut UpstreamFacts| upstream.metrics.as_mut().expect("a page").info.clone();
    gives("block_size", Severity::Warning, |upstream| {
        let info = crate::aggregate::EngineInfo { block_size: Some(64), ..info(upstream) };
        upstream.metrics.as_mut().expect("a page").info = info;
    });
    gives("hash_algorithm", Severity::Note, |upstream| {
        let info = crate::aggregate::EngineInfo { hash_algo: Some("builtin".into()), ..info(upstream) };
        upstream.metrics.as_mut().expect("a page").info = info;
    });
}

#[test]
fn upstreams_of_different_models_may_differ() {
    let found = with_fault(|upstream| {
        upstream.models = models("tiny", "large");
        upstream.version = Some("0.31.0".into());
    });
    assert_eq!(found, []);
}

#[test]
fn two_upstreams_of_one_engine_give_a_finding() {
    let started = sound(0).page().and_then(|page| page.metrics.started);
    gives("same_engine", Severity::Warning, |upstream| {
        upstream.metrics.as_mut().expect("a page").metrics.started = started;
    });
    gives("same_engine", Severity::Warning, |upstream| upstream.config.url = sound(0).config.url);
    let found = with_fault(|upstream| {
        upstream.metrics.as_mut().expect("a page").metrics.started = started;
        upstream.address = Some(SocketAddr::from(([10, 0, 0, 2], 8000)));
    });
    assert_eq!(found, [], "machines that started at the same time");
}
