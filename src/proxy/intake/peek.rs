//! Reads the beginning of a request's body, and its facts, before an upstream is chosen.
//!
//! Bounded three ways: by `peek.bytes` (up to `peek.max_body` where something decides the upstream that has
//! not come yet), by `peek.memory` over all requests, and by the pace of the upload.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use super::body_facts::{BodyFacts, BodyShape, FactsReader, PeekedBytes};
use crate::config::types::Peek;
use crate::names::MAX_MODEL_BYTES;
use crate::observe::Observer;
use crate::prompt::ModelField;
use crate::prompt::multipart::FormScanner;
use crate::prompt::scan::BodyField;
use crate::prompt::session;
use crate::proxy::body::RequestBody;
use crate::proxy::body_tail::{lost_form, second_model};
use crate::proxy::capture::PreparedCapture;
use crate::proxy::client::Client;
use crate::proxy::fleet_routes::FleetRoutes;
use crate::proxy::headers;
use crate::proxy::random::RandomSource;
use crate::proxy::request_end::{RequestEnd, client_failure};
use crate::proxy::route_edits::RouteEdits;
use crate::proxy::settings::Peeker;
use crate::proxy::usage_injection::{self, UsageInjection};
use crate::proxy::watch::UploadPace;
use crate::reject::Reject;
use crate::route::dialect::BodyDialect;
use crate::route::edit::wide;
use crate::route::rewrite::is_wide;
use crate::route::usage::{self, UsageRequest};
use crate::traces::Traces;

/// The facts from a request's head.
#[derive(Clone, Copy)]
pub(crate) struct HeadFacts<'a> {
    /// What is captured, and the random numbers that decide on it.
    pub traces: &'a Traces,
    pub random: &'a RandomSource,
    pub observer: &'a Observer,
    /// Decoded, as its interface is found by it.
    pub path: &'a str,
    /// The session that the path names.
    pub session: Option<&'a str>,
    /// The model, before which what the body says of one does not count.
    pub model: Option<&'a str>,
}

/// The facts of a request that are needed before an upstream can be chosen.
#[derive(Clone, Copy)]
pub(crate) struct PeekNeeds {
    pub model: bool,
    /// The response that it goes on from, of one that makes another.
    pub previous: bool,
    pub route: bool,
}

/// The peeked part of a body, and its facts.
pub(crate) struct Peeked {
    pub body: RequestBody,
    pub pace: UploadPace,
    /// The time in which the client's bytes were awaited.
    pub waited: Duration,
    pub facts: BodyFacts,
    pub usage_injection: Option<Box<UsageInjection>>,
    pub capture: Option<Box<PreparedCapture>>,
}

impl Peeker {
    /// Rejects a declared length above the limit before any of the body is read.
    pub(crate) fn check_declared_length(&self, client: &Client<'_>) -> Result<(), Reject> {
        match headers::length(client.headers()) {
            Some(length) if length > self.limits.max_body => {
                Err(Reject::TooLarge { limit: self.limits.max_body })
            }
            _ => Ok(()),
        }
    }

    /// `edits`: what its route changes, once that is known.
    pub(crate) async fn peek(
        &self,
        client: &mut Client<'_>,
        shape: BodyShape,
        head: HeadFacts<'_>,
        mut needs: PeekNeeds,
        edits: &mut Option<Box<RouteEdits>>,
    ) -> Result<Peeked, RequestEnd> {
        needs.model &= head.model.is_none();
        let declared = headers::length(client.headers());
        let body = RequestBody::new(self.memory.reservation(), self.limits.max_body, declared);
        let pace = UploadPace::new(Instant::now());
        let (facts, waited) = (FactsReader::new(shape), Duration::ZERO);
        let mut reader = PeekReader { body, pace, waited, facts, limits: self.limits };
        if client.has_no_body() {
            reader.body.complete();
            reader.facts = FactsReader::Opaque;
            *edits = self.edits(client, head, &reader).1.filter(|_| needs.route);
            let facts = reader.facts.facts(reader.peeked(), None, None);
            let PeekReader { body, pace, waited, .. } = reader;
            return Ok(Peeked { body, pace, waited, facts, usage_injection: None, capture: None });
        }
        reader.read_needed(client, needs, &self.routes).await?;
        let mut intent = self.capture_intent(client, head, &mut reader).await?;
        if let Some(intent) = &mut intent {
            reader.read_all(client).await?;
            if let Some(settings) = intent.edits().cloned() {
                // The session may name another model.
                intent.client_model = head.model.map(str::to_string).or_else(|| reader.model());
                reader.edit_for_session(&settings).await?;
            }
        }
        let (model, found) = self.edits(client, head, &reader);
        *edits = found.filter(|_| needs.route);
        check_model(edits.as_ref().and_then(|edits| edits.model.as_deref()))?;
        let by_body = head.model.is_none() && !self.routes.is_empty();
        let mut head = HeadFacts { model: head.model.or(model.as_deref()), ..head };
        let mut named = None;
        if let Some(edits) = edits.as_mut().filter(|edits| edits.needs_body()) {
            let model_span = reader.facts.model_span();
            reader.read_all(client).await?;
            if by_body && reader.facts.model_span() != model_span {
                return Err(second_model().into());
            }
            // The edit may remove the field that names the session.
            named = Some(self.session(client, head, &reader, edits.served()));
            reader.edit(edits).await?;
            // The name that its route gives is in the body.
            head.model = head.model.filter(|_| !edits.renames());
        }
        if by_body && !reader.body.is_complete() {
            reader.watch_tail()?;
        }
        let mut facts = reader.facts.facts(reader.peeked(), self.blocks, head.model);
        check_model(facts.model.name())?;
        let model = facts.prompt.model.as_deref();
        let named = named.unwrap_or_else(|| self.session(client, head, &reader, model));
        (facts.prompt.session, facts.session_label) = named.unzip();
        let usage_injection = reader.inject_usage_request(edits.as_deref());
        let intent = intent.filter(|intent| intent.is_captured);
        let capture = intent.and_then(|intent| {
            reader.inject_capture_question(intent, usage_injection.as_deref(), head.observer)
        });
        let PeekReader { body, pace, waited, .. } = reader;
        Ok(Peeked { body, pace, waited, facts, usage_injection, capture })
    }

    /// The session that the request names, and how that is reported. `model`: as the upstreams know it.
    pub(super) fn session(
        &self,
        client: &Client<'_>,
        head: HeadFacts<'_>,
        reader: &PeekReader,
        model: Option<&str>,
    ) -> Option<(session::Session, String)> {
        let request = session::SessionLookup {
            path: head.session,
            headers: client.headers(),
            body: reader.facts.scanner().map(|scanner| (reader.body.bytes(), scanner)),
            model: model.unwrap_or_default(),
        };
        request.session(&self.sessions)
    }

    /// The edits of the request's route, if it has one, and the model of a request that names none.
    fn edits(
        &self,
        client: &Client<'_>,
        head: HeadFacts<'_>,
        reader: &PeekReader,
    ) -> (Option<String>, Option<Box<RouteEdits>>) {
        if self.routes.is_empty() {
            return (None, None);
        }
        let body = reader.body.bytes();
        let text = |name| client.headers().get(name).and_then(|value| value.to_str().ok());
        let (model, dialect, form) = match &reader.facts {
            FactsReader::Json(scanner, api) => (scanner.facts(body).model, BodyDialect::of(*api), None),
            FactsReader::Multipart(scanner) => {
                (scanner.facts(body).model, BodyDialect::Other, text(http::header::CONTENT_TYPE))
            }
            FactsReader::LostForm | FactsReader::Opaque => (ModelField::Absent, BodyDialect::Other, None),
        };
        let is_opaque = matches!(reader.facts, FactsReader::Opaque);
        let is_unnamed = head.model.is_none() && model == ModelField::Absent && !is_opaque;
        let (resolved, mut edits) = if is_unnamed {
            RouteEdits::without_model(&self.routes, client, head.path, (dialect, form))
        } else {
            let model = head.model.or(model.name());
            (None, RouteEdits::for_model(&self.routes, client, head.path, model, (dialect, form)))
        };
        if let (FactsReader::Json(_, api), Some(edits)) = (&reader.facts, &mut edits) {
            edits.expect_body(*api);
        }
        (resolved, edits.map(Box::new))
    }
}

/// One body while it is peeked.
pub(super) struct PeekReader {
    pub(super) body: RequestBody,
    pace: UploadPace,
    waited: Duration,
    pub(super) facts: FactsReader,
    limits: Peek,
}

impl PeekReader {
    /// The model that the body names, as it was read.
    fn model(&self) -> Option<String> {
        let facts = self.facts.scanner()?.facts(self.body.bytes());
        facts.model.name().map(str::to_string)
    }

    fn peeked(&self) -> PeekedBytes<'_> {
        PeekedBytes {
            bytes: self.body.bytes(),
            complete: self.body.is_complete(),
            declared: self.body.declared(),
        }
    }

    /// Reads `peek.bytes`, and on until what decides the upstream has come.
    async fn read_needed(
        &mut self,
        client: &mut Client<'_>,
        needs: PeekNeeds,
        routes: &FleetRoutes,
    ) -> Result<(), RequestEnd> {
        self.read(client, self.limits.bytes).await?;
        self.facts.read(self.body.bytes());
        self.check_encoding(routes)?;
        while !self.body.is_complete() && self.needs_more(needs) && self.body.len() < self.limits.max_body {
            // A piece at a time, so that reading ends soon after what decides has come.
            let goal = (self.body.len() + self.limits.bytes).min(self.limits.max_body);
            self.read(client, goal).await?;
            self.facts.read(self.body.bytes());
        }
        if !self.body.is_complete() && self.needs_more(needs) {
            return Err(Reject::TooLarge { limit: self.limits.max_body }.into());
        }
        Ok(self.check_form(routes)?)
    }

    /// Reads the rest of a body that is needed as a whole.
    pub(super) async fn read_all(&mut self, client: &mut Client<'_>) -> Result<(), RequestEnd> {
        while !self.body.is_complete() && self.body.len() < self.limits.max_body {
            self.read(client, self.limits.max_body).await?;
        }
        if !self.body.is_complete() {
            return Err(Reject::TooLarge { limit: self.limits.max_body }.into());
        }
        self.facts.read(self.body.bytes());
        Ok(())
    }

    /// Reads until `goal` bytes are there or the body has ended.
    async fn read(&mut self, client: &mut Client<'_>, goal: u64) -> Result<(), RequestEnd> {
        while self.body.len() < goal && !self.body.is_complete() {
            let deadline = self.pace.deadline().unwrap_or_else(Instant::now);
            let (received, waited) = timed_wait(timeout_at(deadline, self.receive(client, goal))).await;
            self.waited += waited;
            let received = match received {
                Err(_) => return Err(Reject::Slow.into()),
                Ok(received) => received?,
            };
            if received == 0 && !client.is_body_done() {
                continue;
            }
            self.pace.received(received);
            if client.is_body_done() {
                self.body.complete();
            }
        }
        Ok(())
    }

    /// Reads and holds what comes next of the body, up to `goal`. Returns the number of bytes.
    async fn receive(&mut self, client: &mut Client<'_>, goal: u64) -> Result<usize, RequestEnd> {
        if client.reads_into() {
            let received = client.received().await.map_err(client_failure)?;
            let most = received.min(usize::try_from(goal - self.body.len()).unwrap_or(usize::MAX));
            let room = self.body.buffer_for(most).ok_or(Reject::Memory)?;
            return client.read_into(room, most).map_err(client_failure);
        }
        let Some(piece) = client.read().await.map_err(client_failure)? else {
            self.body.complete();
            return Ok(0);
        };
        let length = piece.len();
        if self.body.len() + length as u64 > self.limits.max_body {
            return Err(Reject::TooLarge { limit: self.limits.max_body }.into());
        }
        if self.body.hold(piece) { Ok(length) } else { Err(Reject::Memory.into()) }
    }

    /// Engines can read JSON in UTF-16 and UTF-32 where the balancer cannot: no route would be found for it.
    fn check_encoding(&self, routes: &FleetRoutes) -> Result<(), Reject> {
        if routes.is_empty() || self.facts.scanner().is_none() || !is_wide(self.body.bytes()) {
            return Ok(());
        }
        Err(wide())
    }

    /// Engines may follow a form that the balancer cannot: no route would be found for it, or another.
    fn check_form(&self, routes: &FleetRoutes) -> Result<(), Reject> {
        if routes.is_empty() || !self.facts.is_lost_form() { Ok(()) } else { Err(lost_form()) }
    }

    /// Watches the rest of the body for a second model, for which another route may be.
    fn watch_tail(&mut self) -> Result<(), Reject> {
        if let Some(tail) = self.facts.tail(self.body.bytes())? {
            self.body.watch(tail);
        }
        Ok(())
    }

    fn needs_more(&self, needs: PeekNeeds) -> bool {
        needs.model && self.facts.needs_model(self.body.bytes())
            || needs.previous && self.facts.needs_previous()
    }

    /// Replaces the received body, which is complete and has been read, by the edited one.
    async fn edit(&mut self, edits: &mut RouteEdits) -> Result<(), RequestEnd> {
        if let FactsReader::Multipart(scanner) = &self.facts
            && (scanner.is_lost() || scanner.end().is_none())
        {
            return Err(lost_form().into());
        }
        let (body, edit) = (self.body.replay(), edits.edit(self.facts.scanner()));
        let mut working = self.body.reservation_beside();
        working.reserve_edit(edit.memory_needed(body.len()), body.len())?;
        let edited = if edit.leaves_worker(body.len()) {
            // The edit continues when its client disconnects, and holds its memory until it ends.
            let edited = spawn_blocking(move || (edit.run(&body), working)).await;
            edited.map_or(Err(Reject::Internal), |(edited, _)| edited)
        } else {
            edit.run(&body)
        };
        let Some(edited) = edits.edited(edited?) else { return Ok(()) };
        self.facts = match (&self.facts, edits.form.as_deref().and_then(FormScanner::new)) {
            (FactsReader::Json(scanner, api), _) => {
                FactsReader::Json(scanner.of_edited(self.body.bytes(), &edited), edits.api(*api))
            }
            (FactsReader::Multipart(_), Some(scanner)) => FactsReader::Multipart(scanner),
            (FactsReader::Multipart(_) | FactsReader::LostForm | FactsReader::Opaque, _) => {
                FactsReader::Opaque
            }
        };
        self.facts.read(&edited);
        if self.body.replace(Bytes::from(edited)) { Ok(()) } else { Err(Reject::Memory.into()) }
    }

    /// Puts the question for the stream's usage into the body, which has been read, if it is complete.
    fn inject_usage_request(&mut self, edits: Option<&RouteEdits>) -> Option<Box<UsageInjection>> {
        let FactsReader::Json(scanner, api) = &self.facts else { return None };
        if !self.body.is_complete() {
            return None;
        }
        let mut working = self.body.reservation_beside();
        let edits_options = scanner.span(BodyField::StreamOptions).is_some();
        if edits_options && !working.grow_to(usage::memory_needed(self.body.bytes().len())) {
            return None;
        }
        let asking = usage_injection::usage_request(self.body.bytes(), scanner, *api, edits)?;
        let keeps = edits.is_some_and(RouteEdits::translates);
        let is_inserted = match asking {
            UsageRequest::Insert { at, text } => {
                self.body.insert(at, text);
                true
            }
            UsageRequest::Body(asking) => {
                // Lack of memory for this edit does not justify a reject.
                if asking.len() as u64 > self.limits.max_body || !self.body.replace(Bytes::from(asking)) {
                    return None;
                }
                false
            }
        };
        Some(Box::new(UsageInjection::new(is_inserted, keeps)))
    }
}

/// Runs a future to its end. Returns how long it was pending as well; a future that is ready at once costs no
/// look at the clock.
async fn timed_wait<T>(waiting: impl Future<Output = T>) -> (T, Duration) {
    let (mut waiting, mut since) = (pin!(waiting), None);
    let done = poll_fn(|cx| {
        let polled = waiting.as_mut().poll(cx);
        if polled.is_pending() {
            since.get_or_insert_with(Instant::now);
        }
        polled
    });
    let done = done.await;
    (done, since.map_or(Duration::ZERO, |since| since.elapsed()))
}

/// Rejects a name that is too long: it would be written into every event of the answer.
fn check_model(model: Option<&str>) -> Result<(), Reject> {
    if model.is_none_or(|model| model.len() <= MAX_MODEL_BYTES) {
        return Ok(());
    }
    let message = format!("The name of the model is longer than {MAX_MODEL_BYTES} bytes.");
    Err(Reject::Field { param: "model".into(), message })
}
