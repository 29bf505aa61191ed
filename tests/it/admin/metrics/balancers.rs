//! Events besides requests whose counts are known: the states of upstreams, the load that engines report,
//! the process, recorded calls, and the exchange between two balancers.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::ledger::{Ledger, MetricsPage};
use super::{CHAT, labelled, named};
use crate::common::body::stream;
use crate::common::model_server::{ModelServer, document, source};
use crate::common::ports::reserved_address;
use crate::common::redis::Redis;
use crate::common::wire::{Wire, post};
use crate::common::{Balancer, Options, admin, direct, engine, engines, eventually, paced};
use serde_json::{Value, json};
use vllm_lb::app::{self, LoadConfig};
use vllm_lb::config::redis;

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

/// Where balancers exchange urgent messages.
const URGENT_STREAM: &str = "vllm-lb:{lb}:stream";

/// The states that an upstream may have.
const STATES: [&str; 6] = ["unknown", "ready", "suspect", "down", "draining", "tripped"];

async fn has_state(ledger: &mut Ledger, balancer: &Balancer, wanted: &str) {
    for state in STATES {
        let sample = format!("vllm_lb_upstream_state{{upstream=\"a\",state=\"{state}\"}}");
        ledger.shows(balancer, &sample, f64::from(u8::from(state == wanted))).await;
    }
    ledger
        .shows(balancer, &labelled("upstream_ready|upstream|a"), f64::from(u8::from(wanted == "ready")))
        .await;
}

pub async fn upstreams(ledger: &mut Ledger) {
    let engine = engine(Options::default()).await;
    let mut config = named([&engine]);
    config.health.fall = 1;
    let balancer = Balancer::ready(config).await;
    has_state(ledger, &balancer, "ready").await;
    let change =
        |state: &str| labelled("upstream_changes_total") + &format!("{{state=\"{state}\",upstream=\"a\"}}");
    for (drain, state) in [(true, "draining"), (false, "ready")] {
        let before = MetricsPage::of(&balancer).await.value(&change(state));
        admin(&balancer, "PATCH", "/admin/upstreams/a", json!({"drain": drain})).await.expect(200);
        has_state(ledger, &balancer, state).await;
        ledger.shows(&balancer, &change(state), before + 1.0).await;
    }
    ledger.holds(&balancer, &labelled("probes_total|upstream|a"), |count| count > 2.0).await;
    engine.set_health(Some(503));
    has_state(ledger, &balancer, "down").await;
    let failures = labelled("probe_failures_total|upstream|a");
    ledger.holds(&balancer, &failures, |count| count >= 1.0).await;
    ledger.shows(&balancer, &change("down"), 1.0).await;
    engine.set_health(None);
    has_state(ledger, &balancer, "ready").await;
    ledger.shows(&balancer, &labelled("upstream_cache_tokens|upstream|a"), 262_144.0).await;
}

async fn streams(address: &str, count: usize) -> Vec<Wire> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let mut client = Wire::connect(address).await;
        client.send(post(CHAT, stream("sim", 10_000))).await;
        clients.push(client);
    }
    clients
}

pub async fn engine_load(ledger: &mut Ledger) {
    let engine = paced(ENDLESS).await;
    let balancer = Balancer::ready(named([&engine])).await;
    let sample = |name: &str| labelled(&format!("upstream_{name}|upstream|a"));
    ledger.shows(&balancer, &sample("unaccounted_requests"), 0.0).await;
    ledger.shows(&balancer, &sample("kv_usage"), 0.0).await;
    for (sight, has) in [("exact", 0.0), ("learnt", 1.0), ("blind", 0.0)] {
        let sample = format!("vllm_lb_upstream_sight{{upstream=\"a\",sight=\"{sight}\"}}");
        ledger.shows(&balancer, &sample, has).await;
    }
    let ours = streams(balancer.address(), 3).await;
    ledger.shows(&balancer, &sample("active"), 3.0).await;
    ledger.holds(&balancer, &sample("context_tokens"), |tokens| tokens > 0.0).await;
    ledger.holds(&balancer, &sample("kv_usage"), |usage| usage > 0.0 && usage < 1.0).await;
    // Other clients of the engine: the balancer knows of none of them.
    let others = streams(&direct(&engine), 4).await;
    ledger.shows(&balancer, &sample("foreign_requests"), 4.0).await;
    ledger.shows(&balancer, &sample("unaccounted_requests"), 4.0).await;
    drop((ours, others));
    for name in ["active", "context_tokens", "foreign_requests", "unaccounted_requests"] {
        ledger.shows(&balancer, &sample(name), 0.0).await;
    }
    // Prompts that wait for their first token.
    engine.set_fault(crate::common::InjectedFault::StallHeaders).await;
    let stalled = streams(balancer.address(), 2).await;
    ledger.holds(&balancer, &sample("backlog_tokens"), |tokens| tokens > 0.0).await;
    drop(stalled);
    ledger.shows(&balancer, &sample("backlog_tokens"), 0.0).await;
}

pub async fn process(ledger: &mut Ledger) {
    let engines = engines(1).await;
    let mut config = named(&engines);
    let address = reserved_address();
    config.sources = vec![source(&address)];
    let file = Arc::new(Mutex::new(Ok(config.clone())));
    let read = file.clone();
    let load: LoadConfig = Arc::new(move || {
        let read: Result<_, Vec<String>> = read.lock().expect("no test panics with it").clone();
        read.map(|config| (config, Vec::new()))
    });
    let started = std::time::SystemTime::UNIX_EPOCH.elapsed().expect("it is after 1970").as_secs_f64();
    let balancer = Balancer { running: app::start_with(config, load).await.expect("the balancer starts") };
    balancer.until_ready(1).await;
    ledger.holds(&balancer, "vllm_lb_start_time_seconds", |at| at >= started && at < started + 20.0).await;
    let build = format!(
        "vllm_lb_build_info{{arch=\"{}\",os=\"{}\",version=\"{}\"}}",
        std::env::consts::ARCH,
        std::env::consts::OS,
        env!("CARGO_PKG_VERSION")
    );
    ledger.shows(&balancer, &build, 1.0).await;
    ledger.holds(&balancer, "vllm_lb_resident_bytes", |bytes| bytes > 1e6 && bytes < 1e11).await;
    let label = format!("gym http://{address}");
    let failures = format!("vllm_lb_discovery_failures_total{{reason=\"unreachable\",source=\"{label}\"}}");
    ledger.holds(&balancer, &failures, |count| count >= 1.0).await;
    let server = ModelServer::at(&address, document(&engines)).await;
    let of_source = |name: &str| labelled(&format!("discovery_{name}|source|{label}"));
    ledger.shows(&balancer, &of_source("upstreams"), 1.0).await;
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().expect("it is after 1970").as_secs_f64();
    let last = of_source("last_list_time_seconds");
    ledger.holds(&balancer, &last, |at| at >= started && at <= now()).await;
    drop(server);
    let reloads = |result: &str| labelled(&format!("reloads_total|result|{result}"));
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
    ledger.shows(&balancer, &reloads("ok"), 1.0).await;
    *file.lock().expect("no test panics with it") = Err(vec!["a problem".into()]);
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(422);
    ledger.shows(&balancer, &reloads("failed"), 1.0).await;
}

pub async fn traces(ledger: &mut Ledger) {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::ready(named([&engine])).await;
    let messages = json!([{"role": "user", "content": "word ".repeat(3000)}]);
    let body = json!({"model": "sim", "messages": messages, "max_tokens": 2}).to_string();
    balancer.ask(post(&format!("/sessions/one{CHAT}"), body)).await.expect(200);
    balancer.admin(post("/admin/flush", "")).await.expect(200);
    ledger.shows(&balancer, &labelled("traces_total|result|stored"), 1.0).await;
    ledger.holds(&balancer, "vllm_lb_traces_stored_bytes", |bytes| bytes > 0.0).await;
}

pub async fn siblings(ledger: &mut Ledger) {
    let (mut redis, engine) = (Redis::start(&[]).await, paced(ENDLESS).await);
    let mut config = named([&engine]);
    config.redis = Some(redis::url(&redis.url()).expect("is a URL"));
    config.redis_options.gauge_ttl = Duration::from_millis(1500);
    let one = Balancer::ready(config.clone()).await;
    ledger.shows(&one, "vllm_lb_siblings", 0.0).await;
    let other = Balancer::ready(config).await;
    ledger.shows(&one, "vllm_lb_siblings", 1.0).await;
    ledger.shows(&one, "vllm_lb_redis_up", 1.0).await;
    ledger.shows(&one, "vllm_lb_members_shared", 1.0).await;
    for (name, least) in [("messages", 3.0), ("bytes", 60.0)] {
        for way in ["said", "heard"] {
            let sample = labelled(&format!("exchange_{name}_total|way|{way}"));
            ledger.holds(&one, &sample, |count| count >= least).await;
        }
    }
    ledger.holds(&one, "vllm_lb_exchange_lag_seconds_count", |count| count >= 3.0).await;
    ledger.holds(&one, "vllm_lb_redis_round_trip_seconds", |time| time > 0.0 && time < 1.0).await;
    let active = labelled("upstream_siblings_active|upstream|a");
    ledger.shows(&one, &active, 0.0).await;
    let theirs = streams(other.address(), 2).await;
    ledger.shows(&one, &active, 2.0).await;
    ledger.holds(&one, "vllm_lb_siblings_age_seconds", |age| age > 0.0 && age < 1.5).await;
    // One of the two probes the engine, and the other applies its reports.
    let reports = labelled("probe_reports_total|upstream|a");
    eventually("one of them applies reports", async || {
        let pages = [MetricsPage::of(&one).await, MetricsPage::of(&other).await];
        (pages.iter().any(|page| page.value(&reports) >= 1.0)).then_some(())
    })
    .await;
    let holder = if MetricsPage::of(&one).await.value(&reports) >= 1.0 { &one } else { &other };
    ledger.holds(holder, &reports, |count| count >= 1.0).await;
    drop(theirs);
    ledger.shows(&one, &active, 0.0).await;
    // Not a message of any version.
    redis.add(URGENT_STREAM, b"no message").await;
    ledger.shows(&one, &labelled("exchange_lost_total|what|unreadable"), 1.0).await;
    redis.kill();
    ledger.shows(&one, "vllm_lb_redis_up", 0.0).await;
    ledger.shows(&one, "vllm_lb_members_shared", 0.0).await;
    ledger.holds(&one, &labelled("redis_failures_total|cause|lost"), |count| count >= 1.0).await;
}
