//! A real redis-server for one test: on a reserved port and a unix socket, to be killed, stopped and started
//! anew.

use std::ffi::OsString;
use std::process::{Child, Command, Stdio};

use redis::{AsyncConnectionConfig, Value};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::ports::reserved_port;
use super::{PATIENCE, eventually};

/// Names another program than `redis-server`, such as Valkey's.
const SERVER_VARIABLE: &str = "VLLM_LB_REDIS_SERVER";

/// The file from which a starting redis-server reads its data.
const DATA_FILE: &str = "dump.rdb";

/// The file that `Redis::take_snapshot` leaves.
const SNAPSHOT_FILE: &str = "earlier.rdb";

pub struct Redis {
    child: Child,
    folder: TempDir,
    pub port: u16,
    arguments: Vec<String>,
    password: Option<String>,
}

impl Redis {
    /// With further arguments of redis-server's; answers when it takes commands.
    pub async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = reserved_port();
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let given = arguments.iter().position(|argument| argument == "--requirepass");
        let password = given.map(|at| arguments[at + 1].clone());
        let child = spawn(&folder, port, &arguments);
        let redis = Redis { child, folder, port, arguments, password };
        redis.until_up().await;
        redis
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub fn socket(&self) -> String {
        self.folder.path().join("redis.sock").display().to_string()
    }

    async fn until_up(&self) {
        eventually("redis answers", async || self.try_ask(&["PING"]).await.ok()).await;
    }

    /// One command, over the unix socket.
    pub async fn ask(&self, words: &[&str]) -> Value {
        self.try_ask(words).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    async fn try_ask(&self, words: &[&str]) -> redis::RedisResult<Value> {
        let password = self.password.as_deref().map(|password| format!("&pass={password}"));
        let url = format!("unix://{}?db=0{}", self.socket(), password.unwrap_or_default());
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        let client = redis::Client::open(url)?;
        let mut link = client.get_multiplexed_async_connection_with_config(&config).await?;
        let mut command = redis::cmd(words[0]);
        words[1..].iter().for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut link).await
    }

    /// Adds a message to a stream, as a balancer does.
    pub async fn add(&self, stream: &str, message: &[u8]) {
        let client = redis::Client::open(format!("unix://{}", self.socket())).expect("is a URL");
        let mut link = client.get_multiplexed_async_connection().await.expect("redis is there");
        let mut command = redis::cmd("XADD");
        command.arg(stream).arg("*").arg("d").arg(message);
        command.query_async::<Value>(&mut link).await.expect("the message is added");
    }

    /// A number, from one command.
    pub async fn count(&self, words: &[&str]) -> i64 {
        match self.ask(words).await {
            Value::Int(number) => number,
            other => panic!("{words:?}: {other:?}"),
        }
    }

    /// The number of calls of a command.
    pub async fn calls(&self, command: &str) -> i64 {
        self.command_count(command, "calls").await
    }

    /// The number of calls of a command that Redis has rejected, as without a permission.
    pub async fn rejected(&self, command: &str) -> i64 {
        self.command_count(command, "rejected_calls").await
    }

    async fn command_count(&self, command: &str, field: &str) -> i64 {
        let Value::BulkString(stats) = self.ask(&["INFO", "commandstats"]).await else { panic!("is a text") };
        let stats = String::from_utf8(stats).expect("is a text");
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:")));
        let mut fields = line.unwrap_or_default().split(',').filter_map(|field| field.split_once('='));
        fields.find(|(name, _)| *name == field).map_or(0, |(_, count)| count.parse().expect("is a number"))
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process has an id");
        kill_process(pid, signal).expect("the process is there until it was waited for");
    }

    /// Stops it without an end: connections stay, and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// kill -9
    pub fn kill(&mut self) {
        self.child.kill().expect("the process is there until it was waited for");
        self.child.wait().expect("its own child can be waited for");
    }

    /// Keeps a copy of all that is in it at the moment.
    pub async fn take_snapshot(&self) {
        self.ask(&["SAVE"]).await;
        let files = [DATA_FILE, SNAPSHOT_FILE].map(|name| self.folder.path().join(name));
        std::fs::rename(&files[0], &files[1]).expect("SAVE writes a file");
    }

    /// Kills it, and starts it again with what was in it at the snapshot.
    pub async fn return_to_snapshot(&mut self) {
        self.kill();
        let files = [SNAPSHOT_FILE, DATA_FILE].map(|name| self.folder.path().join(name));
        std::fs::copy(&files[0], &files[1]).expect("there is a snapshot");
        self.again().await;
        std::fs::remove_file(&files[1]).expect("the copy is there");
    }

    /// Makes it a replica of a master that does not exist: it has what it had, and accepts no writes.
    pub async fn set_read_only(&self) {
        let nowhere = reserved_port().to_string();
        self.ask(&["REPLICAOF", "127.0.0.1", &nowhere]).await;
    }

    /// Makes it a master, which accepts writes.
    pub async fn set_writable(&self) {
        self.ask(&["REPLICAOF", "NO", "ONE"]).await;
    }

    /// Starts it again after its end, with nothing in it.
    pub async fn again(&mut self) {
        self.child = spawn(&self.folder, self.port, &self.arguments);
        self.until_up().await;
    }
}

fn program() -> OsString {
    std::env::var_os(SERVER_VARIABLE).unwrap_or_else(|| "redis-server".into())
}

fn spawn(folder: &TempDir, port: u16, arguments: &[String]) -> Child {
    let log = std::fs::File::options().append(true).create(true).open(folder.path().join("log"));
    // Sentinels are begun with a file, which has to stand first.
    let (first, rest) = match arguments.split_first() {
        Some((file, rest)) if !file.starts_with("--") => (Some(file), rest),
        _ => (None, arguments),
    };
    Command::new(program())
        .args(first)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--unixsocket", "redis.sock"])
        .args(["--save", "", "--appendonly", "no"])
        .args(rest)
        .current_dir(folder.path())
        .stdout(Stdio::from(log.expect("the folder can be written")))
        .spawn()
        .expect("redis-server is installed: ./dev setup does it")
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            eprintln!("the log of redis-server:\n{log}");
        }
    }
}
