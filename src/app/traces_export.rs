//! Writes recorded calls as JSON lines: those of a running balancer, over its admin listener, or of a store.
//!
//! The answers of a balancer go to the output as they come, so that a session may be larger than memory.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt;
use serde::Deserialize;

use super::admin_client::{AdminClient, escaped};
use crate::cli::traces::ExportArgs;
use crate::config::types::{TraceStore, TracesConfig};
use crate::observe::Observer;
use crate::traces::json;
use crate::traces::store::Store;

/// How long the balancer may be silent.
const MAX_SILENCE: Duration = Duration::from_secs(60);

/// The largest list of sessions.
const MAX_LIST_BYTES: usize = 1 << 30;

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
    let mut client = AdminClient::new(&args.admin, (args.token.as_ref(), token), MAX_SILENCE)?;
    let since = args.since.map(|since| format!("since={since}"));
    let mut sessions = args.sessions.clone();
    if sessions.is_empty() {
        sessions = self::sessions(&mut client, since.as_deref()).await?;
    }
    let mut summary = ExportSummary::default();
    for session in sessions {
        let before = output.bytes;
        traces(&mut client, &session, since.as_deref(), output).await?;
        if output.bytes == before {
            summary.empty.push(session);
        }
    }
    Ok(summary)
}

/// The sessions that have traces, the oldest first.
async fn sessions(client: &mut AdminClient<'_>, since: Option<&str>) -> Result<Vec<String>, ExportError> {
    let query = since.map_or(String::new(), |since| format!("?{since}"));
    let answer = client.get(&format!("/sessions{query}")).await?;
    let body = client.read(answer, MAX_LIST_BYTES).await?;
    let listed: Vec<ListedSession> = serde_json::from_slice(&body)
        .map_err(|error| client.failed(format!("its list of sessions cannot be read: {error}")))?;
    Ok(listed.into_iter().rev().map(|session| session.session_id).collect())
}

/// Copies the traces of a session to the output.
async fn traces(
    client: &mut AdminClient<'_>,
    session: &str,
    since: Option<&str>,
    output: &mut ExportOutput<impl Write>,
) -> Result<(), ExportError> {
    let since = since.map_or(String::new(), |since| format!("&{since}"));
    let path = format!("/sessions/{}/traces?format=jsonl{since}", escaped(session));
    let mut body = client.get(&path).await?.into_body();
    let mut is_first = true;
    while let Some(frame) = client.within_some(body.frame()).await? {
        let Ok(piece) = frame.into_data() else { continue };
        if is_first && !piece.is_empty() && piece[0] != b'{' {
            let what = "its answer is not of JSON lines: it may be of an older version";
            return Err(client.failed(what).into());
        }
        is_first &= piece.is_empty();
        output.write(&piece)?;
    }
    if output.last == b'\n' { Ok(()) } else { output.end_line() }
}

// === impl ExportError ===

impl From<String> for ExportError {
    fn from(error: String) -> Self {
        ExportError::Failed(error)
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

#[cfg(test)]
mod tests;
