//! Upstreams that a file lists: followed when the file is replaced, kept when it is not a list.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vllm_lb::config::types::{DiscoveryMethod, ListedFile};

use super::*;

/// A folder with a list of upstreams.
pub struct ListFolder(TempDir);

impl ListFolder {
    pub fn new() -> Self {
        ListFolder(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A source that reads the list often.
    pub fn source(&self) -> DiscoverySource {
        let file = ListedFile::new(self.path("upstreams.yaml"));
        DiscoverySource {
            every: Duration::from_millis(100),
            ..DiscoverySource::new(DiscoveryMethod::File(file))
        }
    }

    /// The name of the source in logs.
    fn label(&self) -> String {
        format!("source=file {}", self.path("upstreams.yaml").display())
    }

    pub fn write(&self, text: &str) {
        write(&self.path("upstreams.yaml"), text);
    }

    /// Renames a new list over the old one.
    pub fn replace(&self, text: &str) {
        write(&self.path("next.yaml"), text);
        std::fs::rename(self.path("next.yaml"), self.path("upstreams.yaml")).expect("it is renamed");
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("it is written");
}

/// A list of these engines.
pub fn list<'a>(engines: impl IntoIterator<Item = &'a EngineServer>) -> String {
    engines.into_iter().map(|engine| format!("- {}/v1\n", engine.url())).collect()
}

/// The `authorization` of the latest probe.
fn key_of_probes(engine: &EngineServer) -> Option<String> {
    let last = engine.polls().into_iter().next_back()?;
    last.headers.get("authorization").map(|value| value.to_str().expect("is text").to_string())
}

async fn failures(balancer: &Balancer) -> f64 {
    balancer.metric("vllm_lb_discovery_failures_total").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_list_is_applied_with_its_settings() {
    let (folder, engines) = (ListFolder::new(), engines(3).await);
    let balancer = Balancer::start(asking([folder.source()])).await;
    let missed = async || (failures(&balancer).await >= 2.0).then_some(());
    eventually("the file is missed", missed).await;
    folder.write(&list(&engines[..2]));
    until_ready(&balancer, &engines[..2]).await;
    let clients = Clients::start(&balancer, 4);
    // JSON is YAML.
    let items: Vec<Value> = engines[1..]
        .iter()
        .map(|engine| json!({"url": engine.url(), "weight": 3, "max_active": 50, "api_key": "hunter2"}))
        .collect();
    folder.replace(&Value::from(items).to_string());
    until_ready(&balancer, &engines[1..]).await;
    eventually("the first is gone", async || (balancer.loads().len() == 2).then_some(())).await;
    clients.until_more(20).await;
    for engine in &engines[1..] {
        let row = admin(&balancer, "GET", &path(engine), Value::Null).await.expect(200).json();
        assert_eq!((&row["weight"], &row["max_active"]), (&json!(3.0), &json!(50)), "{row}");
        assert_eq!(row["source"], format!("file {}", folder.path("upstreams.yaml").display()));
        let sent = async || (key_of_probes(engine).as_deref() == Some("Bearer hunter2")).then_some(());
        eventually("the key is sent", sent).await;
    }
    // Other names for the same engines.
    let named = |first: &str, second: &str| {
        format!(
            "[{{url: '{}', name: {first}}}, {{url: '{}', name: {second}}}]",
            engines[1].url(),
            engines[2].url()
        )
    };
    let mut clients = Some(clients);
    for (first, second) in [("left", "right"), ("left", "third"), ("third", "left")] {
        if second == "left" {
            // Each name stands for another engine at once, and neither has been probed.
            assert_eq!(clients.take().expect("they run").end().await, none());
        }
        folder.replace(&named(first, second));
        let wanted = |balancer: &Balancer| {
            let snapshot = balancer.running.fleet.snapshot();
            let port = |name: &str| Some(snapshot.by_name(name)?.upstream.config.url.port);
            port(first) == Some(engines[1].address().port())
                && port(second) == Some(engines[2].address().port())
        };
        let mut names = vec![first.to_string(), second.to_string()];
        names.sort();
        let done = async || (wanted(&balancer) && ready(&balancer) == names).then_some(());
        eventually(&format!("they are {names:?}"), done).await;
        if let Some(clients) = &clients {
            clients.until_more(20).await;
        }
    }
    assert_eq!(balancer.metric("vllm_lb_discovery_upstreams").await, 2.0);
    assert!(balancer.metric("vllm_lb_discovery_last_list_time_seconds").await > 1e9);
    assert!(!crate::common::logs::all().join("\n").contains("hunter2"));
}

/// A ConfigMap is mounted like this: the file leads through a link to a folder, and the link is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_behind_links_is_followed() {
    let (folder, engines) = (ListFolder::new(), engines(2).await);
    let version = |name: &str, text: &str| {
        std::fs::create_dir(folder.path(name)).expect("a folder is made");
        write(&folder.path(name).join("upstreams.yaml"), text);
    };
    let link =
        |to: &str, name: &str| std::os::unix::fs::symlink(to, folder.path(name)).expect("it is linked");
    // Of the same size, and perhaps of the same time.
    version("one", &list(&engines[..1]));
    version("two", &list(&engines[1..]));
    link("one", "..data");
    link("..data/upstreams.yaml", "upstreams.yaml");
    let balancer = Balancer::start(asking([folder.source()])).await;
    until_ready(&balancer, &engines[..1]).await;
    link("two", "..next");
    std::fs::rename(folder.path("..next"), folder.path("..data")).expect("it is renamed");
    until_ready(&balancer, &engines[1..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_list_keeps_the_last_one_with_one_warning() {
    let (folder, engines) = (ListFolder::new(), engines(2).await);
    folder.write(&list(&engines));
    let balancer = Balancer::start(asking([folder.source()])).await;
    until_ready(&balancer, &engines).await;
    let clients = Clients::start(&balancer, 2);
    let one = engines[0].url();
    let huge = format!("- {one}\n# {}\n", "x".repeat(1 << 20));
    let rubbish = [
        ("", "the file lists no upstream"),
        ("[]\n", "the file lists no upstream"),
        ("- http://127.0.0.1:1\n- {url: http", "(line "),
        (
            "- http://127.0.0.1:1\n- url: http://127.0.0.1:2\n  wieght: 2\n",
            "[1].wieght: unknown key: did you mean",
        ),
        ("- http://127.0.0.1:1\n- gpu-1:8000\n", "[1]: \"gpu-1:8000\" has"),
        ("- gym: http://127.0.0.1:1\n", "[0].gym: can only stand in the configuration"),
        ("upstreams: [http://127.0.0.1:1]\n", "must be a list, is a map of keys (line 1)"),
        (&huge, "the file is larger than 1048576 bytes"),
    ];
    let kept = async |what: &str| {
        let before = failures(&balancer).await;
        eventually(what, async || (failures(&balancer).await > before + 2.0).then_some(())).await;
        until_ready(&balancer, &engines).await;
        assert_eq!(balancer.loads().len(), 2, "{what}");
    };
    let warnings = |text: &str| {
        let lines = crate::common::logs::all().into_iter();
        let lines = lines.filter(|line| line.starts_with("WARN source does not name upstreams"));
        lines.filter(|line| line.contains(&folder.label()) && line.contains(text)).count()
    };
    for (text, wanted) in rubbish {
        folder.replace(text);
        kept(wanted).await;
        assert_eq!(warnings(wanted), 1, "{wanted}");
    }
    std::fs::remove_file(folder.path("upstreams.yaml")).expect("it is there");
    kept("the file is gone").await;
    assert_eq!(warnings("cannot read"), 1);
    std::fs::create_dir(folder.path("upstreams.yaml")).expect("a folder is made");
    kept("a folder is there").await;
    assert_eq!(warnings("it is no file"), 1);
    clients.until_more(20).await;
    std::fs::remove_dir(folder.path("upstreams.yaml")).expect("it is there");
    folder.write(&list(&engines[1..]));
    until_ready(&balancer, &engines[1..]).await;
    assert_eq!(clients.end().await, none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_upstreams_enter_and_change() {
    let folder = ListFolder::new();
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.expect("a free port is there");
    let engine = EngineServer::start_on(listener, Options::default()).expect("a socket can be served");
    let port = engine.address().port();
    let lines = |weight: f64| -> String {
        let line = |at: usize| {
            format!(
                "- {{url: 'http://127.3.{}.{}:{port}', name: gpu-{at}, weight: {weight}}}\n",
                at / 250,
                at % 250 + 1
            )
        };
        (0..1000).map(line).collect()
    };
    folder.write(&lines(1.0));
    let mut config = asking([folder.source()]);
    // The probes have nothing to do with it.
    config.health.interval = Duration::from_secs(180);
    let balancer = Balancer::start(config).await;
    for weight in [1.0, 2.0, 3.0] {
        folder.replace(&lines(weight));
        let entered = async || {
            let snapshot = balancer.running.fleet.snapshot();
            let all = snapshot.entries.iter().all(|entry| entry.upstream.config.weight == weight);
            (all && snapshot.entries.len() == 1000).then_some(())
        };
        eventually(&format!("all have the weight {weight}"), entered).await;
    }
}
