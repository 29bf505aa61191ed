//! The doctor as a process of its own, and simulated engines as processes of theirs.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// What the doctor printed, and the code that it ended with.
pub struct Visit {
    pub code: Option<i32>,
    pub text: String,
    pub errors: String,
}

/// A process of simulated engines, which does not outlive its test.
pub struct EngineProcess {
    child: Child,
    pub url: String,
}

/// Runs the doctor with these arguments, and with enough files to open.
pub async fn visit(arguments: &[&str]) -> Visit {
    visit_with_files(8192, arguments).await
}

/// Runs the doctor with this limit of open files.
pub async fn visit_with_files(files: u32, arguments: &[&str]) -> Visit {
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let run = move || {
        Command::new("sh")
            .args(["-c", &format!("ulimit -n {files} && exec \"$0\" doctor \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_vllm-lb"))
            .args(arguments)
            .env_clear()
            .output()
            .expect("the binary can be started")
    };
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.expect("it ran");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("is UTF-8");
    Visit { code: status.code(), text: text(stdout), errors: text(stderr) }
}

/// Writes a configuration whose admin listener cannot be reached.
pub fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    write!(file, "admin: {{address: '127.0.0.1:0'}}\n{text}\n").expect("written");
    file
}

// === impl Visit ===

impl Visit {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text)
            .unwrap_or_else(|error| panic!("{error}: {}{}", self.text, self.errors))
    }

    /// The findings as subject and code, sorted.
    #[track_caller]
    pub fn findings(&self) -> Vec<(String, String)> {
        let report = self.json();
        let all = report["findings"].as_array().expect("a list").iter();
        let text = |value: &Value| value.as_str().expect("a text").to_string();
        let mut found: Vec<_> = all.map(|one| (text(&one["subject"]), text(&one["code"]))).collect();
        found.sort();
        found
    }
}

// === impl EngineProcess ===

impl EngineProcess {
    /// Starts an engine that answers at once, with further flags; waits until it listens.
    pub async fn start(flags: &[&str]) -> Self {
        let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        let start = move || {
            let mut child = Command::new(env!("CARGO_BIN_EXE_vllm-lb"))
                .args(["engine", "--port", "0", "--instant", "-q"])
                .args(flags)
                .env_clear()
                .stdout(Stdio::piped())
                .spawn()
                .expect("the binary can be started");
            let mut url = String::new();
            let output = child.stdout.take().expect("is piped");
            BufReader::new(output).read_line(&mut url).expect("it prints its URL");
            EngineProcess { child, url: url.trim().to_string() }
        };
        tokio::task::spawn_blocking(start).await.expect("it started")
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
