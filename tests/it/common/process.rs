//! The real binary as a process of its own: started, asked, signalled, and its end watched.

use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};

use super::wire::{Answer, Wire, get, with_host};
use super::{EngineServer, eventually};

/// A process, which does not outlive its test.
pub struct Process {
    child: Child,
    log: NamedTempFile,
    /// Where the public listeners, and the admin's, are bound.
    pub addresses: Vec<String>,
    pub admin: String,
}

/// A folder with a configuration, whose listeners take any free port.
pub struct Setup {
    pub folder: TempDir,
    variables: Vec<(String, String)>,
}

// === impl Setup ===

impl Setup {
    /// Over these engines; `more` are further lines of the file.
    pub fn over<'a>(engines: impl IntoIterator<Item = &'a EngineServer>, more: &str) -> Self {
        let setup = Setup { folder: tempfile::tempdir().expect("a temporary folder"), variables: Vec::new() };
        let urls: Vec<String> = engines.into_iter().map(|engine| format!("{:?}", engine.url())).collect();
        setup.write(&urls.join(", "), more);
        setup
    }

    /// Writes the configuration anew.
    pub fn write(&self, upstreams: &str, more: &str) {
        let health = if more.contains("health:") { "" } else { "health: {interval: 100ms}\n" };
        let text = format!(
            "listen: ['127.0.0.1:0', 'unix:{}']\nadmin: {{address: '127.0.0.1:0'}}\nupgrade_socket: {}\n\
             upstreams: [{upstreams}]\n{health}threads: 2\n{more}\n",
            self.path("api.sock"),
            self.path("upgrade.sock"),
        );
        std::fs::write(self.path("lb.yaml"), text).expect("the folder can be written");
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Sets a variable for processes that start from now on.
    pub fn variable(&mut self, name: &str, value: &str) {
        self.variables.push((name.into(), value.into()));
    }

    /// Starts a process, and waits until it serves.
    pub async fn start(&self) -> Process {
        let mut process = self.spawn(&[]);
        process.serves().await;
        process
    }

    /// Starts one that takes over, and waits until it has.
    pub async fn upgrade(&self) -> Process {
        let mut process = self.spawn(&["-u"]);
        process.serves().await;
        process.says("took over from the running process").await;
        process
    }

    /// Starts a process.
    pub fn spawn(&self, arguments: &[&str]) -> Process {
        let log = NamedTempFile::new().expect("a temporary file");
        let output = || Stdio::from(log.reopen().expect("a temporary file can be opened again"));
        let child = Command::new(env!("CARGO_BIN_EXE_vllm-lb"))
            .args(["-c", &self.path("lb.yaml"), "-L", "json"])
            .args(arguments)
            .env_clear()
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdout(output())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the binary can be started");
        Process { child, log, addresses: Vec::new(), admin: String::new() }
    }
}

// === impl Process ===

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All records so far.
    pub fn records(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.log.path()).expect("the log can be read");
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a record with this message.
    pub async fn says(&self, message: &str) -> Value {
        let of = |record: &Value| record["message"] == message;
        eventually(&format!("the process says {message:?}"), async || self.records().into_iter().find(of))
            .await
    }

    pub fn has_said(&self, message: &str) -> bool {
        self.records().iter().any(|record| record["message"] == message)
    }

    /// Waits until all listeners accept and an upstream is ready.
    async fn serves(&mut self) {
        let listening = async || {
            let records = self.records();
            let listening = records.iter().filter(|record| record["message"] == "listening");
            let found: Vec<(bool, String)> =
                listening.map(|record| (record["serves"] == "admin", text(&record["address"]))).collect();
            found.iter().any(|(admin, _)| *admin).then_some(found)
        };
        let found = eventually("the process listens", listening).await;
        self.admin = found.iter().find(|(admin, _)| *admin).expect("is there").1.clone();
        self.addresses = found.into_iter().filter(|(admin, _)| !admin).map(|(_, address)| address).collect();
        eventually("an upstream is ready", async || (self.admin("/ready").await.status == 200).then_some(()))
            .await;
    }

    /// `GET` on the admin listener; after a handover, the process that serves answers.
    pub async fn admin(&self, path: &str) -> Answer {
        Wire::connect(&self.admin).await.ask(with_host(&get(path), &self.admin)).await
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process has an id");
        kill_process(pid, signal).expect("the process is there until its end was seen");
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("its own child can be waited for")
    }

    /// Waits for the end, and gives its code.
    pub async fn ended(&mut self) -> Option<i32> {
        eventually("the process ends", async || self.has_ended()).await.code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.log.path()).unwrap_or_default();
            eprintln!("the log of process {}:\n{log}", self.child.id());
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}
