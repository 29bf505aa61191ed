//! A connection that successive probes of one upstream use.
//!
//! A new connection for every probe costs the engine's API process more than the probe itself, and with TLS a
//! handshake. A probe of an upstream that works therefore uses the connection of the probe before, for as
//! long as the server keeps it open, the settings stay, and the host name still has its address. A server
//! may close an idle connection at any time: a request that fails on a kept connection is sent again on a new
//! one, and only the result of that counts.
//!
//! A kept connection does not show whether the upstream accepts new ones. A prober that doubts the upstream
//! closes it first.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::task::JoinSet;

use super::client::{self, FetchError, UpstreamClient};
use super::upstream::Upstream;

/// The connection of one prober, if one is open.
#[derive(Default)]
pub(super) struct ProbeConnection {
    open: Option<OpenConnection>,
}

struct OpenConnection {
    requests: SendRequest<Full<Bytes>>,
    /// The settings that the connection was opened with.
    upstream: Arc<Upstream>,
    /// The address of the server; `None` for a unix socket.
    peer: Option<SocketAddr>,
    /// The task that drives the connection; it ends when this is dropped.
    _driver: JoinSet<()>,
}

// === impl ProbeConnection ===

impl ProbeConnection {
    /// Closes the connection: the next request opens a new one.
    pub(super) fn close(&mut self) {
        self.open = None;
    }

    /// Fetches a document of at most `max_bytes` with GET within `limit`.
    pub(super) async fn get(
        &mut self,
        client: &UpstreamClient,
        upstream: &Arc<Upstream>,
        path: &str,
        limit: Duration,
        max_bytes: usize,
    ) -> Result<Response<Bytes>, FetchError> {
        let request = || {
            let request = client::with_own_key(upstream, Request::get(path).body(Bytes::new())?)?;
            client::addressed(upstream, request, true)
        };
        // An exchange that ends here by its limit takes its connection along.
        client::within(limit, async {
            if let Some(mut kept) = self.reusable(upstream).await
                && let Ok(answer) = kept.exchange(request()?, max_bytes).await
            {
                self.open = Some(kept);
                return Ok(answer);
            }
            let mut open = OpenConnection::open(client, upstream).await?;
            let answer = open.exchange(request()?, max_bytes).await?;
            self.open = Some(open);
            Ok(answer)
        })
        .await
    }

    /// Takes the open connection, where a request with these settings may use it.
    async fn reusable(&mut self, upstream: &Upstream) -> Option<OpenConnection> {
        let mut kept = self.open.take().filter(|open| open.upstream.connects_as(upstream))?;
        if let Some(peer) = kept.peer
            && !client::has_address(upstream, peer).await
        {
            return None;
        }
        kept.requests.ready().await.ok()?;
        Some(kept)
    }
}

// === impl OpenConnection ===

impl OpenConnection {
    async fn open(client: &UpstreamClient, upstream: &Arc<Upstream>) -> Result<Self, FetchError> {
        let (stream, peer) = client.connect(upstream).await?;
        let (requests, connection) = handshake(TokioIo::new(stream)).await?;
        let mut driver = JoinSet::new();
        // The request returns the error of its connection.
        driver.spawn(async { drop(connection.await) });
        Ok(OpenConnection { requests, upstream: upstream.clone(), peer, _driver: driver })
    }

    async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
        max_bytes: usize,
    ) -> Result<Response<Bytes>, FetchError> {
        client::read_whole(self.requests.send_request(request).await?, max_bytes).await
    }
}
