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

mod answer;
mod ask;
mod attempt;
mod budget;
pub mod certificate;
pub mod connections;
mod context;
mod face;
mod headers;
pub mod leave;
mod line;
mod local;
mod look;
mod memory;
mod peek;
mod peer;
mod plan;
mod prompt;
mod random;
mod replay;
mod respond;
mod served;
pub mod server;
mod session;
mod settings;
mod stored;
mod translation;
pub mod wire;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderValue;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType, Result};

use crate::config::types::Config;
use crate::fleet::{Fleet, Outcome};
use crate::observe;
use crate::reject::Reject;
use crate::state::State;
use crate::state::redis::Exchange;
use attempt::Cause;
use budget::Budget;
use context::Context;
use leave::Leave;
use plan::Step;
use settings::Settings;

/// A client that stops reading, or stops sending what it announced, is let go after this.
pub(crate) const STALLED: Duration = Duration::from_secs(120);

/// What a refused request still has on the way is read, and forgotten, for this long, so that the
/// client gets to read the refusal.
const DRAIN: Duration = Duration::from_secs(10);

/// What all listeners share.
pub struct Shared {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    /// Where siblings' words are to be looked up; `None`: there are none.
    exchange: Option<Arc<Exchange>>,
    settings: ArcSwap<Settings>,
    memory: Arc<memory::Memory>,
    peers: peer::Peers,
    random: random::Random,
    /// What this balancer says of itself in `via`, so that it knows a request that comes back.
    mark: HeaderValue,
    budget: Budget,
    leave: Arc<Leave>,
}

impl Shared {
    pub fn new(
        config: &Config,
        fleet: Arc<Fleet>,
        state: Arc<State>,
        exchange: Option<Arc<Exchange>>,
    ) -> Arc<Self> {
        let memory = memory::Memory::new(config.peek.memory);
        let random = random::Random::new();
        Arc::new(Shared {
            settings: ArcSwap::new(Settings::new(config, fleet.clone(), memory.clone(), state.blocks())),
            fleet,
            state,
            exchange,
            memory,
            peers: peer::Peers::default(),
            mark: random.mark(),
            random,
            budget: Budget::new(),
            leave: Arc::default(),
        })
    }

    /// What tells of the end: whoever ends the balancer moves it on.
    pub fn leave(&self) -> &Arc<Leave> {
        &self.leave
    }

    /// Requests that begin from now on go by `config`.
    pub fn reload(&self, config: &Config) {
        self.memory.limit(config.peek.memory);
        self.state.set_ttl(config.sessions.ttl);
        let (fleet, memory) = (self.fleet.clone(), self.memory.clone());
        self.settings.store(Settings::new(config, fleet, memory, self.state.blocks()));
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

    /// An attempt failed before its answer began: another follows if it may.
    fn failed(&self, context: &mut Context, cause: Cause, error: Box<Error>) -> Box<Error> {
        let allowed = std::mem::take(&mut context.allowed);
        let again = allowed || attempt::may_follow(&self.shared, context, cause);
        attempt::end(&self.shared, context, cause);
        if again {
            observe::retried(cause.label());
        }
        let mut error = error.into_up();
        error.set_retry(again);
        error
    }

    fn finished(&self, context: &Context, error: Option<&Error>) -> Outcome {
        match (context.outcome, error) {
            (Some(outcome), _) => outcome,
            (None, None) => attempt::whole(&self.shared, context),
            (None, Some(error)) if *error.esource() == ErrorSource::Downstream => Outcome::ClientGone,
            (None, Some(_)) => Outcome::Broken,
        }
    }
}

/// Whether some of the answer has gone to the client; leave to send a body is none of it.
fn has_begun(session: &Session) -> bool {
    session.response_written().is_some_and(|head| !head.status.is_informational() || head.status == 101)
}

/// Ends the attempt in favour of another one, which `may_follow` has allowed.
fn another(context: &mut Context, cause: Cause) -> Box<Error> {
    context.cause = Some(cause);
    context.allowed = true;
    Error::new_up(ErrorType::Custom("tried again"))
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
        Context::new(self.shared.settings.load_full(), self.shared.leave.clone())
    }

    /// No compression: vLLM has none, and an event must not wait for its neighbours.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, context: &mut Context) -> Result<()> {
        session.set_total_drain_timeout(Some(DRAIN));
        // Pingora would close a connection on which anything, even `100 Continue`, is said before the body
        // is whole: a client that still sends would lose the answer.
        session.set_close_on_response_before_downstream_finish(false);
        session.set_read_timeout(Some(STALLED));
        session.set_write_timeout(Some(STALLED));
        let id = headers::request_id(session.req_header()).map(str::to_string);
        context.id = id.unwrap_or_else(|| self.shared.random.id());
        match headers::refuse(session, context.settings.header_bytes, &self.shared.mark) {
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
                self.shared.budget.request(context.retry().budget);
                attempt::choose(&self.shared, session, context).await?;
                Ok(false)
            }
            Step::Answer(answer) => {
                context.status = answer.status().as_u16();
                respond::send(session, answer, context, self.shared.leave.is_closing()).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, session: &mut Session, context: &mut Context) -> Result<Box<HttpPeer>> {
        context.attempts += 1;
        if context.attempts > 1 {
            attempt::next(&self.shared, session, context).await?;
        }
        let lease = context.lease.as_ref().ok_or_else(|| Error::new_in(ErrorType::InternalError))?;
        let peer = self.shared.peers.peer(lease.upstream(), context.timeouts().connect);
        peer.map_err(|error| self.failed(context, Cause::Connect { refused: false }, error))
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        context: &mut Context,
        error: Box<Error>,
    ) -> Box<Error> {
        let refused = *error.etype() == ErrorType::ConnectRefused;
        self.failed(context, Cause::Connect { refused }, error)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Context,
        reused: bool,
    ) -> Box<Error> {
        // An undecided error would panic when it is asked whether it may be tried again.
        error.set_retry(false);
        let begun = has_begun(session);
        match context.cause.take().or_else(|| attempt::cause_of(&error, context, reused)) {
            Some(cause) if begun => {
                attempt::end(&self.shared, context, cause);
                error
            }
            Some(cause) => self.failed(context, cause, error),
            None => {
                // The client's doing: whatever an earlier attempt met is no news to anybody.
                context.failed = None;
                error
            }
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        head: &mut RequestHeader,
        context: &mut Context,
    ) -> Result<()> {
        let https = session.digest().is_some_and(|digest| digest.ssl_digest.is_some());
        context.sent = true;
        context.face.as_ref().map_or(Ok(()), |face| face.translate_path(head))?;
        if let Some(lease) = &context.lease {
            headers::towards_upstream(session, head, lease.upstream(), https)?;
        }
        headers::pass(head, &self.shared.mark)?;
        let upstream = context.lease.as_ref().map(|lease| &**lease.upstream());
        context.face.as_ref().map_or(Ok(()), |face| face.towards_upstream(head, upstream))?;
        context.ask.as_ref().map_or(Ok(()), |ask| ask.towards_upstream(head))?;
        context.making.as_ref().map_or(Ok(()), |making| making.lengthen(head))
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        context: &mut Context,
    ) -> Result<()> {
        let (before, piece) = (context.received, body.as_deref().unwrap_or_default());
        context.received += piece.len() as u64;
        prompt::follow(&self.shared, context, before, piece, end);
        if context.received > context.most {
            return Err(refuse(context, Reject::TooLarge { limit: context.most }));
        }
        if before == 0 {
            stored::stamp(context, body);
        }
        Ok(())
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        head: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        let status = head.status.as_u16();
        if status == 101 && !session.is_upgrade_req() {
            // Nobody has asked to speak another protocol; what follows would be no HTTP.
            return Err(
                Error::explain(ErrorType::InvalidHTTPHeader, "an upgrade that was not asked for").into_up()
            );
        }
        context.status = status;
        context.head_came = true;
        attempt::answered(&self.shared, context, head);
        let cause = Cause::Status(status);
        let elsewhere = stored::elsewhere(&self.shared, context).await;
        if elsewhere || attempt::may_follow(&self.shared, context, cause) {
            return Err(another(context, cause));
        }
        answer::begin(&self.shared, context, head)
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        head: &mut ResponseHeader,
        context: &mut Context,
    ) -> Result<()> {
        if self.shared.leave.is_closing() {
            session.set_keepalive(None);
        }
        if session.req_header().version == http::Version::HTTP_10 {
            // It knows no chunks: the end of the connection is the end of the answer.
            head.remove_header(&http::header::TRANSFER_ENCODING);
        }
        context.face.as_ref().map_or(Ok(()), |face| face.towards_client(head))?;
        headers::towards_client(head, context, context.settings.expose)
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        context: &mut Context,
    ) -> Result<Option<Duration>> {
        answer::piece(&self.shared, context, body, end)?;
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
        if has_begun(session) {
            plan::end_stream(session, error, context).await;
            return nothing;
        }
        // What an answer said that no client got counts for nothing.
        context.meter = None;
        let Some(reject) = context.reject.take().or_else(|| plan::failure(error, context)) else {
            return nothing;
        };
        observe::rejected(reject.label());
        context.refused = Some(reject.label());
        context.status = reject.status();
        let failed = context.attempts > 0;
        context.drain = failed && !reject.closes();
        let close = failed || reject.closes() || self.shared.leave.is_closing();
        let answer = respond::refusal(&reject, context.style);
        match respond::send(session, answer, context, close).await {
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
        if let Some(lease) = &lease {
            let has_read = context.has_read();
            prompt::forget(&self.shared, context, lease.upstream().id, has_read);
            if let Some(usage) = &context.usage() {
                prompt::told(&self.shared, context, lease.upstream(), usage);
            }
        }
        plan::tell(&self.shared, session, error, context, lease.as_ref(), outcome);
        drop(lease);
        if context.drain {
            // The connection ends either way.
            drop(session.drain_request_body().await);
        }
    }

    /// As above.
    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _context: &Context,
        _error: &Error,
        _what: ProxyWarnLogContext,
    ) -> bool {
        true
    }

    /// Ends are told by `observe`, once, with their fields.
    fn suppress_error_log(&self, _session: &Session, _context: &Context, _error: &Error) -> bool {
        true
    }
}
