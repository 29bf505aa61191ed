//! One request on its way: what its head and the peeked part of its body say, and what is decided from that.
//!
//! Written by `intake`, read by everything behind it. Never: I/O, a rule of routing.

use std::time::Instant;

use super::body::RequestBody;
use super::prompt_work::PromptTail;
use super::route_edits::RouteEdits;
use super::settings::Settings;
use super::stored::PendingResponse;
use super::usage_question::UsageQuestion;
use super::{Shared, memory};
use crate::config::types::{Retry, Timeouts};
use crate::fleet::{Query, Snapshot};
use crate::reject::Style;
use crate::reply::ending::Form;
use crate::route::resolve;
use crate::state::PromptLookup;

/// What all steps of one request share.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    pub shared: &'a Shared,
    pub settings: &'a Settings,
    /// Of the request, as the client or the balancer called it.
    pub id: &'a str,
    pub begun: Instant,
}

/// The model that a client requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RequestedModel {
    /// None, null or empty: the model that the upstream has.
    #[default]
    Any,
    Named(String),
    /// The body is no document, or its model no string: an upstream tells what is wrong with it.
    Unreadable,
}

impl RequestedModel {
    pub fn name(&self) -> Option<&str> {
        match self {
            RequestedModel::Named(name) => Some(name),
            RequestedModel::Any | RequestedModel::Unreadable => None,
        }
    }
}

/// See the module.
pub struct ClientRequest {
    /// A call to the admin API, which is no client's request.
    pub admin: bool,
    /// Decoded, and without the session.
    pub path: String,
    /// The session that the path names.
    pub path_session: Option<String>,
    /// The session, wherever it is named, in the form in which it is reported.
    pub session_label: Option<String>,
    /// How the interface's clients expect an error, and the events of a stream.
    pub style: Style,
    pub form: Form,
    /// The interface has answers that count tokens.
    pub counts_tokens: bool,
    pub model: RequestedModel,
    /// What its route changes.
    pub edits: Option<Box<RouteEdits>>,
    /// Its stream's usage is asked for on the balancer's own account.
    pub usage_question: Option<Box<UsageQuestion>>,
    /// What is known of its prompt, and what reads on behind the peek.
    pub prompt: PromptLookup,
    pub prompt_tail: Option<Box<PromptTail>>,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    /// The answer is to come as a stream.
    pub streams: bool,
    /// A response that its upstream keeps is being made.
    pub pending_response: Option<Box<PendingResponse>>,
    /// The work goes on when the client disconnects.
    pub background: bool,
    /// The one upstream that may have it, by its id.
    pub only: Option<usize>,
    /// The stored response that `only` should have, where nothing but the response's id says so.
    pub unproven: Option<Box<str>>,
    /// It names where its keys and values are, or controls an upstream: no other upstream may have it.
    pub pinned: bool,
    pub body: RequestBody,
    /// Bytes of the body that went to the upstream of the present attempt.
    pub forwarded: u64,
    /// Beginnings of the bodies, where they are logged.
    pub samples: Option<Box<BodySamples>>,
}

/// The beginnings of a request's and its answer's body.
#[derive(Default)]
pub struct BodySamples {
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
    pub limit: usize,
}

// === impl ClientRequest ===

impl ClientRequest {
    pub fn new(reservation: memory::Reservation) -> Self {
        ClientRequest {
            admin: false,
            path: String::new(),
            path_session: None,
            session_label: None,
            style: Style::OpenAi,
            form: Form::Data,
            counts_tokens: false,
            model: RequestedModel::Any,
            edits: None,
            usage_question: None,
            prompt: PromptLookup::default(),
            prompt_tail: None,
            tokens: 0,
            streams: false,
            pending_response: None,
            background: false,
            only: None,
            unproven: None,
            pinned: false,
            body: RequestBody::empty(reservation),
            forwarded: 0,
            samples: None,
        }
    }

    pub fn retry<'a>(&'a self, settings: &'a Settings) -> &'a Retry {
        self.edits.as_ref().map_or(&settings.retry, |edits| &edits.plan.route.retry)
    }

    pub fn timeouts(&self, settings: &Settings) -> Timeouts {
        self.edits.as_ref().map_or(settings.timeouts, |edits| edits.plan.route.timeouts)
    }

    /// The name that the client gave the model.
    pub fn client_model(&self) -> Option<&str> {
        self.edits.as_ref().map_or(self.model.name(), |edits| edits.model.as_deref())
    }

    /// The upstreams that its route leads to; `None`: all. A request that can go to one alone goes there.
    pub fn among(&self, snapshot: &Snapshot) -> Option<Vec<usize>> {
        if self.only.is_some() {
            return None;
        }
        resolve::among(&self.edits.as_ref()?.plan.route, snapshot)
    }

    /// The names of the upstreams that its route leads to; `None` as for `among`.
    pub fn upstream_names(&self) -> Option<&[String]> {
        let edits = self.edits.as_ref().filter(|_| self.only.is_none())?;
        edits.plan.route.upstreams.as_deref()
    }

    /// What it asks of the fleet, as far as that does not depend on its attempts.
    pub fn query<'a>(&'a self, settings: &Settings, among: Option<&'a [usize]>) -> Query<'a> {
        Query {
            model: self.model.name(),
            tokens: self.tokens,
            tried: &[],
            again: false,
            away: &[],
            only: self.only,
            among,
            names: self.upstream_names(),
            has_aliases: !settings.peeker.routes.is_empty(),
        }
    }

    /// The length of the body on its way to an upstream, as far as it is known before its end.
    pub fn length(&self) -> Option<u64> {
        let body = &self.body;
        let length = if body.is_complete() { Some(body.sent_length()) } else { body.declared() }?;
        let added = self.pending_response.as_ref().map_or(0, |pending| pending.added_length());
        Some(if length == 0 { 0 } else { length + added })
    }

    /// Once some of the answer has gone out no attempt can follow, and what another would be chosen by goes.
    /// `sent`: no byte of the body waits for the upstream any more.
    pub fn settle(&mut self, sent: bool) {
        if sent {
            self.body.release();
        } else {
            self.body.let_go();
        }
        self.prompt.chain = Vec::new();
    }

    /// An answer was given up for another attempt: the log of bodies has nothing of it.
    pub fn forget_answer(&mut self) {
        if let Some(samples) = &mut self.samples {
            samples.answer.clear();
        }
    }

    /// Keeps the beginning of an answer for the log of bodies.
    pub fn sample_answer(&mut self, piece: &[u8]) {
        if let Some(samples) = &mut self.samples {
            BodySamples::keep(&mut samples.answer, samples.limit, piece);
        }
    }
}

// === impl BodySamples ===

impl BodySamples {
    pub fn keep(sample: &mut Vec<u8>, limit: usize, piece: &[u8]) {
        let room = limit.saturating_sub(sample.len());
        sample.extend_from_slice(&piece[..piece.len().min(room)]);
    }
}
