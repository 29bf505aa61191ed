//! A log that its reader does not take, as with a log driver that stalls.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::common::body::chat;
use crate::common::process::Setup;
use crate::common::wire::{Wire, get, post};
use crate::common::{engine, eventually};

const CHAT: &str = "/v1/chat/completions";

/// Enough that their records, each of which has more than 200 bytes, do not fit into a pipe of 64 KiB.
const REQUESTS: usize = 500;

/// Longer than the end of the process waits for the reader of its log.
const END: Duration = Duration::from_secs(10);

/// A process whose log is a pipe; it does not outlive its test.
struct PipedProcess {
    child: Child,
    log: BufReader<ChildStdout>,
}

impl PipedProcess {
    fn start(setup: &Setup, arguments: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vllm-lb"))
            .args(["-c", &setup.path("lb.yaml"), "-L", "json"])
            .args(arguments)
            .env_clear()
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary can be started");
        let log = BufReader::new(child.stdout.take().expect("it is a pipe"));
        PipedProcess { child, log }
    }

    /// Reads the log as far as the record of the admin listener. Returns its address.
    fn admin(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).expect("the log is text") > 0, "the process ended");
            let record: Value = serde_json::from_str(&line).expect("a record is JSON");
            if record["message"] == "listening" && record["serves"] == "admin" {
                return record["address"].as_str().expect("it is text").into();
            }
        }
    }

    /// Waits for the end. Returns the exit code, and the rest of the log.
    async fn ended(mut self) -> (Option<i32>, String) {
        let ended = async || self.child.try_wait().expect("its own child can be waited for");
        let code = eventually("the process ends", ended).await.code();
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).expect("the log is text");
        (code, rest)
    }
}

impl Drop for PipedProcess {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Regression: worker threads wrote to standard output. Once its pipe was full, all of them waited for its
/// reader, and nothing was answered.
#[tokio::test(flavor = "multi_thread")]
async fn the_balancer_serves_and_ends_while_its_log_is_not_read() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "log: {requests: true}");
    let mut process = PipedProcess::start(&setup, &[]);
    let admin = process.admin();
    let public = format!("unix:{}", setup.path("api.sock"));
    let status = async |address: &str, path: &str| Wire::connect(address).await.ask(get(path)).await.status;
    let ready = async || (status(&public, "/health").await == 200).then_some(());
    eventually("an upstream is ready", ready).await;
    let mut wire = Wire::connect(&public).await;
    for _ in 0..REQUESTS {
        wire.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!(status(&public, "/health").await, 200);
    assert_eq!(status(&admin, "/live").await, 200);
    let pid = i32::try_from(process.child.id()).ok().and_then(Pid::from_raw).expect("a process has an id");
    drop(wire);
    let signalled = Instant::now();
    kill_process(pid, Signal::TERM).expect("the process runs");
    let (code, log) = process.ended().await;
    assert!(code == Some(0) && signalled.elapsed() < END, "{code:?} after {:?}", signalled.elapsed());
    // The pipe has the first of them in full.
    let done = log.lines().filter(|line| line.contains("\"request done\"")).count();
    assert!((50..REQUESTS).contains(&done), "{done} of {REQUESTS} records");
}

/// What a process logs before it ends is written, however soon it ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_fails_at_its_start_loses_no_record() {
    let setup = Setup::over([], "sources: []");
    let taken = std::os::unix::net::UnixListener::bind(setup.path("api.sock")).expect("a free path");
    setup.write("'http://127.0.0.1:9'", "");
    let (code, log) = PipedProcess::start(&setup, &[]).ended().await;
    drop(taken);
    let last = log.lines().last().unwrap_or_default();
    assert!(code == Some(1) && last.contains("cannot go on"), "{code:?}: {log}");
    assert!(log.contains("\"starting\""), "{log}");
}
