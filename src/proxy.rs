//! The edge towards clients: pingora's `ProxyHttp`, which hands each request to `exchange`.
//!
//! ```text
//! request_filter    exchange::carry: intake -> choose -> attempt -> relay
//! logging           the record of the finished request
//! ```
//!
//! Pingora reads and parses requests, frames answers and keeps connections; it never carries a request
//! itself, so that its own phases towards upstreams do not run.
//!
//! Never: a rule of routing or balancing (`route`, `pick`, `retry`), a metric's name (`observe`), an error's
//! text (`reject`).

mod attempt;
mod body;
mod body_tail;
mod budget;
pub mod certificate;
mod choose;
mod client;
pub mod connections;
mod context;
mod exchange;
mod headers;
mod intake;
pub mod leave;
mod memory;
mod own_answers;
mod prompt_work;
mod random;
mod record;
mod relay;
mod request;
mod respond;
mod route_edits;
mod served;
pub mod server;
mod settings;
mod stored;
mod stored_search;
mod translation;
mod tunnel;
mod upstream_head;
mod usage_question;
mod watch;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderValue;
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};

use crate::config::types::Config;
use crate::fleet::Fleet;
use crate::state::State;
use crate::state::redis::Exchange;
use attempt::pool::Pool;
use budget::Budget;
use client::{Client, STALLED};
use context::Context;
use leave::Leave;
use settings::Settings;
use stored_search::ResponseSearches;

/// What a refused request still has on the way is read, and forgotten, for this long, so that the
/// client gets to read the refusal.
const MAX_DRAIN: Duration = Duration::from_secs(10);

/// What all listeners share.
pub struct Shared {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    /// Where siblings' words are to be looked up; `None`: there are none.
    exchange: Option<Arc<Exchange>>,
    settings: ArcSwap<Settings>,
    memory: Arc<memory::Memory>,
    pool: Pool,
    searches: ResponseSearches,
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
            pool: Pool::default(),
            searches: ResponseSearches::default(),
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
}

#[async_trait]
impl ProxyHttp for Balancer {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context::new(self.shared.settings.load_full(), self.shared.leave.clone())
    }

    /// No compression: vLLM has none, and an event must not wait for its neighbours.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, context: &mut Context) -> Result<bool> {
        session.set_total_drain_timeout(Some(MAX_DRAIN));
        // Pingora would close a connection on which anything, even `100 Continue`, is written before the body
        // is whole: a client that still sends would lose the answer.
        session.set_close_on_response_before_downstream_finish(false);
        session.set_read_timeout(Some(STALLED));
        let id = headers::request_id(session.req_header()).map(str::to_string);
        context.id = id.unwrap_or_else(|| self.shared.random.id());
        let mut client = Client::new(session.as_downstream_mut());
        exchange::carry(self, &mut client, context).await.map(|()| true)
    }

    /// Never called: `request_filter` answers every request.
    async fn upstream_peer(&self, _session: &mut Session, _context: &mut Context) -> Result<Box<HttpPeer>> {
        Err(Error::new_in(ErrorType::InternalError))
    }

    /// The client has been told what there was to tell: the connection ends.
    async fn fail_to_proxy(
        &self,
        _session: &mut Session,
        _error: &Error,
        _context: &mut Context,
    ) -> FailToProxy {
        FailToProxy { error_code: 0, can_reuse_downstream: false }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Context) {
        record::write(&self.shared, session, error, context);
        if context.drain || error.is_none() {
            Client::new(session.as_downstream_mut()).discard_body(MAX_DRAIN).await;
        }
        if context.drain {
            // The connection ends either way.
            session.drain_request_body().await.ok();
        }
    }

    /// As below.
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
