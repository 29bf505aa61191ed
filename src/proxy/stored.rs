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

use super::Shared;
use super::body::BodyInsertion;
use super::client::Client;
use super::exchange::Stop;
use super::headers;
use super::own_answers::Located;
use super::prompt_work::Placement;
use super::request::{ClientRequest, Scope};
use super::route_edits::RouteEdits;
use super::stored_search::SearchKey;
use crate::fleet::{Snapshot, SnapshotEntry};
use crate::observe;
use crate::reject::Reject;
use crate::route::dialect::Dialect;
use crate::route::refusal::{self, Refusal};
use crate::route::stored::location::{
    self, FoundResponse, LocationReport, LocationSource, ResponseDestination, ResponseUse, SOURCES,
};
use crate::route::stored::{Stamp, Tag, is_id, name_of, number};
use crate::state::exchange::Binding;
use crate::state::responses::ResponseOrigin;

/// The path by which responses are made: requests for a response look its route up by this path, too.
const PATH: &str = "/v1/responses";

/// What the body says of the response that it requests, unless the upstream is not to keep it.
#[derive(Clone, Copy, Debug)]
pub struct KeptResponse {
    /// The body has the field of the id, if only as null: of equal keys the last one counts.
    pub named: bool,
    pub background: bool,
}

/// A response that is being made.
pub struct PendingResponse {
    stamp: Option<Stamp>,
    /// The number of its model's name.
    name: u64,
    /// The answer has told its id.
    learnt: bool,
    /// The present answer, where it is a refusal that counts the client's fields.
    refusal: Option<Refusal>,
}

// === impl PendingResponse ===

impl PendingResponse {
    /// `model` as the client called it.
    pub fn new(shared: &Shared, kept: KeptResponse, body: &[u8], model: Option<&str>) -> Box<Self> {
        let secret = if kept.named { None } else { shared.random.secret() };
        let name = number(model);
        let stamp = secret.and_then(|secret| Stamp::new(body, name, secret));
        Box::new(PendingResponse { stamp, name, learnt: false, refusal: None })
    }

    /// The bytes by which the body becomes longer on its way to an upstream.
    pub fn added_length(&self) -> u64 {
        self.stamp.as_ref().map_or(0, |_| Stamp::length() as u64)
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
            Some(fields) => Some(Refusal::new(fields)),
            None => Some(Refusal::new(refusal::fields(body)?).broken_behind(stamp.span())),
        });
        match &self.refusal {
            Some(refusal) if !refusal.keeps_length() => headers::of_unknown_length(head),
            _ => Ok(()),
        }
    }

    /// The next piece of the answer, without what is in it on account of the id. `None`: it goes on as it is.
    pub fn piece(&mut self, piece: &[u8], end: bool) -> Option<Bytes> {
        Some(Bytes::from(self.refusal.as_mut()?.feed(piece, end)))
    }

    /// The answer has told its id, whose place is learnt where the id does not tell it.
    pub fn learn(&mut self, shared: &Shared, placement: &Placement, id: &str) {
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
pub async fn follow(
    scope: &Scope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    previous: Option<&str>,
) -> Result<(), Stop> {
    let Some(id) = previous else { return Ok(()) };
    let shared = scope.shared;
    let mut found = find(scope, client, request, id).await;
    let misplaced = found.misplaced(&**shared.fleet.snapshot(), request.model.name());
    if let Some(first) = misplaced {
        let other = if found.is_unproven() { second_place(shared, request, first, id).await } else { None };
        found = found.moved(other);
    }
    direct(request, &found, id, ResponseUse::Continue)
}

/// Sends a request for a response itself, to get it or to cancel it, to the upstream that has it.
pub async fn again(
    scope: &Scope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    id: &str,
) -> Result<(), Stop> {
    let shared = scope.shared;
    let learnt = shared.state.response(id, Instant::now()).map(|made| made.name);
    let name = learnt.or_else(|| Some(Tag::read(id)?.name()));
    request.edits = edits(scope, client, name.unwrap_or_default());
    let found = find(scope, client, request, id).await;
    if request.edits.is_none() {
        request.edits = edits(scope, client, found.name);
    }
    let any_ready = shared.fleet.snapshot().any_ready();
    direct(request, &found, id, ResponseUse::Retrieve { any_ready })
}

/// Sends a request to where its response was found.
fn direct(
    request: &mut ClientRequest,
    found: &FoundResponse,
    id: &str,
    response_use: ResponseUse,
) -> Result<(), Stop> {
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
pub async fn elsewhere(shared: &Shared, request: &mut ClientRequest, status: u16) -> bool {
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

/// Where a response is by what stands in Redis, if that is another upstream than its id tells.
async fn second_place(shared: &Shared, request: &ClientRequest, first: usize, id: &str) -> Option<usize> {
    let snapshot = shared.fleet.snapshot_owned();
    let report = kept(shared, &snapshot, request.among(&snapshot).as_deref(), id).await;
    let found = FoundResponse::from_report(LocationSource::Redis, report)?;
    let other = found.in_place_of(first, &*snapshot, request.model.name())?;
    observe::response_found(found.label());
    Some(other)
}

/// The edits of the route by which it was made, as far as the number of its model's name tells.
fn edits(scope: &Scope<'_>, client: &Client<'_>, name: u64) -> Option<Box<RouteEdits>> {
    let routes = &scope.settings.peeker.routes;
    let model = name_of(name, routes.names())?;
    let plan = routes.plan(Some(model), PATH, client.headers())?;
    Some(Box::new(RouteEdits::new(plan, Dialect::Responses, Some(model.to_string()), None)))
}

/// Reads the sources until one settles where the response is.
async fn find(scope: &Scope<'_>, client: &Client<'_>, request: &ClientRequest, id: &str) -> FoundResponse {
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
            LocationSource::Memory => learnt(shared, &snapshot, among, id),
            LocationSource::Id => tagged(&snapshot, among, id),
            LocationSource::Redis => kept(shared, &snapshot, among, id).await,
            LocationSource::OnlyUpstream => location::only_upstream(&*snapshot, among, request.model.name()),
            LocationSource::Search => searched(scope, client, request, &snapshot, among, id).await,
        };
        found = FoundResponse::from_report(source, report);
        if found.is_some() {
            break;
        }
    }
    let found = found.unwrap_or_else(FoundResponse::nowhere);
    observe::response_found(found.label());
    found
}

/// The report that an upstream, if it is there and among these, has made the response.
fn made_at(entry: Option<&SnapshotEntry>, among: Option<&[usize]>, name: u64) -> LocationReport {
    let Some(entry) = entry.filter(|entry| entry.is_among(among)) else { return LocationReport::Silent };
    let lost = entry.removing || entry.status.lost;
    LocationReport::MadeAt { upstream: entry.upstream.id, lost, name }
}

/// What this balancer has learnt.
fn learnt(shared: &Shared, snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> LocationReport {
    match shared.state.response(id, Instant::now()) {
        Some(made) => made_at(snapshot.by_id(made.upstream), among, made.name),
        None => LocationReport::Silent,
    }
}

/// What the id tells.
fn tagged(snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> LocationReport {
    let Some(tag) = Tag::read(id) else { return LocationReport::Silent };
    let mut entries = snapshot.entries.iter().filter(|entry| entry.is_among(among));
    made_at(entries.find(|entry| tag.is_at(entry.upstream.name())), among, tag.name())
}

/// What stands in Redis.
async fn kept(shared: &Shared, snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> LocationReport {
    let Some(exchange) = shared.exchange.as_ref() else { return LocationReport::Silent };
    match exchange.lookup(Binding::Response, id).await {
        Some(kept) => made_at(snapshot.by_name(&kept.upstream), among, kept.number),
        None => LocationReport::Silent,
    }
}

/// What the upstreams answer when all of them are asked, each with the key that the request itself would
/// bring.
async fn searched(
    scope: &Scope<'_>,
    client: &Client<'_>,
    request: &ClientRequest,
    snapshot: &Arc<Snapshot>,
    among: Option<&[usize]>,
    id: &str,
) -> LocationReport {
    let (shared, peeker) = (scope.shared, &scope.settings.peeker);
    // The route by which a request for a response goes when the model that made it is not known.
    let unnamed = || peeker.routed(client, &request.path, None, (Dialect::Other, None)).map(Box::new);
    let fallback = if request.edits.is_none() { unnamed() } else { None };
    let edits = request.edits.as_deref().or(fallback.as_deref());
    let asked = snapshot.reachable().filter(|entry| entry.is_among(among)).map(|entry| {
        let upstream = &entry.upstream;
        (upstream.id, headers::authorization(client, edits, upstream))
    });
    let key = SearchKey { id: id.into(), upstreams: asked.collect() };
    match shared.searches.locate(&shared.fleet, snapshot, key).await {
        Located::At(upstream) => LocationReport::MadeAt { upstream, lost: false, name: 0 },
        Located::Nowhere => LocationReport::Nowhere,
        Located::Unsure => LocationReport::Unsure,
    }
}
