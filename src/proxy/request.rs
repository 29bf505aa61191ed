//! One request: the facts from its head and the peeked part of its body, and the decisions from them.
//!
//! Written by `intake`, read by all later steps. Never: I/O, a routing rule.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::admin_service::AdminService;
use super::body::RequestBody;
use super::capture::RequestCapture;
use super::continued_turn::ContinuedTurn;
use super::memory::MemoryReservation;
use super::peeked_prompt::PromptTail;
use super::pending_response::PendingResponse;
use super::route_edits::RouteEdits;
use super::settings::ProxySettings;
use super::shared::ProxyShared;
use super::usage_injection::UsageInjection;
use crate::config::types::{Retry, SloRule, Timeouts};
use crate::fleet::{Snapshot, UpstreamQuery};
use crate::otlp::trace_context::RequestTrace;
use crate::reject::ErrorShape;
use crate::reply::ending::ErrorEventForm;
use crate::route::resolve;
use crate::route::upstreams::{RouteNames, RouteUpstreams};
use crate::state::PromptLookup;

/// The values that all steps of one request share.
#[derive(Clone, Copy)]
pub(super) struct RequestScope<'a> {
    pub shared: &'a ProxyShared,
    pub settings: &'a ProxySettings,
    /// The admin API, on its listener.
    pub admin: Option<&'a dyn AdminService>,
    /// The request id of the client, or a new one.
    pub id: &'a str,
    /// The trace that the upstream gets in place of the client's.
    pub trace: Option<&'a RequestTrace>,
    pub begun: Instant,
}

/// The model that a client requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum RequestedModel {
    /// None, null or empty: the model that the upstream has.
    #[default]
    Any,
    Named(String),
    /// The body is no document, or its model no string: the upstream's error explains it.
    Unreadable,
}

impl RequestedModel {
    /// The name of the model, where the request has one.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            RequestedModel::Named(name) => Some(name),
            RequestedModel::Any | RequestedModel::Unreadable => None,
        }
    }
}

/// The facts and decisions of one request.
pub(super) struct ClientRequest {
    /// A call to the admin API.
    pub admin: bool,
    /// Decoded, and without the session.
    pub path: String,
    /// The session that the path names.
    pub path_session: Option<String>,
    /// The session, wherever it is named, in the form in which it is reported.
    pub session_label: Option<String>,
    /// The form of errors and of stream events for the interface's clients.
    pub style: ErrorShape,
    pub form: ErrorEventForm,
    /// The interface has answers that count tokens.
    pub counts_tokens: bool,
    pub model: RequestedModel,
    /// The edits of its route.
    pub edits: Option<Box<RouteEdits>>,
    /// The balancer requests its stream's usage.
    pub usage_injection: Option<Box<UsageInjection>>,
    /// Its prompt, and the reader of the prompt behind the peek.
    pub prompt: PromptLookup,
    pub prompt_tail: Option<Box<PromptTail>>,
    /// Prompt tokens, estimated.
    pub tokens: u64,
    /// The longest time to the first token that the client accepts, where `balance.slo` regards it.
    pub slo: Option<Duration>,
    /// The answer is to come as a stream.
    pub streams: bool,
    /// Its call is recorded as a trace.
    pub capture: Option<Box<RequestCapture>>,
    /// A completion that continues from recorded tokens is sent in its place.
    pub continued: Option<Box<ContinuedTurn>>,
    /// A response that its upstream keeps is being made.
    pub pending_response: Option<Box<PendingResponse>>,
    /// The request continues when the client disconnects.
    pub background: bool,
    /// The one upstream that may have it, by its id.
    pub only: Option<usize>,
    /// The stored response that `only` should have, where nothing but the response's id says so.
    pub unproven: Option<Box<str>>,
    /// Whether the request names the upstream of its KV cache, or controls an upstream: no retry elsewhere.
    pub pinned: bool,
    pub body: RequestBody,
    /// Bytes of the body that went to the upstream of the present attempt.
    pub forwarded: u64,
    /// Beginnings of the bodies, where they are logged.
    pub samples: Option<Box<BodySamples>>,
}

/// The beginnings of a request's and its answer's body.
#[derive(Default)]
pub(super) struct BodySamples {
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
    pub limit: usize,
}

// === impl ClientRequest ===

impl ClientRequest {
    pub(super) fn new(reservation: MemoryReservation) -> Self {
        ClientRequest {
            admin: false,
            path: String::new(),
            path_session: None,
            session_label: None,
            style: ErrorShape::OpenAi,
            form: ErrorEventForm::Data,
            counts_tokens: false,
            model: RequestedModel::Any,
            edits: None,
            usage_injection: None,
            prompt: PromptLookup::default(),
            prompt_tail: None,
            tokens: 0,
            slo: None,
            streams: false,
            capture: None,
            continued: None,
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

    pub(super) fn retry<'a>(&'a self, settings: &'a ProxySettings) -> &'a Retry {
        self.edits.as_ref().map_or(&settings.retry, |edits| &edits.plan.route.retry)
    }

    pub(super) fn timeouts(&self, settings: &ProxySettings) -> Timeouts {
        self.edits.as_ref().map_or(settings.timeouts, |edits| edits.plan.route.timeouts)
    }

    /// The name that the client gave the model, or that of the only model where it gave none.
    pub(super) fn client_model(&self) -> Option<&str> {
        self.edits.as_ref().map_or(self.model.name(), |edits| edits.model.as_deref())
    }

    /// The name of its route.
    pub(super) fn route_name(&self) -> Option<&str> {
        self.edits.as_ref().map(|edits| edits.plan.name.as_str())
    }

    /// The upstreams that its route leads to; `None`: all. A request that can go to one alone goes there.
    pub(super) fn among(&self, snapshot: &Snapshot) -> Option<Arc<RouteUpstreams>> {
        if self.only.is_some() {
            return None;
        }
        resolve::upstreams(&self.edits.as_ref()?.plan, snapshot)
    }

    /// The names of the upstreams that its route leads to; `None` as for `among`.
    pub(super) fn upstream_names(&self) -> Option<&Arc<RouteNames>> {
        let edits = self.edits.as_ref().filter(|_| self.only.is_none())?;
        edits.plan.names.as_ref()
    }

    /// The query for its candidates, without its attempts.
    pub(super) fn query<'a>(
        &'a self,
        settings: &ProxySettings,
        among: Option<&'a RouteUpstreams>,
    ) -> UpstreamQuery<'a> {
        UpstreamQuery {
            model: self.model.name(),
            tokens: self.tokens,
            tried: &[],
            again: false,
            declined: &[],
            only: self.only,
            among,
            names: self.upstream_names(),
            has_aliases: !settings.peeker.routes.is_empty(),
            slo: self.slo.filter(|_| settings.slo == SloRule::Queue),
            even_full: false,
        }
    }

    /// The length of the body on its way to an upstream, as far as it is known before its end.
    pub(super) fn length(&self) -> Option<u64> {
        let body = &self.body;
        let length = if body.is_complete() { Some(body.sent_length()) } else { body.declared() }?;
        let added = self.pending_response.as_ref().map_or(0, |pending| pending.added_length());
        Some(if length == 0 { 0 } else { length + added })
    }

    /// Frees the data that only another attempt would need, once a part of the answer was sent. `sent`: no
    /// byte of the body waits for the upstream.
    pub(super) fn release_for_answer(&mut self, sent: bool) {
        if sent {
            self.body.release();
        } else {
            self.body.stop_holding();
        }
        self.prompt.chain = Vec::new();
    }

    /// Drops the sample of an answer that another attempt replaces.
    pub(super) fn forget_answer(&mut self) {
        if let Some(samples) = &mut self.samples {
            samples.answer.clear();
        }
    }

    /// Keeps the beginning of an answer for the log of bodies.
    pub(super) fn sample_answer(&mut self, piece: &[u8]) {
        if let Some(samples) = &mut self.samples {
            BodySamples::keep(&mut samples.answer, samples.limit, piece);
        }
    }
}

// === impl BodySamples ===

impl BodySamples {
    /// Appends a piece to a sample, up to its limit.
    pub(super) fn keep(sample: &mut Vec<u8>, limit: usize, piece: &[u8]) {
        let room = limit.saturating_sub(sample.len());
        sample.extend_from_slice(&piece[..piece.len().min(room)]);
    }
}
