//! Upstreams that the EndpointSlices of a Kubernetes service list: followed from event to event, kept while
//! the API server is away, and drained when their pods are told to stop.

mod troubles;

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use vllm_lb::app::{self, LoadConfig};
use vllm_lb::config::types::{Config, DiscoveryMethod, DiscoverySource, KubernetesService};

use crate::common::api_server::{ApiServer, Verb, ready, slice, slice_of, terminating, unready};
use crate::common::body::{chat, stream};
use crate::common::clients::{Clients, none};
use crate::common::wire::{get, post};
use crate::common::{Balancer, EngineServer, Options, Timing, admin, config, eventually, logs, upstreams};
use crate::session_turns::{moved, turn};

const CHAT: &str = "/v1/chat/completions";

/// The cluster of a test: an API server, and pods that listen on one port of addresses of their own.
pub struct TestCluster {
    pub api: ApiServer,
    pub pods: Vec<EngineServer>,
    pub port: u16,
    directory: TempDir,
}

// === impl TestCluster ===

impl TestCluster {
    /// With so many pods, of which no slice knows.
    pub async fn with(pods: usize) -> Self {
        Self::of(ApiServer::start().await, pods, Timing::instant()).await
    }

    pub async fn of(api: ApiServer, count: usize, timing: Timing) -> Self {
        let (pods, port) =
            eventually("a port is free at all addresses", async || pods(count, timing).await).await;
        TestCluster { api, pods, port, directory: tempfile::tempdir().expect("a directory can be made") }
    }

    /// A source that follows the service, with these settings of the kubeconfig.
    pub fn source_with(&self, cluster: Value, user: Value) -> DiscoverySource {
        let kubeconfig = Some(self.api.kubeconfig(self.directory(), cluster, user));
        let service = KubernetesService { kubeconfig, namespace: Some("default".into()), ..service() };
        DiscoverySource::new(DiscoveryMethod::Kubernetes(service))
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn config(&self) -> Config {
        following([self.source_with(json!({}), json!({}))])
    }

    /// Puts all pods into one slice, ready.
    pub fn put_all(&self) {
        self.put(0..self.pods.len());
    }

    /// Puts these pods into one slice, ready.
    pub fn put(&self, pods: impl IntoIterator<Item = usize>) {
        self.put_endpoints(pods.into_iter().map(|number| ready(&pod(number), &ip(number))));
    }

    pub fn put_endpoints(&self, endpoints: impl IntoIterator<Item = Value>) {
        self.api.put("vllm-a", slice(self.port, endpoints));
    }

    /// A balancer that follows the slice, with all pods in it.
    pub async fn balancer(&self) -> Balancer {
        self.put_all();
        let balancer = Balancer::start(self.config()).await;
        until_ready(&balancer, 0..self.pods.len()).await;
        self.api.until_watched().await;
        balancer
    }
}

fn service() -> KubernetesService {
    KubernetesService::new("vllm")
}

/// Over what these sources list, and nothing else.
pub fn following(sources: impl IntoIterator<Item = DiscoverySource>) -> Config {
    Config { sources: sources.into_iter().collect(), ..config(Vec::new()) }
}

/// Engines on one port of 127.0.0.2 and on; `None` when an address has not the port that another one has.
async fn pods(count: usize, timing: Timing) -> Option<(Vec<EngineServer>, u16)> {
    let mut listeners = Vec::new();
    for number in 0..count.max(1) {
        let port =
            listeners.first().map_or(0, |first: &TcpListener| first.local_addr().map_or(0, |at| at.port()));
        listeners.push(TcpListener::bind((ip(number), port)).await.ok()?);
    }
    let port = listeners[0].local_addr().ok()?.port();
    let mut engines = Vec::new();
    for (listener, seed) in listeners.into_iter().zip(0..count as u64) {
        let options = Options { seed, timing, ..Options::default() };
        engines.push(EngineServer::start_on(listener, options).ok()?);
    }
    Some((engines, port))
}

pub fn pod(number: usize) -> String {
    format!("vllm-{number}")
}

pub fn ip(number: usize) -> String {
    format!("127.0.0.{}", number + 2)
}

/// Names of the upstreams that take requests, sorted.
pub fn names_of_ready(balancer: &Balancer) -> Vec<String> {
    let snapshot = balancer.running.fleet.snapshot();
    let mut names: Vec<String> = snapshot.ready().map(|entry| entry.upstream.name().to_string()).collect();
    names.sort();
    names
}

/// Waits until exactly these pods take requests.
pub async fn until_ready(balancer: &Balancer, numbers: impl IntoIterator<Item = usize>) {
    let mut wanted: Vec<String> = numbers.into_iter().map(pod).collect();
    wanted.sort();
    let are = async || (names_of_ready(balancer) == wanted).then_some(());
    eventually(&format!("{wanted:?} are ready"), are).await;
}

/// Records that begin so.
pub fn records(start: &str) -> Vec<String> {
    logs::all().into_iter().filter(|line| line.starts_with(start)).collect()
}

// === the tests ===

#[tokio::test(flavor = "multi_thread")]
async fn follows_endpoints_from_event_to_event_after_one_list() {
    let cluster = TestCluster::with(3).await;
    cluster.put([0]);
    // Another service, and a slice without endpoints.
    cluster.api.put("judge-a", slice_of("judge", cluster.port, [ready("judge-0", &ip(2))]));
    cluster.api.put("vllm-b", slice(cluster.port, []));
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    cluster.api.until_watched().await;
    let load = Clients::start(&balancer, 4);
    load.until_more(10).await;
    cluster.api.put("vllm-b", slice(cluster.port, [ready(&pod(1), &ip(1)), unready(&pod(2), &ip(2))]));
    until_ready(&balancer, [0, 1]).await;
    cluster.api.put("vllm-b", slice(cluster.port, [ready(&pod(1), &ip(1)), ready(&pod(2), &ip(2))]));
    until_ready(&balancer, 0..3).await;
    load.until_more(20).await;
    cluster.put_endpoints([unready(&pod(0), &ip(0))]);
    until_ready(&balancer, [1, 2]).await;
    cluster.put([0]);
    until_ready(&balancer, 0..3).await;
    cluster.api.delete("vllm-b");
    until_ready(&balancer, [0]).await;
    load.until_more(20).await;
    assert_eq!(load.end().await, none());
    assert_eq!(cluster.api.count(Verb::List), 1);
    let first = cluster.api.latest(Verb::List);
    assert_eq!(first.query["labelSelector"], "kubernetes.io/service-name=vllm");
    let watches = cluster.api.requests().into_iter().filter(|seen| seen.verb == Verb::Watch);
    let watch = watches.into_iter().next().expect("it watches");
    assert_eq!(watch.query["resourceVersion"], "103");
    assert_eq!(watch.query["allowWatchBookmarks"], "true");
    let row = balancer.admin(get("/admin/upstreams/vllm-0")).await.expect(200).json();
    let source = row["source"].as_str().expect("it has a source");
    assert!(source.starts_with("kubernetes default/vllm in /"), "{source}");
    assert_eq!(row["url"], format!("http://{}:{}", ip(0), cluster.port));
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_by_page() {
    let cluster = TestCluster::with(2).await;
    for number in 0..230 {
        cluster.api.put(&format!("vllm-m{number:03}"), slice(cluster.port, []));
    }
    cluster.api.put("vllm-a", slice(cluster.port, [ready(&pod(0), &ip(0))]));
    cluster.api.put("vllm-z", slice(cluster.port, [ready(&pod(1), &ip(1))]));
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, 0..2).await;
    let lists: Vec<_> = cluster.api.requests().into_iter().filter(|seen| seen.verb != Verb::Watch).collect();
    let keys: Vec<_> =
        lists.iter().map(|seen| seen.query.get("continue").cloned().unwrap_or_default()).collect();
    assert_eq!(keys, ["", "332:100", "332:200"]);
    assert!(lists.iter().all(|seen| seen.query["limit"] == "100"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_terminates_ends_its_streams_and_gets_no_more() {
    let timing = Timing { per_step: 0.02, ..Timing::instant() };
    let cluster = TestCluster::of(ApiServer::start().await, 2, timing).await;
    cluster.put([0]);
    let balancer = Balancer::start(Config { expose: true, ..cluster.config() }).await;
    until_ready(&balancer, [0]).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 300))).await;
    let head = client.head().await;
    // The other pod takes its place, and is never ready.
    cluster.put_endpoints([terminating(&pod(0), &ip(0)), unready(&pod(1), &ip(1))]);
    until_ready(&balancer, []).await;
    assert_eq!(balancer.loads().len(), 1, "it is there for its stream");
    cluster.put_endpoints([terminating(&pod(0), &ip(0)), ready(&pod(1), &ip(1))]);
    until_ready(&balancer, [1]).await;
    for _ in 0..5 {
        let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
        assert_eq!(answer.header("x-vllm-lb-upstream"), pod(1));
    }
    let answer = client.body(head).await.expect(200);
    assert!(answer.whole && answer.text().contains("[DONE]"), "{}", answer.text());
    eventually("it is gone", async || (balancer.loads().len() == 1).then_some(())).await;
    until_ready(&balancer, [1]).await;
}

/// A pod of a stateful set keeps its name when it is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_at_another_address_is_another_engine() {
    let cluster = TestCluster::with(2).await;
    cluster.put_endpoints([ready("vllm-0", &ip(0))]);
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    cluster.put_endpoints([ready("vllm-0", &ip(1))]);
    let moved = async || {
        let row = balancer.admin(get("/admin/upstreams/vllm-0")).await;
        (row.status == 200 && row.json()["url"] == format!("http://{}:{}", ip(1), cluster.port)).then_some(())
    };
    eventually("the name has the other address", moved).await;
    until_ready(&balancer, [0]).await;
    eventually("the old one is gone", async || (balancer.loads().len() == 1).then_some(())).await;
    let before = cluster.pods[0].requests().len();
    for _ in 0..5 {
        balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!(cluster.pods[0].requests().len(), before, "all go to the new address");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_stay_with_engines_that_stay() {
    let cluster = TestCluster::with(4).await;
    cluster.put(0..3);
    let balancer = Balancer::start(Config { expose: true, ..cluster.config() }).await;
    until_ready(&balancer, 0..3).await;
    cluster.api.until_watched().await;
    let first = turn(&balancer, 0).await;
    assert!((0..3).all(|number| first.contains(&pod(number))), "every engine has sessions: {first:?}");
    cluster.put(0..4);
    until_ready(&balancer, 0..4).await;
    assert_eq!(turn(&balancer, 2).await, first, "none moves to an engine that enters");
    // Another slice has the pods from now on: for a moment two have them, and then one of them lacks a pod.
    let endpoints =
        |numbers: &[usize]| numbers.iter().map(|number| ready(&pod(*number), &ip(*number))).collect();
    let (all, fewer): (Vec<Value>, Vec<Value>) = (endpoints(&[0, 1, 2, 3]), endpoints(&[0, 2, 3]));
    cluster.api.put("vllm-b", slice(cluster.port, all));
    cluster.api.delete("vllm-a");
    cluster.api.put("vllm-b", slice(cluster.port, fewer));
    until_ready(&balancer, [0, 2, 3]).await;
    let after = turn(&balancer, 4).await;
    assert_eq!(moved(&first, &after, &pod(1)), Vec::<usize>::new(), "one less moves its own");
    assert!(!after.contains(&pod(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_is_an_answer() {
    let cluster = TestCluster::with(1).await;
    let balancer = cluster.balancer().await;
    cluster.put_endpoints([]);
    until_ready(&balancer, []).await;
    eventually("it is gone", async || balancer.loads().is_empty().then_some(())).await;
    let said = eventually("it is told", async || records("WARN source lists no upstream").pop()).await;
    assert!(said.contains("no endpoint"), "{said}");
    cluster.put([0]);
    until_ready(&balancer, [0]).await;
    cluster.put_endpoints([unready(&pod(0), &ip(0))]);
    until_ready(&balancer, []).await;
    let told = async || {
        records("WARN source lists no upstream").into_iter().find(|line| line.contains("1 not ready"))
    };
    eventually("it is told why", told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_of_names_are_left_out_with_one_warning() {
    let cluster = TestCluster::with(2).await;
    let mut names = slice(cluster.port, [ready(&pod(1), "localhost")]);
    names["addressType"] = "FQDN".into();
    cluster.api.put("vllm-names", names.clone());
    cluster.put([0]);
    let balancer = Balancer::start(cluster.config()).await;
    until_ready(&balancer, [0]).await;
    cluster.api.until_watched().await;
    cluster.api.put("vllm-names", names);
    cluster.put([0, 1]);
    until_ready(&balancer, 0..2).await;
    assert_eq!(balancer.loads().len(), 2);
    let warnings = records("WARN source lists upstreams without IP addresses");
    assert!(warnings.len() == 1 && warnings[0].contains("upstreams=1"), "{warnings:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_slices_is_told_apart() {
    let cluster = TestCluster::with(1).await;
    let balancer = Balancer::start(cluster.config()).await;
    let said = eventually("it is told", async || records("WARN source lists no upstream").pop()).await;
    assert!(said.contains("kubernetes.io/service-name=vllm"), "{said}");
    cluster.put([0]);
    until_ready(&balancer, [0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_leaves_the_file_is_watched_no_more() {
    let cluster = TestCluster::with(2).await;
    cluster.put_all();
    let file = Arc::new(Mutex::new(cluster.config()));
    let read = file.clone();
    let load: LoadConfig = Arc::new(move || Ok((read.lock().expect("no panic").clone(), Vec::new())));
    let running = app::start_with(cluster.config(), load).await.expect("the balancer starts");
    let balancer = Balancer { running };
    until_ready(&balancer, 0..2).await;
    let upstreams = upstreams(&cluster.pods[..1]);
    *file.lock().expect("no panic") = Config { sources: Vec::new(), upstreams, ..cluster.config() };
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
    eventually("the file's is the only one", async || (balancer.loads().len() == 1).then_some(())).await;
    eventually("nothing is watched", async || (cluster.api.watches() == 0).then_some(())).await;
    // The file names it differently: it is another upstream, which has to be probed first.
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}
