//! What the phases of `proxy` call: from a head to a step, from a failure to a refusal, from an end to
//! its record.

use std::fmt::Display;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType, Result};
use tokio::time::{Instant, timeout_at};

use super::attempt::watched;
use super::context::{Context, Samples};
use super::line::Line;
use super::look::Shape;
use super::memory::Reservation;
use super::peek::{Failure, Needs, Peeked, Said, Wanted};
use super::replay::Replay;
use super::stored::{self, Making};
use super::{Balancer, Shared, headers, local, refuse, session as wrapper};
use crate::fleet::{Lease, Outcome, Routing, Snapshot};
use crate::observe;
use crate::reject::{Reject, Style, broken_stream};
use crate::reply::ending::{Form, error_events};
use crate::route::dialect::Dialect;
use crate::route::paths::{
    self, Aggregate, Answer, Api, ErrorStyle, Found, ModelIn, Policy, Route, location,
};

/// What a request comes to once its head, and the beginning of its body, are known.
pub enum Step {
    Forward,
    Answer(Response<Bytes>),
}

/// The largest body of a call that is held whole: one to the admin room, or one to all upstreams. None of
/// these carries more than settings, or a list of ids.
const CALL_BODY: u64 = 1 << 20;

/// Where SageMaker names a model.
const ADAPTER: &str = "x-amzn-sagemaker-adapter-identifier";

/// How long a client may take for such a body.
const CALL_PATIENCE: Duration = Duration::from_secs(30);

/// Hands an admin listener's request to the admin room; `None` is a request like any other.
///
/// A call with a body is handed in twice: first its head alone, as with `expect: 100-continue`, so that
/// nothing is read for a caller whom the room refuses.
pub async fn admin(
    balancer: &Balancer,
    session: &mut Session,
    context: &mut Context,
) -> Result<Option<Response<Bytes>>> {
    let Some(admin) = &balancer.admin else { return Ok(None) };
    let head = session.req_header();
    if !admin.serves(head.uri.path()) {
        return Ok(None);
    }
    context.admin = true;
    let mut request = Request::new(Bytes::new());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.headers_mut() = head.headers.clone();
    if !session.is_body_empty() {
        request.headers_mut().insert(header::EXPECT, HeaderValue::from_static("100-continue"));
        let leave = admin.call(request.clone()).await;
        if leave.status() != StatusCode::CONTINUE {
            return Ok(Some(leave));
        }
        *request.body_mut() = read_whole(session, context, CALL_BODY, None).await?;
    }
    request.headers_mut().remove(header::EXPECT);
    Ok(Some(watched(session, context, admin.call(request)).await?))
}

/// Finds the route of a request, and answers it or makes it ready to be sent.
pub async fn route(shared: &Shared, session: &mut Session, context: &mut Context) -> Result<Step> {
    name_host(session)?;
    name_session(session, context);
    let head = session.req_header();
    let Some(path) = paths::decode(head.uri.path()) else { return Err(refuse(context, Reject::Path)) };
    context.path = path.into_owned();
    let method = head.method.clone();
    let Route { api, policy } = match context.settings.table.find(method.as_str(), &context.path) {
        Found::Route(route) => route,
        Found::NotFound => return Err(refuse(context, Reject::Path)),
        Found::MethodNotAllowed { allow } => return Err(refuse(context, Reject::Method { allow })),
        Found::Redirect { to } => {
            let https = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
            let host = headers::host(head).unwrap_or_default();
            let location = location(https, &host, &to, head.uri.query());
            return Err(refuse(context, Reject::Redirect { location }));
        }
    };
    if api.is_websocket() {
        if !session.is_upgrade_req() {
            return Err(refuse(context, Reject::Path));
        }
    } else {
        // Some clients offer HTTP/2 with every request; nobody here takes such an offer, and a request
        // with one is a request like any other.
        let head = session.req_header_mut();
        head.remove_header(&header::UPGRADE);
        head.remove_header("http2-settings");
    }
    context.form = match api {
        Api::Responses | Api::ResponseById => Form::Responses,
        Api::Messages => Form::Messages,
        _ => Form::Data,
    };
    context.style = match api.error_style() {
        ErrorStyle::Anthropic => Style::Anthropic,
        ErrorStyle::OpenAi | ErrorStyle::Detail => Style::OpenAi,
    };
    let snapshot = shared.fleet.snapshot_owned();
    match policy {
        Policy::Deny => Err(refuse(context, Reject::Path)),
        Policy::Answer(Answer::Health) => {
            Ok(Step::Answer(local::health(&snapshot, shared.leave.is_leaving())))
        }
        Policy::Aggregate(what) => aggregate(shared, context, &snapshot, what).await,
        Policy::FanOut => fan_out(shared, session, context, &method).await,
        Policy::Upstream(name) => {
            let named = snapshot.by_name(&name);
            context.only = Some(named.map_or(usize::MAX, |entry| entry.upstream.id));
            context.model = Wanted::Unreadable;
            let step = forward(shared, session, context, Shape::Opaque, false).await?;
            // A control call may have done what it says before its connection broke: it is sent once.
            context.pinned = true;
            Ok(step)
        }
        Policy::Sticky { id } => {
            stored::again(shared, session, context, &id).await?;
            context.model = Wanted::Unreadable;
            forward(shared, session, context, Shape::Opaque, false).await
        }
        Policy::Route { .. } => inference(shared, session, context, api, &snapshot).await,
    }
}

/// HTTP/2 has the host outside of the fields: from here on it stands among them, where routes look for it.
fn name_host(session: &mut Session) -> Result<()> {
    let head = session.req_header_mut();
    let host = headers::host(head).filter(|_| !head.headers.contains_key(header::HOST));
    host.map_or(Ok(()), |host| head.insert_header(header::HOST, host))
}

/// Takes a session out of the path: what is left is the path of the interface.
fn name_session(session: &mut Session, context: &mut Context) {
    let uri = &session.req_header().uri;
    let Some((name, rest)) = paths::of_session(uri.path()) else { return };
    let query = uri.query().map_or(String::new(), |query| format!("?{query}"));
    // A piece of a path is a path.
    let Ok(inner) = Uri::try_from(format!("{rest}{query}")) else { return };
    context.session = Some(name.into_owned());
    session.req_header_mut().set_uri(inner);
}

async fn aggregate(
    shared: &Shared,
    context: &mut Context,
    snapshot: &Snapshot,
    what: Aggregate,
) -> Result<Step> {
    if !snapshot.any_ready() {
        return Err(refuse(context, Reject::NotReady { model: None }));
    }
    Ok(Step::Answer(match what {
        Aggregate::Models => local::models(snapshot, &context.settings.peeker.routes),
        Aggregate::Version => local::version(snapshot),
        Aggregate::Load => local::load(&shared.fleet).await,
        Aggregate::Metrics => local::metrics(&shared.fleet).await,
    }))
}

async fn fan_out(
    shared: &Shared,
    session: &mut Session,
    context: &mut Context,
    method: &Method,
) -> Result<Step> {
    let limit = context.settings.peeker.limits.max_body.min(CALL_BODY);
    let mut held = context.settings.peeker.memory.reservation();
    let body = read_whole(session, context, limit, Some(&mut held)).await?;
    let head = session.req_header();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_string();
    let headers = head.headers.clone();
    let asked = local::fan_out(&shared.fleet, (method, &path), &headers, body, context.settings.expose);
    match watched(session, context, asked).await? {
        Some(answer) => Ok(Step::Answer(answer)),
        None => Err(refuse(context, Reject::NotReady { model: None })),
    }
}

/// A request for a model: looks where the model is named.
async fn inference(
    shared: &Shared,
    session: &mut Session,
    context: &mut Context,
    api: Api,
    snapshot: &Snapshot,
) -> Result<Step> {
    context.counts = api.counts_tokens();
    let head = session.req_header();
    let kind = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let shape = match api.model_in() {
        ModelIn::Json | ModelIn::Sniff => Shape::Json(api),
        ModelIn::Multipart => kind.map_or(Shape::Opaque, |kind| Shape::Multipart(kind.to_string())),
        ModelIn::Query | ModelIn::Nowhere => Shape::Opaque,
    };
    let step = forward(shared, session, context, shape, snapshot.model_decides()).await?;
    match api.model_in() {
        ModelIn::Query => by_query(session, context),
        ModelIn::Nowhere => context.model = Wanted::Unreadable,
        // The name that its route gives stands in the body, before which the field would go.
        ModelIn::Sniff if context.face.as_ref().is_some_and(|face| face.renames()) => {
            session.req_header_mut().remove_header(ADAPTER);
        }
        ModelIn::Json | ModelIn::Multipart | ModelIn::Sniff => {}
    }
    if context.model == Wanted::Any && !has_model(context, snapshot) {
        if !snapshot.any_ready() {
            return Err(refuse(context, Reject::NotReady { model: None }));
        }
        // vLLM would take its own model; with several of them there is none to take.
        let aliases = context.settings.peeker.routes.aliases(snapshot);
        return Err(refuse(context, Reject::Model { model: String::new(), aliases }));
    }
    Ok(step)
}

/// Whether a request that names no model goes to where there is one to take.
fn has_model(context: &Context, snapshot: &Snapshot) -> bool {
    // The route of the model that it would get would not be the one it takes.
    let has_one = || snapshot.serves_one_base(context.among(snapshot).as_deref());
    !context.settings.peeker.routes.goes_by_model() && (context.only.is_some() || has_one())
}

/// Peeks the body, if there is one, and stands the wrapper in the session's place.
async fn forward(
    shared: &Shared,
    session: &mut Session,
    context: &mut Context,
    shape: Shape,
    model_decides: bool,
) -> Result<Step> {
    if session.is_upgrade_req() {
        return Ok(Step::Forward);
    }
    if let Err(reject) = context.settings.peeker.declared(session) {
        return Err(refuse(context, reject));
    }
    expect(session).await?;
    let needs = Needs {
        model: model_decides || !context.settings.peeker.routes.is_empty(),
        // Where there is one upstream, it is there or nowhere.
        previous: shared.fleet.snapshot().entries.len() > 1,
        // A response that is asked for again has had its route before.
        route: context.face.is_none(),
    };
    let (mut face, peeker) = (None, &context.settings.peeker);
    let (path, adapter) = (&context.path, adapter(session, &shape));
    let said = Said { path, session: context.session.as_deref(), model: adapter.as_deref() };
    let peeked = peeker.peek(session, shape, said, needs, &mut face).await;
    // A refusal goes out by its route, too.
    context.face = context.face.take().or(face);
    let Peeked { body, whole, reservation, wish, ask } = match peeked {
        Ok(peeked) => peeked,
        Err(Failure::Reject(reject)) => return Err(refuse(context, reject)),
        Err(Failure::Client(error)) => return Err(error),
    };
    context.model = wish.model;
    (context.ask, context.told_session) = (ask, wish.session);
    stored::follow(shared, session, context, wish.previous_response_id.as_deref()).await?;
    context.making = wish.kept.map(|kept| Making::new(shared, kept, &body, context.client_model()));
    context.tokens = shared.state.prompt(&wish.asked).tokens;
    (context.asked, context.rest, context.streams) = (wish.asked, wish.rest, wish.streams);
    context.pinned = wish.pinned;
    if let Some(most) = context.settings.sample {
        let mut samples = Samples { request: Vec::new(), answer: Vec::new(), most };
        Samples::keep(&mut samples.request, most, &body);
        context.samples = Some(Box::new(samples));
    }
    let most = context.settings.peeker.limits.max_body;
    context.most = if whole { u64::MAX } else { most };
    let replay = Replay::new(body, reservation, most);
    let line = Line::new(shared.fleet.clone(), context.timeouts());
    let place = &mut session.downstream_session;
    let background = wish.kept.is_some_and(|kept| kept.background);
    let held = wrapper::Held { replay: replay.clone(), whole, background };
    context.home = Some(wrapper::wrap(place, held, line.clone(), shared.leave.clone()));
    context.replay = Some(replay);
    context.line = Some(line);
    Ok(Step::Forward)
}

/// A client that waits for leave to send its body gets it from us, before we read.
async fn expect(session: &mut Session) -> Result<()> {
    let value = session.req_header().headers.get(header::EXPECT);
    if value.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        session.downstream_session.write_continue_response().await?;
    }
    Ok(())
}

/// Reads a body of `limit` bytes at the most. `held`: what it takes of `peek.memory`; a call without it, an
/// operator's, is read also when clients have used all of that up.
async fn read_whole(
    session: &mut Session,
    context: &mut Context,
    limit: u64,
    mut held: Option<&mut Reservation>,
) -> Result<Bytes> {
    let mut body = BytesMut::new();
    if session.is_body_empty() {
        return Ok(body.freeze());
    }
    let declared = headers::length(&session.req_header().headers);
    if declared.is_some_and(|length| length > limit) {
        return Err(refuse(context, Reject::TooLarge { limit }));
    }
    expect(session).await?;
    let deadline = Instant::now() + CALL_PATIENCE;
    loop {
        let Ok(piece) = timeout_at(deadline, session.read_request_body()).await else {
            return Err(refuse(context, Reject::Slow));
        };
        let Some(piece) = piece? else { return Ok(body.freeze()) };
        let total = (body.len() + piece.len()) as u64;
        if total > limit {
            return Err(refuse(context, Reject::TooLarge { limit }));
        }
        // Twice as much each time, as the buffer takes it.
        if held.as_mut().is_some_and(|held| !held.grow_to(total.next_power_of_two())) {
            return Err(refuse(context, Reject::Memory));
        }
        body.extend_from_slice(&piece);
    }
}

/// A socket's model comes only after it is open; who wants another than the only one says so in the query.
/// What its route makes of it ends with its head: what is said on it goes by unread.
fn by_query(session: &mut Session, context: &mut Context) {
    context.model = query_model(session);
    let mut model = context.model.name().map(str::to_string);
    let peeker = &context.settings.peeker;
    let of_query = (Dialect::Other, None);
    let face = match &model {
        Some(model) => peeker.routed(session, &context.path, Some(model), of_query),
        None => {
            let (resolved, face) = peeker.unnamed(session, &context.path, of_query);
            model = resolved;
            face
        }
    };
    let Some(face) = face.map(Box::new) else { return };
    let served = face.served().map(str::to_string);
    context.face = Some(face);
    let Some(served) = served.filter(|served| Some(served) != model.as_ref()) else { return };
    let uri = &session.req_header().uri;
    let renamed = paths::with_model(uri.path(), uri.query().unwrap_or_default(), &served);
    if let Ok(renamed) = Uri::try_from(renamed) {
        session.req_header_mut().set_uri(renamed);
        context.model = Wanted::Named(served);
    }
}

/// `?model=`, if there is one.
fn query_model(session: &Session) -> Wanted {
    let query = session.req_header().uri.query().unwrap_or("");
    let value = query.split('&').find_map(|pair| pair.strip_prefix("model=")).unwrap_or_default();
    // As forms are written. Broken escapes are text to whoever reads such a query.
    let name = paths::decode_escapes(&value.replace('+', " ")).unwrap_or_else(|| value.to_string());
    if name.is_empty() { Wanted::Unreadable } else { Wanted::Named(name) }
}

/// SageMaker names the adapter in a header, which vLLM takes for the model, whatever the body says.
fn adapter(session: &Session, shape: &Shape) -> Option<String> {
    let value = session.req_header().headers.get(ADAPTER)?;
    if !matches!(shape, Shape::Json(Api::Invocations)) {
        return None;
    }
    value.to_str().ok().filter(|name| !name.is_empty()).map(str::to_string)
}

/// Why there was nobody to choose from.
pub fn no_candidate(routing: &Routing, context: &Context, snapshot: &Snapshot) -> Reject {
    let model = context.client_model().map(str::to_string);
    // The model that it was made for has gone meanwhile: the next try is made for the one that is there then.
    let is_late = context.face.as_ref().is_some_and(|face| face.plan.is_found);
    match (routing, model) {
        (Routing::Full { .. }, _) => Reject::Full { retry_after: 1 },
        (Routing::NoSuchModel, model) if is_late => Reject::NotReady { model },
        (Routing::NoSuchModel, Some(model)) => {
            Reject::Model { model, aliases: context.settings.peeker.routes.aliases(snapshot) }
        }
        (_, model) => Reject::NotReady { model },
    }
}

/// What a failure that nobody named is called; `None` when there is no client to tell.
pub fn failure(error: &Error, context: &mut Context) -> Option<Reject> {
    if let Some(failed) = context.failed.take() {
        return Some(failed);
    }
    if let ErrorType::HTTPStatus(400) = error.etype() {
        return Some(Reject::Malformed { why: "it is no HTTP" });
    }
    match error.esource() {
        ErrorSource::Downstream if *error.etype() == ErrorType::InvalidHTTPHeader => {
            Some(Reject::Malformed { why: "its head is no HTTP" })
        }
        ErrorSource::Downstream => None,
        ErrorSource::Upstream | ErrorSource::Internal | ErrorSource::Unset => Some(Reject::Internal),
    }
}

/// A stream that had begun cannot go on: its client is told so in the interface's own form, and the
/// connection ends. An answer that is no stream just breaks off, which its framing shows.
pub async fn end_stream(session: &mut Session, error: &Error, context: &mut Context) {
    let gone = *error.esource() == ErrorSource::Downstream && context.failed.is_none();
    let (Some(tail), false) = (&context.stream, gone) else { return };
    let name = context.last.as_ref().map_or("", |upstream| upstream.name());
    let late = matches!(&context.failed, Some(Reject::Timeout { .. }));
    let (code, message) = broken_stream(late, context.settings.expose.then_some(name));
    observe::stream_broken(&context.id, name, &error.to_string());
    let apart = !tail.between_events();
    let events = context.last_words.take();
    let events = events.unwrap_or_else(|| error_events(context.form, &message, code, apart).into());
    // Whoever does not read any more has not been cut silently either.
    drop(session.write_response_body(Some(events), true).await);
}

/// Tells the end of a request to logs and metrics.
pub fn tell(
    shared: &Shared,
    session: &Session,
    error: Option<&Error>,
    context: &Context,
    lease: Option<&Lease>,
    outcome: Outcome,
) {
    let head = session.req_header();
    let client = session.client_addr();
    let model = match &context.model {
        Wanted::Named(name) if shared.fleet.snapshot().knows(name) => Some(name.as_str()),
        _ => None,
    };
    // A refusal carries its own name in the metrics of refusals; as an error it would be told twice.
    let error = error.filter(|error| !matches!(error.etype(), ErrorType::Custom(_)));
    observe::request_done(&observe::Done {
        id: &context.id,
        client: client.map(|client| client as &dyn Display),
        method: head.method.as_str(),
        path: head.uri.path(),
        model,
        route: context.face.as_ref().map(|face| face.plan.name.as_str()),
        session: context.told_session.as_deref(),
        usage: context.usage(),
        upstream: lease.map(Lease::upstream).or(context.last.as_ref()).map(|upstream| upstream.name()),
        status: context.status,
        outcome: context.refused.unwrap_or(outcome.label()),
        attempts: context.attempts,
        first_byte: context.first_byte,
        total: context.started.elapsed(),
        received: context.received,
        sent: session.body_bytes_sent() as u64,
        error: error.map(|error| error as &dyn Display),
        admin: context.admin,
    });
    if let Some(samples) = &context.samples {
        let text = |sample: &[u8]| String::from_utf8_lossy(sample).into_owned();
        observe::bodies(&context.id, &text(&samples.request), &text(&samples.answer));
    }
}
