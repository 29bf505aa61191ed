//! The edge towards clients, which hands each request to `exchange`.
//!
//! ```text
//! server            connections and their limits; the head of each request
//! Balancer::serve   exchange::carry: intake -> choose -> attempt -> relay; then the request's record
//! ```
//!
//! Pingora's sessions parse requests and frame answers. Pingora's proxy, which would carry a request through
//! phases of its own, is not used.
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
mod linger;
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
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method};
use pingora::ErrorType;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use tokio::time::timeout;

use crate::config::types::Config;
use crate::fleet::Fleet;
use crate::state::State;
use crate::state::redis::SiblingExchange;
use attempt::pool::Pool;
use budget::Budget;
use client::{Client, STALLED};
use context::Context;
use leave::Leave;
use linger::linger;
use settings::Settings;
use stored_search::ResponseSearches;

/// What a refused request still has on the way is read, and forgotten, for this long, so that the
/// client gets to read the refusal.
const MAX_DRAIN: Duration = Duration::from_secs(10);

/// How long a connection may take to end, or to become ready for its next request.
const MAX_FINISH: Duration = Duration::from_secs(15);

/// What all listeners share.
pub struct Shared {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    /// Where siblings' words are to be looked up; `None`: there are none.
    exchange: Option<Arc<SiblingExchange>>,
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
        exchange: Option<Arc<SiblingExchange>>,
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

impl Balancer {
    /// Serves one request. Returns its connection if it can bring another.
    ///
    /// Pingora's `ProxyHttp` is not between: with a request's phases inlined, its future took 14 KiB of each
    /// stream that is open, and 3 of 45 us of a small request's CPU time.
    pub async fn serve(&self, session: ServerSession, is_closing: bool) -> Option<Stream> {
        let mut session = begin(session).await?;
        if is_closing {
            session.set_keepalive(None);
        }
        session.set_total_drain_timeout(Some(MAX_DRAIN));
        // Pingora would close a connection on which anything, even `100 Continue`, is written before the body
        // is whole: a client that still sends would lose the answer.
        session.set_close_on_response_before_downstream_finish(false);
        session.set_read_timeout(Some(STALLED));
        let mut context = Context::new(self.shared.settings.load_full(), self.shared.leave.clone());
        let id = headers::request_id(session.req_header()).map(str::to_string);
        context.id = id.unwrap_or_else(|| self.shared.random.id());
        let mut client = Client::new(&mut session);
        let error = exchange::carry(self, &mut client, &mut context).await.err();
        record::write(&self.shared, client.session(), error.as_deref(), &context);
        let lingers = client.sends_more();
        // Boxed: it ends at once, and an idle stream should not hold its room.
        let finishing = Box::pin(finish(session, error.is_some(), context.drain, lingers));
        timeout(MAX_FINISH, finishing).await.ok().flatten()
    }
}

/// Reads the head, which has been received. Returns the session of a request.
async fn begin(mut session: ServerSession) -> Option<ServerSession> {
    let refusal = match session.read_request().await {
        Ok(true) if session.req_header().method != Method::CONNECT => return Some(session),
        Ok(true) => 405,
        Err(error) if *error.etype() == ErrorType::InvalidHTTPHeader => 400,
        Ok(false) | Err(_) => return None,
    };
    // Boxed: it is rare.
    let refusing = Box::pin(async {
        if session.respond_error(refusal).await.is_ok()
            && let ServerSession::H1(session) = session
        {
            linger(session.into_inner()).await;
        }
    });
    drop(timeout(MAX_FINISH, refusing).await);
    None
}

/// Ends a request, whose answer has been written. Returns its connection if it can bring another.
/// `lingers`: the client has sent, or may send, what is not read.
async fn finish(mut session: ServerSession, failed: bool, drains: bool, lingers: bool) -> Option<Stream> {
    let stays = session.as_http1().is_some_and(|session| session.will_keepalive());
    if drains || !failed && stays {
        Client::new(&mut session).discard_body(MAX_DRAIN).await;
    }
    if drains {
        // The connection ends either way.
        session.drain_request_body().await.ok();
    }
    if failed {
        return None;
    }
    session = match session {
        ServerSession::H1(mut session) if lingers => {
            session.finish_body().await.ok()?;
            linger(session.into_inner()).await;
            return None;
        }
        session => session,
    };
    // Without pipelining there are no bytes of another request.
    let (stream, _) = session.finish().await.ok()??.into_parts();
    Some(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn future_size<'a, F>(_: impl Fn(&'a Balancer, ServerSession, bool) -> F) -> usize {
        size_of::<F>()
    }

    /// Each open stream has one of these. With pingora's proxy around it, it was 18 KiB.
    #[test]
    fn a_requests_future_is_small() {
        let size = future_size(Balancer::serve);
        assert!(size <= 6_200, "{size} bytes");
    }
}
