//! What stands in for a Kubernetes API server: it lists and watches EndpointSlices as the real one does, and
//! breaks off, refuses and forgets where it is told to.
//!
//! Every object has the version of its last change. A list has the version of the server; its pages have a
//! limit, and a key that names the version and the place. A watch begins behind a version, which the server
//! may have forgotten, and ends after `timeoutSeconds`.

mod serve;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::certs::Certs;
use super::ports::reserved_address;
use super::{Duration, eventually};
use serve::accept;

/// The label that names the service of a slice.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// A server at an address that stays its own, also while it is away.
pub struct ApiServer {
    pub address: String,
    scheme: &'static str,
    acceptor: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    task: Option<JoinHandle<()>>,
}

struct Shared {
    cluster: Mutex<Cluster>,
    /// Counts the entries of the log.
    changed: watch::Sender<usize>,
    /// The number of watches whose client is there.
    watches: AtomicUsize,
}

#[derive(Default)]
struct Cluster {
    version: u64,
    objects: BTreeMap<String, Value>,
    /// What watches get, in order.
    log: Vec<Entry>,
    /// Watches from before this version, and pages of lists from before it, are refused.
    oldest: u64,
    token: Option<String>,
    /// The refusals of lists and of watches.
    refusals: HashMap<Verb, Refusal>,
    /// Each answer is so late.
    late: Duration,
    requests: Vec<SeenRequest>,
}

#[derive(Clone)]
struct Entry {
    version: u64,
    item: Item,
}

#[derive(Clone)]
enum Item {
    Event {
        kind: &'static str,
        object: Value,
    },
    /// Bytes that every watch gets.
    Bytes(String),
    /// Ends every watch, within a chunk or not.
    End {
        cut: bool,
    },
}

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// The first page of a list.
    List,
    /// A further page.
    Page,
    Watch,
}

/// An answer in place of the right one.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub status: u16,
    pub headers: Vec<(&'static str, &'static str)>,
    pub body: String,
    /// For so many requests.
    pub times: usize,
}

/// A request that came.
#[derive(Clone, Debug)]
pub struct SeenRequest {
    pub verb: Verb,
    pub path: String,
    pub query: HashMap<String, String>,
    pub authorization: Option<String>,
}

/// A refusal as the API server writes it.
pub fn refusal(status: u16, reason: &str, message: &str) -> Refusal {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": status,
    });
    Refusal { status, headers: Vec::new(), body: body.to_string(), times: usize::MAX }
}

// === objects ===

/// An endpoint that is ready.
pub fn ready(pod: &str, ip: &str) -> Value {
    endpoint(pod, ip, json!({"ready": true, "serving": true, "terminating": false}))
}

/// An endpoint whose pod is not ready.
pub fn unready(pod: &str, ip: &str) -> Value {
    endpoint(pod, ip, json!({"ready": false, "serving": false, "terminating": false}))
}

/// An endpoint whose pod was told to stop, and that still serves.
pub fn terminating(pod: &str, ip: &str) -> Value {
    endpoint(pod, ip, json!({"ready": false, "serving": true, "terminating": true}))
}

fn endpoint(pod: &str, ip: &str, conditions: Value) -> Value {
    json!({
        "addresses": [ip],
        "conditions": conditions,
        "targetRef": {"kind": "Pod", "namespace": "default", "name": pod},
    })
}

/// A slice of the service `vllm`.
pub fn slice(port: u16, endpoints: impl IntoIterator<Item = Value>) -> Value {
    slice_of("vllm", port, endpoints)
}

pub fn slice_of(service: &str, port: u16, endpoints: impl IntoIterator<Item = Value>) -> Value {
    json!({
        "metadata": {"labels": {SERVICE_LABEL: service, "team": "one"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        "endpoints": endpoints.into_iter().collect::<Vec<_>>(),
    })
}

// === impl ApiServer ===

impl ApiServer {
    pub async fn start() -> Self {
        Self::over(&reserved_address(), None).await
    }

    /// With TLS.
    pub async fn secure(certs: &Certs) -> Self {
        Self::over(&reserved_address(), Some(certs.acceptor())).await
    }

    async fn over(address: &str, acceptor: Option<TlsAcceptor>) -> Self {
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let cluster = Mutex::new(Cluster { version: 100, ..Cluster::default() });
        let shared =
            Arc::new(Shared { cluster, changed: watch::Sender::new(0), watches: AtomicUsize::new(0) });
        let mut server = ApiServer { address: address.into(), scheme, acceptor, shared, task: None };
        server.back().await;
        server
    }

    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Writes a kubeconfig for this server into a directory; `user` and `cluster` are further settings.
    pub fn kubeconfig(&self, directory: &Path, cluster: Value, user: Value) -> PathBuf {
        let mut cluster = cluster;
        cluster["server"] = self.url().into();
        let document = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "balancer", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "test", "user": "balancer"}}],
        });
        let path = directory.join("kubeconfig");
        // JSON is YAML.
        std::fs::write(&path, document.to_string()).expect("the directory can be written");
        path
    }

    // === the cluster ===

    /// Adds an object or changes it.
    pub fn put(&self, name: &str, object: Value) {
        self.change(|cluster| {
            let kind = if cluster.objects.contains_key(name) { "MODIFIED" } else { "ADDED" };
            let object = cluster.stamp(name, object);
            cluster.objects.insert(name.into(), object.clone());
            cluster.record(Item::Event { kind, object });
        });
    }

    pub fn delete(&self, name: &str) {
        self.change(|cluster| {
            let object = cluster.objects.remove(name).expect("it was put");
            let object = cluster.stamp(name, object);
            cluster.record(Item::Event { kind: "DELETED", object });
        });
    }

    /// Lets time pass, in which other objects change.
    pub fn advance(&self, versions: u64) {
        self.cluster().version += versions;
    }

    /// Tells every watch the version.
    pub fn bookmark(&self) {
        self.change(|cluster| {
            let metadata = json!({"resourceVersion": cluster.version.to_string(), "creationTimestamp": null});
            let object =
                json!({"kind": "EndpointSlice", "metadata": metadata, "endpoints": null, "ports": null});
            cluster.record(Item::Event { kind: "BOOKMARK", object });
        });
    }

    /// Forgets what happened up to the present version, which remains known.
    pub fn compact(&self) {
        let mut cluster = self.cluster();
        cluster.oldest = cluster.version;
    }

    /// Ends every watch with an event that says that its version is too old.
    pub fn expire(&self) {
        self.change(|cluster| {
            cluster.record(Item::Bytes(format!("{}\n", error_event(410, "Expired"))));
            cluster.record(Item::End { cut: false });
        });
    }

    /// Writes bytes to every watch.
    pub fn write(&self, bytes: &str) {
        self.change(|cluster| cluster.record(Item::Bytes(bytes.into())));
    }

    /// Ends every watch: as the server does, or by cutting its connection.
    pub fn end(&self, cut: bool) {
        self.change(|cluster| cluster.record(Item::End { cut }));
    }

    /// Changes an object, but the watches get half of the event and are cut.
    pub fn put_halfway(&self, name: &str, object: Value) {
        self.change(|cluster| {
            let object = cluster.stamp(name, object);
            cluster.objects.insert(name.into(), object.clone());
            let text = line("MODIFIED", &object);
            cluster.record(Item::Bytes(text[..text.len() / 2].into()));
            cluster.record(Item::End { cut: true });
            // Watches that begin later get it whole.
            cluster.record(Item::Event { kind: "MODIFIED", object });
        });
    }

    // === troubles ===

    /// Refuses requests in this way.
    pub fn refuse(&self, verb: Verb, refusal: Refusal) {
        self.cluster().refusals.insert(verb, refusal);
    }

    /// Serves again.
    pub fn serve(&self) {
        self.cluster().refusals.clear();
    }

    /// Accepts no other token.
    pub fn accept_token(&self, token: &str) {
        self.cluster().token = Some(token.into());
    }

    /// Answers so late.
    pub fn delay(&self, late: Duration) {
        self.cluster().late = late;
    }

    /// Stops listening, and cuts every connection.
    pub async fn away(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            drop(task.await);
        }
    }

    /// Listens again, with what the cluster is.
    pub async fn back(&mut self) {
        let listener = TcpListener::bind(&self.address).await.expect("the port is reserved");
        self.task = Some(tokio::spawn(accept(listener, self.acceptor.clone(), self.shared.clone())));
    }

    // === what came ===

    pub fn requests(&self) -> Vec<SeenRequest> {
        self.cluster().requests.clone()
    }

    pub fn count(&self, verb: Verb) -> usize {
        self.requests().iter().filter(|request| request.verb == verb).count()
    }

    /// The number of watches whose client is there.
    pub fn watches(&self) -> usize {
        self.shared.watches.load(Ordering::Relaxed)
    }

    /// Waits until a watch has begun and its version was accepted.
    pub async fn until_watched(&self) {
        eventually("it is watched", async || (self.watches() > 0).then_some(())).await;
    }

    /// The latest request of this kind.
    pub fn latest(&self, verb: Verb) -> SeenRequest {
        let requests = self.requests();
        requests.into_iter().rev().find(|request| request.verb == verb).expect("there was one")
    }

    pub fn version(&self) -> u64 {
        self.cluster().version
    }

    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.shared.cluster()
    }

    fn change(&self, change: impl FnOnce(&mut Cluster)) {
        change(&mut self.cluster());
        self.notify();
    }

    fn notify(&self) {
        self.shared.changed.send_replace(self.cluster().log.len());
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

// === impl Cluster ===

impl Cluster {
    /// Gives an object its name and the next version.
    fn stamp(&mut self, name: &str, mut object: Value) -> Value {
        self.version += 1;
        object["apiVersion"] = "discovery.k8s.io/v1".into();
        object["kind"] = "EndpointSlice".into();
        object["metadata"]["name"] = name.into();
        object["metadata"]["namespace"] = "default".into();
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        object
    }

    fn record(&mut self, item: Item) {
        self.log.push(Entry { version: self.version, item });
    }

    /// A page of the list, or the status of the refusal.
    fn page(&self, query: &HashMap<String, String>) -> Result<Value, u16> {
        let selector = query.get("labelSelector");
        let all: Vec<&Value> = self.objects.values().filter(|object| is_selected(object, selector)).collect();
        let (version, from) = match query.get("continue") {
            None => (self.version, 0usize),
            Some(key) => {
                let (version, from) = key.split_once(':').ok_or(400u16)?;
                (version.parse().map_err(|_| 400u16)?, from.parse().map_err(|_| 400u16)?)
            }
        };
        if version < self.oldest {
            return Err(410);
        }
        let limit: usize = query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let end = all.len().min(from.saturating_add(limit));
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if end < all.len() {
            metadata["continue"] = format!("{version}:{end}").into();
        }
        let items = all.get(from..end).unwrap_or_default();
        let mut page = json!({"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1"});
        page["metadata"] = metadata;
        page["items"] = items.iter().copied().cloned().collect();
        Ok(page)
    }
}

// === lines of a watch ===

fn is_selected(object: &Value, selector: Option<&String>) -> bool {
    let Some((label, value)) = selector.and_then(|selector| selector.split_once('=')) else { return true };
    object["metadata"]["labels"][label] == value
}

fn line(kind: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": kind, "object": object}))
}

fn error_event(code: u16, reason: &str) -> Value {
    let status = json!({
        "kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason,
    });
    json!({"type": "ERROR", "object": status})
}
