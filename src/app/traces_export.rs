//! Writes recorded calls as JSON lines: those of a running balancer, over its admin listener, or of a store.
//!
//! The answers of a balancer go to the output as they come, so that a session may be larger than memory.

use std::fs::{self, File};
use std::future::Future;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::cli::traces::{ADMIN_TOKEN, ExportArgs};
use crate::config::types::{TraceStore, TracesConfig, UpstreamUrl};
use crate::names::PRODUCT;
use crate::observe::Observer;
use crate::traces::json;
use crate::traces::store::Store;

/// How long the balancer may be silent.
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// The largest list of sessions.
const MAX_LIST_BYTES: usize = 1 << 30;

/// The most of a refusal that is shown.
const MAX_REFUSAL_BYTES: usize = 4096;

/// Why an export ended early.
#[derive(Debug)]
pub enum ExportError {
    /// The program that reads the output has ended: there is nothing more to do.
    OutputClosed,
    Failed(String),
}

/// What was exported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportSummary {
    /// The requested sessions that had nothing to export.
    pub empty: Vec<String>,
}

#[derive(Deserialize)]
struct ListedSession {
    session_id: String,
}

/// The admin listener of a balancer.
struct AdminClient<'a> {
    url: &'a UpstreamUrl,
    authorization: Option<HeaderValue>,
    /// The connection of the request before.
    kept: Option<SendRequest<Empty<Bytes>>>,
}

/// The output, which counts what goes through it.
struct ExportOutput<W> {
    out: W,
    bytes: u64,
    last: u8,
}

/// Exports to the file that the arguments name, or to `out`. `token` is that of the environment.
pub async fn run(
    args: &ExportArgs,
    token: Option<&str>,
    out: &mut impl Write,
) -> Result<ExportSummary, ExportError> {
    let Some(path) = &args.output else { return export(args, token, out).await };
    let part = part_of(path);
    let cannot = |error: io::Error| ExportError::Failed(format!("cannot write {}: {error}", path.display()));
    let mut file = File::create(&part).map_err(cannot)?;
    let exported = export(args, token, &mut file).await;
    let placed = exported.and_then(|summary| {
        file.sync_all().and_then(|()| fs::rename(&part, path)).map_err(cannot)?;
        Ok(summary)
    });
    if placed.is_err() {
        // The error is told already.
        fs::remove_file(&part).ok();
    }
    placed
}

/// The file that holds an export until it is complete.
fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(".part");
    name.into()
}

async fn export(
    args: &ExportArgs,
    token: Option<&str>,
    out: &mut impl Write,
) -> Result<ExportSummary, ExportError> {
    let mut output = ExportOutput { out: BufWriter::with_capacity(1 << 20, out), bytes: 0, last: b'\n' };
    let summary = match &args.store {
        Some(store) => from_store(args, store, &mut output).await?,
        None => from_balancer(args, token, &mut output).await?,
    };
    output.out.flush().map_err(of_output)?;
    Ok(summary)
}

async fn from_store(
    args: &ExportArgs,
    store: &TraceStore,
    output: &mut ExportOutput<impl Write>,
) -> Result<ExportSummary, ExportError> {
    if let TraceStore::Sqlite(Some(path)) = store {
        // To open a database that is missing would make it.
        let is_there = fs::metadata(path);
        is_there.map_err(|error| ExportError::Failed(format!("cannot read {}: {error}", path.display())))?;
    }
    let failed = |error| ExportError::Failed(format!("cannot read the store: {error}"));
    let config = TracesConfig { store: store.clone(), ..TracesConfig::default() };
    let store = Store::open(&config, &Observer::default()).await.map_err(failed)?;
    let mut sessions = args.sessions.clone();
    if sessions.is_empty() {
        let listed = store.sessions(args.since, None).await.map_err(failed)?;
        sessions = listed.into_iter().rev().map(|session| session.session_id).collect();
    }
    let mut summary = ExportSummary::default();
    for session in sessions {
        let traces = store.traces(&session, args.since, None).await.map_err(failed)?;
        for trace in &traces {
            output.write(json::to_json(&trace.record).as_bytes())?;
            output.end_line()?;
        }
        if traces.is_empty() {
            summary.empty.push(session);
        }
    }
    store.close().await;
    Ok(summary)
}

async fn from_balancer(
    args: &ExportArgs,
    token: Option<&str>,
    output: &mut ExportOutput<impl Write>,
) -> Result<ExportSummary, ExportError> {
    let token = args.token.as_ref().map(|token| token.expose()).or(token.filter(|token| !token.is_empty()));
    let authorization = token.map(|token| HeaderValue::try_from(format!("Bearer {token}"))).transpose();
    let authorization =
        authorization.map_err(|_| ExportError::Failed("the token cannot be sent in a header".into()))?;
    let mut client = AdminClient { url: &args.admin, authorization, kept: None };
    let since = args.since.map(|since| format!("since={since}"));
    let mut sessions = args.sessions.clone();
    if sessions.is_empty() {
        sessions = client.sessions(since.as_deref()).await?;
    }
    let mut summary = ExportSummary::default();
    for session in sessions {
        let before = output.bytes;
        client.traces(&session, since.as_deref(), output).await?;
        if output.bytes == before {
            summary.empty.push(session);
        }
    }
    Ok(summary)
}

// === impl AdminClient ===

impl AdminClient<'_> {
    /// The sessions that have traces, the oldest first.
    async fn sessions(&mut self, since: Option<&str>) -> Result<Vec<String>, ExportError> {
        let query = since.map_or(String::new(), |since| format!("?{since}"));
        let answer = self.get(&format!("/sessions{query}")).await?;
        let body = self.within(Limited::new(answer.into_body(), MAX_LIST_BYTES).collect()).await?;
        let listed: Vec<ListedSession> = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| self.failed(format!("its list of sessions cannot be read: {error}")))?;
        Ok(listed.into_iter().rev().map(|session| session.session_id).collect())
    }

    /// Copies the traces of a session to the output.
    async fn traces(
        &mut self,
        session: &str,
        since: Option<&str>,
        output: &mut ExportOutput<impl Write>,
    ) -> Result<(), ExportError> {
        let since = since.map_or(String::new(), |since| format!("&{since}"));
        let path = format!("/sessions/{}/traces?format=jsonl{since}", escaped(session));
        let mut body = self.get(&path).await?.into_body();
        let mut is_first = true;
        while let Some(frame) = self.within_some(body.frame()).await? {
            let Ok(piece) = frame.into_data() else { continue };
            if is_first && !piece.is_empty() && piece[0] != b'{' {
                return Err(self.failed("its answer is not of JSON lines: it may be of an older version"));
            }
            is_first &= piece.is_empty();
            output.write(&piece)?;
        }
        if output.last == b'\n' { Ok(()) } else { output.end_line() }
    }

    async fn get(&mut self, path: &str) -> Result<Response<Incoming>, ExportError> {
        let mut request = Request::get(format!("{}{path}", self.url.prefix));
        let host = if self.url.unix.is_some() { "localhost".into() } else { self.url.authority() };
        request = request.header(header::HOST, host).header(header::USER_AGENT, PRODUCT);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::new()).map_err(|error| self.failed(error))?;
        let mut kept = self.kept.take();
        let is_open = match &mut kept {
            Some(kept) => kept.ready().await.is_ok(),
            None => false,
        };
        let mut sender = match kept.filter(|_| is_open) {
            Some(kept) => kept,
            None => self.connect().await?,
        };
        let answer = self.within(sender.send_request(request)).await?;
        self.kept = Some(sender);
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = Limited::new(answer.into_body(), MAX_REFUSAL_BYTES).collect().await;
        let text = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned());
        let hint = if status == 401 {
            format!(": give its token by --token or {ADMIN_TOKEN}")
        } else {
            String::new()
        };
        Err(self.failed(format!("{status}{hint}: {}", text.unwrap_or_default().trim())))
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, ExportError> {
        match &self.url.unix {
            Some(path) => self.begin(self.within(UnixStream::connect(path)).await?).await,
            None => {
                let address = (self.url.host.as_str(), self.url.port);
                self.begin(self.within(TcpStream::connect(address)).await?).await
            }
        }
    }

    async fn begin(
        &self,
        stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    ) -> Result<SendRequest<Empty<Bytes>>, ExportError> {
        let (sender, connection) = self.within(handshake(TokioIo::new(stream))).await?;
        // Its errors are those of the requests on it.
        tokio::spawn(async move { connection.await.ok() });
        Ok(sender)
    }

    async fn within<T, E: std::fmt::Display>(
        &self,
        step: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ExportError> {
        match timeout(MAX_SILENCE, step).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(self.failed(error)),
            Err(_) => Err(self.failed(format!("silent for {MAX_SILENCE:?}"))),
        }
    }

    async fn within_some<T, E: std::fmt::Display>(
        &self,
        step: impl Future<Output = Option<Result<T, E>>>,
    ) -> Result<Option<T>, ExportError> {
        self.within(async { step.await.transpose() }).await
    }

    fn failed(&self, what: impl std::fmt::Display) -> ExportError {
        ExportError::Failed(format!("{}: {what}", self.url.display()))
    }
}

// === impl ExportOutput ===

impl<W: Write> ExportOutput<W> {
    fn write(&mut self, piece: &[u8]) -> Result<(), ExportError> {
        self.bytes += piece.len() as u64;
        self.last = piece.last().copied().unwrap_or(self.last);
        self.out.write_all(piece).map_err(of_output)
    }

    fn end_line(&mut self) -> Result<(), ExportError> {
        self.write(b"\n")
    }
}

fn of_output(error: io::Error) -> ExportError {
    match error.kind() {
        ErrorKind::BrokenPipe => ExportError::OutputClosed,
        _ => ExportError::Failed(format!("cannot write: {error}")),
    }
}

/// A text as one segment of a path.
fn escaped(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(char::from(byte)),
            // Dots, too: a segment of two of them would be removed.
            _ => path.push_str(&format!("%{byte:02X}")),
        }
    }
    path
}

#[cfg(test)]
mod tests;
