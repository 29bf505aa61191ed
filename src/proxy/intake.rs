//! Turns a head into a request that can be sent, or into an answer of the balancer's own.
//!
//! In this order: the head is checked, its API route found, the body peeked, the configured route and the
//! stored response looked up. A rejection is a `RequestEnd`: nothing has been sent then.
//!
//! Never: a lease, a choice among upstreams, a byte of an answer.

pub(super) mod body_facts;
mod capture_body;
pub(super) mod peek;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::time::{Instant, timeout_at};

use super::admin_service::AdminBody;
use super::capture::RequestCapture;
use super::client::Client;
use super::memory::MemoryReservation;
use super::pending_response::PendingResponse;
use super::request::{BodySamples, ClientRequest, RequestScope, RequestedModel};
use super::request_end::{RequestEnd, client_failure};
use super::route_edits::RouteEdits;
use super::watch::RequestWatch;
use super::watched::watched;
use super::{cumulative, headers, own_answers, slo, stored};
use crate::config::types::Timeouts;
use crate::fleet::Snapshot;
use crate::reject::{ErrorShape, Reject};
use crate::reply::ending::ErrorEventForm;
use crate::route::api_paths::{
    self, AggregateKind, Api, ApiRoute, ErrorStyle, ModelLocation, OwnAnswer, PathMatch, PathPolicy, location,
};
use crate::route::dialect::BodyDialect;
use crate::route::upstreams::RouteUpstreams;
use body_facts::BodyShape;
use peek::{HeadFacts, PeekNeeds, Peeked};

/// The largest body of a call that is held whole: one to the admin API, or one to all upstreams. None of
/// these carries more than settings, or a list of ids.
const MAX_CALL_BODY_BYTES: u64 = 1 << 20;

/// How long a client may take for such a body.
const CALL_BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Where SageMaker names a model.
const ADAPTER_HEADER: &str = "x-amzn-sagemaker-adapter-identifier";

/// The next step of a request.
pub(super) enum Intake {
    /// It is sent to an upstream, and watched.
    Forward(RequestWatch),
    /// The balancer answers it.
    Answer(Response<Bytes>),
    /// The admin API answers it with a stream.
    Stream(Response<AdminBody>),
}

/// Reads a request's head and peeks its body into `request`.
pub(super) async fn take_in(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
) -> Result<Intake, RequestEnd> {
    if let Some(reject) = headers::refuse(client.session(), scope.settings.header_bytes, &scope.shared.mark) {
        return Err(reject.into());
    }
    match call_admin(scope, client, request).await? {
        Some(answer) => Ok(of_admin(answer).await),
        None => route(scope, client, request).await,
    }
}

/// Hands an admin listener's request to the admin API; `None` is a request like any other.
///
/// A call with a body is handed in twice: first its head alone, as with `expect: 100-continue`, so that
/// nothing is read of a call that the API rejects.
async fn call_admin(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
) -> Result<Option<Response<AdminBody>>, RequestEnd> {
    let Some(admin) = scope.admin else { return Ok(None) };
    let head = client.head();
    if !admin.serves(head.uri.path()) {
        return Ok(None);
    }
    request.admin = true;
    let mut call = Request::new(Bytes::new());
    *call.method_mut() = head.method.clone();
    *call.uri_mut() = head.uri.clone();
    *call.headers_mut() = head.headers.clone();
    if !client.has_no_body() {
        call.headers_mut().insert(header::EXPECT, HeaderValue::from_static("100-continue"));
        let permission = admin.call(call.clone()).await;
        if permission.status() != StatusCode::CONTINUE {
            return Ok(Some(permission));
        }
        *call.body_mut() = read_call(client, MAX_CALL_BODY_BYTES, None).await?;
    }
    call.headers_mut().remove(header::EXPECT);
    // No upstream answers this call, so the deadlines of requests do not apply.
    let mut watch = RequestWatch::new(scope.shared.fleet.clone(), Timeouts::default(), scope.begun);
    Ok(Some(watched(client, request, &mut watch, true, admin.call(call)).await?))
}

/// An answer of the admin API: whole, where its size is known, else a stream.
async fn of_admin(answer: Response<AdminBody>) -> Intake {
    if answer.body().size_hint().exact().is_none() {
        return Intake::Stream(answer);
    }
    let (head, body) = answer.into_parts();
    match body.collect().await {
        Ok(collected) => Intake::Answer(Response::from_parts(head, collected.to_bytes())),
        Err(never) => match never {},
    }
}

/// Finds the API route of a request, and answers the request or makes it ready to be sent.
async fn route(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
) -> Result<Intake, RequestEnd> {
    add_host_field(client);
    take_session(client, request);
    let head = client.head();
    let Some(path) = api_paths::decode(head.uri.path()) else { return Err(Reject::Path.into()) };
    request.path = path.into_owned();
    let ApiRoute { api, policy } = match scope.settings.table.find(head.method.as_str(), &request.path) {
        PathMatch::Route(route) => route,
        PathMatch::NotFound => return Err(Reject::Path.into()),
        PathMatch::MethodNotAllowed { allow } => return Err(Reject::Method { allow }.into()),
        PathMatch::Redirect { to } => {
            let host = headers::host(head).unwrap_or_default();
            let location = location(client.is_https(), &host, &to, head.uri.query());
            return Err(Reject::Redirect { location }.into());
        }
    };
    if api.is_websocket() {
        if !client.is_upgrade() {
            return Err(Reject::Path.into());
        }
    } else if client.headers().contains_key(header::UPGRADE) {
        // Some clients offer an upgrade to HTTP/2 with every request; it is ignored.
        let head = client.head_mut();
        head.remove_header(&header::UPGRADE);
        head.remove_header("http2-settings");
    }
    request.form = match api {
        Api::Responses | Api::ResponseById => ErrorEventForm::Responses,
        Api::Messages => ErrorEventForm::Messages,
        _ => ErrorEventForm::Data,
    };
    request.style = match api.error_style() {
        ErrorStyle::Anthropic => ErrorShape::Anthropic,
        ErrorStyle::OpenAi | ErrorStyle::Detail => ErrorShape::OpenAi,
    };
    let shared = scope.shared;
    match policy {
        PathPolicy::Deny => Err(Reject::Path.into()),
        PathPolicy::Answer(OwnAnswer::Health) => {
            let health = own_answers::health(&shared.fleet.snapshot(), shared.shutdown.is_unready());
            Ok(Intake::Answer(health))
        }
        PathPolicy::Aggregate(what) => aggregate(scope, what).await,
        PathPolicy::FanOut => fan_out(scope, client, request).await,
        PathPolicy::Upstream(name) => {
            let named = shared.fleet.snapshot().by_name(&name).map(|entry| entry.upstream.id);
            request.only = Some(named.unwrap_or(usize::MAX));
            let watch = read_body(scope, client, request, BodyShape::Opaque, false).await?;
            request.model = RequestedModel::Unreadable;
            // A control call may have done its work before its connection broke: it is sent once.
            request.pinned = true;
            Ok(Intake::Forward(watch))
        }
        PathPolicy::Sticky { id } => {
            stored::route_to_stored(scope, client, request, &id).await?;
            let watch = read_body(scope, client, request, BodyShape::Opaque, false).await?;
            request.model = RequestedModel::Unreadable;
            Ok(Intake::Forward(watch))
        }
        PathPolicy::Route { .. } => route_inference(scope, client, request, api).await,
    }
}

/// Copies HTTP/2's authority into the `host` field, where routes read it.
fn add_host_field(client: &mut Client<'_>) {
    let head = client.head();
    let host = headers::host(head).filter(|_| !head.headers.contains_key(header::HOST));
    if let Some(host) = host.and_then(|host| HeaderValue::try_from(host).ok()) {
        // A field that the head has room for; without it routes see no host.
        client.head_mut().insert_header(header::HOST, host).ok();
    }
}

/// Removes a session from the path; the rest is the path of the interface.
fn take_session(client: &mut Client<'_>, request: &mut ClientRequest) {
    let uri = &client.head().uri;
    let Some((name, rest)) = api_paths::of_session(uri.path()) else { return };
    let query = uri.query().map_or(String::new(), |query| format!("?{query}"));
    // A piece of a path is a path.
    let Ok(inner) = Uri::try_from(format!("{rest}{query}")) else { return };
    request.path_session = Some(name.into_owned());
    client.head_mut().set_uri(inner);
}

async fn aggregate(scope: &RequestScope<'_>, what: AggregateKind) -> Result<Intake, RequestEnd> {
    let (fleet, pages) = (&scope.shared.fleet, &scope.shared.pages);
    let snapshot = fleet.snapshot_owned();
    if !snapshot.any_ready() {
        return Err(Reject::NotReady { model: None }.into());
    }
    Ok(Intake::Answer(match what {
        AggregateKind::Models => own_answers::models(&snapshot, &scope.settings.peeker.routes),
        AggregateKind::Version => own_answers::version(&snapshot),
        AggregateKind::Load => own_answers::load(pages, fleet).await,
        AggregateKind::Metrics => own_answers::metrics(pages, fleet).await,
    }))
}

async fn fan_out(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
) -> Result<Intake, RequestEnd> {
    let peeker = &scope.settings.peeker;
    let mut held = peeker.memory.reservation();
    let body = read_call(client, peeker.limits.max_body.min(MAX_CALL_BODY_BYTES), Some(&mut held)).await?;
    let head = client.head();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_string();
    let (method, fields) = (head.method.clone(), head.headers.clone());
    let expose = scope.settings.expose;
    let asked = own_answers::fan_out(&scope.shared.fleet, (&method, &path), &fields, body, expose);
    // No upstream answers it: the deadlines of requests do not hold.
    let mut watch = RequestWatch::new(scope.shared.fleet.clone(), Timeouts::default(), scope.begun);
    match watched(client, request, &mut watch, true, asked).await? {
        Some(answer) => Ok(Intake::Answer(answer)),
        None => Err(Reject::NotReady { model: None }.into()),
    }
}

/// Prepares a request for a model: finds the model's name.
async fn route_inference(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    api: Api,
) -> Result<Intake, RequestEnd> {
    request.counts_tokens = api.counts_tokens();
    request.slo = slo::limit_of(client.headers(), scope.settings.slo)?;
    let kind = client.headers().get(header::CONTENT_TYPE);
    let kind = kind.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let shape = match api.model_in() {
        ModelLocation::Json | ModelLocation::Sniff => BodyShape::Json(api),
        ModelLocation::Multipart => kind.map_or(BodyShape::Opaque, BodyShape::Multipart),
        ModelLocation::Query | ModelLocation::Nowhere => BodyShape::Opaque,
    };
    let decides = scope.shared.fleet.snapshot().model_decides();
    let watch = read_body(scope, client, request, shape, decides).await?;
    match api.model_in() {
        ModelLocation::Query => take_model_of_query(scope, client, request)?,
        ModelLocation::Nowhere => request.model = RequestedModel::Unreadable,
        // The name that its route gives is in the body, before which the field would go.
        ModelLocation::Sniff if request.edits.as_ref().is_some_and(|edits| edits.renames()) => {
            client.head_mut().remove_header(ADAPTER_HEADER);
        }
        ModelLocation::Json | ModelLocation::Multipart | ModelLocation::Sniff => {}
    }
    let snapshot = scope.shared.fleet.snapshot();
    if request.model == RequestedModel::Any && !has_model(scope, request, &snapshot) {
        if !snapshot.any_ready() {
            return Err(Reject::NotReady { model: None }.into());
        }
        // vLLM would use its own model; several upstreams may have several.
        let aliases = scope.settings.peeker.routes.aliases(&snapshot);
        return Err(Reject::Model { model: String::new(), aliases }.into());
    }
    Ok(Intake::Forward(watch))
}

/// Whether a request without a model goes to upstreams with one model.
fn has_model(scope: &RequestScope<'_>, request: &ClientRequest, snapshot: &Snapshot) -> bool {
    // The route of the model that it would get would not be the one that it has.
    let has_one = || snapshot.serves_one_base(request.among(snapshot).as_deref().map(RouteUpstreams::ids));
    !scope.settings.peeker.routes.depends_on_model() && (request.only.is_some() || has_one())
}

/// Peeks the body, if there is one, and stores its facts in `request`.
async fn read_body(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    shape: BodyShape,
    model_decides: bool,
) -> Result<RequestWatch, RequestEnd> {
    let (shared, peeker) = (scope.shared, &scope.settings.peeker);
    let is_upgrade = client.is_upgrade();
    if !is_upgrade {
        peeker.check_declared_length(client)?;
        permit_body(client).await?;
        let needs = PeekNeeds {
            model: model_decides || !peeker.routes.is_empty(),
            // With one upstream, the response is there or nowhere.
            previous: shared.fleet.snapshot().entries.len() > 1,
            // A request for a stored response needs no route: the response's own request had one.
            route: request.edits.is_none(),
        };
        let adapter = adapter(client, &shape);
        let head = HeadFacts {
            traces: &shared.traces,
            random: &shared.random,
            observer: &shared.observer,
            path: &request.path,
            session: request.path_session.as_deref(),
            model: adapter.as_deref(),
        };
        let mut edits = None;
        let peeked = peeker.peek(client, shape, head, needs, &mut edits).await;
        // A refusal has the headers of its route, too.
        request.edits = request.edits.take().or(edits);
        let mut peeked = peeked?;
        if let Some(prepared) = peeked.capture.take() {
            let model = request.client_model().or(peeked.facts.model.name());
            let capture = RequestCapture::begin(shared, (scope.id, scope.begun), *prepared, model);
            request.capture = Some(capture);
        }
        let Peeked { body, pace, waited, facts, usage_injection, .. } = peeked;
        request.model = facts.model;
        (request.usage_injection, request.session_label) = (usage_injection, facts.session_label);
        stored::route_to_previous(scope, client, request, facts.previous_response_id.as_deref()).await?;
        request.tokens = shared.state.prompt(&facts.prompt).tokens;
        (request.prompt, request.prompt_tail) = (facts.prompt, facts.prompt_tail);
        (request.streams, request.pinned) = (facts.streams, facts.pinned);
        if let Some(limit) = scope.settings.sample {
            let mut samples = BodySamples { limit, ..BodySamples::default() };
            BodySamples::keep(&mut samples.request, limit, body.bytes());
            request.samples = Some(Box::new(samples));
        }
        if let Some(kept) = facts.kept {
            let pending = PendingResponse::new(&shared.random, kept, body.bytes(), request.client_model());
            request.pending_response = Some(pending);
            request.background = kept.background;
        }
        client.set_background(request.background);
        let mut watch =
            RequestWatch::new(shared.fleet.clone(), request.timeouts(scope.settings), scope.begun);
        watch.set_upload((!body.is_complete()).then_some(pace));
        watch.add_body_wait(waited);
        request.body = body;
        if request.capture.is_some() && shared.traces.is_cumulative() {
            // Boxed: other requests should not hold its room.
            Box::pin(cumulative::continue_turn(scope, client, request, &mut watch)).await?;
        }
        return Ok(watch);
    }
    Ok(RequestWatch::new(shared.fleet.clone(), request.timeouts(scope.settings), scope.begun))
}

/// Permits a client that asks for permission to send its body, before it is read.
async fn permit_body(client: &mut Client<'_>) -> Result<(), RequestEnd> {
    if client.asks_permission() {
        client.permit_body().await.map_err(RequestEnd::Disconnected)?;
    }
    Ok(())
}

/// Reads the body of a call, `limit` bytes at the most. `held`: what it takes of `peek.memory`; a call
/// without it, an operator's, is read also when clients have used all of that up.
async fn read_call(
    client: &mut Client<'_>,
    limit: u64,
    mut held: Option<&mut MemoryReservation>,
) -> Result<Bytes, RequestEnd> {
    let mut body = BytesMut::new();
    if client.has_no_body() {
        return Ok(body.freeze());
    }
    if headers::length(client.headers()).is_some_and(|length| length > limit) {
        return Err(Reject::TooLarge { limit }.into());
    }
    permit_body(client).await?;
    let deadline = Instant::now() + CALL_BODY_TIMEOUT;
    loop {
        let Ok(piece) = timeout_at(deadline, client.read()).await else {
            return Err(Reject::Slow.into());
        };
        let Some(piece) = piece.map_err(client_failure)? else { return Ok(body.freeze()) };
        let total = (body.len() + piece.len()) as u64;
        if total > limit {
            return Err(Reject::TooLarge { limit }.into());
        }
        // Twice as much each time, as the buffer takes it.
        if held.as_mut().is_some_and(|held| !held.grow_to(total.next_power_of_two())) {
            return Err(Reject::Memory.into());
        }
        body.extend_from_slice(&piece);
    }
}

/// Reads the model from the query: the model in a websocket arrives only after the upgrade. The route's edits
/// apply to the head alone, since the messages of the socket are not read.
fn take_model_of_query(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
) -> Result<(), Reject> {
    request.model = model_of_query(client.head().uri.query().unwrap_or_default())?;
    let mut model = request.model.name().map(str::to_string);
    let (routes, of_query) = (&scope.settings.peeker.routes, (BodyDialect::Other, None));
    let edits = match &model {
        Some(model) => RouteEdits::for_model(routes, client, &request.path, Some(model), of_query),
        None => {
            let (resolved, edits) = RouteEdits::without_model(routes, client, &request.path, of_query);
            model = resolved;
            edits
        }
    };
    let Some(edits) = edits.map(Box::new) else { return Ok(()) };
    let served = edits.served().map(str::to_string);
    request.edits = Some(edits);
    let Some(served) = served.filter(|served| Some(served) != model.as_ref()) else { return Ok(()) };
    let uri = &client.head().uri;
    let renamed = api_paths::with_model(uri.path(), uri.query().unwrap_or_default(), &served);
    if let Ok(renamed) = Uri::try_from(renamed) {
        client.head_mut().set_uri(renamed);
        request.model = RequestedModel::Named(served);
    }
    Ok(())
}

/// `?model=`, if there is one. Of two, servers take the first or the last.
fn model_of_query(query: &str) -> Result<RequestedModel, Reject> {
    // In the encoding of forms, where broken escapes are text.
    let decoded = |text: &str| {
        let text = text.replace('+', " ");
        api_paths::decode_escapes(&text).map_or_else(|| text.clone(), |decoded| decoded.to_string())
    };
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut models = pairs.filter(|(key, _)| decoded(key) == "model").map(|(_, value)| decoded(value));
    let name = models.next().unwrap_or_default();
    if models.next().is_some() {
        let message = "The query names more than one model.".into();
        return Err(Reject::Field { param: "model".into(), message });
    }
    Ok(if name.is_empty() { RequestedModel::Unreadable } else { RequestedModel::Named(name) })
}

/// The adapter in SageMaker's header, which vLLM uses as the model in place of the body's.
fn adapter(client: &Client<'_>, shape: &BodyShape) -> Option<String> {
    let value = client.headers().get(ADAPTER_HEADER)?;
    if !matches!(shape, BodyShape::Json(Api::Invocations)) {
        return None;
    }
    value.to_str().ok().filter(|name| !name.is_empty()).map(str::to_string)
}
