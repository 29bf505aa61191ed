//! Upstreams that a NeMo Gym model server names: found when it comes up, followed when it names others, kept
//! when it goes, and never the operator's.

mod doctor;
mod files;
mod models;
mod names;
mod sessions;

use std::time::Duration;

use crate::common::body::chat;
use crate::common::certs::Certs;
use crate::common::clients::{Clients, none};
use crate::common::model_server::{ModelServer, document, source};
use crate::common::ports::reserved_address;
use crate::common::raw::Raw;
use crate::common::redis::Redis;
use crate::common::wire::{JSON, get, post, request};
use crate::common::{
    Balancer, EngineServer, Options, admin, config, direct as name, engines, eventually, paced, serving,
    upstream, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::redis;
use vllm_lb::config::types::{Config, DiscoverySource, UpstreamTls};

const CHAT: &str = "/v1/chat/completions";

/// Over what these sources name, and nothing else.
fn asking(sources: impl IntoIterator<Item = DiscoverySource>) -> Config {
    Config { sources: sources.into_iter().collect(), ..config(Vec::new()) }
}

fn path(engine: &EngineServer) -> String {
    format!("/admin/upstreams/{}", name(engine))
}

/// Names of the upstreams that take requests, sorted.
fn ready(balancer: &Balancer) -> Vec<String> {
    let snapshot = balancer.running.fleet.snapshot();
    let mut names: Vec<String> = snapshot.ready().map(|entry| entry.upstream.name().to_string()).collect();
    names.sort();
    names
}

async fn until_ready<'a>(balancer: &Balancer, engines: impl IntoIterator<Item = &'a EngineServer>) {
    let mut wanted: Vec<String> = engines.into_iter().map(name).collect();
    wanted.sort();
    eventually(&format!("{wanted:?} are ready"), async || (ready(balancer) == wanted).then_some(())).await;
}

/// The `authorization` of the latest request.
fn authorization(engine: &EngineServer) -> Option<String> {
    let last = engine.requests().into_iter().next_back()?;
    last.headers.get("authorization").map(|value| value.to_str().expect("is text").to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_server_that_comes_up_late_is_found_with_all_that_it_says() {
    let (engines, address) = (engines(2).await, reserved_address());
    let mut config = asking([source(&address)]);
    config.routes = check("upstreams: [http://a]\nroutes: [{model: face, to: sim}]", &|_| None)
        .unwrap_or_else(|problems| panic!("{problems:?}"))
        .routes;
    config.queue.wait = Duration::ZERO;
    let balancer = Balancer::start(config).await;
    balancer.ask(get("/health")).await.expect(503);
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    let failures = async || balancer.metric("vllm_lb_discovery_failures_total").await;
    eventually("it was asked for in vain", async || (failures().await >= 2.0).then_some(())).await;
    let server = ModelServer::at(&address, document(&engines)).await;
    until_ready(&balancer, &engines).await;
    let head = server.heads().remove(0);
    assert!(head.starts_with("GET /get_inner_vllm_config HTTP/1.1\r\n"), "{head}");
    for model in ["sim", "face"] {
        let answer = balancer.ask(post(CHAT, chat(model))).await.expect(200).json();
        assert_eq!(answer["model"], model);
    }
    let asked: Vec<_> = engines.iter().filter_map(authorization).collect();
    assert!(!asked.is_empty() && asked.iter().all(|key| key == "Bearer dummy"), "{asked:?}");
    let list = balancer.ask(get("/v1/models")).await.expect(200).json();
    let card = list["data"].as_array().and_then(|cards| cards.iter().find(|card| card["id"] == "sim"));
    assert!(card.is_some_and(|card| card["max_model_len"].is_u64()), "it was asked for: {list}");
    let row = admin(&balancer, "GET", &path(&engines[0]), Value::Null).await.expect(200).json();
    assert_eq!(row["source"], format!("gym http://{address}"));
    assert_eq!(failures().await, failures().await, "it answers");
    balancer.stop().await;
}

/// While one source is silent its models may yet come; when all have answered an unknown name is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_a_source_that_is_not_up_yet_is_no_unknown_model() {
    let (engines, judge, address) = (engines(1).await, serving(&["judge"]).await, reserved_address());
    let server = ModelServer::start(document(&engines)).await;
    let mut config = asking([server.source(), source(&address)]);
    config.queue.wait = Duration::ZERO;
    let balancer = Balancer::start(config).await;
    until_ready(&balancer, &engines).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    balancer.ask(post(CHAT, chat("judge"))).await.expect(503);
    let _late = ModelServer::at(&address, document([&judge])).await;
    until_ready(&balancer, [&engines[0], &judge]).await;
    balancer.ask(post(CHAT, chat("judge"))).await.expect(200);
    balancer.ask(post(CHAT, chat("nobody"))).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn discovered_engines_use_the_trust_settings_of_their_source() {
    let certs = Certs::new();
    let engine = EngineServer::start_tls(Options::default(), &certs.certificate, &certs.key);
    let engine = engine.await.expect("a free port is there");
    assert!(engine.url().starts_with("https://"));
    let plain = ModelServer::start(document([&engine])).await;
    let secure = ModelServer::secure(document([&engine]), &certs).await;
    let proven = UpstreamTls { ca: Some(certs.authority()), ..UpstreamTls::default() };
    let named = |name: &str| UpstreamTls { sni: Some(name.into()), ..proven.clone() };
    for (tls, is_trusted) in [
        (proven.clone(), true),
        (named("localhost"), true),
        (UpstreamTls { verify: false, ..UpstreamTls::default() }, true),
        (named("elsewhere.test"), false),
        (UpstreamTls::default(), false),
    ] {
        // An untrusted peer fails the probe of an engine, or the request for the list of engines.
        let found_out = ["vllm_lb_probe_failures_total", "vllm_lb_discovery_failures_total"];
        for (server, failures) in [&plain, &secure].into_iter().zip(found_out) {
            let source = DiscoverySource { tls: tls.clone(), ..server.source() };
            let balancer = Balancer::start(asking([source])).await;
            if is_trusted {
                until_ready(&balancer, [&engine]).await;
                balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
                assert_eq!(authorization(&engine).as_deref(), Some("Bearer dummy"));
            } else {
                let before = balancer.metric(failures).await;
                let more = async || (balancer.metric(failures).await > before).then_some(());
                eventually(&format!("{tls:?} is not believed"), more).await;
                assert!(ready(&balancer).is_empty(), "{tls:?}");
            }
            balancer.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_engines_take_over_and_no_request_notices() {
    let engines = engines(4).await;
    let server = ModelServer::start(document(&engines[..2])).await;
    let balancer = Balancer::start(asking([server.source()])).await;
    until_ready(&balancer, &engines[..2]).await;
    let load = Clients::start(&balancer, 4);
    for chosen in [&engines[2..], &engines[1..3], &engines[3..], &engines[..]] {
        load.until_more(20).await;
        server.say(&document(chosen));
        until_ready(&balancer, chosen).await;
    }
    // One that is no list.
    server.say(&json!({"base_url": engines[3].url(), "api_key": "EMPTY", "model": "sim"}));
    until_ready(&balancer, &engines[3..]).await;
    load.until_more(20).await;
    assert_eq!(load.end().await, none());
    eventually("the others are gone", async || (balancer.loads().len() == 1).then_some(())).await;
    assert_eq!(authorization(&engines[3]).as_deref(), Some("Bearer EMPTY"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replaced_upstreams_stay_until_the_new_ones_are_ready() {
    let old = paced(Duration::from_millis(20)).await;
    let (new, address) = (engines(1).await, reserved_address());
    let server = ModelServer::start(document([&old])).await;
    let balancer = Balancer::start(asking([server.source()])).await;
    until_ready(&balancer, [&old]).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, crate::common::body::stream("sim", 100))).await;
    let head = client.head().await;
    // No engine listens there.
    server.say(&json!({"base_url": format!("http://{address}/v1")}));
    server.until_asked(3).await;
    assert_eq!(ready(&balancer), [name(&old)]);
    server.say(&document(&new));
    until_ready(&balancer, &new).await;
    let answer = client.body(head).await.expect(200);
    assert!(answer.whole && answer.text().contains("[DONE]"), "{}", answer.text());
    eventually("the old one is gone", async || (balancer.loads().len() == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_source_removes_no_upstream() {
    let engines = engines(2).await;
    let server = ModelServer::start(document(&engines)).await;
    let balancer = Balancer::start(asking([server.source()])).await;
    until_ready(&balancer, &engines).await;
    let failures = async || balancer.metric("vllm_lb_discovery_failures_total").await;
    server.answer(503, "");
    eventually("it is missed", async || (failures().await > 2.0).then_some(())).await;
    server.say(&document(&engines));
    server.until_asked(2).await;
    let told = format!("source=gym http://{}", server.address);
    let lines: Vec<String> =
        crate::common::logs::all().into_iter().filter(|line| line.contains(&told)).collect();
    let count = |start: &str| lines.iter().filter(|line| line.starts_with(start)).count();
    assert_eq!((count("WARN source does not name"), count("INFO source names")), (1, 2), "{lines:?}");
    let load = Clients::start(&balancer, 2);
    let huge = format!(r#"{{"base_url": "http://a:1", "x": "{}"}}"#, "x".repeat(2 << 20));
    let rubbish = [
        (200, ""),
        (200, "ok"),
        (200, r#"{"base_url": []}"#),
        (200, r#"{"base_url": ["http://127.0.0.1:1", 5]}"#),
        (200, &huge),
        (500, r#"{"base_url": "http://127.0.0.1:1"}"#),
        (404, ""),
    ];
    for (status, body) in rubbish {
        let before = failures().await;
        server.answer(status, body);
        eventually("it is counted", async || (failures().await > before + 1.0).then_some(())).await;
        until_ready(&balancer, &engines).await;
        assert_eq!(balancer.loads().len(), 2);
    }
    let address = server.address.clone();
    drop(server);
    let before = failures().await;
    eventually("it is missed", async || (failures().await > before + 2.0).then_some(())).await;
    load.until_more(20).await;
    until_ready(&balancer, &engines).await;
    assert_eq!(load.end().await, none());
    let _server = ModelServer::at(&address, document(&engines[1..])).await;
    until_ready(&balancer, &engines[1..]).await;
}

/// The authorities of a source that is asked without TLS are read when it names an engine that has it.
#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_engine_does_not_block_others() {
    let engines = engines(2).await;
    let said = json!({"base_url": ["https://127.0.0.1:1", engines[0].url()], "model": "sim"});
    let servers = [ModelServer::start(said).await, ModelServer::start(document(&engines[1..])).await];
    let mut sources = servers.each_ref().map(ModelServer::source);
    sources[0].tls.ca = Some("/nowhere/ca.pem".into());
    let balancer = Balancer::start(asking(sources)).await;
    until_ready(&balancer, &engines).await;
    // No further answer makes it usable.
    servers[0].until_asked(5).await;
    let logs = crate::common::logs::all();
    let warnings: Vec<_> = logs.iter().filter(|line| line.starts_with("WARN upstream of a source")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("/nowhere/ca.pem"), "{warnings:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_key_replaces_the_old_one() {
    let engines = engines(1).await;
    let mut said = document(&engines);
    said["api_key"] = "hunter2-first".into();
    let server = ModelServer::start(said.clone()).await;
    let balancer = Balancer::start(asking([server.source()])).await;
    until_ready(&balancer, &engines).await;
    let key = async || {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
        authorization(&engines[0]).expect("a key was sent")
    };
    assert_eq!(key().await, "Bearer hunter2-first");
    said["api_key"] = "hunter2-second".into();
    server.say(&said);
    eventually("the new key is used", async || (key().await == "Bearer hunter2-second").then_some(())).await;
    let page = admin(&balancer, "GET", "/admin/config", Value::Null).await.expect(200);
    let list = admin(&balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200);
    let logs = crate::common::logs::all().join("\n");
    for shown in [page.text(), list.text(), &logs] {
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

/// The route serves the model that its model server names, and none while no server answers.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_without_a_list_of_models_serves_the_one_that_is_named() {
    let engine = Raw::start("HTTP/1.1 404 X\r\ncontent-length: 0\r\n\r\n").await;
    let url = format!("http://{}/v1", engine.address());
    let server = ModelServer::start(json!({"base_url": url, "api_key": "dummy", "model": "org/m"})).await;
    let balancer = Balancer::start(asking([server.source()])).await;
    balancer.until_ready(1).await;
    assert!(balancer.running.fleet.snapshot().serves_model("org/m"));
    let key = |head: &String| head.starts_with("GET /v1/models") && head.contains("Bearer dummy");
    assert!(engine.heads().iter().any(key), "{:?}", engine.heads());
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_changes_take_precedence_over_sources() {
    let engines = engines(3).await;
    let servers =
        [ModelServer::start(document(&engines)).await, ModelServer::start(document(&engines)).await];
    let mut config = asking(servers.iter().map(ModelServer::source));
    config.upstreams = upstreams([&engines[0]]);
    config.upstreams[0].name = "mine".into();
    let balancer = Balancer::start(config).await;
    let names = |numbers: &[usize], more: &[&str]| {
        let mut names: Vec<String> = numbers.iter().map(|number| name(&engines[*number])).collect();
        names.extend(more.iter().map(ToString::to_string));
        names.sort();
        names
    };
    let until = async |wanted: Vec<String>| {
        eventually(&format!("{wanted:?}"), async || (ready(&balancer) == wanted).then_some(())).await;
    };
    until(names(&[1, 2], &["mine"])).await;
    let sources = async |number: usize| {
        let row = admin(&balancer, "GET", &path(&engines[number]), Value::Null).await.json();
        row["source"].as_str().map(|source| source.to_string())
    };
    let label = |number: usize| Some(format!("gym http://{}", servers[number].address));
    eventually("the first source has it", async || (sources(1).await == label(0)).then_some(())).await;
    // A weight and a drain of the operator's stay, whatever is said.
    admin(&balancer, "PATCH", &path(&engines[2]), json!({"weight": 3, "drain": true})).await.expect(200);
    admin(&balancer, "DELETE", &path(&engines[1]), Value::Null).await;
    servers[0].until_asked(3).await;
    servers[1].until_asked(3).await;
    until(names(&[], &["mine"])).await;
    let row = admin(&balancer, "GET", &path(&engines[2]), Value::Null).await.expect(200).json();
    assert_eq!((&row["state"], &row["weight"]), (&json!("draining"), &json!(3.0)));
    admin(&balancer, "PATCH", &path(&engines[2]), json!({"drain": false})).await.expect(200);
    // Named no more, and named anew.
    servers.iter().for_each(|server| server.say(&document(&engines[2..])));
    servers[0].until_asked(3).await;
    servers[1].until_asked(3).await;
    servers[1].say(&document(&engines[1..]));
    until(names(&[1, 2], &["mine"])).await;
    assert_eq!((sources(1).await, sources(2).await), (label(1), label(0)));
    // The operator's own takes the place of what was discovered.
    let added = json!({"url": engines[2].url(), "name": "too"});
    admin(&balancer, "POST", "/admin/upstreams", added).await.expect(201);
    until(names(&[1], &["mine", "too"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_of_sources_fails_no_request() {
    let engines = engines(3).await;
    let servers = [
        ModelServer::start(document(&engines[..2])).await,
        ModelServer::start(document(&engines[2..])).await,
    ];
    let file = std::sync::Arc::new(std::sync::Mutex::new(config(upstreams(&engines[..2]))));
    let read = file.clone();
    let load: vllm_lb::app::LoadConfig =
        std::sync::Arc::new(move || Ok((read.lock().expect("nobody panics with it").clone(), Vec::new())));
    let first = file.lock().expect("nobody panics with it").clone();
    let running = vllm_lb::app::start_with(first.clone(), load).await.expect("the balancer starts");
    let balancer = Balancer { running };
    until_ready(&balancer, &engines[..2]).await;
    let clients = Clients::start(&balancer, 4);
    let reload = async |next: Config| {
        *file.lock().expect("nobody panics with it") = next;
        clients.until_more(20).await;
        admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200).json()
    };
    let discovered = || {
        let snapshot = balancer.running.fleet.snapshot();
        snapshot.entries.iter().filter(|entry| entry.upstream.config.discovered.is_some()).count()
    };
    let told = reload(Config { sources: vec![servers[0].source()], ..first.clone() }).await;
    assert_eq!(told["changed"], json!(["upstreams"]));
    servers[0].until_asked(3).await;
    assert_eq!(discovered(), 0, "the file goes first");
    // From the file to the source, and a second source.
    let sources: Vec<DiscoverySource> = servers.iter().map(ModelServer::source).collect();
    reload(Config { sources: sources.clone(), upstreams: Vec::new(), ..first.clone() }).await;
    eventually("all are discovered", async || (discovered() == 3).then_some(())).await;
    assert!(discovered() == balancer.loads().len(), "what the file had is the source's now");
    until_ready(&balancer, &engines).await;
    // Other settings for the same engines.
    let heavier: Vec<DiscoverySource> =
        sources.into_iter().map(|source| DiscoverySource { weight: 2.0, ..source }).collect();
    reload(Config { sources: heavier.clone(), upstreams: Vec::new(), ..first.clone() }).await;
    let weights = || {
        let snapshot = balancer.running.fleet.snapshot();
        snapshot.entries.iter().map(|entry| entry.upstream.config.weight).collect::<Vec<f64>>()
    };
    eventually("they are heavier", async || (weights() == [2.0; 3]).then_some(())).await;
    // And away again.
    reload(Config { sources: heavier[1..].to_vec(), upstreams: Vec::new(), ..first.clone() }).await;
    until_ready(&balancer, &engines[2..]).await;
    let before = servers[0].heads().len();
    servers[1].until_asked(3).await;
    assert!(servers[0].heads().len() <= before + 1, "nobody asks it any more");
    reload(Config { upstreams: vec![upstream(&engines[2].url())], ..first }).await;
    assert_eq!((discovered(), ready(&balancer)), (0, vec![name(&engines[2])]));
    clients.until_more(20).await;
    assert_eq!(clients.end().await, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn balancers_discover_alone_and_share_operator_changes() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let server = ModelServer::start(document(&engines)).await;
    let mut config = asking([server.source()]);
    config.redis = Some(redis::url(&redis.url()).expect("is a URL"));
    config.redis_options.gauge_ttl = Duration::from_millis(600);
    let [one, other] = [Balancer::start(config.clone()).await, Balancer::start(config.clone()).await];
    until_ready(&one, &engines).await;
    until_ready(&other, &engines).await;
    let listed = async || {
        let keys = redis.ask(&["KEYS", "*members"]).await;
        format!("{keys:?}").contains("members")
    };
    assert!(!listed().await, "what is discovered is nobody's change");
    admin(&one, "DELETE", &path(&engines[0]), Value::Null).await;
    admin(&other, "PATCH", &path(&engines[1]), json!({"state": "drain"})).await.expect(200);
    until_ready(&one, &engines[2..]).await;
    until_ready(&other, &engines[2..]).await;
    assert!(listed().await, "that is what an operator changed");
    // A balancer that starts later finds the engines and the operator's changes.
    other.stop().await;
    let next = Balancer::start(config.clone()).await;
    until_ready(&next, &engines[2..]).await;
    server.until_asked(4).await;
    assert_eq!((ready(&next), ready(&one)), (vec![name(&engines[2])], vec![name(&engines[2])]));
    // Named anew it begins anew, for all and from now on.
    server.say(&document(&engines[1..]));
    server.until_asked(6).await;
    server.say(&document(&engines));
    let back = [&engines[0], &engines[2]];
    until_ready(&one, back).await;
    until_ready(&next, back).await;
    one.stop().await;
    eventually("a balancer that starts has it", async || {
        let last = Balancer::start(config.clone()).await;
        until_ready_some(&last).await;
        server.until_asked(6).await;
        let found = ready(&last).contains(&name(&engines[0]));
        last.stop().await;
        found.then_some(())
    })
    .await;
}

async fn until_ready_some(balancer: &Balancer) {
    eventually("some are ready", async || (!ready(balancer).is_empty()).then_some(())).await;
}

/// The example of the manual: Gym's proxy replaced, two faces of what one model server has.
#[tokio::test(flavor = "multi_thread")]
async fn two_virtual_models_over_a_discovered_model() {
    let example = include_str!("../../../conf/examples/gym.yaml");
    let checked = check(example, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    assert_eq!(checked.sources.len(), 1);
    let engine = serving(&["Qwen/Qwen3-8B"]).await;
    let mut said = document([&engine]);
    said["model"] = "Qwen/Qwen3-8B".into();
    let server = ModelServer::start(said).await;
    let mut config = asking([server.source()]);
    config.routes = checked.routes;
    let balancer = Balancer::start(config).await;
    until_ready(&balancer, [&engine]).await;
    for (model, profile, thinks, most) in [
        (Some("policy-thinking"), None, true, 16384),
        (Some("policy-instant"), None, false, 4096),
        (None, Some("instant"), false, 4096),
        (None, None, true, 16384),
    ] {
        let mut body = json!({"messages": [{"role": "developer", "content": "hi"}]});
        if let Some(model) = model {
            body["model"] = model.into();
        }
        let headers = [JSON].into_iter().chain(profile.map(|profile| ("x-profile", profile)));
        let headers: Vec<_> = headers.collect();
        let body = body.to_string();
        let answer = balancer.ask(request("POST", CHAT, &headers, body.as_bytes())).await.expect(200).json();
        assert_eq!(answer["model"], model.unwrap_or("Qwen/Qwen3-8B"));
        let last = engine.requests().into_iter().next_back().expect("it was asked");
        let got: Value = serde_json::from_slice(&last.body).expect("is JSON");
        // Without a name the engine takes its own model.
        assert_eq!(got["model"], model.map_or(Value::Null, |_| "Qwen/Qwen3-8B".into()));
        assert_eq!(got["chat_template_kwargs"], json!({"enable_thinking": thinks}));
        assert_eq!(got["max_tokens"], most);
        assert_eq!(got["messages"][0]["role"], if thinks { "developer" } else { "system" });
        assert_eq!(got["temperature"], if thinks { Value::Null } else { json!(0.7) });
    }
}
