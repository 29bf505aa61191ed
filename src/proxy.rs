//! The edge towards clients: accepts connections and hands each request to `carry`.
//!
//! ```text
//! server            connections and their limits; the head of each request
//! Balancer::serve   carry::carry: intake -> choose -> attempt -> relay; then the request's record
//! ```
//!
//! Pingora's sessions parse requests and frame answers. Pingora's proxy, which would carry a request through
//! phases of its own, is not used.
//!
//! Never: a rule of routing or balancing (`route`, `pick`, `retry`), a metric's name (`observe`), an error's
//! text (`reject`).

mod admin_service;
mod admin_stream;
mod attempt;
mod attempts;
mod body;
mod body_tail;
mod budget;
mod cached_pages;
mod capture;
mod carry;
mod choose;
mod client;
mod client_address;
mod context;
mod continued_turn;
mod cumulative;
mod fleet_routes;
mod forwarded_head;
mod headers;
mod intake;
mod linger;
mod memory;
mod own_answers;
mod peeked_prompt;
mod pending_response;
mod phases;
mod placement;
mod random;
mod record;
mod relay;
mod request;
mod request_end;
mod request_report;
mod respond;
mod route_edits;
pub(crate) mod server;
mod settings;
mod shared;
mod slo;
mod stored;
mod stored_search;
mod translation;
mod tunnel;
mod upstream_head;
mod usage_injection;
mod watch;
mod watched;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use pingora::ErrorType;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use tokio::time::timeout;

pub(crate) use admin_service::{AdminBody, AdminService};
use client::{Client, MAX_CLIENT_STALL};
use context::RequestContext;
use linger::linger;
pub(crate) use shared::ProxyShared;

/// The longest time that the rest of a rejected request is read and discarded, so that the client can read
/// the answer.
const MAX_DRAIN: Duration = Duration::from_secs(10);

/// How long a connection may take to end, or to become ready for its next request.
const MAX_FINISH: Duration = Duration::from_secs(15);

/// Serves the requests of one kind of listener: the public one, or the admin's, which also serves the public
/// API.
pub(crate) struct Balancer {
    shared: Arc<ProxyShared>,
    admin: Option<Arc<dyn AdminService>>,
}

impl Balancer {
    pub(crate) fn public(shared: Arc<ProxyShared>) -> Self {
        Balancer { shared, admin: None }
    }

    pub(crate) fn admin(shared: Arc<ProxyShared>, admin: Arc<dyn AdminService>) -> Self {
        Balancer { shared, admin: Some(admin) }
    }
}

impl Balancer {
    /// Serves one request. Returns its connection if it can carry another.
    ///
    /// Pingora's `ProxyHttp` is not used: with a request's phases inlined, its future took 14 KiB of each
    /// open stream.
    pub(crate) async fn serve(&self, session: ServerSession, is_closing: bool) -> Option<Stream> {
        let mut session = begin(session).await?;
        if is_closing {
            session.set_keepalive(None);
        }
        session.set_total_drain_timeout(Some(MAX_DRAIN));
        // Pingora would close a connection on which anything, even `100 Continue`, is written before the body
        // is whole: a client that still sends would lose the answer.
        session.set_close_on_response_before_downstream_finish(false);
        session.set_read_timeout(Some(MAX_CLIENT_STALL));
        let shared = &self.shared;
        let id = headers::request_id(session.req_header()).map(str::to_string);
        let id = id.unwrap_or_else(|| shared.random.id());
        let path = session.req_header().uri.path();
        let only_watches = self.admin.as_deref().is_some_and(|admin| admin.only_watches(path));
        let context = RequestContext::new(shared, id, &session.req_header().headers, only_watches);
        let mut client = Client::new(&mut session);
        let finished = carry::carry(shared, self.admin.as_deref(), &mut client, &context).await;
        record::write(shared, client.session(), &context, &finished);
        let (failed, drains, lingers) = (finished.error.is_some(), finished.drain, client.sends_more());
        drop(finished);
        // Boxed: this future ends at once, and an idle stream should not hold its memory.
        let finishing = Box::pin(finish(session, failed, drains, lingers));
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

/// Ends a request after its answer. Returns its connection if it can carry another.
/// `lingers`: the client has sent, or may send, bytes that are not read.
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

    /// Each open stream has one such future. Inside pingora's proxy it took 18 KiB.
    #[test]
    fn future_of_a_request_is_small() {
        let size = future_size(Balancer::serve);
        assert!(size <= 6_100, "{size} bytes");
    }
}
