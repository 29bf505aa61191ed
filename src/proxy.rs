//! The edge towards clients: pingora's `ProxyHttp`, each phase a few lines and a call.
//!
//! ```text
//! request_filter    head checked -> route found -> answered here, or body peeked
//!                   candidates -> pick -> lease
//! upstream_peer     where to connect
//! upstream_request  head made ready for the upstream
//! upstream_response first byte -> the lease's prefill is over, the held body goes
//! fail_to_proxy     the one place that answers for a failure
//! logging           the session goes home, the lease drops, the request is told
//! ```
//!
//! Never: a rule of routing or balancing (`route`, `pick`), a metric's name (`observe`), an error's text
//! (`reject`).

mod context;
mod headers;
mod local;
mod memory;
mod peek;
mod peer;
mod plan;
mod random;
mod replay;
mod respond;
pub mod server;
mod settings;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};

use crate::config::types::Config;
use crate::fleet::{Fleet, Lease, Outcome, Query, Routing};
use crate::observe;
use crate::pick::{self, Seed};
use crate::reject::Reject;
use crate::reply::Reply;
use context::{Context, Samples};
use peek::Wanted;
use plan::Step;
use settings::Settings;

/// A client that stops reading, or stops sending what it announced, is let go after this.
const STALLED: Duration = Duration::from_secs(120);

/// What a refused request still has on the way is read, and forgotten, for this long, so that the
/// client gets to read the refusal.
const DRAIN: Duration = Duration::from_secs(10);

/// What all listeners share.
pub struct Shared {
    fleet: Arc<Fleet>,
    settings: ArcSwap<Settings>,
    memory: Arc<memory::Memory>,
    peers: peer::Peers,
    random: random::Random,
}

impl Shared {
    pub fn new(config: &Config, fleet: Arc<Fleet>) -> Arc<Self> {
        let memory = memory::Memory::new(config.peek.memory);
        Arc::new(Shared {
            fleet,
            settings: ArcSwap::new(Settings::new(config, memory.clone())),
            memory,
            peers: peer::Peers::default(),
            random: random::Random::new(),
        })
    }

    /// Requests that begin from now on go by `config`.
    pub fn reload(&self, config: &Config) {
        self.memory.limit(config.peek.memory);
        self.settings.store(Settings::new(config, self.memory.clone()));
    }
}

/// The admin room, handed in by the assembly: edges do not know each other.
pub trait Admin: Send + Sync {
    /// Whether a path is one of its own.
    fn serves(&self, path: &str) -> bool;
    fn call(&self, request: http::Request<Bytes>) -> BoxFuture<'_, http::Response<Bytes>>;
}

/// One kind of listener: the public one, or the admin's, which serves all that the public one does too.
pub struct Balancer {
    shared: Arc<Shared>,
    admin: Option<Arc<dyn Admin>>,
}

impl Balancer {
    pub fn public(shared: Arc<Shared>) -> Self {
        Balancer { shared, admin: None }
    }

    pub fn admin(shared: Arc<Shared>, admin: Arc<dyn Admin>) -> Self {
        Balancer { shared, admin: Some(admin) }
    }

    /// Chooses an upstream and takes a lease on it.
    fn choose(&self, context: &mut Context) -> Result<()> {
        let shared = &*self.shared;
        let snapshot = shared.fleet.snapshot_owned();
        let mut candidates = Vec::with_capacity(snapshot.entries.len());
        let model = match &context.model {
            Wanted::Named(name) => Some(name.as_str()),
            Wanted::Any | Wanted::Unreadable => None,
        };
        let query = Query { model, tokens: context.tokens, only: context.only, ..Query::default() };
        loop {
            let now = Instant::now();
            let routing = snapshot.candidates(&query, now, &mut candidates);
            let seed = Seed { random: shared.random.next(), turn: shared.fleet.next_turn() };
            let choice = match (routing, pick::pick(&candidates, &context.settings.knobs, seed)) {
                (Routing::Candidates, Some(choice)) => choice,
                (routing, _) => {
                    return Err(refuse(context, plan::no_candidate(&routing, context, &snapshot)));
                }
            };
            let entry = &snapshot.entries[choice.index];
            // Somebody else may have taken the last place meanwhile.
            let Some(lease) = Lease::take(entry, context.tokens, now) else { continue };
            let (name, reason) = (entry.upstream.name(), choice.reason.label());
            observe::chosen(&context.id, name, choice.cost, reason, candidates.len());
            context.lease = Some(lease);
            return Ok(());
        }
    }

    fn finished(&self, context: &Context, error: Option<&Error>) -> Outcome {
        match (context.outcome, error) {
            (Some(outcome), _) => outcome,
            (None, None) => Outcome::Answered(context.status),
            (None, Some(error)) if *error.esource() == ErrorSource::Downstream => Outcome::ClientGone,
            (None, Some(_)) => Outcome::Broken,
        }
    }
}

/// Ends the request with a refusal: `fail_to_proxy` says it to the client.
fn refuse(context: &mut Context, reject: Reject) -> Box<Error> {
    context.reject = Some(reject);
    Error::new_in(ErrorType::Custom("refused"))
}

#[async_trait]
impl ProxyHttp for Balancer {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context::new(self.shared.settings.load_full())
    }

    /// No compression: vLLM has none, and an event must not wait for its neighbours.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, context: &mut Context) -> Result<()> {
        session.set_total_drain_timeout(Some(DRAIN));
        session.set_read_timeout(Some(STALLED));
        session.set_write_timeout(Some(STALLED));
        let id = headers::request_id(session.req_header()).map(str::to_string);
        context.id = id.unwrap_or_else(|| self.shared.random.id());
        match headers::refuse(session, context.settings.header_bytes) {
            Some(reject) => Err(refuse(context, reject)),
            None => Ok(()),
        }
    }

    async fn request_filter(&self, session: &mut Session, context: &mut Context) -> Result<bool> {
        let step = plan::admin(self, session, context).await?;
        let step = match step {
            Some(answer) => Step::Answer(answer),
            None => plan::route(&self.shared, session, context).await?,
        };
        match step {
            Step::Forward => {
                // Chosen here rather than when pingora asks for the peer, so that a refusal leaves the
                // client its connection.
                self.choose(context)?;
                Ok(false)
            }
            Step::Answer(answer) => {
                context.status = answer.status().as_u16();
                respond::send(session, answer, &context.id, false).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, context: &mut Context) -> Result<Box<HttpPeer>> {
        context.attempts += 1;
        let lease = context.lease.as_ref().ok_or_else(|| Error::new_in(ErrorType::InternalError))?;
        self.shared.peers.peer(lease.upstream(), context.settings.timeouts.connect).map_err(|error| {
            context.outcome = Some(Outcome::Unreached);
            error.into_up()
        })
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        context: &mut Context,
        error: Box<Error>,
    ) -> Box<Error> {
        context.outcome = Some(Outcome::Unreached);
        error.into_up()
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        _session: &mut Session,
        mut error: Box<Error>,
        _context: &mut Context,
        _reused: bool,
    ) -> Box<Error> {
        // An undecided error would panic when it is asked whether it may be tried again.
        error.set_retry(false);
        error
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        head: &mut RequestHeader,
        context: &mut Context,
    ) -> Result<()> {
        let https = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        match &context.lease {
            Some(lease) => headers::towards_upstream(session, head, lease.upstream(), https),
            None => Ok(()),
        }
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        context: &mut Context,
    ) -> Result<()> {
        context.received += body.as_ref().map_or(0, |piece| piece.len() as u64);
        let limit = context.settings.peeker.limits.max_body;
        if context.received > limit && context.home.is_some() {
            return Err(refuse(context, Reject::TooLarge { limit }));
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        _session: &mut Session,
        head: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        context.status = head.status.as_u16();
        let kind = head.headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        context.reply = Some(Reply::new(kind));
        // Nothing is tried again once an answer has begun.
        context.settle();
        Ok(())
    }

    async fn response_filter(
        &self,
        _session: &mut Session,
        head: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        headers::towards_client(head, context, context.settings.expose)
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        context: &mut Context,
    ) -> Result<Option<Duration>> {
        let Some(piece) = body.as_ref().filter(|piece| !piece.is_empty()) else { return Ok(None) };
        context.watch(piece);
        if let Some(samples) = &mut context.samples {
            Samples::keep(&mut samples.answer, samples.most, piece);
        }
        Ok(None)
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        context: &mut Context,
    ) -> FailToProxy {
        if let Some(home) = context.home.take() {
            home.unwrap(&mut session.downstream_session);
        }
        let nothing = FailToProxy { error_code: 0, can_reuse_downstream: false };
        if session.response_written().is_some_and(|head| !head.status.is_informational()) {
            return nothing;
        }
        let Some(reject) = context.reject.take().or_else(|| plan::failure(error, context)) else {
            return nothing;
        };
        observe::rejected(reject.label());
        context.refused = Some(reject.label());
        if matches!(reject, Reject::Upstream { .. } | Reject::Timeout { .. })
            && let Some(lease) = &context.lease
        {
            lease.upstream().doubt();
        }
        context.status = reject.status();
        let close = context.attempts > 0 || reject.closes();
        let answer = respond::refusal(&reject, context.style);
        match respond::send(session, answer, &context.id, close).await {
            Ok(()) => FailToProxy { error_code: context.status, can_reuse_downstream: !close },
            Err(_) => nothing,
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Context) {
        if let Some(home) = context.home.take() {
            home.unwrap(&mut session.downstream_session);
        }
        context.settle();
        let outcome = self.finished(context, error);
        let lease = context.lease.take();
        plan::tell(&self.shared, session, error, context, lease.as_ref(), outcome);
    }

    /// Ends are told by `observe`, once, with their fields.
    fn suppress_error_log(&self, _session: &Session, _context: &Context, _error: &Error) -> bool {
        true
    }
}
