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

use super::client::Client;
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::route_edits::{RouteEdits, authorization};
use super::shared::ProxyShared;
use super::stored_search::{ResponseSearchResult, SearchKey};
use crate::fleet::{Snapshot, SnapshotEntry};
use crate::reject::Reject;
use crate::route::dialect::BodyDialect;
use crate::route::stored::location::{
    self, FoundResponse, LocationReport, LocationSource, ResponseDestination, ResponseUse, SOURCES,
};
use crate::route::stored::{ResponseIdTag, is_id, name_of};
use crate::route::upstreams::RouteUpstreams;
use crate::state::exchange::Binding;

/// The path by which responses are made: requests for a response look its route up by this path, too.
const RESPONSES_PATH: &str = "/v1/responses";

/// Sends a request that continues from a response to the upstream that has it.
pub(super) async fn route_to_previous(
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
pub(super) async fn route_to_stored(
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
pub(super) async fn retries_elsewhere(
    shared: &ProxyShared,
    request: &mut ClientRequest,
    status: u16,
) -> bool {
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
    let among = request.among(&snapshot);
    let among = among.as_deref().map(RouteUpstreams::ids);
    let report = report_from_redis(shared, &snapshot, among, id).await;
    let found = FoundResponse::from_report(LocationSource::Redis, report)?;
    let other = found.in_place_of(first, &*snapshot, request.model.name())?;
    shared.observer.response_found(found.label());
    Some(other)
}

/// The edits of the route by which it was made, as far as the number of its model's name tells.
fn edits(scope: &RequestScope<'_>, client: &Client<'_>, name: u64) -> Option<Box<RouteEdits>> {
    let routes = &scope.settings.peeker.routes;
    let model = name_of(name, routes.names())?;
    let dialect = (BodyDialect::Responses, None);
    RouteEdits::for_model(routes, client, RESPONSES_PATH, Some(model), dialect).map(Box::new)
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
    let among = among.as_deref().map(RouteUpstreams::ids);
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
    let (shared, routes) = (scope.shared, &scope.settings.peeker.routes);
    // The route by which a request for a response goes when the model that made it is not known.
    let unnamed = || RouteEdits::for_model(routes, client, &request.path, None, (BodyDialect::Other, None));
    let fallback = if request.edits.is_none() { unnamed() } else { None };
    let edits = request.edits.as_deref().or(fallback.as_ref());
    let asked = snapshot.reachable().filter(|entry| entry.is_among(among)).map(|entry| {
        let upstream = &entry.upstream;
        (upstream.id, authorization(client, edits, upstream))
    });
    let key = SearchKey { id: id.into(), upstreams: asked.collect() };
    match shared.searches.locate(&shared.fleet, snapshot, key).await {
        ResponseSearchResult::At(upstream) => LocationReport::MadeAt { upstream, lost: false, name: 0 },
        ResponseSearchResult::Nowhere => LocationReport::Nowhere,
        ResponseSearchResult::Unsure => LocationReport::Unsure,
    }
}
