//! A configuration takes another's place while requests are in flight, and no request notices.

use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::body::chat;
use crate::common::body::stream;
use crate::common::certs::Certs;
use crate::common::clients::{Clients, none};
use crate::common::wire::{self, Wire, get, post, tcp};
use crate::common::{
    Balancer, EngineServer, Options, admin, config, engines, eventually, logs, paced, upstream, upstreams,
};
use serde_json::{Value, json};
use vllm_lb::app::{self, LoadConfig};
use vllm_lb::config::types::{Config, UpstreamConfig};

const CHAT: &str = "/v1/chat/completions";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

/// A balancer whose configuration can be exchanged.
async fn reloadable(config: Config) -> (Balancer, Arc<Mutex<Result<Config, Vec<String>>>>) {
    let file = Arc::new(Mutex::new(Ok(config.clone())));
    let read = file.clone();
    let load: LoadConfig = Arc::new(move || {
        let read: Result<Config, Vec<String>> = read.lock().expect("nobody panics with it").clone();
        read.map(|config| (config, Vec::new()))
    });
    let running = app::start_with(config.clone(), load).await.expect("the balancer starts");
    let balancer = Balancer { running };
    balancer.until_ready(config.upstreams.len()).await;
    (balancer, file)
}

/// A reload brought back what had been taken out at run time, and weights of the file.
#[tokio::test(flavor = "multi_thread")]
async fn runtime_changes_survive_an_unrelated_reload() {
    let engines = engines(2).await;
    let first = config(upstreams(&engines));
    let (balancer, file) = reloadable(first.clone()).await;
    let path = |at: usize| format!("/admin/upstreams/{}", first.upstreams[at].name);
    admin(&balancer, "DELETE", &path(0), Value::Null).await;
    balancer.until_ready(1).await;
    admin(&balancer, "PATCH", &path(1), json!({"weight": 3})).await.expect(200);
    let reload = async |next: Config| {
        *file.lock().expect("nobody panics with it") = Ok(next);
        admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
        let rows = admin(&balancer, "GET", "/admin/upstreams", Value::Null).await.expect(200).json();
        let rows = rows.as_array().cloned().unwrap_or_default();
        rows.iter().map(|row| row["weight"].as_f64().unwrap_or(0.0)).collect::<Vec<f64>>()
    };
    assert_eq!(reload(Config { expose: true, ..first.clone() }).await, [3.0]);
    let mut next = first.clone();
    next.upstreams[0].max_active = Some(9);
    next.upstreams[1].weight = 2.0;
    assert_eq!(reload(next).await, [2.0, 1.0], "the file says something new of both");
}

/// The log is the process's, and what else runs in it may log more.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_without_another_log_level_leaves_the_log_as_it_is() {
    let engines = engines(1).await;
    let first = config(upstreams(&engines));
    let (balancer, file) = reloadable(first.clone()).await;
    logs::remember();
    *file.lock().expect("nobody panics with it") = Ok(Config { expose: true, ..first });
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
    assert_eq!(log::max_level(), log::LevelFilter::Debug);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_reloads_that_change_the_upstreams_fail_no_request() {
    let engines = engines(4).await;
    let all = upstreams(&engines);
    let with = |chosen: &[usize]| {
        let chosen: Vec<UpstreamConfig> = chosen.iter().map(|at| all[*at].clone()).collect();
        config(chosen)
    };
    let (balancer, file) = reloadable(with(&[0, 1])).await;
    let load = Clients::start(&balancer, 6);
    load.until_more(20).await;
    let sets: [&[usize]; 5] = [&[1, 2], &[2, 3, 0], &[0, 1, 2, 3], &[3, 1], &[0, 1]];
    for round in 0..10 {
        let mut next = with(sets[round % sets.len()]);
        next.upstreams[0].weight = 1.0 + round as f64;
        next.timeouts.connect = Duration::from_secs(2 + round as u64 % 3);
        next.expose = round % 2 == 0;
        let count = next.upstreams.len();
        *file.lock().expect("nobody panics with it") = Ok(next);
        let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200).json();
        assert!(
            told["changed"].as_array().is_some_and(|changed| changed.contains(&json!("upstreams"))),
            "{told}"
        );
        balancer.until_ready(count).await;
        load.until_more(30).await;
    }
    assert_eq!(load.end().await, none());
    balancer.until_idle().await;
    assert_eq!(balancer.metric("vllm_lb_reloads_total").await, 10.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_with_problems_changes_nothing_and_one_that_needs_a_restart_does_the_rest() {
    let engines = engines(3).await;
    let first = config(upstreams([&engines[0]]));
    let (balancer, file) = reloadable(first.clone()).await;
    let put = |config: Result<Config, Vec<String>>| *file.lock().expect("nobody panics with it") = config;

    put(Err(vec!["upstreams[0].url: is bad (line 3)".into()]));
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(422).json();
    assert_eq!(told["problems"], json!(["upstreams[0].url: is bad (line 3)"]));
    let mut unusable = config(upstreams(&engines));
    unusable.upstreams[2].url.https = true;
    unusable.upstreams[2].tls.ca = Some("/nowhere/ca.pem".into());
    put(Ok(unusable));
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(422).json();
    assert!(
        told["problems"][0].as_str().is_some_and(|problem| problem.contains("/nowhere/ca.pem")),
        "{told}"
    );
    assert_eq!(balancer.loads().len(), 1, "neither the good one");

    let mut next = first.clone();
    next.threads = 7;
    next.admin.token = Some(vllm_lb::config::secret::Secret::new("hunter2"));
    put(Ok(next));
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200).json();
    assert_eq!(
        told,
        json!({"status": "ok", "changed": ["admin.token"], "needs_restart": ["threads"], "warnings": []})
    );
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(401);
    let token = ("authorization", "Bearer hunter2");
    let shown = balancer.admin(wire::request("GET", "/admin/config", &[token], b"")).await.expect(200);
    assert_eq!(shown.json()["threads"], 2, "what runs is shown");

    // What was added at run time stays, unless the file names it and lets it go again.
    let add = json!({"url": engines[1].url()}).to_string();
    let add = wire::request("POST", "/admin/upstreams?wait=20s", &[wire::JSON, token], add.as_bytes());
    balancer.admin(add).await.expect(201);
    for (config, count) in
        [(first.clone(), 2), (config(upstreams(&engines[..2])), 2), (config(upstreams([&engines[0]])), 1)]
    {
        put(Ok(config));
        balancer.running.reload().await.expect("is valid");
        eventually("the upstreams are as wanted", async || (balancer.loads().len() == count).then_some(()))
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_end_by_the_settings_that_they_began_with() {
    let engines = [paced(ENDLESS).await];
    let (balancer, file) = reloadable(config(upstreams(&engines))).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 20))).await;
    engines[0].wait_until("it runs", |stats| stats.running == 1).await;
    let mut next = config(upstreams(&engines));
    next.timeouts.total = Some(Duration::from_millis(1));
    next.upstreams[0].api_key = Some(vllm_lb::config::secret::Secret::new("other"));
    *file.lock().expect("nobody panics with it") = Ok(next);
    balancer.running.reload().await.expect("is valid");
    assert_eq!(balancer.loads()[0].active, 1, "the count goes on with other settings");
    assert!(client.answer().await.expect(200).text().contains("[DONE]"));
    balancer.until_idle().await;
    balancer.ask(post(CHAT, stream("sim", 100))).await.expect(504);
}

/// An address that leads to whichever engine it is told to.
async fn switch(first: &EngineServer) -> (String, Arc<Mutex<String>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let address = listener.local_addr().expect("it is bound").to_string();
    let target = Arc::new(Mutex::new(first.address().to_string()));
    let told = target.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let target = told.lock().expect("nobody panics with it").clone();
            tokio::spawn(async move {
                let mut engine = tcp(&target).await;
                tokio::io::copy_bidirectional(&mut client, &mut engine).await.ok();
            });
        }
    });
    (address, target)
}

/// Also where the connections that the old one has vouched for are still open.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_replaces_the_trusted_authority() {
    for same_path in [false, true] {
        let (before, after) = (Certs::new(), Certs::new());
        let mut engines = Vec::new();
        for certs in [&before, &after] {
            let engine = EngineServer::start_tls(Options::default(), &certs.certificate, &certs.key).await;
            engines.push(engine.expect("the certificate is one"));
        }
        let (address, target) = switch(&engines[0]).await;
        let mut next = config(vec![upstream(&format!("https://{address}"))]);
        next.upstreams[0].tls.ca = Some(before.authority());
        let (balancer, file) = reloadable(next.clone()).await;
        let mut clients = [balancer.client().await, balancer.client().await];
        for client in &mut clients {
            client.ask(post(CHAT, chat("sim"))).await.expect(200);
        }
        *target.lock().expect("nobody panics with it") = engines[1].address().to_string();
        if same_path {
            std::fs::copy(after.authority(), before.authority()).expect("written");
        } else {
            next.upstreams[0].tls.ca = Some(after.authority());
            *file.lock().expect("nobody panics with it") = Ok(next);
        }
        balancer.running.reload().await.expect("is valid");
        eventually("requests go to the new engine", async || {
            let answer = clients[0].ask(post(CHAT, chat("sim"))).await;
            (answer.status == 200).then_some(())
        })
        .await;
        let served = [engines[0].requests().len(), engines[1].requests().len()];
        assert_eq!(served, [2, 1], "same path: {same_path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_of_a_listener_is_used_after_a_reload() {
    let (certs, renewed) = (Certs::new(), Certs::new());
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    config.listen[0].tls = Some(certs.listen());
    let (balancer, _file) = reloadable(config).await;
    let mut kept = Wire::over(certs.connect(balancer.address(), &["http/1.1"]).await);
    let files = certs.listen();
    std::fs::write(&files.certificate, &renewed.certificate).expect("written");
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(422).json();
    assert!(told["problems"][0].as_str().is_some_and(|problem| problem.contains("cert.pem")), "{told}");
    Wire::over(certs.connect(balancer.address(), &[]).await).ask(get("/version")).await.expect(200);
    std::fs::write(&files.key, &renewed.key).expect("written");
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200).json();
    assert_eq!(told, json!({"status": "ok", "changed": ["listen.tls"], "needs_restart": [], "warnings": []}));
    Wire::over(renewed.connect(balancer.address(), &[]).await).ask(get("/version")).await.expect(200);
    kept.ask(get("/version")).await.expect(200);
    let told = admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200).json();
    assert_eq!(told["changed"], json!([]));
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_file_again() {
    let engines = engines(2).await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("lb.yaml");
    let socket = |name: &str| format!("unix:{}", folder.path().join(name).display());
    let write = |engines: &[EngineServer]| {
        let urls: Vec<String> = engines.iter().map(EngineServer::url).collect();
        let text = json!({"listen": socket("api"), "admin": {"address": socket("admin")}, "upstreams": urls});
        std::fs::write(&file, text.to_string()).expect("written");
    };
    write(&engines[..1]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-lb"));
    let process = Process(command.arg("-qq").arg("-c").arg(&file).spawn().expect("it starts"));
    let count = async || {
        // Its file is there a moment before it takes connections.
        tokio::net::UnixStream::connect(folder.path().join("admin")).await.ok()?;
        let list = Wire::connect(&socket("admin")).await.ask(get("/admin/upstreams")).await.expect(200);
        list.json().as_array().map(Vec::len)
    };
    eventually("it serves", async || count().await.filter(|count| *count == 1)).await;
    write(&engines);
    let pid = process.0.id().to_string();
    let sent = Command::new("kill").args(["-HUP", &pid]).status().expect("kill is there");
    assert!(sent.success());
    eventually("it has read the file", async || count().await.filter(|count| *count == 2)).await;
}
