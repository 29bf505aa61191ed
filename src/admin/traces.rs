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
use crate::traces::store::StoredTrace;

/// How long a call waits for calls that have ended to be stored. rllm's clients wait 30 s for an answer.
pub const MAX_FLUSH: Duration = Duration::from_secs(28);

/// The same before something is read.
const MAX_READ_FLUSH: Duration = Duration::from_secs(1);

/// The largest list in one answer.
const MAX_LIST_BYTES: usize = 2 << 30;

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
    let traces = api.traces.store()?.traces(&stored_id(&id), range.since, range.limit).await?;
    TraceList::new(form).with(traces).await?.answer()
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
        list = list.with(store.traces(&stored_id(&id), range.since, range.limit).await?).await?;
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
}

impl TraceList {
    fn new(form: ListForm) -> Self {
        TraceList { form, body: Vec::new(), count: 0 }
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
        if self.body.len() + trace.len() > MAX_LIST_BYTES {
            let error = format!(
                "the traces are longer than {MAX_LIST_BYTES} bytes: request fewer sessions, or use limit"
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
    use super::*;

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
