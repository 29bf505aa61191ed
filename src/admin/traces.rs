//! Recorded calls, as training frameworks read them: see `gateway` for the paths.
//!
//! A list shows every call that had ended before it was requested, unless the store is slower than
//! [`MAX_READ_FLUSH`].

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::gateway::{ListRange, decoded_id, object, session_ids};
use super::sessions::stored_id;
use super::{AdminApi, AdminReject, AdminResult, answer, not_allowed, parameter, respond, typed_answer};
use crate::traces::json::to_json;
use crate::traces::store::{Store, StoredTrace};

/// How long a call waits for calls that have ended to be stored. rllm's clients wait 30 s for an answer.
pub const MAX_FLUSH: Duration = Duration::from_secs(28);

/// The same before something is read.
const MAX_READ_FLUSH: Duration = Duration::from_secs(1);

/// The largest list in one answer.
const MAX_LIST_BYTES: usize = 2 << 30;

/// The traces of a session that are read at a time at first, and later at the most: a list takes little
/// memory beside its answer, and ends early where that becomes too long.
const FIRST_PAGE: usize = 32;
const MAX_PAGE: usize = 512;

/// What the traces of a page may take as JSON, as far as those before show it.
const MAX_PAGE_BYTES: usize = 32 << 20;

/// The trace of an id, as it stands in the path.
pub async fn one(api: &AdminApi, written: &str, request: &Request<Bytes>) -> Response<Bytes> {
    if request.method() != Method::GET {
        return not_allowed("GET");
    }
    respond(show(api, written).await)
}

async fn show(api: &AdminApi, written: &str) -> AdminResult {
    let id = decoded_id(written)?;
    settle(api).await;
    match api.traces.store()?.trace(&id).await? {
        Some(trace) => TraceList::new(ListForm::Single).with(vec![trace]).await?.answer(),
        None => Err(AdminReject::new(StatusCode::NOT_FOUND, format!("Trace {id} not found"))),
    }
}

/// The traces of a session, the oldest first.
pub async fn of_session(api: &AdminApi, written: &str, request: &Request<Bytes>) -> AdminResult {
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
    settle(api).await;
    let store = api.traces.store()?;
    TraceList::new(form).with_session(&store, &stored_id(&id), range).await?.answer()
}

/// The traces of several sessions, in the order of the ids; the limit is one of each session.
pub async fn query(api: &AdminApi, request: &Request<Bytes>) -> Response<Bytes> {
    respond(found(api, request).await)
}

async fn found(api: &AdminApi, request: &Request<Bytes>) -> AdminResult {
    let body = object(request)?;
    let (ids, range) = (session_ids(&body)?, ListRange::of_body(&body)?);
    settle(api).await;
    let store = api.traces.store()?;
    let mut list = TraceList::new(ListForm::Array);
    for id in ids {
        list = list.with_session(&store, &stored_id(&id), range).await?;
    }
    list.answer()
}

/// Waits until every call that has ended is stored.
pub async fn flush(api: &AdminApi) -> Response<Bytes> {
    let flushed = bounded(api.traces.flush()).await;
    respond(flushed.map(|()| answer(StatusCode::OK, &json!({"status": "flushed"}))))
}

/// Waits for work behind the queue, but not for a store that does not come back.
pub async fn bounded<T>(work: impl Future<Output = T>) -> Result<T, AdminReject> {
    let late = |_| {
        let error = format!("traces are not stored after {} s: see the log", MAX_FLUSH.as_secs());
        AdminReject::new(StatusCode::SERVICE_UNAVAILABLE, error)
    };
    timeout(MAX_FLUSH, work).await.map_err(late)
}

/// Lets a reader find what has ended before; a slow store is read as it is.
pub async fn settle(api: &AdminApi) {
    timeout(MAX_READ_FLUSH, api.traces.flush()).await.ok();
}

/// Shows or sets the version of the weights that calls are recorded with.
pub async fn weight_version(api: &AdminApi, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => answer(StatusCode::OK, &json!({"weight_version": api.traces.weight_version()})),
        Method::POST => respond(set_weight_version(api, request).await),
        _ => not_allowed("GET, POST"),
    }
}

async fn set_weight_version(api: &AdminApi, request: &Request<Bytes>) -> AdminResult {
    let body = object(request)?;
    let given = body.get("weight_version").filter(|given| !given.is_null());
    let given = given.ok_or_else(|| AdminReject::problem("weight_version is required"))?;
    let version = version(given)
        .ok_or_else(|| AdminReject::problem(format!("invalid weight_version: {}", quoted(given))))?;
    api.traces.set_weight_version(version).await?;
    Ok(answer(StatusCode::OK, &json!({"weight_version": version})))
}

/// A number, or a text of one.
fn version(given: &Value) -> Option<i64> {
    let version = match given {
        Value::String(text) => text.trim().parse().ok(),
        _ => given.as_i64(),
    };
    // The lowest number stands for none.
    version.filter(|version| *version != i64::MIN)
}

/// A value as Python would quote it, where it is a plain text.
fn quoted(value: &Value) -> String {
    match value {
        Value::String(text) => format!("'{}'", text.chars().take(100).collect::<String>()),
        _ => value.to_string().chars().take(100).collect(),
    }
}

/// How traces stand in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ListForm {
    Single,
    Array,
    Lines,
}

/// A list of traces in the making. A trace is freed once its text is made.
struct TraceList {
    form: ListForm,
    body: Vec<u8>,
    count: usize,
    /// The most bytes of the body.
    limit: usize,
}

/// The pages in which the traces of a session are read.
struct ListPages {
    since: Option<f64>,
    /// The traces that are still to be read, at the most.
    left: usize,
    /// The traces of the next page.
    page: usize,
}

impl ListPages {
    fn new(range: ListRange) -> Self {
        ListPages { since: range.since, left: range.limit.unwrap_or(usize::MAX), page: FIRST_PAGE }
    }

    /// From when on the next page begins, and how many traces it has at the most. `None`: there is none.
    fn next(&self) -> Option<(Option<f64>, usize)> {
        let count = self.page.min(self.left);
        (count > 0).then_some((self.since, count))
    }

    /// The page that was requested has so many traces, the last of this time, and takes so many bytes.
    fn add(&mut self, count: usize, last_at: Option<f64>, bytes: usize) {
        let is_last = count < self.page.min(self.left);
        self.left = if is_last { 0 } else { self.left - count };
        self.since = last_at.map(f64::next_up);
        self.page = (MAX_PAGE_BYTES / (bytes / count.max(1)).max(1)).clamp(1, MAX_PAGE);
    }
}

impl TraceList {
    fn new(form: ListForm) -> Self {
        TraceList { form, body: Vec::new(), count: 0, limit: MAX_LIST_BYTES }
    }

    /// Adds the traces of a session, which are read page by page.
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

    /// Adds traces, on a thread that no request waits for.
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
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::types::TracesConfig;
    use crate::observe::Observer;
    use crate::traces::store::samples::record;

    #[test]
    fn lists_are_joined_by_their_form() {
        for (form, none, one, two) in
            [(ListForm::Array, "[]", "[{}]", "[{},{}]"), (ListForm::Lines, "", "{}\n", "{}\n{}\n")]
        {
            for (count, expected) in [none, one, two].into_iter().enumerate() {
                let mut list = TraceList::new(form);
                (0..count).for_each(|_| assert!(list.add("{}").is_ok()));
                let answer = respond(list.answer());
                assert_eq!(answer.body(), expected, "{form:?} of {count}");
            }
        }
    }

    /// Reads a session of so many traces, each of so many bytes. Returns the traces that were read, and the
    /// most bytes of a page behind the first.
    fn read_pages(range: ListRange, session: usize, each: usize) -> (usize, usize) {
        let (mut pages, mut read, mut most) = (ListPages::new(range), 0, 0);
        while let Some((since, wanted)) = pages.next() {
            if read > 0 {
                assert_eq!(since, Some(((read - 1) as f64).next_up()), "it begins behind the one before");
                most = most.max(wanted * each);
            }
            let count = wanted.min(session - read);
            read += count;
            pages.add(count, read.checked_sub(1).map(|last| last as f64), count * each);
        }
        (read, most)
    }

    #[test]
    fn long_sessions_are_read_in_pages_of_few_bytes() {
        let all = ListRange::default();
        for (session, each) in [(0, 1), (1, 1), (31, 1), (32, 1), (33, 10), (5_000, 100), (200, 5 << 20)] {
            let (read, most) = read_pages(all, session, each);
            assert!(read == session && most <= MAX_PAGE_BYTES, "{session}: {read} {most}");
        }
        assert_eq!(read_pages(all, 40, 64 << 20).0, 40, "one is read at least");
        for limit in [0, 1, 32, 40, 5_000, usize::MAX] {
            let range = ListRange { since: None, limit: Some(limit) };
            assert_eq!(read_pages(range, 4_000, 1_000).0, limit.min(4_000));
        }
    }

    #[tokio::test]
    async fn a_list_of_several_pages_is_that_of_the_session() {
        let store =
            Store::open(&TracesConfig::default(), &Observer::default()).await.expect("a store in memory");
        let records = (0..100).map(|at| Arc::new(record("s", &at.to_string(), &["{}"], &[1], &[2])));
        store.put(&records.collect::<Vec<_>>(), 1.0).await.expect("is stored");
        let list = async |limit, body| {
            let range = ListRange { since: None, limit };
            TraceList { limit: body, ..TraceList::new(ListForm::Lines) }
                .with_session(&store, "s", range)
                .await
        };
        let whole = list(None, 1 << 20).await.ok().expect("fits").body;
        let ids = |body: &[u8]| -> Vec<Value> {
            let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            lines
                .map(|line| serde_json::from_slice::<Value>(line).expect("JSON")["trace_id"].clone())
                .collect()
        };
        let wanted: Vec<Value> = (0..100).map(|at| json!(at.to_string())).collect();
        assert_eq!(ids(&whole), wanted);
        assert_eq!(ids(&list(Some(70), 1 << 20).await.ok().expect("fits").body), wanted[..70]);
        let failed = list(None, 10_000).await.err().expect("is too long");
        assert_eq!(failed.0, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[test]
    fn weight_versions_are_numbers_or_texts_of_numbers() {
        for (given, expected) in [
            (json!(7), Some(7)),
            (json!(-7), Some(-7)),
            (json!("42"), Some(42)),
            (json!(" 42 "), Some(42)),
            (json!(i64::MAX), Some(i64::MAX)),
            (json!(i64::MIN), None),
            (json!(u64::MAX), None),
            (json!(1.5), None),
            (json!("1.5"), None),
            (json!("x"), None),
            (json!(""), None),
            (json!(true), None),
            (json!([1]), None),
        ] {
            assert_eq!(version(&given), expected, "{given}");
        }
        assert_eq!(quoted(&json!("x")), "'x'");
        assert_eq!(quoted(&json!(1.5)), "1.5");
    }
}
