//! Requests that continue from the recorded tokens of their session's last turn (`traces.cumulative`).
//!
//! `route::cumulative` has the rules; this module finds the last turn, has the chat tokenised by an upstream,
//! and sends the completion in place of the chat. The answer becomes a chat's again before anything else
//! reads it, so that capture, usage and the route's edits see what they see of every chat.
//!
//! Never: reject a request because of this mode. A turn that cannot be continued, or whose completion the
//! upstream rejects, is sent as the chat.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use http::{HeaderValue, Request, StatusCode, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use tokio::task::spawn_blocking;

use super::body::SentBody;
use super::capture::RequestCapture;
use super::client::Client;
use super::continued_turn::ContinuedTurn;
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::route_edits::authorization;
use super::watch::RequestWatch;
use super::watched::watched;
use crate::fleet::{Fleet, SnapshotEntry, Upstream};
use crate::observe::Observer;
use crate::route::cumulative::{ChatTurn, FallbackReason, RecordedTurn, memory_needed, parse_tokens};
use crate::route::edit::MAX_WORKER_TREE_BYTES;
use crate::traces::Traces;

/// How long an upstream may take to tokenise a chat.
const MAX_TOKENIZE_TIME: Duration = Duration::from_secs(2);

const COMPLETIONS_PATH: &str = "/v1/completions";
const TOKENIZE_PATH: &str = "/tokenize";

/// The plan for a turn before its upstream answers.
enum TurnPlan {
    /// There is nothing to continue from.
    First,
    Fallback(FallbackReason),
    Continue {
        chat: ChatTurn,
        recorded: Arc<RecordedTurn>,
    },
}

/// Turns a request that is captured into the completion that continues from its session's last turn, where
/// there is one. The body is complete.
pub(super) async fn continue_turn(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    watch: &mut RequestWatch,
) -> Result<(), RequestEnd> {
    let traces = &scope.shared.traces;
    // The messages of a translated request are not its client's.
    if request.edits.as_ref().is_some_and(|edits| edits.translates()) {
        return Ok(());
    }
    let Some(session) = request.capture.as_ref().and_then(|capture| capture.continued_session()) else {
        return Ok(());
    };
    let session = session.to_string();
    let body = request.body.whole();
    let mut working = request.body.reservation_beside();
    let plan = if working.grow_to(memory_needed(body.len())) {
        let planning = plan_turn(traces, &session, body);
        watched(client, request, watch, true, Box::pin(planning)).await?
    } else {
        TurnPlan::Fallback(FallbackReason::Size)
    };
    let continued = match plan {
        TurnPlan::First => None,
        TurnPlan::Fallback(reason) => Some(Err(reason)),
        TurnPlan::Continue { chat, recorded } => {
            Some(send_completion(scope, client, request, watch, &chat, &recorded).await?)
        }
    };
    let Some(capture) = &mut request.capture else { return Ok(()) };
    match continued {
        None => {
            scope.shared.observer.cumulative_turn("first");
            capture.set_cumulative("first".into());
        }
        Some(Err(reason)) => fall_back(&scope.shared.observer, capture, reason),
        // Counted once an upstream has taken it.
        Some(Ok(())) => capture.set_cumulative("continued".into()),
    }
    Ok(())
}

fn fall_back(observer: &Observer, capture: &mut RequestCapture, reason: FallbackReason) {
    observer.cumulative_turn(reason.label());
    capture.set_cumulative(format!("fallback: {}", reason.label()));
}

/// Reads the chat, and finds the turn that it continues.
async fn plan_turn(traces: &Traces, session: &str, body: Bytes) -> TurnPlan {
    let known = match traces.last_turn(session).await {
        Ok(known) => known,
        Err(reason) => return TurnPlan::Fallback(reason),
    };
    if known.is_none() && !traces.may_have_stored_turns() {
        return TurnPlan::First;
    }
    let read = if body.len() > MAX_WORKER_TREE_BYTES {
        spawn_blocking(move || ChatTurn::read(&body)).await.unwrap_or(Err(FallbackReason::Size))
    } else {
        ChatTurn::read(&body)
    };
    let chat = match read {
        Ok(chat) => chat,
        Err(reason) => return TurnPlan::Fallback(reason),
    };
    if !chat.has_history() {
        return TurnPlan::First;
    }
    let continued = |turn: &RecordedTurn| turn.continued_by(&chat).map(drop);
    let verdict = known.as_deref().map(&continued);
    let (recorded, verdict) = match (known, verdict) {
        (Some(known), Some(Ok(()))) => (Some(known), Some(Ok(()))),
        (known, verdict) => match traces.stored_turn(session, known.is_some()).await {
            Some(stored) => {
                let verdict = continued(&stored);
                (Some(Arc::new(stored)), Some(verdict))
            }
            None => (known, verdict),
        },
    };
    match (recorded, verdict) {
        (Some(recorded), Some(verdict)) => match verdict.and_then(|()| chat.check()) {
            Ok(()) => TurnPlan::Continue { chat, recorded },
            Err(reason) => TurnPlan::Fallback(reason),
        },
        _ => TurnPlan::First,
    }
}

/// Puts the completion in the place of the chat.
async fn send_completion(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    watch: &mut RequestWatch,
    chat: &ChatTurn,
    recorded: &RecordedTurn,
) -> Result<std::result::Result<(), FallbackReason>, RequestEnd> {
    let continuation = match recorded.continued_by(chat) {
        Ok(continuation) => continuation,
        Err(reason) => return Ok(Err(reason)),
    };
    let Some((upstream, key)) = tokenizer(scope, client, request, recorded.upstream.as_deref()) else {
        return Ok(Err(FallbackReason::Tokenizer));
    };
    let asking = tokenize(&scope.shared.fleet, &upstream, key, continuation.tokenize_bodies());
    let Some((tokens, probe)) = watched(client, request, watch, true, Box::pin(asking)).await? else {
        return Ok(Err(FallbackReason::Tokenizer));
    };
    let prompt = match continuation.prompt(&tokens, &probe) {
        Ok(prompt) => prompt,
        Err(reason) => return Ok(Err(reason)),
    };
    let completion = SentBody::new(chat.completion(&prompt).into());
    let Some(sent) = request.body.exchange(completion) else { return Ok(Err(FallbackReason::Size)) };
    request.continued = Some(Box::new(ContinuedTurn::new(sent, chat.token_form())));
    Ok(Ok(()))
}

/// The upstream that tokenises, and the key for it: the one that had the last turn, else any that may have
/// this one.
fn tokenizer(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    last: Option<&str>,
) -> Option<(Arc<Upstream>, Option<HeaderValue>)> {
    let snapshot = scope.shared.fleet.snapshot();
    let among = request.among(&snapshot);
    let may_have = |entry: &&SnapshotEntry| {
        let id = entry.upstream.id;
        request.only.is_none_or(|only| only == id)
            && among.as_ref().is_none_or(|among| among.contains(id))
            && request.model.name().is_none_or(|model| entry.serves(model))
    };
    let mut possible = snapshot.ready().filter(may_have).peekable();
    let first = possible.peek().map(|entry| entry.upstream.clone());
    let last = possible.find(|entry| Some(entry.upstream.name()) == last);
    let upstream = last.map(|entry| entry.upstream.clone()).or(first)?;
    let key = authorization(client, request.edits.as_deref(), &upstream);
    Some((upstream, key))
}

/// The tokens of both chats.
async fn tokenize(
    fleet: &Fleet,
    upstream: &Upstream,
    key: Option<HeaderValue>,
    [chat, probe]: [Vec<u8>; 2],
) -> Option<(Vec<u32>, Vec<u32>)> {
    let ask = async |body: Vec<u8>| {
        let mut request = Request::post(TOKENIZE_PATH).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &key {
            request = request.header(header::AUTHORIZATION, key);
        }
        let request = request.body(Bytes::from(body)).ok()?;
        let answer = fleet.client().request_with_key(upstream, request, MAX_TOKENIZE_TIME).await.ok()?;
        if answer.status() == StatusCode::OK { parse_tokens(answer.body()) } else { None }
    };
    let (chat, probe) = join(ask(chat), ask(probe)).await;
    chat.zip(probe)
}

/// The target of a request that is sent as a completion.
pub(super) fn target(request: &ClientRequest, head: &RequestHeader) -> Option<String> {
    request.continued.as_ref()?;
    let query = head.uri.query().map_or(String::new(), |query| format!("?{query}"));
    Some(format!("{COMPLETIONS_PATH}{query}"))
}

/// Whether the answer is held until it is whole: only then another attempt can follow an unreadable answer.
pub(super) fn holds(request: &ClientRequest, head: &ResponseHeader) -> bool {
    let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let is_json = kind.is_some_and(|kind| kind.trim_start().starts_with("application/json"));
    request.continued.is_some() && head.status.is_success() && is_json
}

/// Whether an answer of this status refuses the completion, so that the chat is sent in its place now.
pub(super) fn is_refused(scope: &RequestScope<'_>, request: &mut ClientRequest, status: u16) -> bool {
    let refuses = matches!(status, 400..=407 | 409..=428 | 430..=499 | 501);
    refuses && give_up(scope, request)
}

/// Puts the chat back in the place of the completion. False: the request is none, or its body has gone.
pub(super) fn give_up(scope: &RequestScope<'_>, request: &mut ClientRequest) -> bool {
    if !request.body.is_replayable() {
        return false;
    }
    let Some(continued) = request.continued.take() else { return false };
    // This succeeds: the completion's reservation was made beside the chat's.
    let is_back = request.body.exchange(continued.into_chat()).is_some();
    if let Some(capture) = &mut request.capture {
        fall_back(&scope.shared.observer, capture, FallbackReason::Refused);
    }
    is_back
}
