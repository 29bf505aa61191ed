//! What stands in for a NeMo Gym model server: it says what it is told to at `GET /get_inner_vllm_config`.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use vllm_lb::config::types::{DiscoveryMethod, DiscoverySource};
use vllm_lb::config::url;

use super::certs::Certs;
use super::ports::reserved_address;
use super::wire::Stream;
use super::{Duration, EngineServer, eventually};

#[derive(Default)]
struct State {
    /// Status and body of each answer.
    answer: (u16, String),
    heads: Vec<String>,
}

pub struct ModelServer {
    pub address: String,
    scheme: &'static str,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

/// What a model server says of these engines.
pub fn document<'a>(engines: impl IntoIterator<Item = &'a EngineServer>) -> Value {
    let urls: Vec<String> = engines.into_iter().map(|engine| format!("{}/v1", engine.url())).collect();
    json!({"base_url": urls, "api_key": "dummy", "model": "sim"})
}

/// A source that is asked often.
pub fn source(address: &str) -> DiscoverySource {
    source_at(&format!("http://{address}"))
}

fn source_at(url: &str) -> DiscoverySource {
    let url = url::upstream(url).expect("is a URL");
    DiscoverySource { every: Duration::from_millis(100), ..DiscoverySource::new(DiscoveryMethod::Gym(url)) }
}

// === impl ModelServer ===

impl ModelServer {
    pub async fn start(document: Value) -> Self {
        Self::at(&reserved_address(), document).await
    }

    /// With TLS.
    pub async fn secure(document: Value, certs: &Certs) -> Self {
        Self::over(&reserved_address(), document, Some(certs.acceptor())).await
    }

    /// At a reserved address.
    pub async fn at(address: &str, document: Value) -> Self {
        Self::over(address, document, None).await
    }

    async fn over(address: &str, document: Value, acceptor: Option<TlsAcceptor>) -> Self {
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind(address).await.expect("the port is reserved");
        let answer = (200, document.to_string());
        let state = Arc::new(Mutex::new(State { answer, heads: Vec::new() }));
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (shared, acceptor) = (shared.clone(), acceptor.clone());
                tokio::spawn(async move {
                    match acceptor {
                        None => serve(stream, shared).await,
                        // A client that does not trust the certificate disconnects.
                        Some(acceptor) => {
                            if let Ok(stream) = acceptor.accept(stream).await {
                                serve(stream, shared).await;
                            }
                        }
                    }
                });
            }
        });
        ModelServer { address: address.into(), scheme, state, task }
    }

    /// A source that asks here, often.
    pub fn source(&self) -> DiscoverySource {
        source_at(&format!("{}://{}", self.scheme, self.address))
    }

    pub fn say(&self, document: &Value) {
        self.answer(200, &document.to_string());
    }

    pub fn answer(&self, status: u16, body: &str) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).answer = (status, body.into());
    }

    /// Heads of the questions that came.
    pub fn heads(&self) -> Vec<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).heads.clone()
    }

    /// Waits until it was asked so often since this was called: the answers to all but the last have been
    /// read.
    pub async fn until_asked(&self, times: usize) {
        let before = self.heads().len();
        eventually("it is asked again", async || (self.heads().len() >= before + times).then_some(())).await;
    }
}

impl Drop for ModelServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: impl Stream, state: Arc<Mutex<State>>) {
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let (status, body) = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.heads.push(String::from_utf8_lossy(&read).into_owned());
        state.answer.clone()
    };
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    // The client may have disconnected.
    drop(stream.write_all(format!("{head}{body}").as_bytes()).await);
    drop(stream.shutdown().await);
}
