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

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header;
use pingora::Result;
use pingora::http::ResponseHeader;

use super::Shared;
use super::client::Client;
use super::exchange::Stop;
use super::headers;
use super::own_answers::Located;
use super::prompt_work::Placement;
use super::request::{ClientRequest, Scope};
use super::route_edits::RouteEdits;
use super::stored_search::SearchKey;
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
pub struct KeptResponse {
    /// The client says what its id is, if only that it is null: what stands behind ours counts.
    pub named: bool,
    pub background: bool,
}

/// A response that is being made.
pub struct PendingResponse {
    stamp: Option<Stamp>,
    /// The number of its model's name.
    name: u64,
    /// Its id has come, and where it is will be known.
    learnt: bool,
    /// Of the present attempt: it counts the client's fields.
    refusal: Option<Refusal>,
}

/// What came of looking for a response.
struct FoundResponse {
    /// What told it.
    by: &'static str,
    place: ResponsePlace,
    /// The number of its model's name.
    name: u64,
}

/// Where a response is.
enum ResponsePlace {
    At(usize),
    /// It was there, and is no more.
    Lost,
    Nowhere,
    /// Whoever may have it does not answer now.
    Unsure,
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

    /// So much longer the body is on its way to an upstream.
    pub fn added_length(&self) -> u64 {
        self.stamp.as_ref().map_or(0, |_| Stamp::length() as u64)
    }

    /// The body's first piece, as it is sent to this upstream.
    pub fn stamp(&self, piece: Bytes, upstream: &str) -> Bytes {
        match &self.stamp {
            Some(stamp) => stamp.put(&piece, upstream).into(),
            None => piece,
        }
    }

    /// An answer begins. `body`: as the client sent it, as far as it is held.
    pub fn begin(&mut self, head: &mut ResponseHeader, body: &[u8]) -> Result<()> {
        // What was learnt of an attempt that has failed was of another upstream.
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

    /// The answer has told its id, which is learnt where it is not ours. One that only looks like ours may be
    /// of an earlier response, made elsewhere.
    pub fn learn(&mut self, shared: &Shared, placement: &Placement, id: &str) {
        if std::mem::replace(&mut self.learnt, true) {
            return;
        }
        let upstream = placement.upstream();
        let ours = self.stamp.as_ref().is_some_and(|stamp| stamp.id(upstream.name()) == id);
        if !ours && is_id(id) {
            let made = Made { upstream: upstream.id, name: self.name };
            shared.state.keep_response(id, made, Instant::now());
        }
    }
}

/// A request that goes on from a response goes to where that is.
pub async fn follow(
    scope: &Scope<'_>,
    client: &Client<'_>,
    request: &mut ClientRequest,
    previous: Option<&str>,
) -> Result<(), Stop> {
    let Some(id) = previous else { return Ok(()) };
    let shared = scope.shared;
    let mut found = find(scope, client, request, id).await;
    if let ResponsePlace::At(upstream) = found.place
        && !may_have(&shared.fleet.snapshot(), upstream, request.model.name())
    {
        // Where its model is, nobody has ever heard of it.
        let other = match found.unproven(id) {
            Some(id) => other(shared, request, upstream, &id).await,
            None => None,
        };
        found.place = other.map_or(ResponsePlace::Lost, ResponsePlace::At);
    }
    match found.place {
        ResponsePlace::At(upstream) => request.only = Some(upstream),
        ResponsePlace::Lost => return Err(Reject::Response { id: id.to_string() }.into()),
        ResponsePlace::Unsure => return Err(Reject::NotReady { model: None }.into()),
        // Unknown to all: any upstream says so in vLLM's words.
        ResponsePlace::Nowhere => {}
    }
    request.unproven = found.unproven(id);
    Ok(())
}

/// A response is asked for again, or told to stop.
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
    match found.place {
        ResponsePlace::At(upstream) => request.only = Some(upstream),
        // Whoever has it may come back.
        ResponsePlace::Nowhere if !shared.fleet.snapshot().any_ready() => {
            return Err(Reject::NotReady { model: None }.into());
        }
        ResponsePlace::Unsure => return Err(Reject::NotReady { model: None }.into()),
        ResponsePlace::Lost | ResponsePlace::Nowhere => {
            return Err(Reject::Response { id: id.to_string() }.into());
        }
    }
    request.unproven = found.unproven(id);
    Ok(())
}

/// An answer's head has come. Whether it says that a response is not where its id alone says, while Redis
/// knows of another upstream, which is asked next: the client has put an earlier id on a later response. The
/// upstreams are not asked: whoever asks for what is long gone would have all of them searched.
pub async fn elsewhere(shared: &Shared, request: &mut ClientRequest, status: u16) -> bool {
    if status != 404 {
        return false;
    }
    let Some(id) = request.unproven.take() else { return false };
    if request.pinned || !request.body.is_replayable() {
        return false;
    }
    let Some(said) = request.only.take() else { return false };
    let other = other(shared, request, said, &id).await;
    request.only = other.or(Some(said));
    other.is_some()
}

/// Where a response is by what stands in Redis, if that is not where its id says.
async fn other(shared: &Shared, request: &ClientRequest, said: usize, id: &str) -> Option<usize> {
    let snapshot = shared.fleet.snapshot_owned();
    let found = kept(shared, &snapshot, request.among(&snapshot).as_deref(), id).await?;
    match found.place {
        ResponsePlace::At(upstream)
            if upstream != said && may_have(&snapshot, upstream, request.model.name()) =>
        {
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

/// The edits of the route by which it was made, as far as the number of its model's name tells.
fn edits(scope: &Scope<'_>, client: &Client<'_>, name: u64) -> Option<Box<RouteEdits>> {
    let routes = &scope.settings.peeker.routes;
    let model = routes.names().find(|model| number(Some(model)) == name)?;
    let plan = routes.plan(Some(model), PATH, client.headers())?;
    Some(Box::new(RouteEdits::new(plan, Dialect::Responses, Some(model.to_string()), None)))
}

async fn find(scope: &Scope<'_>, client: &Client<'_>, request: &ClientRequest, id: &str) -> FoundResponse {
    let shared = scope.shared;
    if !is_id(id) {
        return FoundResponse::new("nowhere", ResponsePlace::Nowhere, 0);
    }
    let snapshot = shared.fleet.snapshot_owned();
    let among = request.among(&snapshot);
    let among = among.as_deref();
    let mut found = known(shared, &snapshot, among, id);
    if found.is_none() {
        found = kept(shared, &snapshot, among, id).await;
    }
    let model = request.model.name();
    let found = match found.or_else(|| alone(&snapshot, among, model)) {
        Some(found) => found,
        None => asked(shared, client, request, &snapshot, among, id).await,
    };
    observe::response_found(found.by);
    found
}

/// What is known without asking anybody.
fn known(shared: &Shared, snapshot: &Snapshot, among: Option<&[usize]>, id: &str) -> Option<FoundResponse> {
    let learnt = shared.state.response(id, Instant::now()).and_then(|made| {
        let entry = snapshot.by_id(made.upstream).filter(|entry| entry.is_among(among))?;
        Some(FoundResponse::new("memory", entry.into(), made.name))
    });
    learnt.or_else(|| {
        let tag = Tag::read(id)?;
        let mut entries = snapshot.entries.iter().filter(|entry| entry.is_among(among));
        let entry = entries.find(|entry| tag.is_at(entry.upstream.name()))?;
        Some(FoundResponse::new(BY_ID, entry.into(), tag.name()))
    })
}

/// What stands in Redis.
async fn kept(
    shared: &Shared,
    snapshot: &Snapshot,
    among: Option<&[usize]>,
    id: &str,
) -> Option<FoundResponse> {
    let kept = shared.exchange.as_ref()?.lookup(Binding::Response, id).await?;
    let entry = snapshot.by_name(&kept.upstream).filter(|entry| entry.is_among(among))?;
    Some(FoundResponse::new("redis", entry.into(), kept.number))
}

/// The one upstream there is, if it may be that it has made what this model goes on from.
fn alone(snapshot: &Snapshot, among: Option<&[usize]>, model: Option<&str>) -> Option<FoundResponse> {
    let mut reachable = snapshot.reachable().filter(|entry| entry.is_among(among));
    let only = reachable.next().filter(|_| reachable.next().is_none())?;
    let may = may_have(snapshot, only.upstream.id, model);
    may.then(|| FoundResponse::new("alone", ResponsePlace::At(only.upstream.id), 0))
}

/// What the upstreams say.
async fn asked(
    shared: &Shared,
    client: &Client<'_>,
    request: &ClientRequest,
    snapshot: &Arc<Snapshot>,
    among: Option<&[usize]>,
    id: &str,
) -> FoundResponse {
    let routed = request.edits.as_ref().and_then(|edits| edits.authorization());
    let authorization = routed.or_else(|| client.headers().get(header::AUTHORIZATION).cloned());
    let key = SearchKey { id: id.into(), authorization, among: among.map(<[usize]>::to_vec) };
    match shared.searches.locate(&shared.fleet, snapshot, key).await {
        Located::At(upstream) => FoundResponse::new("asked", ResponsePlace::At(upstream), 0),
        Located::Nowhere => FoundResponse::new("nowhere", ResponsePlace::Nowhere, 0),
        Located::Unsure => FoundResponse::new("unsure", ResponsePlace::Unsure, 0),
    }
}

// === impl FoundResponse ===

impl FoundResponse {
    fn new(by: &'static str, place: ResponsePlace, name: u64) -> Self {
        FoundResponse { by, place, name }
    }

    /// The id, where there is nothing else that says where the response is.
    fn unproven(&self, id: &str) -> Option<Box<str>> {
        (self.by == BY_ID).then(|| id.into())
    }
}

// === impl ResponsePlace ===

impl From<&Entry> for ResponsePlace {
    fn from(entry: &Entry) -> Self {
        let is_lost = entry.removing || entry.standing.lost;
        if is_lost { ResponsePlace::Lost } else { ResponsePlace::At(entry.upstream.id) }
    }
}
