//! Recorded calls, in the form that training frameworks read: see `gateway` for the paths.
//!
//! A list shows every call that had ended before it was requested, unless the store is slower than
//! [`MAX_READ_FLUSH`].

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::answer::{AdminReject, AdminResult, answer, not_allowed, respond, typed_answer};
use super::arguments::{ListRange, decoded_id, object, parameter, session_ids, stored_id};
use super::parts::AdminParts;
use crate::traces::json::to_json;
use crate::traces::store::{Store, StoredTrace};

/// The longest time that a flush waits for ended calls to be stored. rllm's clients wait 30 s for an answer.
pub(super) const MAX_FLUSH: Duration = Duration::from_secs(28);

/// The longest time that a read waits for ended calls to be stored.
const MAX_READ_FLUSH: Duration = Duration::from_secs(1);

/// The largest list in one answer, in bytes.
const MAX_LIST_BYTES: usize = 2 << 30;

/// The number of traces in the first page that is read of a session. Pages keep the memory beside the
/// answer small, and reading ends as soon as the answer is too long.
const FIRST_PAGE_TRACES: usize = 32;
/// The largest number of traces in one page.
const MAX_PAGE_TRACES: usize = 512;

/// The intended size of a page as JSON, estimated from the traces before.
const MAX_PAGE_BYTES: usize = 32 << 20;

/// Answers calls of one trace. `written`: its id as written in the path.
pub(super) async fn one(parts: &AdminParts, written: &str, request: &Request<Bytes>) -> Response<Bytes> {
    if request.method() != Method::GET {
        return not_allowed("GET");
    }
    respond(show(parts, written).await)
}

async fn show(parts: &AdminParts, written: &str) -> AdminResult {
    let id = decoded_id(written)?;
    settle(parts).await;
    match parts.traces.store()?.trace(&id).await? {
        Some(trace) => TraceList::new(ListForm::Single).with(vec![trace]).await?.answer(),
        None => Err(AdminReject::new(StatusCode::NOT_FOUND, format!("Trace {id} not found"))),
    }
}

/// Lists the traces of a session, oldest first.
pub(super) async fn of_session(parts: &AdminParts, written: &str, request: &Request<Bytes>) -> AdminResult {
    let id = decoded_id(written)?;
    let range = ListRange::of_query(request)?;
    let form = match parameter(request, "format") {
        None | Some("json") => ListForm::Array,
        Some("jsonl") => ListForm::Lines,
        Some(other) => {
            let error = format!("format: {other:?} is neither json nor jsonl");
            return Err(AdminReject::new(StatusCode::UNPROCESSABLE_ENTITY, error));
        }
    };
    settle(parts).await;
    let store = parts.traces.store()?;
    TraceList::new(form).with_session(&store, &stored_id(&id), range).await?.answer()
}

/// Lists the traces of several sessions, in the order of the ids; the limit applies to each session.
pub(super) async fn query(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    respond(found(parts, request).await)
}

async fn found(parts: &AdminParts, request: &Request<Bytes>) -> AdminResult {
    let body = object(request)?;
    let (ids, range) = (session_ids(&body)?, ListRange::of_body(&body)?);
    settle(parts).await;
    let store = parts.traces.store()?;
    let mut list = TraceList::new(ListForm::Array);
    for id in ids {
        list = list.with_session(&store, &stored_id(&id), range).await?;
    }
    list.answer()
}

/// Answers once every ended call is stored, or once [`MAX_FLUSH`] has passed.
pub(super) async fn flush(parts: &AdminParts) -> Response<Bytes> {
    let flushed = bounded(parts.traces.flush()).await;
    respond(flushed.map(|()| answer(StatusCode::OK, &json!({"status": "flushed"}))))
}

/// Waits until the queued calls are stored, for a bounded time in case the store stays away.
pub(super) async fn bounded<T>(work: impl Future<Output = T>) -> Result<T, AdminReject> {
    let late = |_| {
        let error = format!("traces are not stored after {} s: see the log", MAX_FLUSH.as_secs());
        AdminReject::new(StatusCode::SERVICE_UNAVAILABLE, error)
    };
    timeout(MAX_FLUSH, work).await.map_err(late)
}

/// Waits until ended calls are stored, at most [`MAX_READ_FLUSH`]; a slower store is read as it is.
pub(super) async fn settle(parts: &AdminParts) {
    timeout(MAX_READ_FLUSH, parts.traces.flush()).await.ok();
}

/// Shows or sets the version of the weights that is recorded with each call.
pub(super) async fn weight_version(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => answer(StatusCode::OK, &json!({"weight_version": parts.traces.weight_version()})),
        Method::POST => respond(set_weight_version(parts, request).await),
        _ => not_allowed("GET, POST"),
    }
}

async fn set_weight_version(parts: &AdminParts, request: &Request<Bytes>) -> AdminResult {
    let body = object(request)?;
    let given = body.get("weight_version").filter(|given| !given.is_null());
    let given = given.ok_or_else(|| AdminReject::problem("weight_version is required"))?;
    let version = version(given)
        .ok_or_else(|| AdminReject::problem(format!("invalid weight_version: {}", quoted(given))))?;
    parts.traces.set_weight_version(version).await?;
    Ok(answer(StatusCode::OK, &json!({"weight_version": version})))
}

/// Parses a version: a number, or a text of a number.
fn version(given: &Value) -> Option<i64> {
    let version = match given {
        Value::String(text) => text.trim().parse().ok(),
        _ => given.as_i64(),
    };
    // The lowest number is reserved for "no version".
    version.filter(|version| *version != i64::MIN)
}

/// The value, quoted as Python quotes a plain text.
fn quoted(value: &Value) -> String {
    match value {
        Value::String(text) => format!("'{}'", text.chars().take(100).collect::<String>()),
        _ => value.to_string().chars().take(100).collect(),
    }
}

/// The format of a list of traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListForm {
    Single,
    Array,
    Lines,
}

/// A list of traces under construction. Each trace is freed once its text is written.
struct TraceList {
    form: ListForm,
    body: Vec<u8>,
    count: usize,
    /// The largest body, in bytes.
    limit: usize,
}

/// The pages in which the traces of a session are read.
struct ListPages {
    since: Option<f64>,
    /// The largest number of traces that remain to be read.
    left: usize,
    /// The number of traces in the next page.
    page: usize,
}

impl ListPages {
    fn new(range: ListRange) -> Self {
        ListPages { since: range.since, left: range.limit.unwrap_or(usize::MAX), page: FIRST_PAGE_TRACES }
    }

    /// The start time and the largest number of traces of the next page. `None` after the last page.
    fn next(&self) -> Option<(Option<f64>, usize)> {
        let count = self.page.min(self.left);
        (count > 0).then_some((self.since, count))
    }

    /// Records the page that was read: its number of traces, the time of the last one, and its bytes.
    fn add(&mut self, count: usize, last_at: Option<f64>, bytes: usize) {
        let is_last = count < self.page.min(self.left);
        self.left = if is_last { 0 } else { self.left - count };
        self.since = last_at.map(f64::next_up);
        self.page = (MAX_PAGE_BYTES / (bytes / count.max(1)).max(1)).clamp(1, MAX_PAGE_TRACES);
    }
}

impl TraceList {
    fn new(form: ListForm) -> Self {
        TraceList { form, body: Vec::new(), count: 0, limit: MAX_LIST_BYTES }
    }

    /// Reads the traces of a session page by page and adds them.
    async fn with_session(mut self, store: &Store, id: &str, range: ListRange) -> Result<Self, AdminReject> {
        let mut pages = ListPages::new(range);
        while let Some((since, count)) = pages.next() {
            let traces = store.traces(id, since, Some(count)).await?;
            let (read, before) = (traces.len(), self.body.len());
            let last_at = traces.last().map(|last| last.created_at);
            self = self.with(traces).await?;
            pages.add(read, last_at, self.body.len() - before);
        }
        Ok(self)
    }

    /// Adds traces, on a thread apart from those that serve requests.
    async fn with(mut self, traces: Vec<StoredTrace>) -> Result<Self, AdminReject> {
        if traces.is_empty() {
            return Ok(self);
        }
        let work = move || {
            for trace in traces {
                self.add(&to_json(&trace.record))?;
            }
            Ok(self)
        };
        let failed = |error| AdminReject::new(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}"));
        spawn_blocking(work).await.map_err(failed)?
    }

    fn add(&mut self, trace: &str) -> Result<(), AdminReject> {
        if self.body.len() + trace.len() > self.limit {
            let error = format!(
                "the traces are longer than {} bytes: request fewer sessions, or use limit",
                self.limit
            );
            return Err(AdminReject::new(StatusCode::PAYLOAD_TOO_LARGE, error));
        }
        match self.form {
            ListForm::Array => self.body.push(if self.count == 0 { b'[' } else { b',' }),
            ListForm::Single | ListForm::Lines => {}
        }
        self.body.extend_from_slice(trace.as_bytes());
        if self.form == ListForm::Lines {
            self.body.push(b'\n');
        }
        self.count += 1;
        Ok(())
    }

    fn answer(mut self) -> AdminResult {
        if self.form == ListForm::Array {
            self.body.extend_from_slice(if self.count == 0 { b"[]" } else { b"]" });
        }
        let kind = match self.form {
            ListForm::Lines => "application/x-ndjson",
            ListForm::Single | ListForm::Array => "application/json",
        };
        Ok(typed_answer(StatusCode::OK, kind, self.body.into()))
    }
}

#[cfg(test)]
mod tests;
