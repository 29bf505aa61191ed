//! Sessions: their settings, which operators write, and their stored calls. See `gateway` for the paths.
//!
//! A session exists once it is created here or once one of its calls is stored; the list contains sessions
//! with calls only.

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use rustls::crypto::ring;
use serde_json::{Map, Value, json};
use tokio::task::yield_now;

use super::answer::{AdminReject, AdminResult, answer, not_allowed, respond, typed_answer};
use super::arguments::{ListRange, decoded_id, object, session_ids, stored_id, text_member};
use super::parts::AdminParts;
use super::traces;
use crate::route::api_paths::{escape_path, of_session};
use crate::traces::now;
use crate::traces::record::{SessionSettings, SessionSummary};

/// The longest id of a created session, in bytes.
const MAX_ID_BYTES: usize = 1 << 10;

/// The largest metadata, sampling parameters and model of a session together, as JSON.
const MAX_SETTINGS_BYTES: usize = 64 << 10;

/// The number of sessions deleted in a row before other tasks may run.
const MAX_FORGOTTEN_AT_ONCE: usize = 256;

/// Answers calls of the list of sessions.
pub(super) async fn all(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    match *request.method() {
        Method::GET => respond(list(parts, request).await),
        Method::POST => respond(create(parts, request).await),
        _ => not_allowed("GET, POST"),
    }
}

/// Answers calls of one session and of its traces.
pub(super) async fn one(parts: &AdminParts, written: &str, request: &Request<Bytes>) -> Response<Bytes> {
    let with_traces = written.strip_suffix("/traces").filter(|id| !id.is_empty());
    respond(match (request.method(), with_traces) {
        (&Method::GET, Some(written)) => traces::of_session(parts, written, request).await,
        (&Method::GET, None) => show(parts, written).await,
        (&Method::DELETE, _) => delete(parts, written).await,
        (_, Some(_)) => return not_allowed("GET"),
        (_, None) => return not_allowed("GET, DELETE"),
    })
}

async fn list(parts: &AdminParts, request: &Request<Bytes>) -> AdminResult {
    let range = ListRange::of_query(request)?;
    traces::settle(parts).await;
    let sessions = parts.traces.store()?.sessions(range.since, range.limit).await?;
    let rows: Vec<String> = sessions.iter().map(row).collect();
    Ok(typed_answer(StatusCode::OK, "application/json", format!("[{}]", rows.join(",")).into()))
}

async fn show(parts: &AdminParts, written: &str) -> AdminResult {
    let id = decoded_id(written)?;
    traces::settle(parts).await;
    match parts.traces.store()?.session(&stored_id(&id)).await? {
        Some(session) => Ok(typed_answer(StatusCode::OK, "application/json", row(&session).into())),
        None => Err(AdminReject::new(StatusCode::NOT_FOUND, format!("Session {id} not found"))),
    }
}

/// The metadata is JSON already.
fn row(session: &SessionSummary) -> String {
    let SessionSummary { session_id, trace_count, created_at, metadata } = session;
    let (id, created_at) = (json!(session_id), json!(created_at));
    let metadata = if metadata.is_empty() { "{}" } else { metadata };
    format!(
        r#"{{"session_id":{id},"trace_count":{trace_count},"created_at":{created_at},"metadata":{metadata}}}"#
    )
}

/// Creates a session, or updates the members that the call has, as rllm-model-gateway does.
async fn create(parts: &AdminParts, request: &Request<Bytes>) -> AdminResult {
    let body = object(request)?;
    let id = match text_member(&body, "session_id")? {
        Some(id) => checked_id(id)?,
        None => random_id()?,
    };
    let metadata = object_member(&body, "metadata")?;
    let sampling_params = object_member(&body, "sampling_params")?;
    let model = text_member(&body, "model")?;
    let known = parts.traces.store()?.load_session(&stored_id(&id)).await?.unwrap_or_default();
    let or_known = |given: Map<String, Value>, known| if given.is_empty() { known } else { given };
    let settings = SessionSettings {
        session_id: stored_id(&id),
        created_at: now(),
        metadata: or_known(metadata, known.metadata),
        sampling_params: or_known(sampling_params, known.sampling_params),
        model: model.or(known.model),
    };
    let length = |object: &Map<String, Value>| json!(object).to_string().len();
    let model = settings.model.as_ref().map_or(0, String::len);
    if length(&settings.metadata) + length(&settings.sampling_params) + model > MAX_SETTINGS_BYTES {
        let what = "metadata, sampling_params and model together are longer than";
        return Err(AdminReject::problem(format!("{what} {MAX_SETTINGS_BYTES} bytes")));
    }
    parts.traces.put_session(settings).await?;
    let url = url_of(&id);
    Ok(answer(StatusCode::OK, &json!({"session_id": id, "url": url})))
}

fn object_member(body: &Map<String, Value>, name: &str) -> Result<Map<String, Value>, AdminReject> {
    match body.get(name) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object.clone()),
        Some(_) => Err(AdminReject::problem(format!("{name} must be an object"))),
    }
}

/// The path of a session's API.
fn url_of(id: &str) -> String {
    format!("/sessions/{}/v1", escape_path(id))
}

/// The id, if requests can name it in their path.
fn checked_id(id: String) -> Result<String, AdminReject> {
    if id.len() > MAX_ID_BYTES {
        return Err(AdminReject::problem(format!("session_id is longer than {MAX_ID_BYTES} bytes")));
    }
    let is_named = of_session(&url_of(&id)).is_some_and(|(named, rest)| named == id && rest == "/v1");
    if !is_named || id.trim_ascii() != id || id.ends_with("/traces") {
        let error = "session_id cannot stand in a path: it must have no control characters, no white space \
                     around it, no /v1, . or .. among its segments, and not end with /traces";
        return Err(AdminReject::problem(error));
    }
    Ok(id)
}

/// Generates a UUID of version 4.
fn random_id() -> Result<String, AdminReject> {
    let mut bytes = [0; 16];
    ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| {
        AdminReject::new(StatusCode::INTERNAL_SERVER_ERROR, "the system gives no random numbers")
    })?;
    Ok(uuid4(bytes))
}

fn uuid4(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let digits = format!("{:032x}", u128::from_be_bytes(bytes));
    let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    parts.join("-")
}

async fn delete(parts: &AdminParts, written: &str) -> AdminResult {
    deleted(parts, vec![decoded_id(written)?]).await
}

/// Deletes several sessions.
pub(super) async fn delete_many(parts: &AdminParts, request: &Request<Bytes>) -> Response<Bytes> {
    respond(match object(request).and_then(|body| session_ids(&body)) {
        Ok(ids) => deleted(parts, ids).await,
        Err(reject) => Err(reject),
    })
}

/// Deletes sessions with their traces; later requests with these ids start new sessions.
async fn deleted(parts: &AdminParts, mut ids: Vec<String>) -> AdminResult {
    ids.sort_unstable();
    ids.dedup();
    let stored: Vec<String> = ids.iter().map(|id| stored_id(id)).collect();
    let deleted = traces::bounded(parts.traces.delete_sessions(&stored)).await??;
    let snapshot = parts.fleet.snapshot_owned();
    let mut models: Vec<&str> =
        snapshot.entries.iter().flat_map(|entry| entry.models.iter()).map(|card| card.id.as_str()).collect();
    // Requests that name no model.
    models.push("");
    models.sort_unstable();
    models.dedup();
    for ids in ids.chunks(MAX_FORGOTTEN_AT_ONCE) {
        ids.iter().for_each(|id| parts.state.forget_session(id, models.iter().copied()));
        yield_now().await;
    }
    Ok(answer(StatusCode::OK, &json!({"deleted": deleted})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_are_uuids_of_version_4() {
        assert_eq!(uuid4([0; 16]), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid4([255; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let (one, other) = (random_id().ok(), random_id().ok());
        assert!(one.is_some() && one != other);
    }

    #[test]
    fn rejects_ids_that_a_path_cannot_name() {
        let long = "x".repeat(MAX_ID_BYTES);
        for id in ["a", "harbor/hello-world:0", "v1", "a b", "100%", "a?b#c", "\u{e9}", "/a", "v1/a", &long] {
            assert!(checked_id(id.into()).is_ok(), "{id}");
        }
        let longer = format!("{long}x");
        for id in ["a/v1", "a/v1/b", ".", "..", "a/../b", " a", "a ", "\n", "a\u{7f}", "a/traces", &longer] {
            assert!(checked_id(id.into()).is_err(), "{id}");
        }
        assert_eq!(url_of("harbor/hello-world:0"), "/sessions/harbor/hello-world:0/v1");
        assert_eq!(url_of("a b?"), "/sessions/a%20b%3F/v1");
    }

    #[test]
    fn shows_metadata_of_a_session_unchanged() {
        let mut session = SessionSummary {
            session_id: "a\"b".into(),
            trace_count: 3,
            created_at: 1.5,
            metadata: r#"{"n":1.0}"#.into(),
        };
        let expected = r#"{"session_id":"a\"b","trace_count":3,"created_at":1.5,"metadata":{"n":1.0}}"#;
        assert_eq!(row(&session), expected);
        session.metadata = String::new();
        assert!(row(&session).ends_with(r#""metadata":{}}"#));
    }
}
