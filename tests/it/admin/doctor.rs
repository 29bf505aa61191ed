//! `vllm-lb doctor` over engines with one fault each, and over servers that are no vLLM.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::common::certs::Certs;
use crate::common::doctor::{EngineProcess, Visit, file, visit, visit_with_files};
use crate::common::model_server::{ModelServer, document};
use crate::common::ports::reserved_port;
use crate::common::wire;
use crate::common::{
    Balancer, EngineServer, admin, config, direct, engine, engines, eventually, logs, upstreams,
};
use vllm_lb::engine::http::Options;

/// The flags of an engine, and the finding that it gives.
const FAULTS: &[(&[&str], &str)] = &[
    (&["--health-status", "503"], "unhealthy"),
    (&["--no-enable-prefix-caching"], "prefix_caching_off"),
    (&["--no-prompt-tokens-details"], "usage_details_off"),
    (&["--model-root", "/models/other"], "different_models"),
    (&["--max-model-len", "16384"], "max_model_len"),
    (&["--clock-skew", "90"], "clock"),
    (&["--clock-skew=-90"], "clock"),
    (&["--report-version", "0.31.0"], "version"),
    (&["--disable-log-stats"], "no_metrics"),
    (&["--block-size", "32"], "block_size"),
    (&["--prefix-caching-hash-algo", "sha256_cbor"], "hash_algorithm"),
    (&["--api-key", "secret"], "key_refused"),
    (&["--dev-mode"], "dev_routes"),
    (&["--asleep"], "asleep"),
];

/// Names for URLs, as items of the file.
fn items<'a>(named: impl IntoIterator<Item = (String, &'a str)>) -> String {
    let item = |(name, url): (String, &str)| format!("  - {{url: '{url}', name: {name}}}\n");
    let items: String = named.into_iter().map(item).collect();
    format!("upstreams:\n{items}")
}

async fn examine(upstreams: &str, arguments: &[&str]) -> Visit {
    let file = file(upstreams);
    let path = file.path().display().to_string();
    visit(&[&["-c", &path, "--json"], arguments].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_of_an_engine_gives_exactly_its_finding() {
    let mut engines = Vec::new();
    for (flags, code) in FAULTS {
        engines.push((format!("gpu-{}", engines.len()), *code, EngineProcess::start(flags).await));
    }
    let sound = [EngineProcess::start(&[]).await, EngineProcess::start(&[]).await];
    let nowhere = format!("http://127.0.0.1:{}", reserved_port());
    let twin = sound[0].url.replace("127.0.0.1", "localhost");
    let mut named: Vec<(String, &str)> =
        engines.iter().map(|(name, _, engine)| (name.clone(), engine.url.as_str())).collect();
    let others =
        [("sound-0", &sound[0].url), ("sound-1", &sound[1].url), ("gone", &nowhere), ("twin", &twin)];
    named.extend(others.map(|(name, url)| (name.to_string(), url.as_str())));
    let visit = examine(&items(named), &["--request"]).await;
    let mut wanted: Vec<(String, String)> =
        engines.iter().map(|(name, code, _)| (name.clone(), code.to_string())).collect();
    wanted.push(("gone".into(), "unreachable".into()));
    wanted.push(("twin".into(), "same_engine".into()));
    wanted.sort();
    assert_eq!(visit.findings(), wanted, "{}", visit.text);
    assert_eq!(visit.code, Some(1));
    // Errors come first.
    let report = visit.json();
    let all = report["findings"].as_array().expect("a list");
    let is_error: Vec<bool> = all.iter().map(|one| one["severity"] == "error").collect();
    assert!(is_error.is_sorted_by(|one, next| one >= next), "{is_error:?}");
    assert_eq!(report["errors"], is_error.iter().filter(|error| **error).count());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_set_up_gives_no_finding() {
    let engines = [EngineProcess::start(&[]).await, EngineProcess::start(&["--lora", "a"]).await];
    let named = || engines.iter().zip(["gpu-0", "gpu-1"]).map(|(engine, name)| (name.into(), &*engine.url));
    let visit = examine(&items(named()), &["--request"]).await;
    assert_eq!((visit.findings(), visit.code), (vec![], Some(0)), "{}", visit.text);
    let report = visit.json();
    assert_eq!(report["upstreams"][1]["models"], serde_json::json!(["sim", "a"]));
    assert_eq!(report["not_checked"], serde_json::json!(["Redis: none is configured"]));
    // The text form, without --request.
    let file = file(&items(named()));
    let path = file.path().display().to_string();
    let visit = crate::common::doctor::visit(&["-c", &path]).await;
    assert_eq!(visit.code, Some(0), "{}", visit.text);
    assert!(visit.text.starts_with("2 upstreams, 2 healthy; "), "{}", visit.text);
    assert!(visit.text.contains("--request") && visit.text.ends_with("nothing found\n"), "{}", visit.text);
    // URLs in place of the file, and the check of the file with its servers.
    let visit = visit_with_files(256, &[&*engines[0].url, "--json"]).await;
    let wanted = ("this machine".to_string(), "open_files".to_string());
    assert_eq!((visit.findings(), visit.code), (vec![wanted], Some(0)), "{}", visit.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_configuration_ends_with_64() {
    let file = file("upstreams: ['gpu-0:8000']");
    let path = file.path().display().to_string();
    for arguments in
        [&["-c", &*path][..], &[], &["ftp://a"], &["http://a", "--timeout", "0"], &["--nonsense"]]
    {
        let visit = visit(arguments).await;
        assert_eq!((visit.code, visit.text.as_str()), (Some(64), ""), "{arguments:?}");
        assert!(!visit.errors.is_empty(), "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_an_engine_cannot_control_the_terminal() {
    let hostile = EngineProcess::start(&["--report-version", "\u{1b}[2J\u{202e}evil"]).await;
    let sound = EngineProcess::start(&[]).await;
    let visit = visit(&[&*sound.url, &*hostile.url]).await;
    assert!(visit.text.contains("\\u{1b}[2J\\u{202e}evil"), "{}", visit.text);
    assert!(!visit.text.contains(['\u{1b}', '\u{202e}']), "{}", visit.text);
}

// === TLS, and sources of upstreams ===

#[tokio::test(flavor = "multi_thread")]
async fn upstreams_with_tls_are_examined_with_their_trust_settings() {
    let certs = Certs::new();
    let engine = EngineServer::start_tls(Options::default(), &certs.certificate, &certs.key);
    let engine = engine.await.expect("a free port is there");
    let (url, ca) = (engine.url(), certs.authority().display().to_string());
    assert!(url.starts_with("https://"));
    let upstream = |name: &str, tls: &str| format!("upstreams: [{{url: '{url}', name: {name}, tls: {tls}}}]");
    for (name, tls, wanted) in [
        ("trusted", format!("{{ca: '{ca}'}}"), None),
        ("named", format!("{{ca: '{ca}', sni: localhost}}"), None),
        ("unproven", "{verify: false}".to_string(), None),
        ("elsewhere", format!("{{ca: '{ca}', sni: elsewhere.test}}"), Some("unreachable")),
        ("system", "{}".to_string(), Some("unreachable")),
        ("no-file", "{ca: /nowhere/ca.pem}".to_string(), Some("settings")),
    ] {
        let visit = examine(&upstream(name, &tls), &["--request"]).await;
        let wanted: Vec<(String, String)> =
            wanted.map(|code| (name.to_string(), code.to_string())).into_iter().collect();
        assert_eq!(visit.findings(), wanted, "{name}: {}", visit.text);
        assert_eq!(visit.code, Some(i32::from(!wanted.is_empty())), "{name}");
    }
    // The cause is named, so that the operator knows that it is the certificate.
    let visit = examine(&upstream("system", "{}"), &[]).await;
    assert!(visit.text.contains("certificate"), "{}", visit.text);
    // An upstream with TLS that is configured without.
    let plain = url.replace("https://", "http://");
    let visit = examine(&items([("plain".to_string(), plain.as_str())]), &[]).await;
    assert_eq!(visit.code, Some(1), "{}", visit.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_and_the_engines_that_they_list_are_examined() {
    let sound = engine(Options::default()).await;
    let off = engine(Options { prefix_caching: false, seed: 1, ..Options::default() }).await;
    let server = ModelServer::start(document([&sound, &off])).await;
    let source = format!("gym http://{}", server.address);
    let listed = format!("upstreams: [{{gym: 'http://{}'}}]", server.address);
    let visit = examine(&listed, &["--request"]).await;
    let wanted = vec![(direct(&off), "prefix_caching_off".to_string())];
    assert_eq!((visit.findings(), visit.code), (wanted, Some(0)), "{}", visit.text);
    let mut names: Vec<String> = visit.json()["upstreams"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|row| row["name"].as_str().expect("a name").to_string())
        .collect();
    names.sort();
    let mut engines = [direct(&sound), direct(&off)];
    engines.sort();
    assert_eq!(names, engines);
    // An engine that the file names, too, is examined once.
    let both = format!("upstreams: [{{gym: 'http://{}'}}, '{}']", server.address, sound.url());
    let visit = examine(&both, &[]).await;
    assert_eq!(visit.json()["upstreams"].as_array().map(Vec::len), Some(2), "{}", visit.text);
    let codes = async |answer: (u16, &str)| {
        server.answer(answer.0, answer.1);
        let visit = examine(&listed, &[]).await;
        (visit.findings(), visit.code)
    };
    let one = |code: &str| vec![(source.clone(), code.to_string())];
    let none = r#"{"base_url": [], "model": "sim"}"#;
    for answer in [(500, "{}"), (200, "<html>"), (200, r#"{"base_url": 7}"#), (200, none)] {
        assert_eq!(codes(answer).await, (one("source_unreadable"), Some(1)), "{answer:?}");
    }
    drop(server);
    let visit = examine(&listed, &[]).await;
    assert_eq!((visit.findings(), visit.code), (one("source_unreadable"), Some(1)), "{}", visit.text);
}

// === servers that are no vLLM ===

/// Answers a connection.
type Behaviour = fn(TcpStream) -> futures_util::future::BoxFuture<'static, ()>;

/// Listens, and answers each connection by `behaviour`.
async fn listen(behaviour: Behaviour) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let url = format!("http://{}", listener.local_addr().expect("a listener has an address"));
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(behaviour(stream));
        }
    });
    (url, task)
}

/// Writes `first`, then `piece` until the client leaves.
async fn pour(mut stream: TcpStream, first: &str, piece: &[u8]) {
    drop(stream.read(&mut [0; 4096]).await);
    drop(stream.write_all(first.as_bytes()).await);
    let piece = piece.repeat(200);
    while !piece.is_empty() && stream.write_all(&piece).await.is_ok() {}
    drop(stream.shutdown().await);
}

const ENDLESS: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_no_vllm_give_findings_in_bounded_time() {
    let behaviours: [(&str, &str, Behaviour); 6] = [
        ("garbage", "not_vllm", |stream| Box::pin(async { pour(stream, "\u{1}\u{2}hello\r\n", b"").await })),
        ("closes", "unreachable", |stream| Box::pin(async { drop(stream) })),
        ("silent", "silent", |mut stream| {
            Box::pin(async move { while stream.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {} })
        }),
        ("endless-head", "not_vllm", |stream| {
            Box::pin(async {
                pour(stream, "HTTP/1.1 200 OK\r\n", b"x: aaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n").await
            })
        }),
        ("endless-body", "not_vllm", |stream| {
            let piece = format!("1000\r\n{}\r\n", "a".repeat(0x1000));
            Box::pin(async move { pour(stream, ENDLESS, piece.as_bytes()).await })
        }),
        ("wrong-list", "models_unreadable", |stream| {
            let page = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n<html";
            Box::pin(async move { pour(stream, page, b"").await })
        }),
    ];
    let (mut servers, mut wanted) = (Vec::new(), Vec::new());
    for (name, code, behaviour) in behaviours {
        let (url, task) = listen(behaviour).await;
        servers.push((name.to_string(), url, task));
        wanted.push((name.to_string(), code.to_string()));
    }
    // What answers everything with a page has no metrics either.
    wanted.push(("wrong-list".into(), "no_metrics".into()));
    wanted.sort();
    let named = servers.iter().map(|(name, url, _)| (name.clone(), url.as_str()));
    let begun = Instant::now();
    let visit = examine(&items(named), &["--timeout", "2s"]).await;
    assert_eq!((visit.findings(), visit.code), (wanted, Some(1)), "{}", visit.text);
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    servers.iter().for_each(|(_, _, task)| task.abort());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_silent_servers_are_asked_in_bounded_time() {
    let (url, task) = listen(|mut stream| {
        Box::pin(async move { while stream.read(&mut [0; 64]).await.is_ok_and(|count| count > 0) {} })
    })
    .await;
    let urls: Vec<String> = (0..1000).map(|number| format!("{url}/gpu-{number}")).collect();
    let named = urls.iter().enumerate().map(|(number, url)| (format!("gpu-{number}"), url.as_str()));
    let begun = Instant::now();
    let visit = examine(&items(named), &["--timeout", "200ms"]).await;
    let found = visit.findings();
    assert_eq!((found.len(), visit.code), (1000, Some(1)));
    assert!(found.iter().all(|(_, code)| code == "silent"), "{found:?}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    task.abort();
}

// === how well a balancer sees ===

fn completion(prompt: &str) -> Vec<u8> {
    let body = serde_json::json!({"model": "sim", "prompt": prompt, "max_tokens": 1});
    wire::post("/v1/completions", body.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_shows_how_well_it_sees_each_upstream() {
    let exact = engine(Options::default()).await;
    let silent = engine(Options { prompt_tokens_details: false, seed: 1, ..Options::default() }).await;
    let off = engine(Options { prefix_caching: false, seed: 2, ..Options::default() }).await;
    let engines = [&exact, &silent, &off];
    let mut config = config(upstreams(engines));
    for (upstream, name) in config.upstreams.iter_mut().zip(["exact", "silent", "off"]) {
        upstream.name = name.into();
    }
    let balancer = Balancer::ready(config).await;
    let prompt = "a prompt of more than one block of text ".repeat(40);
    let sight = async |name: &str| {
        let row = balancer.admin(wire::get(&format!("/admin/upstreams/{name}"))).await;
        let row = row.expect(200).json();
        (row["sight"].as_str().unwrap_or_default().to_string(), row["sight_reason"].clone())
    };
    eventually("metrics were read", async || (sight("off").await.0 == "blind").then_some(())).await;
    let mut round = 0;
    eventually("each upstream has had enough requests", async || {
        round += 1;
        balancer.ask(completion(&format!("{round} {prompt}"))).await.expect(200);
        let is_known = sight("silent").await.1.as_str().is_some_and(|text| text.contains("usage"));
        (is_known && sight("exact").await.0 == "exact").then_some(())
    })
    .await;
    let (state, reason) = sight("off").await;
    assert_eq!(state, "blind");
    assert!(reason.as_str().is_some_and(|text| text.starts_with("prefix caching is off")), "{reason}");
    assert_eq!(sight("exact").await, ("exact".into(), serde_json::Value::Null));
    let (state, reason) = sight("silent").await;
    assert_eq!(state, "learnt");
    assert!(reason.as_str().is_some_and(|text| text.starts_with("no usage details")), "{reason}");
    let page = balancer.admin(wire::get("/metrics")).await.expect(200);
    for (name, state) in [("exact", "exact"), ("silent", "learnt"), ("off", "blind")] {
        let line = format!("vllm_lb_upstream_sight{{upstream=\"{name}\",sight=\"{state}\"}} 1");
        assert!(page.text().contains(&line), "{line}");
    }
    // The doctor asks the balancer, and so needs no request.
    let admin = &balancer.running.admin;
    let list: Vec<String> = engines.iter().map(|engine| format!("'http://{}'", direct(engine))).collect();
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    let text = format!("admin: {{address: '{admin}'}}\nupstreams: [{}]\n", list.join(", "));
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
    let visit = visit(&["-c", &file.path().display().to_string(), "--json"]).await;
    let wanted = [(direct(&silent), "usage_details_off"), (direct(&off), "prefix_caching_off")];
    let mut wanted = wanted.map(|(name, code)| (name, code.to_string()));
    wanted.sort();
    assert_eq!((visit.findings(), visit.code), (wanted.to_vec(), Some(0)), "{}", visit.text);
    balancer.stop().await;
}

/// Two balancers share a file, and one of them has another admin address and a drained upstream.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_the_balancer_that_it_found_and_drained_upstreams() {
    let engines = engines(2).await;
    let balancers = [Balancer::over(&engines).await, Balancer::over(&engines).await];
    let drained = direct(&engines[1]);
    let body = serde_json::json!({"drain": true});
    admin(&balancers[1], "PATCH", &format!("/admin/upstreams/{drained}"), body).await.expect(200);
    let [first, second] = balancers.each_ref().map(|balancer| balancer.running.admin.clone());
    let list: Vec<String> = engines.iter().map(|engine| format!("'http://{}'", direct(engine))).collect();
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    let text = format!("admin: {{address: '{first}'}}\nupstreams: [{}]\n", list.join(", "));
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("written");
    let path = file.path().display().to_string();
    let report = visit(&["-c", &path]).await;
    let found =
        format!("2 upstreams, 2 healthy; a balancer runs, with its admin listener at http://{first}; ");
    assert!(report.text.starts_with(&found), "{}", report.text);
    let report = visit(&["-c", &path, "--admin", &second, "--json"]).await;
    assert_eq!((report.findings(), report.code), (vec![(drained, "drained".to_string())], Some(0)));
    let json = report.json();
    assert_eq!((&json["balancer"], &json["notes"]), (&format!("http://{second}").into(), &1.into()));
    let report = visit(&["-c", &path, "-a", &second]).await;
    assert!(report.text.starts_with("2 upstreams, 2 healthy, 1 drained; "), "{}", report.text);
}

/// An address that the operator names, and that is not one of a balancer, is an error. The doctor was silent.
#[tokio::test(flavor = "multi_thread")]
async fn an_admin_address_without_a_balancer_is_an_error() {
    let engines = engines(1).await;
    let balancer = Balancer::over(&engines).await;
    let nowhere = format!("127.0.0.1:{}", reserved_port());
    let public = balancer.address().to_string();
    let file = file(&format!("upstreams: ['http://{}']", direct(&engines[0])));
    let path = file.path().display().to_string();
    for (admin, seen, remedy) in [
        (nowhere.as_str(), "Connection refused", "start the balancer, or correct --admin"),
        (public.as_str(), "status 404", "admin.address of the running balancer, not listen"),
        ("127.0.0.1:0", "no port", "correct --admin"),
    ] {
        let report = visit(&["-c", &path, "--admin", admin, "--json"]).await;
        let subject = if admin.ends_with(":0") { admin.to_string() } else { format!("http://{admin}") };
        assert_eq!(report.findings(), [(subject, "no_balancer".to_string())], "{}", report.text);
        let finding = &report.json()["findings"][0];
        assert!(finding["seen"].as_str().is_some_and(|text| text.contains(seen)), "{finding}");
        assert!(finding["remedy"].as_str().is_some_and(|text| text.contains(remedy)), "{finding}");
        assert_eq!((&finding["severity"], report.code), (&"error".into(), Some(1)));
    }
    // Without the flag no balancer needs to run.
    let report = visit(&["-c", &path, "--json"]).await;
    assert_eq!((report.findings(), report.code), (vec![], Some(0)), "{}", report.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_forgets_makes_the_balancer_blind() {
    let small = engines(1).await;
    let mut config = config(upstreams(&small));
    config.health.metrics = false;
    let name = config.upstreams[0].name.clone();
    let balancer = Balancer::ready(config).await;
    let prompt = "the same prompt, which the engine drops after each turn ".repeat(200);
    let rows = async || {
        let row = balancer.admin(wire::get(&format!("/admin/upstreams/{name}"))).await;
        row.expect(200).json()
    };
    for _ in 0..20 {
        balancer.ask(completion(&prompt)).await.expect(200);
    }
    assert_eq!(rows().await["sight"], "exact");
    for round in 0..200 {
        // A new process has an empty cache; without metrics the balancer cannot see that it is one.
        small[0].restart().await;
        balancer.ask(completion(&prompt)).await.expect(200);
        if rows().await["sight"] == "blind" {
            let reason = rows().await["sight_reason"].to_string();
            assert!(reason.contains("holds less than predicted"), "{reason}");
            let said = logs::all().join("\n");
            assert!(said.contains("sight changed"), "{said}");
            return balancer.stop().await;
        }
        assert!(round < 199, "{}", rows().await);
    }
}
