//! A master, its replica, and a Sentinel that lets the replica take over.

use redis::Value;
use tempfile::TempDir;

use super::eventually;
use super::redis::Redis;

/// The name under which the Sentinel knows the master.
const MASTER: &str = "main";

/// The master is taken for dead after so many milliseconds.
const DOWN_AFTER: u64 = 500;

pub struct SentinelSet {
    pub master: Redis,
    pub replica: Redis,
    pub sentinel: Redis,
    _folder: TempDir,
}

// === impl SentinelSet ===

impl SentinelSet {
    /// Starts all three; returns when the Sentinel knows both others.
    pub async fn start() -> Self {
        Self::with(&[], "").await
    }

    /// With further arguments of the master and the replica, and further lines of the Sentinel's file.
    pub async fn with(arguments: &[&str], lines: &str) -> Self {
        let master = Redis::start(arguments).await;
        let port = master.port.to_string();
        let replica = Redis::start(&[arguments, &["--replicaof", "127.0.0.1", &port]].concat()).await;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("sentinel.conf");
        let monitor = format!(
            "sentinel monitor {MASTER} 127.0.0.1 {port} 1\n\
             sentinel down-after-milliseconds {MASTER} {DOWN_AFTER}\n\
             sentinel failover-timeout {MASTER} 3000\n{lines}\n"
        );
        std::fs::write(&file, monitor).expect("the folder can be written");
        let sentinel = Redis::start(&[&file.display().to_string(), "--sentinel"]).await;
        eventually("the sentinel knows the replica", async || {
            let replicas = sentinel.ask(&["SENTINEL", "REPLICAS", MASTER]).await;
            format!("{replicas:?}").contains(&replica.port.to_string()).then_some(())
        })
        .await;
        SentinelSet { master, replica, sentinel, _folder: folder }
    }

    /// The URL that a balancer is given.
    pub fn url(&self) -> String {
        format!("redis+sentinel://127.0.0.1:{}/{MASTER}", self.sentinel.port)
    }

    /// Kills the master; returns when the Sentinel has ended the failover to the replica, which then accepts
    /// writes. Before the end the Sentinel names the replica's address, while its list of masters still has
    /// the old master as down, and clients that read the list find none.
    pub async fn fail_over(&mut self) {
        self.master.kill();
        let port = self.replica.port.to_string();
        eventually("the sentinel lists the replica as a sound master", async || {
            let Value::Array(fields) = self.sentinel.ask(&["SENTINEL", "MASTER", MASTER]).await else {
                return None;
            };
            let sound = field(&fields, "flags")? == "master";
            (sound && field(&fields, "port")? == port).then_some(())
        })
        .await;
        eventually("the replica is a master", async || {
            let role = self.replica.ask(&["ROLE"]).await;
            format!("{role:?}").contains("master").then_some(())
        })
        .await;
    }
}

/// The value that follows `name` in an answer of names and values.
fn field(fields: &[Value], name: &str) -> Option<String> {
    let text = |value: &Value| match value {
        Value::BulkString(bytes) => String::from_utf8(bytes.clone()).ok(),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    };
    fields
        .chunks_exact(2)
        .find(|pair| text(&pair[0]).as_deref() == Some(name))
        .and_then(|pair| text(&pair[1]))
}
