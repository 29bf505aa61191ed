//! Reads the beginning of a request's body, and what it says, before an upstream is chosen.
//!
//! Bounded three ways: by `peek.bytes` (up to `peek.max_body` where something decides the upstream that has
//! not come yet), by `peek.memory` over all requests, and by a deadline that leaves a slow line its
//! time but not a client that only holds on: half a minute, and a second more for each 64 KiB that came.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pingora::proxy::Session;
use pingora::{Error, ErrorSource, ErrorType};
use tokio::time::{Instant, timeout_at};

use super::ask::{self, Ask};
use super::face::Face;
use super::headers;
use super::look::{Looker, Shape};
use super::memory::{Memory, Reservation};
use super::prompt::Rest;
use super::served::Routes;
use super::stored::Kept;
use crate::config::types::{Peek, Sessions};
use crate::names::MAX_MODEL_BYTES;
use crate::prompt::Model;
use crate::prompt::chain::Blocks;
use crate::prompt::multipart::FormScanner;
use crate::prompt::session;
use crate::reject::Reject;
use crate::route::dialect::Dialect;
use crate::route::rewrite::is_wide;
use crate::route::table::Unnamed;
use crate::state::Asked;

/// How long a client may take for the first piece of what is peeked.
const PATIENCE: Duration = Duration::from_secs(30);

/// A slow line gets a second for so much.
const SLOWEST: u64 = 64 << 10;

/// Reserved to begin with, unless the body is smaller.
const FIRST: u64 = 64 << 10;

/// What the head says of a request.
#[derive(Clone, Copy)]
pub struct Said<'a> {
    /// Decoded, as its interface is found by it.
    pub path: &'a str,
    /// The session that the path named.
    pub session: Option<&'a str>,
    /// The model, before which what the body says of one does not count.
    pub model: Option<&'a str>,
}

/// What must be known of a request before an upstream can be chosen.
#[derive(Clone, Copy)]
pub struct Needs {
    pub model: bool,
    /// The response that it goes on from, of one that makes another.
    pub previous: bool,
    pub route: bool,
}

/// What the body says, as far as it was read.
#[derive(Default)]
pub struct Wish {
    pub model: Wanted,
    pub asked: Asked,
    /// The session, in the form in which it is told.
    pub session: Option<String>,
    pub rest: Option<Box<Rest>>,
    pub streams: bool,
    pub previous_response_id: Option<String>,
    /// The caller has chosen the upstream: its keys and values lie there.
    pub pinned: bool,
    /// The upstream is to keep the response.
    pub kept: Option<Kept>,
}

/// The model that the client asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// None, null or empty: whatever the upstream has.
    #[default]
    Any,
    Named(String),
    /// The body is no document, or its model no string: an upstream will say what is wrong.
    Unreadable,
}

impl Wanted {
    pub fn name(&self) -> Option<&str> {
        match self {
            Wanted::Named(name) => Some(name),
            Wanted::Any | Wanted::Unreadable => None,
        }
    }
}

pub struct Peeked {
    pub body: Bytes,
    /// The body has no more bytes than these.
    pub whole: bool,
    pub reservation: Reservation,
    pub wish: Wish,
    pub ask: Option<Box<Ask>>,
}

pub enum Failure {
    /// We refuse the request.
    Reject(Reject),
    /// The client left, or its connection broke.
    Client(Box<Error>),
}

/// Settings that outlive a request.
pub struct Peeker {
    pub limits: Peek,
    pub memory: Arc<Memory>,
    /// How prompts are cut; none are read where it does not matter what an upstream holds.
    pub blocks: Option<Blocks>,
    /// Where requests say their session.
    pub sessions: Sessions,
    pub routes: Routes,
}

impl Peeker {
    /// A body that says itself that it is too large is refused before any of it is asked for.
    pub fn declared(&self, session: &Session) -> Result<(), Reject> {
        match headers::length(&session.req_header().headers) {
            Some(length) if length > self.limits.max_body => {
                Err(Reject::TooLarge { limit: self.limits.max_body })
            }
            _ => Ok(()),
        }
    }

    /// `face`: what its route makes of it, once that is known.
    pub async fn peek(
        &self,
        session: &mut Session,
        shape: Shape,
        said: Said<'_>,
        mut needs: Needs,
        face: &mut Option<Box<Face>>,
    ) -> Result<Peeked, Failure> {
        needs.model &= said.model.is_none();
        if session.is_body_empty() {
            let (body, reservation) = (Bytes::new(), self.memory.reservation());
            let wish = Wish { model: Wanted::Unreadable, ..Wish::default() };
            *face = self.face(session, said, &Looker::Opaque, &body).1.filter(|_| needs.route);
            return Ok(Peeked { body, whole: true, reservation, wish, ask: None });
        }
        let declared = headers::length(&session.req_header().headers);
        let mut reader = Reader {
            declared,
            body: Body::Nothing,
            reservation: self.memory.reservation(),
            looker: Looker::new(shape),
            begun: Instant::now(),
            limits: self.limits,
        };
        let mut whole = reader.read(session, self.limits.bytes).await?;
        reader.look();
        reader.check_encoding(&self.routes)?;
        while !whole && reader.wants_more(needs) && reader.len() < self.limits.max_body {
            // A piece at a time, so that reading ends soon after what decides has come.
            let goal = (reader.len() + self.limits.bytes).min(self.limits.max_body);
            whole = reader.read(session, goal).await?;
            reader.look();
        }
        if !whole && reader.wants_more(needs) {
            return Err(Failure::Reject(Reject::TooLarge { limit: self.limits.max_body }));
        }
        let (model, found) = self.face(session, said, &reader.looker, reader.body.bytes());
        *face = found.filter(|_| needs.route);
        let mut said = Said { model: said.model.or(model.as_deref()), ..said };
        let mut named = None;
        if let Some(face) = face.as_mut().filter(|face| face.wants_body()) {
            while !whole && reader.len() < self.limits.max_body {
                whole = reader.read(session, self.limits.max_body).await?;
            }
            if !whole {
                return Err(Failure::Reject(Reject::TooLarge { limit: self.limits.max_body }));
            }
            reader.look();
            // What names the session may be nothing for the upstream, and taken out.
            named = Some(self.session(session, said, &reader, face.served()));
            reader.edit(face)?;
            // The name that its route gives stands in the body.
            said.model = said.model.filter(|_| !face.renames());
        }
        let mut wish = reader.looker.wish((reader.body.bytes(), whole), declared, self.blocks, said.model);
        check_model(wish.model.name())?;
        let model = wish.asked.model.as_deref();
        let named = named.unwrap_or_else(|| self.session(session, said, &reader, model));
        (wish.asked.session, wish.session) = named.unzip();
        let ask = if whole { reader.ask(face.as_deref()) } else { None };
        Ok(Peeked { body: reader.body.freeze(), whole, reservation: reader.reservation, wish, ask })
    }

    /// The session that the request says it is of, and how that is told. `model`: as the upstreams know it.
    fn session(
        &self,
        session: &Session,
        said: Said<'_>,
        reader: &Reader,
        model: Option<&str>,
    ) -> Option<(session::Session, String)> {
        let request = session::Request {
            path: said.session,
            headers: &session.req_header().headers,
            body: reader.looker.scanner().map(|scanner| (reader.body.bytes(), scanner)),
            model: model.unwrap_or_default(),
        };
        request.session(&self.sessions)
    }

    /// What the route of a request for this model makes of it. `form`: the type of a body that is one.
    pub fn routed(
        &self,
        session: &Session,
        path: &str,
        model: Option<&str>,
        (dialect, form): (Dialect, Option<&str>),
    ) -> Option<Face> {
        let plan = self.routes.plan(model, path, &session.req_header().headers)?;
        Some(Face::new(plan, dialect, model.map(str::to_string), form.map(str::to_string)))
    }

    /// As `routed`, of a request that names no model; with the model that it is for.
    pub fn unnamed(
        &self,
        session: &Session,
        path: &str,
        (dialect, form): (Dialect, Option<&str>),
    ) -> (Option<String>, Option<Face>) {
        let Unnamed { model, plan } = self.routes.plan_unnamed(path, &session.req_header().headers);
        let face = |plan| Face::new(plan, dialect, model.clone(), form.map(str::to_string));
        (model.clone(), plan.map(face))
    }

    /// What the request's route makes of it, if it takes one, and the model that a request which names none
    /// is for.
    fn face(
        &self,
        session: &Session,
        said: Said<'_>,
        looker: &Looker,
        body: &[u8],
    ) -> (Option<String>, Option<Box<Face>>) {
        if self.routes.is_empty() {
            return (None, None);
        }
        let text = |name| session.req_header().headers.get(name).and_then(|value| value.to_str().ok());
        let (model, dialect, form) = match looker {
            Looker::Json(scanner, api) => (scanner.facts(body).model, Dialect::of(*api), None),
            Looker::Multipart(scanner) => {
                (scanner.facts(body).model, Dialect::Other, text(http::header::CONTENT_TYPE))
            }
            Looker::Opaque => (Model::Absent, Dialect::Other, None),
        };
        let is_unnamed = said.model.is_none() && model == Model::Absent && !matches!(looker, Looker::Opaque);
        let (resolved, mut face) = if is_unnamed {
            self.unnamed(session, said.path, (dialect, form))
        } else {
            (None, self.routed(session, said.path, said.model.or(model.name()), (dialect, form)))
        };
        if let (Looker::Json(_, api), Some(face)) = (looker, &mut face) {
            face.expect(*api);
        }
        (resolved, face.map(Box::new))
    }
}

struct Reader {
    declared: Option<u64>,
    body: Body,
    reservation: Reservation,
    looker: Looker,
    begun: Instant,
    limits: Peek,
}

impl Reader {
    fn len(&self) -> u64 {
        self.body.bytes().len() as u64
    }

    /// Reads until `goal` bytes are there or the body has ended; true when it has.
    async fn read(&mut self, session: &mut Session, goal: u64) -> Result<bool, Failure> {
        while self.len() < goal {
            let piece = match timeout_at(self.deadline(), session.read_request_body()).await {
                Err(_) => return Err(Failure::Reject(Reject::Slow)),
                Ok(Err(error)) => return Err(client_failure(error)),
                Ok(Ok(piece)) => piece,
            };
            let Some(piece) = piece else { return Ok(true) };
            let total = self.len() + piece.len() as u64;
            if total > self.limits.max_body {
                return Err(Failure::Reject(Reject::TooLarge { limit: self.limits.max_body }));
            }
            self.reserve(total)?;
            self.body.push(piece, usize::try_from(self.reservation.bytes()).unwrap_or(0));
            if session.is_body_done() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn deadline(&self) -> Instant {
        self.begun + PATIENCE + Duration::from_secs(self.len() / SLOWEST)
    }

    /// Reserves for what came, not for what was announced: a client can announce much and send nothing.
    /// By doubling, so that it is done a few times in a large body and once in a small one.
    fn reserve(&mut self, total: u64) -> Result<(), Failure> {
        let ahead = total.next_power_of_two().max(FIRST).min(self.limits.max_body);
        let enough = ahead.min(self.declared.unwrap_or(u64::MAX)).max(total);
        match self.reservation.grow_to(enough) {
            true => Ok(()),
            false => Err(Failure::Reject(Reject::Memory)),
        }
    }

    fn look(&mut self) {
        self.looker.look(self.body.bytes());
    }

    /// JSON in UTF-16 and UTF-32 can be read by engines and not here, so that no route would be found for it.
    fn check_encoding(&self, routes: &Routes) -> Result<(), Failure> {
        if routes.is_empty() || self.looker.scanner().is_none() || !is_wide(self.body.bytes()) {
            return Ok(());
        }
        let message = "The body must be JSON in UTF-8.".into();
        Err(Failure::Reject(Reject::Field { param: "body".into(), message }))
    }

    fn wants_more(&self, needs: Needs) -> bool {
        needs.model && self.looker.wants_model(self.body.bytes())
            || needs.previous && self.looker.wants_previous()
    }

    /// Puts the edited body in the place of the one that came, which is whole and has been looked at.
    fn edit(&mut self, face: &mut Face) -> Result<(), Failure> {
        let edited = face.edit(self.body.bytes(), self.looker.scanner());
        let Some(edited) = edited.map_err(Failure::Reject)? else { return Ok(()) };
        self.looker = match (&self.looker, face.form.as_deref().and_then(FormScanner::new)) {
            (Looker::Json(scanner, api), _) => {
                Looker::Json(scanner.of_edited(self.body.bytes(), &edited), face.api(*api))
            }
            (Looker::Multipart(_), Some(scanner)) => Looker::Multipart(scanner),
            (Looker::Multipart(_) | Looker::Opaque, _) => Looker::Opaque,
        };
        self.looker.look(&edited);
        let length = edited.len() as u64;
        self.body = Body::Piece(Bytes::from(edited));
        match self.reservation.grow_to(length) {
            true => Ok(()),
            false => Err(Failure::Reject(Reject::Memory)),
        }
    }

    /// Puts the question for the stream's usage into the body, which is whole and has been read.
    fn ask(&mut self, face: Option<&Face>) -> Option<Box<Ask>> {
        let Looker::Json(scanner, api) = &self.looker else { return None };
        let asking = ask::question(self.body.bytes(), scanner, *api, face)?;
        let length = asking.len() as u64;
        // Where it does not fit, it is not worth a refusal.
        if length > self.limits.max_body || !self.reservation.grow_to(length) {
            return None;
        }
        let asking = Bytes::from(asking);
        let keeps = face.is_some_and(Face::translates);
        let ask = Ask::new(asking.clone(), self.body.bytes().len(), keeps);
        self.body = Body::Piece(asking);
        Some(Box::new(ask))
    }
}

/// The peeked bytes: most bodies come in one piece, which is then never copied.
enum Body {
    Nothing,
    Piece(Bytes),
    Many(BytesMut),
}

impl Body {
    fn bytes(&self) -> &[u8] {
        match self {
            Body::Nothing => &[],
            Body::Piece(piece) => piece,
            Body::Many(bytes) => bytes,
        }
    }

    fn push(&mut self, piece: Bytes, room: usize) {
        match self {
            _ if piece.is_empty() => {}
            Body::Nothing => *self = Body::Piece(piece),
            Body::Piece(first) => {
                let mut bytes = BytesMut::with_capacity(room.max(first.len() + piece.len()));
                bytes.extend_from_slice(first);
                bytes.extend_from_slice(&piece);
                *self = Body::Many(bytes);
            }
            Body::Many(bytes) => bytes.extend_from_slice(&piece),
        }
    }

    fn freeze(self) -> Bytes {
        match self {
            Body::Nothing => Bytes::new(),
            Body::Piece(piece) => piece,
            Body::Many(bytes) => bytes.freeze(),
        }
    }
}

/// A name that is put into every event of an answer must not be of any length.
fn check_model(model: Option<&str>) -> Result<(), Failure> {
    if model.is_none_or(|model| model.len() <= MAX_MODEL_BYTES) {
        return Ok(());
    }
    let message = format!("The name of the model is longer than {MAX_MODEL_BYTES} bytes.");
    Err(Failure::Reject(Reject::Field { param: "model".into(), message }))
}

/// A body that breaks the framing is the client's mistake; a connection that ends is its leave.
fn client_failure(error: Box<Error>) -> Failure {
    let gone = matches!(
        error.etype(),
        ErrorType::ConnectionClosed
            | ErrorType::ReadError
            | ErrorType::WriteError
            | ErrorType::H2Error
            | ErrorType::ReadTimedout
    );
    if gone {
        let mut error = error;
        error.esource = ErrorSource::Downstream;
        return Failure::Client(error);
    }
    Failure::Reject(Reject::Malformed { why: "the body's framing is broken" })
}
