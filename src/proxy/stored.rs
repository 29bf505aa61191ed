//! Responses that a server keeps in its memory, and only there: new ones get ids that say where they are
//! (`route::stored`), and whoever asks for one is sent to the upstream that has it.
//!
//! In this order: what was learnt here or said by siblings, what the id says, what stands in Redis, the one
//! upstream there is, and at last what the upstreams say when all of them are asked. What is learnt are ids
//! that clients give, and these may look like ours: whoever has learnt of one knows better than the id
//! says, and who has not looks into Redis when the upstream that it names does not know it. An upstream that
//! nobody listens at has lost what it had. One that an operator drains still has it, and still answers for
//! it.
//!
//! With the place goes the name that the client gave the model, so that who asks again has its route.
//!
//! Never: send what goes on from a response to an upstream that does not have it, while one does.

use std::time::Instant;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::proxy::Session;

use super::context::Context;
use super::face::Face;
use super::local::Located;
use super::{Shared, headers, local, refuse};
use crate::fleet::{Entry, Snapshot};
use crate::observe;
use crate::reject::Reject;
use crate::route::dialect::Dialect;
use crate::route::refusal::{self, Refusal};
use crate::route::stored::{Stamp, Tag, is_id, number};
use crate::state::exchange::Binding;
use crate::state::responses::Made;

/// The path by which responses are made: routes are looked up by it for those that are asked for again, too.
const PATH: &str = "/v1/responses";

/// How a place is called that nothing but the response's id tells.
const BY_ID: &str = "id";

/// What the body says of the response that it asks for, unless it is not to be kept.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// The client says what its id is, if only that it is null: what stands behind ours counts.
    pub named: bool,
    pub background: bool,
}

/// A response that is being made.
pub struct Making {
    stamp: Option<Stamp>,
    /// The number of its model's name.
    name: u64,
    /// Its id has come, and where it is will be known.
    learnt: bool,
    /// Of the present attempt: it counts the client's fields.
    refusal: Option<Refusal>,
}

/// What came of looking for a response.
struct Found {
    /// What told it.
    by: &'static str,
    place: Place,
    /// The number of its model's name.
    name: u64,
}

/// Where a response is.
enum Place {
    At(usize),
    /// It was there, and is no more.
    Lost,
    Nowhere,
    /// Whoever may have it does not answer now.
    Unsure,
}

// === impl Making ===

impl Making {
    /// `model` as the client called it.
    pub fn new(shared: &Shared, kept: Kept, body: &[u8], model: Option<&str>) -> Box<Self> {
        let secret = if kept.named { None } else { shared.random.secret() };
        let name = number(model);
        let stamp = secret.and_then(|secret| Stamp::new(body, name, secret));
        Box::new(Making { stamp, name, learnt: false, refusal: None })
    }

    /// The head says how long the body is.
    pub fn lengthen(&self, head: &mut RequestHeader) -> Result<()> {
        match headers::length(&head.headers).filter(|_| self.stamp.is_some()) {
            Some(length) => head.insert_header(header::CONTENT_LENGTH, length + Stamp::length() as u64),
            None => Ok(()),
        }
    }
}

/// The body's first piece, as it is sent to the upstream of this attempt.
pub fn stamp(context: &Context, body: &mut Option<Bytes>) {
    let stamp = context.making.as_ref().and_then(|making| making.stamp.as_ref());
    if let (Some(stamp), Some(lease), Some(piece)) = (stamp, &context.lease, &*body) {
        *body = Some(stamp.put(piece, lease.upstream().name()).into());
    }
}

/// An answer begins.
pub fn begin(context: &mut Context, head: &mut ResponseHeader) -> Result<()> {
    let Some(making) = &mut context.making else { return Ok(()) };
    // What was learnt of an attempt that has failed was of another upstream.
    making.learnt = false;
    let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let refuses = head.status == 400 && text(header::CONTENT_TYPE).starts_with("application/json");
    let plain = text(header::CONTENT_ENCODING).is_empty();
    let body = context.replay.as_ref().filter(|_| refuses && plain).and_then(|replay| replay.body());
    making.refusal =
        making.stamp.as_ref().zip(body).and_then(|(stamp, body)| match refusal::fields_if_sound(&body) {
            Some(fields) => Some(Refusal::new(fields)),
            None => Some(Refusal::new(refusal::fields(&body)?).broken_behind(stamp.span())),
        });
    match &making.refusal {
        Some(refusal) if !refusal.keeps_length() => headers::of_unknown_length(head),
        _ => Ok(()),
    }
}

/// The next piece of it, without what is in it on account of the id. `None`: it goes on as it is.
pub fn piece(context: &mut Context, piece: &[u8], end: bool) -> Option<Bytes> {
    let refusal = context.making.as_mut()?.refusal.as_mut()?;
    Some(Bytes::from(refusal.feed(piece, end)))
}

/// The answer has said more of itself: its id may be there, which is learnt where it is not ours. One that
/// only looks like it may be of an earlier response, made elsewhere.
pub fn learn(shared: &Shared, context: &mut Context) {
    let (Some(making), Some(lease)) = (&mut context.making, &context.lease) else { return };
    let id = context.meter.as_ref().and_then(|meter| meter.id()).filter(|_| !making.learnt);
    let Some(id) = id else { return };
    making.learnt = true;
    let upstream = lease.upstream();
    let ours = making.stamp.as_ref().is_some_and(|stamp| stamp.id(upstream.name()) == id);
    if !ours && is_id(id) {
        let made = Made { upstream: upstream.id, name: making.name };
        shared.state.keep_response(id, made, Instant::now());
    }
}

/// A request that goes on from a response goes to where that is.
pub async fn follow(
    shared: &Shared,
    session: &Session,
    context: &mut Context,
    previous: Option<&str>,
) -> Result<()> {
    let Some(id) = previous else { return Ok(()) };
    let mut found = find(shared, session, context, id).await;
    if let Place::At(upstream) = found.place
        && !may_have(&shared.fleet.snapshot(), upstream, context.model.name())
    {
        // Where its model is, nobody has ever heard of it.
        let other = match found.unproven(id) {
            Some(id) => other(shared, context, upstream, &id).await,
            None => None,
        };
        found.place = other.map_or(Place::Lost, Place::At);
    }
    match found.place {
        Place::At(upstream) => context.only = Some(upstream),
        Place::Lost => return Err(refuse(context, Reject::Response { id: id.to_string() })),
        Place::Unsure => return Err(refuse(context, Reject::NotReady { model: None })),
        // Unknown to all: any upstream says so in vLLM's words.
        Place::Nowhere => {}
    }
    context.unproven = found.unproven(id);
    Ok(())
}

/// A response is asked for again, or told to stop.
pub async fn again(shared: &Shared, session: &Session, context: &mut Context, id: &str) -> Result<()> {
    let learnt = shared.state.response(id, Instant::now()).map(|made| made.name);
    let name = learnt.or_else(|| Some(Tag::read(id)?.name()));
    context.face = face(session, context, name.unwrap_or_default());
    let found = find(shared, session, context, id).await;
    if context.face.is_none() {
        context.face = face(session, context, found.name);
    }
    match found.place {
        Place::At(upstream) => context.only = Some(upstream),
        // Whoever has it may come back.
        Place::Nowhere if !shared.fleet.snapshot().any_ready() => {
            return Err(refuse(context, Reject::NotReady { model: None }));
        }
        Place::Unsure => return Err(refuse(context, Reject::NotReady { model: None })),
        Place::Lost | Place::Nowhere => {
            return Err(refuse(context, Reject::Response { id: id.to_string() }));
        }
    }
    context.unproven = found.unproven(id);
    Ok(())
}

/// An answer's head has come. Whether it says that a response is not where its id alone says, while Redis
/// knows of another upstream, which is asked next: the client has put an earlier id on a later response. The
/// upstreams are not asked: whoever asks for what is long gone would have all of them searched.
pub async fn elsewhere(shared: &Shared, context: &mut Context) -> bool {
    if context.status != 404 {
        return false;
    }
    let Some(id) = context.unproven.take() else { return false };
    if context.pinned || context.replay.as_ref().is_none_or(|replay| !replay.is_whole()) {
        return false;
    }
    let Some(said) = context.only.take() else { return false };
    let other = other(shared, context, said, &id).await;
    context.only = other.or(Some(said));
    other.is_some()
}

/// Where a response is by what stands in Redis, if that is not where its id says.
async fn other(shared: &Shared, context: &Context, said: usize, id: &str) -> Option<usize> {
    let snapshot = shared.fleet.snapshot_owned();
    let found = kept(shared, &snapshot, context.among(&snapshot).as_deref(), id).await?;
    match found.place {
        Place::At(upstream) if upstream != said && may_have(&snapshot, upstream, context.model.name()) => {
            observe::response_found(found.by);
            Some(upstream)
        }
        _ => None,
    }
}

/// Whether an upstream may go on from a response with this model, as far as it is known who serves that.
fn may_have(snapshot: &Snapshot, upstream: usize, model: Option<&str>) -> bool {
    let is_others = |model| snapshot.knows(model) && !snapshot.serves(model, Some(&[upstream]));
    let says = snapshot.by_id(upstream).is_some_and(|entry| !entry.models.is_empty());
    !(says && model.is_some_and(is_others))
}

/// The route by which it was made, as far as the number of its model's name tells.
fn face(session: &Session, context: &Context, name: u64) -> Option<Box<Face>> {
    let (routes, headers) = (&context.settings.peeker.routes, &session.req_header().headers);
    let model = routes.names().find(|model| number(Some(model)) == name)?;
    let plan = routes.plan(Some(model), PATH, headers)?;
    Some(Box::new(Face::new(plan, Dialect::Responses, Some(model.to_string()), None)))
}

async fn find(shared: &Shared, session: &Session, context: &Context, id: &str) -> Found {
    if !is_id(id) {
        return Found::new("nowhere", Place::Nowhere, 0);
    }
    let snapshot = shared.fleet.snapshot_owned();
    let among = context.among(&snapshot);
    let among = among.as_deref();
    let mut found = known(shared, &snapshot, among, id);
    if found.is_none() {
        found = kept(shared, &snapshot, among, id).await;
    }
    let model = context.model.name();
    let found = match found.or_else(|| alone(&snapshot, among, model)) {
        Some(found) => found,
        None => asked(shared, session, context, &snapshot, among, id).await,
    };
    observe::response_found(found.by);
    found
}

/// What is known without asking anybody.
fn known(shared: &Shared, snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> Option<Found> {
    let learnt = shared.state.response(id, Instant::now()).and_then(|made| {
        let entry = snapshot.by_id(made.upstream).filter(|entry| entry.is_among(among))?;
        Some(Found::new("memory", entry.into(), made.name))
    });
    learnt.or_else(|| {
        let tag = Tag::read(id)?;
        let mut entries = snapshot.entries.iter().filter(|entry| entry.is_among(among));
        let entry = entries.find(|entry| tag.is_at(entry.upstream.name()))?;
        Some(Found::new(BY_ID, entry.into(), tag.name()))
    })
}

/// What stands in Redis.
async fn kept(shared: &Shared, snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> Option<Found> {
    let kept = shared.exchange.as_ref()?.lookup(Binding::Response, id).await?;
    let entry = snapshot.by_name(&kept.upstream).filter(|entry| entry.is_among(among))?;
    Some(Found::new("redis", entry.into(), kept.number))
}

/// The one upstream there is, if it may be that it has made what this model goes on from.
fn alone(snapshot: &Snapshot, among: Option<&[usize]>, model: Option<&str>) -> Option<Found> {
    let mut reachable = snapshot.reachable().filter(|entry| entry.is_among(among));
    let only = reachable.next().filter(|_| reachable.next().is_none())?;
    let may = may_have(snapshot, only.upstream.id, model);
    may.then(|| Found::new("alone", Place::At(only.upstream.id), 0))
}

/// What the upstreams say.
async fn asked(
    shared: &Shared,
    session: &Session,
    context: &Context,
    snapshot: &Snapshot,
    among: Option<&[usize]>,
    id: &str,
) -> Found {
    let routed = context.face.as_ref().and_then(|face| face.authorization());
    let key = routed.as_ref().or(session.req_header().headers.get(header::AUTHORIZATION));
    match local::locate_response(&shared.fleet, snapshot, id, key, among).await {
        Located::At(upstream) => Found::new("asked", Place::At(upstream), 0),
        Located::Nowhere => Found::new("nowhere", Place::Nowhere, 0),
        Located::Unsure => Found::new("unsure", Place::Unsure, 0),
    }
}

// === impl Found ===

impl Found {
    fn new(by: &'static str, place: Place, name: u64) -> Self {
        Found { by, place, name }
    }

    /// The id, where there is nothing else that says where the response is.
    fn unproven(&self, id: &str) -> Option<Box<str>> {
        (self.by == BY_ID).then(|| id.into())
    }
}

// === impl Place ===

impl From<&Entry> for Place {
    fn from(entry: &Entry) -> Self {
        let is_lost = entry.removing || entry.standing.lost;
        if is_lost { Place::Lost } else { Place::At(entry.upstream.id) }
    }
}
