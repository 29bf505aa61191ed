//! The HTTP server of a simulated vLLM 0.32: its routes, its answers, its errors, and injected faults.
//!
//! ```text
//! let engine = Engine::start(Options { timing: Timing::faster(50.0), ..Options::default() }).await?;
//! engine.url()                                  // http://127.0.0.1:41234
//! engine.set_fault(Fault::CutStream { events: 3, reset: true }).await;
//! engine.wait_until("both run", |stats| stats.running == 2).await;
//! ```
//!
//! Answers follow from the prompt alone (`plan`), are paced by `engine::batch` and counted as vLLM counts. A
//! client that disconnects aborts its request within a step. The routes under `/sim/` are not part of vLLM:
//! they give tests in other processes the methods of `EngineServer`.
//!
//! The balancer never uses this module, and the module writes no logs.

mod accepted;
mod audio;
mod background;
mod chat;
mod clock;
mod completions;
mod connection;
mod connection_state;
mod control;
mod driver;
mod error;
mod event_log;
mod fault;
mod generate;
mod input;
mod latency;
mod messages;
mod metrics;
mod models;
mod options;
mod plan;
mod pooling;
mod python;
mod realtime;
mod record;
mod render;
mod reply;
mod responses;
mod responses_form;
mod responses_stream;
mod route;
mod run;
mod server;
mod shared;
mod store;
mod stream;
mod token;
mod tokenize;
mod traffic;
mod usage;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

pub use fault::{InjectedFault, NoMetrics};
pub use options::Options;
pub use record::{Recorded, RecordedGeneration, Stats};
pub use run::logprob;

use server::{EngineAddress, EngineListener};
use shared::EngineShared;

/// The longest time that `wait_until` waits.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// One running simulated server, which ends when it is dropped.
pub struct EngineServer {
    shared: Arc<EngineShared>,
    address: EngineAddress,
    tls: bool,
    tasks: [JoinHandle<()>; 2],
}

// === impl EngineServer ===

impl EngineServer {
    /// Starts on a free port of 127.0.0.1.
    pub async fn start(options: Options) -> io::Result<Self> {
        Self::start_on(TcpListener::bind("127.0.0.1:0").await?, options)
    }

    /// Starts on a socket that the caller has bound.
    pub fn start_on(listener: TcpListener, options: Options) -> io::Result<Self> {
        let address = EngineAddress::Tcp(listener.local_addr()?);
        Ok(Self::spawn(EngineListener::Tcp(listener), address, None, options))
    }

    /// Starts with TLS on a free port of 127.0.0.1.
    pub async fn start_tls(options: Options, cert_pem: &str, key_pem: &str) -> io::Result<Self> {
        let acceptor = server::tls(cert_pem, key_pem)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = EngineAddress::Tcp(listener.local_addr()?);
        Ok(Self::spawn(EngineListener::Tcp(listener), address, Some(acceptor), options))
    }

    /// Starts on a unix socket; removes an existing file of that name.
    pub fn start_unix(path: impl Into<PathBuf>, options: Options) -> io::Result<Self> {
        let path = path.into();
        server::remove_socket(&path);
        let listener = EngineListener::Unix(UnixListener::bind(&path)?);
        Ok(Self::spawn(listener, EngineAddress::Unix(path), None, options))
    }

    fn spawn(
        listener: EngineListener,
        address: EngineAddress,
        acceptor: Option<TlsAcceptor>,
        options: Options,
    ) -> Self {
        let shared = Arc::new(EngineShared::new(options));
        let driver = Arc::clone(&shared.driver);
        let tls = acceptor.is_some();
        let tasks = [
            tokio::spawn(async move { driver.run().await }),
            tokio::spawn(server::run(listener, address.clone(), acceptor, Arc::clone(&shared))),
        ];
        Self { shared, address, tls, tasks }
    }

    /// Returns the address on which the server listens.
    ///
    /// # Panics
    ///
    /// Panics when the server listens on a unix socket, which has a `path` and no address.
    pub fn address(&self) -> SocketAddr {
        match &self.address {
            EngineAddress::Tcp(address) => *address,
            EngineAddress::Unix(path) => panic!("{} is a unix socket and has no address", path.display()),
        }
    }

    /// Returns the file of the unix socket, if any.
    pub fn path(&self) -> Option<&Path> {
        match &self.address {
            EngineAddress::Tcp(_) => None,
            EngineAddress::Unix(path) => Some(path),
        }
    }

    /// Returns `http://…`, `https://…` or `unix:/…`, without a slash at the end.
    pub fn url(&self) -> String {
        match &self.address {
            EngineAddress::Tcp(address) if self.tls => format!("https://{address}"),
            EngineAddress::Tcp(address) => format!("http://{address}"),
            EngineAddress::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Returns the latest 1,000 requests other than polls, oldest first.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.requests.all()
    }

    /// Returns the generations of the latest 1,000 requests, oldest first.
    pub fn generations(&self) -> Vec<RecordedGeneration> {
        self.shared.generations.all()
    }

    /// Returns the latest 1,000 GETs of `/health`, `/metrics`, `/v1/models` and the like, oldest first.
    pub fn polls(&self) -> Vec<Recorded> {
        self.shared.polls.all()
    }

    /// Returns the start of the simulated process, as its metrics report it.
    pub fn started(&self) -> f64 {
        self.shared.started()
    }

    /// Injects a fault for every request until `clear_fault`. The fault is in effect when this returns.
    pub async fn set_fault(&self, fault: InjectedFault) {
        self.shared.set_fault(Some(fault), None).await;
    }

    /// Injects a fault for the next `requests` requests.
    pub async fn set_fault_for(&self, requests: u64, fault: InjectedFault) {
        self.shared.set_fault(Some(fault), Some(requests)).await;
    }

    /// Removes the fault. Answers that have gone silent stay silent.
    pub async fn clear_fault(&self) {
        self.shared.set_fault(None, None).await;
    }

    /// Sets the status that `/health` returns instead of 200.
    pub fn set_health(&self, status: Option<u16>) {
        self.shared.faults.set_health(status);
    }

    /// Puts the engine to sleep, as `/sleep?level=1` does.
    pub fn sleep(&self) {
        self.shared.fall_asleep(1);
    }

    /// Sets what `/metrics` does instead of answering.
    pub fn set_metrics(&self, instead: Option<NoMetrics>) {
        self.shared.faults.set_metrics(instead);
    }

    /// Simulates a new process on the same address: an empty cache, no requests, all connections closed.
    pub async fn restart(&self) {
        let old = self.shared.restart();
        // Clients may reconnect before the last old connection is closed, so the count is no criterion.
        self.wait_until("old connections are closed", |_| old.strong_count() == 0).await;
    }

    /// Stops the server and waits until all connections are closed.
    pub async fn stop(self) {
        self.end();
        self.wait_until("connections are closed", |stats| stats.connections == 0).await;
    }

    /// Ends the tasks, and closes the connections that became websockets.
    fn end(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.shared.control.send_modify(|control| control.close_all += 1);
    }

    /// Waits until the counts satisfy `condition`.
    ///
    /// # Panics
    ///
    /// Panics after ten seconds, with `what` and the present counts: this is for tests.
    pub async fn wait_until(&self, what: &str, condition: impl Fn(&Stats) -> bool) {
        let end = Instant::now() + MAX_WAIT;
        loop {
            let stats = self.stats();
            if condition(&stats) {
                return;
            }
            assert!(Instant::now() < end, "waited {MAX_WAIT:?} in vain until {what}: {stats:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for EngineServer {
    fn drop(&mut self) {
        self.end();
        if let EngineAddress::Unix(path) = &self.address {
            server::remove_socket(path);
        }
    }
}
