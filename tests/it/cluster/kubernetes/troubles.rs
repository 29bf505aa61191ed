//! What goes wrong between the balancer and the API server: the engines stay, and what was missed is made up
//! for.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{CHAT, TestCluster, following, ip, pod, records, until_ready};
use crate::common::api_server::{ApiServer, Refusal, Verb, ready, refusal, slice, unready};
use crate::common::body::chat;
use crate::common::certs::Certs;
use crate::common::clients::{Clients, none};
use crate::common::wire::post;
use crate::common::{Balancer, Timing, eventually, logs};

/// Waits until so many more failures of sources are counted.
async fn until_failed(balancer: &Balancer, more: f64) {
    let failures = async || balancer.metric("vllm_lb_discovery_failures_total").await;
    let before = failures().await;
    eventually("failures are counted", async || (failures().await >= before + more).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn engines_stay_while_the_server_is_away() {
    let mut cluster = TestCluster::with(3).await;
    let balancer = cluster.balancer().await;
    let load = Clients::start(&balancer, 2);
    cluster.api.away().await;
    until_failed(&balancer, 2.0).await;
    load.until_more(20).await;
    until_ready(&balancer, 0..3).await;
    // What changes meanwhile is in the watch that begins then; no list is needed.
    cluster.put([0, 2]);
    cluster.api.back().await;
    until_ready(&balancer, [0, 2]).await;
    assert_eq!(cluster.api.count(Verb::List), 1);
    load.until_more(20).await;
    assert_eq!(load.end().await, none());
    let (warnings, news) = (records("WARN source does not name"), records("INFO source names"));
    assert_eq!((warnings.len(), news.len()), (1, 2), "{warnings:?} {news:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_starts_before_its_server_finds_the_engines() {
    let mut cluster = TestCluster::with(1).await;
    cluster.put_all();
    cluster.api.away().await;
    let mut config = cluster.config();
    config.queue.wait = Duration::ZERO;
    let balancer = Balancer::start(config).await;
    until_failed(&balancer, 2.0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    cluster.api.back().await;
    until_ready(&balancer, [0]).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_ends_goes_on_from_the_last_version() {
    let cluster = TestCluster::with(3).await;
    let balancer = cluster.balancer().await;
    for (number, cut) in [false, true].into_iter().enumerate() {
        let watches = cluster.api.count(Verb::Watch);
        cluster.api.end(cut);
        cluster.put([number]);
        until_ready(&balancer, [number]).await;
        assert!(cluster.api.count(Verb::Watch) > watches);
    }
    // Of this event half is written before the connection ends.
    cluster.api.put_halfway("vllm-a", slice(cluster.port, [ready(&pod(2), &ip(2))]));
    until_ready(&balancer, [2]).await;
    assert_eq!(cluster.api.count(Verb::List), 1, "no event was lost");
    assert_eq!(balancer.metric("vllm_lb_discovery_failures_total").await, 0.0, "that is no failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn bookmarks_move_the_version() {
    let cluster = TestCluster::with(2).await;
    let balancer = cluster.balancer().await;
    cluster.api.advance(1000);
    cluster.api.bookmark();
    // The next watch would be refused from any version before the bookmark.
    cluster.api.compact();
    let watches = cluster.api.count(Verb::Watch);
    cluster.api.end(false);
    eventually("it watches again", async || (cluster.api.count(Verb::Watch) > watches).then_some(())).await;
    assert_eq!(cluster.api.latest(Verb::Watch).query["resourceVersion"], cluster.api.version().to_string());
    cluster.put([0]);
    until_ready(&balancer, [0]).await;
    assert_eq!(cluster.api.count(Verb::List), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_too_old_leads_to_a_new_list() {
    let mut cluster = TestCluster::with(3).await;
    let balancer = cluster.balancer().await;
    // In the midst of a watch.
    cluster.api.expire();
    eventually("it lists again", async || (cluster.api.count(Verb::List) == 2).then_some(())).await;
    // At its beginning: a deletion was forgotten, too.
    cluster.api.put("vllm-b", slice(cluster.port, [ready(&pod(2), &ip(2))]));
    cluster.put([0, 1]);
    until_ready(&balancer, 0..3).await;
    cluster.api.away().await;
    cluster.api.delete("vllm-b");
    cluster.api.compact();
    cluster.api.back().await;
    until_ready(&balancer, [0, 1]).await;
    assert_eq!(cluster.api.count(Verb::List), 3);
    // By the status of the answer, as some proxies before the server give it.
    cluster.api.refuse(Verb::Watch, Refusal { times: 1, ..refusal(410, "Gone", "too old") });
    cluster.api.end(false);
    eventually("it lists again", async || (cluster.api.count(Verb::List) == 4).then_some(())).await;
    cluster.put([1]);
    until_ready(&balancer, [1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_expires_between_two_pages_begins_again() {
    let cluster = TestCluster::with(1).await;
    for number in 0..150 {
        cluster.api.put(&format!("vllm-m{number:03}"), slice(cluster.port, []));
    }
    cluster.api.put("vllm-z", slice(cluster.port, [ready(&pod(0), &ip(0))]));
    cluster.api.refuse(Verb::Page, Refusal { times: 1, ..refusal(410, "Expired", "the key is too old") });
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    assert_eq!((cluster.api.count(Verb::List), cluster.api.count(Verb::Page)), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_role_is_named_once() {
    let cluster = TestCluster::with(2).await;
    cluster.put_all();
    let said = "endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:a:b\" cannot list";
    cluster.api.refuse(Verb::List, refusal(403, "Forbidden", said));
    let balancer = Balancer::start(cluster.config()).await;
    until_failed(&balancer, 3.0).await;
    let warnings = records("WARN source does not name");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for part in ["status 403", said, "namespace default", "endpointslices", "[get, list, watch]"] {
        assert!(warnings[0].contains(part), "{part} is not in {warnings:?}");
    }
    cluster.api.serve();
    until_ready(&balancer, 0..2).await;
    // The role may lack the verb `watch` alone: the list is used, and the warning comes again.
    cluster.api.refuse(Verb::Watch, refusal(403, "Forbidden", "cannot watch"));
    cluster.api.end(false);
    until_failed(&balancer, 1.0).await;
    cluster.put([1]);
    until_ready(&balancer, [1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_with_a_time_to_wait_is_respected() {
    let cluster = TestCluster::with(1).await;
    cluster.put_all();
    let busy = Refusal {
        headers: vec![("retry-after", "2")],
        times: 1,
        ..refusal(429, "TooManyRequests", "slow down")
    };
    cluster.api.refuse(Verb::List, busy);
    let began = Instant::now();
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    assert!(began.elapsed() >= Duration::from_secs(2), "it came back after {:?}", began.elapsed());
    assert_eq!(cluster.api.count(Verb::List), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_answers_remove_no_engine() {
    let cluster = TestCluster::with(2).await;
    let balancer = cluster.balancer().await;
    let load = Clients::start(&balancer, 2);
    let answer = |status: u16, body: &str| Refusal { body: body.into(), ..refusal(status, "", "") };
    let nameless = r#"{"metadata": {"resourceVersion": "9"}, "items": [{"metadata": {}, "endpoints": []}]}"#;
    let unversioned = r#"{"metadata": {}, "items": []}"#;
    let endless = r#"{"metadata": {"resourceVersion": "9", "continue": "x"}, "items": []}"#;
    for refusal in [
        answer(500, "oh"),
        refusal(503, "ServiceUnavailable", "the server is starting"),
        answer(200, "<html>please log in</html>"),
        answer(200, r#"{"metadata": {"resourceVersion": "9"}, "items": [{"#),
        answer(200, nameless),
        answer(200, unversioned),
        answer(200, endless),
        answer(401, ""),
        answer(404, "not here"),
    ] {
        let told = format!("{refusal:?}");
        cluster.api.refuse(Verb::Page, refusal.clone());
        cluster.api.refuse(Verb::List, refusal);
        // An event makes the round a success, so that the next pause is short.
        cluster.api.bookmark();
        cluster.api.expire();
        until_failed(&balancer, 1.0).await;
        until_ready(&balancer, 0..2).await;
        assert_eq!(balancer.loads().len(), 2, "{told}");
        let watches = cluster.api.count(Verb::Watch);
        cluster.api.serve();
        eventually("it watches", async || (cluster.api.count(Verb::Watch) > watches).then_some(())).await;
    }
    for line in
        ["rubbish\n", "{\"type\": \"ADDED\", \"object\": {}}\n", "{\"type\": \"WHAT\", \"object\": {}}\n"]
    {
        let (lists, watches) = (cluster.api.count(Verb::List), cluster.api.count(Verb::Watch));
        cluster.api.write(line);
        eventually("it lists", async || (cluster.api.count(Verb::List) > lists).then_some(())).await;
        eventually("it watches", async || (cluster.api.count(Verb::Watch) > watches).then_some(())).await;
        until_ready(&balancer, 0..2).await;
    }
    cluster.put([1]);
    until_ready(&balancer, [1]).await;
    load.until_more(20).await;
    assert_eq!(load.end().await, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_missing_is_named_and_removes_no_engine() {
    let cluster = TestCluster::with(1).await;
    let balancer = cluster.balancer().await;
    let mut other = slice(cluster.port, [ready(&pod(0), &ip(0))]);
    other["ports"] = json!([{"name": "metrics", "port": 9000}, {"name": "api", "port": 8000}]);
    cluster.api.put("vllm-a", other);
    let said = eventually("it is told", async || records("WARN source does not name").pop()).await;
    assert!(said.contains("metrics 9000, api 8000"), "{said}");
    until_ready(&balancer, [0]).await;
    cluster.put_endpoints([unready(&pod(0), &ip(0))]);
    until_ready(&balancer, []).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_is_waited_for() {
    let cluster = TestCluster::with(2).await;
    cluster.put([0]);
    cluster.api.delay(Duration::from_millis(700));
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    cluster.api.until_watched().await;
    // Before the watch is answered.
    cluster.put([0, 1]);
    until_ready(&balancer, 0..2).await;
    assert_eq!(balancer.metric("vllm_lb_discovery_failures_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotated_token_is_read_again() {
    let cluster = TestCluster::with(2).await;
    cluster.put([0]);
    let path = cluster.directory().join("token");
    std::fs::write(&path, "hunter2-first").expect("the directory can be written");
    cluster.api.accept_token("hunter2-first");
    let source = cluster.source_with(json!({}), json!({"tokenFile": path.display().to_string()}));
    let balancer = Balancer::start(following([source])).await;
    until_ready(&balancer, [0]).await;
    assert_eq!(cluster.api.latest(Verb::Watch).authorization.as_deref(), Some("Bearer hunter2-first"));
    std::fs::write(&path, "hunter2-second").expect("the directory can be written");
    cluster.api.accept_token("hunter2-second");
    cluster.api.end(false);
    cluster.put([0, 1]);
    until_ready(&balancer, 0..2).await;
    let refused = "hunter2-wrong";
    cluster.api.accept_token(refused);
    cluster.api.end(false);
    let said =
        async || records("WARN source does not name").into_iter().find(|line| line.contains("status 401"));
    eventually("it is told", said).await;
    until_ready(&balancer, 0..2).await;
    let logs = logs::all().join("\n");
    assert!(!logs.contains("hunter2"), "{logs}");
}

/// Regression: no header holds the line end of a token file.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_may_end_with_a_line_end() {
    let cluster = TestCluster::with(1).await;
    cluster.put_all();
    let path = cluster.directory().join("token");
    std::fs::write(&path, "hunter2\n").expect("the directory can be written");
    cluster.api.accept_token("hunter2");
    let source = cluster.source_with(json!({}), json!({"tokenFile": path.display().to_string()}));
    let balancer = Balancer::start(following([source])).await;
    until_ready(&balancer, [0]).await;
    assert_eq!(cluster.api.latest(Verb::List).authorization.as_deref(), Some("Bearer hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_plugin_is_run_again_when_its_token_expires() {
    let cluster = TestCluster::with(2).await;
    cluster.put([0]);
    let path = cluster.directory().join("credential");
    let give = |token: &str, expires: &str| {
        let status = json!({"token": token, "expirationTimestamp": expires});
        std::fs::write(&path, json!({"status": status}).to_string()).expect("the directory can be written");
        cluster.api.accept_token(token);
    };
    give("hunter2-first", "2020-01-01T00:00:00Z");
    let plugin = json!({
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "cat",
        "args": [path.display().to_string()],
    });
    let source = cluster.source_with(json!({}), json!({"exec": plugin}));
    let balancer = Balancer::start(following([source])).await;
    until_ready(&balancer, [0]).await;
    cluster.api.until_watched().await;
    give("hunter2-second", "2999-01-01T00:00:00Z");
    cluster.api.end(false);
    cluster.put([0, 1]);
    until_ready(&balancer, 0..2).await;
    assert_eq!(cluster.api.latest(Verb::Watch).authorization.as_deref(), Some("Bearer hunter2-second"));
    assert_eq!(balancer.metric("vllm_lb_discovery_failures_total").await, 0.0);
    let logs = logs::all().join("\n");
    assert!(!logs.contains("hunter2"), "{logs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_of_the_server_is_verified() {
    let (certs, strangers) = (Certs::new(), Certs::new());
    let cluster = TestCluster::of(ApiServer::secure(&certs).await, 1, Timing::instant()).await;
    cluster.put_all();
    let trusting = |certs: &Certs| json!({"certificate-authority": certs.authority().display().to_string()});
    let proven =
        |cluster: &TestCluster, settings: Value| following([cluster.source_with(settings, json!({}))]);
    let balancer = Balancer::start(proven(&cluster, trusting(&certs))).await;
    until_ready(&balancer, [0]).await;
    balancer.stop().await;
    for settings in [trusting(&strangers), json!({})] {
        let requests = cluster.api.requests().len();
        let balancer = Balancer::start(proven(&cluster, settings)).await;
        until_failed(&balancer, 2.0).await;
        assert!(balancer.loads().is_empty());
        assert_eq!(cluster.api.requests().len(), requests);
        balancer.stop().await;
    }
}
