//! Responses that an upstream keeps in its memory, and only there: new ones get ids that tell where they are
//! (`route::stored`), and a request for one, or one that continues from it, goes to the upstream that has it.
//!
//! `route::stored::location` decides where that is, from what the sources report; this module reads the
//! sources. An upstream at which no process listens has lost its responses. One that an operator drains still
//! has them, and still answers for them.
//!
//! With the place goes the name that the client gave the model, so that a request for the response has its
//! route.
//!
//! Never: send what continues from a response to an upstream that does not have it, while another has it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;

use super::ProxyShared;
use super::body::BodyInsertion;
use super::client::Client;
use super::exchange::RequestEnd;
use super::headers;
use super::own_answers::ResponseSearchResult;
use super::prompt_work::Placement;
use super::request::{ClientRequest, RequestScope};
use super::route_edits::RouteEdits;
use super::stored_search::SearchKey;
use crate::fleet::{Snapshot, SnapshotEntry};
use crate::reject::Reject;
use crate::route::dialect::BodyDialect;
use crate::route::refusal::{self, RefusalEditor};
use crate::route::stored::location::{
    self, FoundResponse, LocationReport, LocationSource, ResponseDestination, ResponseUse, SOURCES,
};
use crate::route::stored::{ResponseIdStamp, ResponseIdTag, is_id, name_of, number};
use crate::state::exchange::Binding;
use crate::state::responses::ResponseOrigin;

/// The path by which responses are made: requests for a response look its route up by this path, too.
const RESPONSES_PATH: &str = "/v1/responses";

/// The facts of a requested response that the upstream stores.
#[derive(Clone, Copy, Debug)]
pub struct KeptResponse {
    /// The body has the field of the id, if only as null: of equal keys the last one counts.
    pub named: bool,
    pub background: bool,
}

/// A response that is being made.
pub struct PendingResponse {
    stamp: Option<ResponseIdStamp>,
    /// The number of its model's name.
    name: u64,
    /// The answer's id is known.
    learnt: bool,
    /// The present answer, where it is a refusal that counts the client's fields.
    refusal: Option<RefusalEditor>,
}

// === impl PendingResponse ===

impl PendingResponse {
    /// `model` as the client called it.
    pub fn new(shared: &ProxyShared, kept: KeptResponse, body: &[u8], model: Option<&str>) -> Box<Self> {
        let secret = if kept.named { None } else { shared.random.secret() };
        let name = number(model);
        let stamp = secret.and_then(|secret| ResponseIdStamp::new(body, name, secret));
        Box::new(PendingResponse { stamp, name, learnt: false, refusal: None })
    }

    /// The bytes by which the body becomes longer on its way to an upstream.
    pub fn added_length(&self) -> u64 {
        self.stamp.as_ref().map_or(0, |_| ResponseIdStamp::length() as u64)
    }

    /// What is put into the body on its way to this upstream.
    pub fn insertion(&self, upstream: &str) -> Option<BodyInsertion> {
        let (at, text) = self.stamp.as_ref()?.insertion(upstream);
        Some(BodyInsertion { at, text: text.into() })
    }

    /// An answer begins. `body`: the client's, as far as it is held.
    pub fn begin(&mut self, head: &mut ResponseHeader, body: &[u8]) -> Result<()> {
        // An id that was learnt came from an earlier attempt, at another upstream.
        self.learnt = false;
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let refuses = head.status == 400 && text(header::CONTENT_TYPE).starts_with("application/json");
        let plain = text(header::CONTENT_ENCODING).is_empty();
        let stamp = self.stamp.as_ref().filter(|_| refuses && plain && !body.is_empty());
        self.refusal = stamp.and_then(|stamp| match refusal::fields_if_sound(body) {
            Some(fields) => Some(RefusalEditor::new(fields)),
            None => Some(RefusalEditor::new(refusal::fields(body)?).broken_behind(stamp.span())),
        });
        match &self.refusal {
            Some(refusal) if !refusal.keeps_length() => headers::of_unknown_length(head),
            _ => Ok(()),
        }
    }

    /// The next piece of the answer, without the effects of the added id. `None`: it is unchanged.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        Some(Bytes::from(self.refusal.as_mut()?.feed(piece, end)))
    }

    /// Stores the upstream of the answer's id, unless the id itself carries it.
    pub fn record_id(&mut self, shared: &ProxyShared, placement: &Placement, id: &str) {
        if std::mem::replace(&mut self.learnt, true) {
            return;
        }
        let upstream = placement.upstream();
        let own = self.stamp.as_ref().map(|stamp| stamp.id(upstream.name()));
        if location::is_learnt(own.as_deref(), id) {
            let made = ResponseOrigin { upstream: upstream.id, name: self.name };
            shared.state.keep_response(id, made, Instant::now());
        }
    }
}

/// Sends a request that continues from a response to the upstream that has it.
pub async fn route_to_previous(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    previous: Option<&str>,
) -> Result<(), RequestEnd> {
    let Some(id) = previous else { return Ok(()) };
    let shared = scope.shared;
    let mut found = find(scope, client, request, id).await;
    let misplaced = found.misplaced(&**shared.fleet.snapshot(), request.model.name());
    if let Some(first) = misplaced {
        let other = if found.is_unproven() { second_place(shared, request, first, id).await } else { None };
        found = found.moved(other);
    }
    apply_destination(request, &found, id, ResponseUse::Continue)
}

/// Sends a request for a response itself, to get it or to cancel it, to the upstream that has it.
pub async fn route_to_stored(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    id: &str,
) -> Result<(), RequestEnd> {
    let shared = scope.shared;
    let learnt = shared.state.response(id, Instant::now()).map(|made| made.name);
    let name = learnt.or_else(|| Some(ResponseIdTag::read(id)?.name()));
    request.edits = edits(scope, client, name.unwrap_or_default());
    let found = find(scope, client, request, id).await;
    if request.edits.is_none() {
        request.edits = edits(scope, client, found.name);
    }
    let any_ready = shared.fleet.snapshot().any_ready();
    apply_destination(request, &found, id, ResponseUse::Retrieve { any_ready })
}

/// Sends a request to where its response was found.
fn apply_destination(
    request: &mut ClientRequest,
    found: &FoundResponse,
    id: &str,
    response_use: ResponseUse,
) -> Result<(), RequestEnd> {
    match found.destination(response_use) {
        ResponseDestination::Upstream(upstream) => request.only = Some(upstream),
        ResponseDestination::AnyUpstream => {}
        ResponseDestination::NotFound => return Err(Reject::Response { id: id.to_string() }.into()),
        ResponseDestination::NotReady => return Err(Reject::NotReady { model: None }.into()),
    }
    request.unproven = found.is_unproven().then(|| id.into());
    Ok(())
}

/// The head of an answer has come. Whether the request goes to another upstream now: the answer says that the
/// response is not where its id alone places it, and Redis knows of another place.
pub async fn retries_elsewhere(shared: &ProxyShared, request: &mut ClientRequest, status: u16) -> bool {
    if !location::may_be_elsewhere(status, request.pinned, request.body.is_replayable()) {
        return false;
    }
    let Some(id) = request.unproven.take() else { return false };
    // The route's upstreams count, and not the one that it was sent to.
    let Some(first) = request.only.take() else { return false };
    let other = second_place(shared, request, first, &id).await;
    request.only = other.or(Some(first));
    other.is_some()
}

/// The response's upstream in Redis, if it is another one than in its id.
async fn second_place(
    shared: &ProxyShared,
    request: &ClientRequest,
    first: usize,
    id: &str,
) -> Option<usize> {
    let snapshot = shared.fleet.snapshot_owned();
    let report = report_from_redis(shared, &snapshot, request.among(&snapshot).as_deref(), id).await;
    let found = FoundResponse::from_report(LocationSource::Redis, report)?;
    let other = found.in_place_of(first, &*snapshot, request.model.name())?;
    shared.observer.response_found(found.label());
    Some(other)
}

/// The edits of the route by which it was made, as far as the number of its model's name tells.
fn edits(scope: &RequestScope<'_>, client: &Client<'_>, name: u64) -> Option<Box<RouteEdits>> {
    let routes = &scope.settings.peeker.routes;
    let model = name_of(name, routes.names())?;
    let plan = routes.plan(Some(model), RESPONSES_PATH, client.headers())?;
    Some(Box::new(RouteEdits::new(plan, BodyDialect::Responses, Some(model.to_string()), None)))
}

/// Reads the sources until one settles where the response is.
async fn find(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    id: &str,
) -> FoundResponse {
    if !is_id(id) {
        return FoundResponse::nowhere();
    }
    let shared = scope.shared;
    let snapshot = shared.fleet.snapshot_owned();
    let among = request.among(&snapshot);
    let among = among.as_deref();
    let mut found = None;
    for source in SOURCES {
        let report = match source {
            LocationSource::Memory => report_from_memory(shared, &snapshot, among, id),
            LocationSource::Id => report_from_id(&snapshot, among, id),
            LocationSource::Redis => report_from_redis(shared, &snapshot, among, id).await,
            LocationSource::OnlyUpstream => location::only_upstream(&*snapshot, among, request.model.name()),
            LocationSource::Search => report_from_search(scope, client, request, &snapshot, among, id).await,
        };
        found = FoundResponse::from_report(source, report);
        if found.is_some() {
            break;
        }
    }
    let found = found.unwrap_or_else(FoundResponse::nowhere);
    shared.observer.response_found(found.label());
    found
}

/// The report that an upstream, if it is there and among these, has made the response.
fn made_at(entry: Option<&SnapshotEntry>, among: Option<&[usize]>, name: u64) -> LocationReport {
    let Some(entry) = entry.filter(|entry| entry.is_among(among)) else { return LocationReport::Silent };
    let lost = entry.removing || entry.status.lost;
    LocationReport::MadeAt { upstream: entry.upstream.id, lost, name }
}

/// The report of this balancer's memory.
fn report_from_memory(
    shared: &ProxyShared,
    snapshot: &Snapshot,
    among: Option<&[usize]>,
    id: &str,
) -> LocationReport {
    match shared.state.response(id, Instant::now()) {
        Some(made) => made_at(snapshot.by_id(made.upstream), among, made.name),
        None => LocationReport::Silent,
    }
}

/// The report of the id's tag.
fn report_from_id(snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> LocationReport {
    let Some(tag) = ResponseIdTag::read(id) else { return LocationReport::Silent };
    let mut entries = snapshot.entries.iter().filter(|entry| entry.is_among(among));
    made_at(entries.find(|entry| tag.is_at(entry.upstream.name())), among, tag.name())
}

/// The report of Redis.
async fn report_from_redis(
    shared: &ProxyShared,
    snapshot: &Snapshot,
    among: Option<&[usize]>,
    id: &str,
) -> LocationReport {
    let Some(exchange) = shared.exchange.as_ref() else { return LocationReport::Silent };
    match exchange.lookup(Binding::Response, id).await {
        Some(kept) => made_at(snapshot.by_name(&kept.upstream), among, kept.number),
        None => LocationReport::Silent,
    }
}

/// The report of a search of all upstreams, each with the key that the request itself would carry.
async fn report_from_search(
    scope: &RequestScope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    snapshot: &Arc<Snapshot>,
    among: Option<&[usize]>,
    id: &str,
) -> LocationReport {
    let (shared, peeker) = (scope.shared, &scope.settings.peeker);
    // The route by which a request for a response goes when the model that made it is not known.
    let unnamed =
        || peeker.edits_for_model(client, &request.path, None, (BodyDialect::Other, None)).map(Box::new);
    let fallback = if request.edits.is_none() { unnamed() } else { None };
    let edits = request.edits.as_deref().or(fallback.as_deref());
    let asked = snapshot.reachable().filter(|entry| entry.is_among(among)).map(|entry| {
        let upstream = &entry.upstream;
        (upstream.id, headers::authorization(client, edits, upstream))
    });
    let key = SearchKey { id: id.into(), upstreams: asked.collect() };
    match shared.searches.locate(&shared.fleet, snapshot, key).await {
        ResponseSearchResult::At(upstream) => LocationReport::MadeAt { upstream, lost: false, name: 0 },
        ResponseSearchResult::Nowhere => LocationReport::Nowhere,
        ResponseSearchResult::Unsure => LocationReport::Unsure,
    }
}
