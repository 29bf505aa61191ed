//! Responses that a server keeps in its memory, and only there: new ones get ids that say where they are
//! (`route::stored`), and whoever asks for one is sent to the upstream that has it.
//!
//! In this order: what the id says, what was learnt here or said by siblings, the one upstream there is, what
//! stands in Redis, and at last what the upstreams say when all of them are asked. An upstream that nobody
//! listens at has lost what it had. One that an operator drains still has it, and still answers for it.
//!
//! Never: send what goes on from a response to an upstream that does not have it, while one does.

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
use crate::route::stored::{Stamp, Tag, is_id};
use crate::state::exchange::Binding;

/// The path by which responses are made: routes are looked up by it for those that are asked for again, too.
const PATH: &str = "/v1/responses";

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
    /// Its id has come, and where it is will be known.
    learnt: bool,
    /// Of the present attempt: it counts the client's fields.
    refusal: Option<Refusal>,
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
        let stamp = secret.and_then(|secret| Stamp::new(body, model, secret));
        Box::new(Making { stamp, learnt: false, refusal: None })
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

/// The answer has said more of itself: its id may be there, which is learnt where it does not speak for
/// itself.
pub fn learn(shared: &Shared, context: &mut Context) {
    let (Some(making), Some(lease)) = (&mut context.making, &context.lease) else { return };
    let id = context.meter.as_ref().and_then(|meter| meter.id()).filter(|_| !making.learnt);
    let Some(id) = id else { return };
    making.learnt = true;
    let upstream = lease.upstream();
    let speaks = Tag::read(id).is_some_and(|tag| tag.is_at(upstream.name()));
    if !speaks && is_id(id) {
        shared.state.keep_response(id, upstream.id, std::time::Instant::now());
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
    match place(shared, session, context, id).await {
        Place::At(upstream) => context.only = Some(upstream),
        Place::Lost => return Err(refuse(context, Reject::Response { id: id.to_string() })),
        Place::Unsure => return Err(refuse(context, Reject::NotReady { model: None })),
        // Unknown to all: any upstream says so in vLLM's words.
        Place::Nowhere => {}
    }
    Ok(())
}

/// A response is asked for again, or told to stop.
pub async fn again(shared: &Shared, session: &Session, context: &mut Context, id: &str) -> Result<()> {
    context.face = face(session, context, id);
    match place(shared, session, context, id).await {
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
    Ok(())
}

/// The route by which it was made, as far as its id tells.
fn face(session: &Session, context: &Context, id: &str) -> Option<Box<Face>> {
    let (routes, headers) = (&context.settings.peeker.routes, &session.req_header().headers);
    let tag = Tag::read(id)?;
    let model = routes.names().find(|name| tag.is_of(name))?;
    let plan = routes.plan(Some(model), PATH, headers)?;
    Some(Box::new(Face::new(plan, Dialect::Responses, Some(model.to_string()), None)))
}

async fn place(shared: &Shared, session: &Session, context: &Context, id: &str) -> Place {
    if !is_id(id) {
        return Place::Nowhere;
    }
    let snapshot = shared.fleet.snapshot_owned();
    let among = context.among(&snapshot);
    let may = |entry: &&Entry| among.as_ref().is_none_or(|among| among.contains(&entry.upstream.id));
    let (by, place) = match known(shared, &snapshot, &may, id) {
        Some(known) => known,
        None => match &snapshot.reachable().filter(may).collect::<Vec<_>>()[..] {
            [only] => ("alone", Place::At(only.upstream.id)),
            _ => asked(shared, session, context, &snapshot, id).await,
        },
    };
    observe::response_found(by);
    place
}

/// What is known without asking anybody.
fn known(
    shared: &Shared,
    snapshot: &Snapshot,
    may: &impl Fn(&&Entry) -> bool,
    id: &str,
) -> Option<(&'static str, Place)> {
    let said = |tag: Tag| snapshot.entries.iter().filter(may).find(|one| tag.is_at(one.upstream.name()));
    if let Some(entry) = Tag::read(id).and_then(said) {
        return Some(("id", entry.into()));
    }
    let learnt = shared.state.response(id, std::time::Instant::now())?;
    Some(("memory", snapshot.by_id(learnt).filter(may)?.into()))
}

async fn asked(
    shared: &Shared,
    session: &Session,
    context: &Context,
    snapshot: &Snapshot,
    id: &str,
) -> (&'static str, Place) {
    let among = context.among(snapshot);
    let may = |entry: &&Entry| among.as_ref().is_none_or(|among| among.contains(&entry.upstream.id));
    if let Some(exchange) = &shared.exchange
        && let Some(name) = exchange.lookup(Binding::Response, id).await
        && let Some(entry) = snapshot.by_name(&name).filter(may)
    {
        return ("redis", entry.into());
    }
    let routed = context.face.as_ref().and_then(|face| face.authorization());
    let key = routed.as_ref().or(session.req_header().headers.get(header::AUTHORIZATION));
    match local::locate_response(&shared.fleet, snapshot, id, key, among.as_deref()).await {
        Located::At(upstream) => ("asked", Place::At(upstream)),
        Located::Nowhere => ("nowhere", Place::Nowhere),
        Located::Unsure => ("unsure", Place::Unsure),
    }
}

// === impl Place ===

impl From<&Entry> for Place {
    fn from(entry: &Entry) -> Self {
        let is_lost = entry.removing || entry.standing.lost;
        if is_lost { Place::Lost } else { Place::At(entry.upstream.id) }
    }
}
