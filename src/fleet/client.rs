//! A small HTTP client for the balancer's own requests: probes, model lists and metrics of upstreams, and
//! polls of discovery sources.
//!
//! Every request opens its own connection, except those of `ProbeConnection`. Requests of clients do not pass
//! here, except control calls that are fanned out to all upstreams. Every request has a time limit and a
//! limit on the size of its answer.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::upstream::Upstream;
use crate::names::PRODUCT;

/// The largest answer to one of the balancer's own requests, in bytes.
pub(super) const MAX_ANSWER_BYTES: usize = 16 << 20;

/// The largest page of metrics, many times the size that vLLM writes. A request for the fleet's metrics holds
/// the pages of all upstreams at once.
pub(super) const MAX_SCRAPE_BYTES: usize = 4 << 20;

/// The largest document of settings, which normally has a few lines.
const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// Why one of the balancer's own requests failed.
#[derive(Debug, Error)]
pub enum FetchError {
    #[error("cannot resolve: {0}")]
    Resolve(io::Error),
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("answer cannot be read: {0}")]
    Answer(Box<dyn std::error::Error + Send + Sync>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("invalid request: {0}")]
    Request(#[from] http::Error),
}

/// Sends the balancer's own requests.
pub struct UpstreamClient;

/// A connection to a server, with or without TLS.
pub(super) trait ClientStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> ClientStream for T {}

impl UpstreamClient {
    /// Fetches a path with GET.
    pub async fn get(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, FetchError> {
        self.request(upstream, Request::get(path).body(Bytes::new())?, limit).await
    }

    /// Fetches a page of metrics.
    pub async fn scrape(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, FetchError> {
        self.page(upstream, path, limit, MAX_SCRAPE_BYTES).await
    }

    /// Fetches a small document of settings.
    pub async fn small(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, FetchError> {
        self.page(upstream, path, limit, MAX_DOCUMENT_BYTES).await
    }

    /// Fetches a document of at most `max_bytes`.
    async fn page(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
        max_bytes: usize,
    ) -> Result<Response<Bytes>, FetchError> {
        let request = with_own_key(upstream, Request::get(path).body(Bytes::new())?)?;
        within(limit, self.exchange(upstream, request, max_bytes)).await
    }

    /// Sends `request`, whose URI is a path, and reads the whole answer. The upstream's own key replaces an
    /// `authorization` of the request.
    pub async fn request(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        limit: Duration,
    ) -> Result<Response<Bytes>, FetchError> {
        self.request_with_key(upstream, with_own_key(upstream, request)?, limit).await
    }

    /// As `request`, but forwards the `authorization` of the request, if any, in place of the upstream's key.
    pub async fn request_with_key(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        limit: Duration,
    ) -> Result<Response<Bytes>, FetchError> {
        within(limit, self.exchange(upstream, request, MAX_ANSWER_BYTES)).await
    }

    async fn exchange(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        max_bytes: usize,
    ) -> Result<Response<Bytes>, FetchError> {
        let (stream, _) = self.connect(upstream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = addressed(upstream, request, false)?;
        let exchange = async { read_whole(sender.send_request(request).await?, max_bytes).await };
        // The connection task only drives the exchange; the exchange returns the result or the error.
        let driven = async {
            drop(connection.await);
            std::future::pending().await
        };
        tokio::select! {
            answer = exchange => answer,
            never = driven => never,
        }
    }

    /// Connects to the upstream. Returns the address of the server too; `None` for a unix socket.
    pub(super) async fn connect(
        &self,
        upstream: &Upstream,
    ) -> Result<(Box<dyn ClientStream>, Option<SocketAddr>), FetchError> {
        let url = &upstream.config.url;
        if let Some(path) = &url.unix {
            let stream = UnixStream::connect(path).await.map_err(FetchError::Connect)?;
            return Ok((Box::new(stream), None));
        }
        let addresses =
            tokio::net::lookup_host((url.host.as_str(), url.port)).await.map_err(FetchError::Resolve)?;
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "name has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    upstream.set_address(address);
                    return Ok((self.secure(upstream, stream).await?, Some(address)));
                }
                Err(error) => failure = error,
            }
        }
        Err(FetchError::Connect(failure))
    }

    async fn secure(
        &self,
        upstream: &Upstream,
        stream: TcpStream,
    ) -> Result<Box<dyn ClientStream>, FetchError> {
        match &upstream.secure {
            None => Ok(Box::new(stream)),
            Some((connector, name)) => {
                let secured = connector.connect(name.clone(), stream).await;
                Ok(Box::new(secured.map_err(FetchError::Connect)?))
            }
        }
    }
}

/// Whether the upstream's host name still has this address. A name that cannot be resolved keeps its address.
pub(super) async fn has_address(upstream: &Upstream, address: SocketAddr) -> bool {
    let url = &upstream.config.url;
    match tokio::net::lookup_host((url.host.as_str(), url.port)).await {
        Ok(mut addresses) => addresses.any(|other| other == address),
        Err(_) => true,
    }
}

/// Reads an answer with a body of at most `max_bytes`.
pub(super) async fn read_whole(
    answer: Response<hyper::body::Incoming>,
    max_bytes: usize,
) -> Result<Response<Bytes>, FetchError> {
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, max_bytes).collect().await.map_err(FetchError::Answer)?;
    Ok(Response::from_parts(head, body.to_bytes()))
}

/// Limits the time of an exchange.
pub(super) async fn within(
    limit: Duration,
    exchange: impl Future<Output = Result<Response<Bytes>, FetchError>>,
) -> Result<Response<Bytes>, FetchError> {
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(FetchError::Timeout(limit)))
}

/// Sets the upstream's own key on a request, if the upstream has one.
pub(super) fn with_own_key(
    upstream: &Upstream,
    mut request: Request<Bytes>,
) -> Result<Request<Bytes>, http::Error> {
    if let Some(value) = &upstream.authorization {
        request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(value.as_str())?);
    }
    Ok(request)
}

/// Sets the upstream's path prefix and host name on a request, and whether the connection is used again.
pub(super) fn addressed(
    upstream: &Upstream,
    request: Request<Bytes>,
    keep: bool,
) -> Result<Request<Full<Bytes>>, http::Error> {
    let (mut head, body) = request.into_parts();
    let url = &upstream.config.url;
    if !url.prefix.is_empty() {
        head.uri = format!("{}{}", url.prefix, head.uri).parse()?;
    }
    head.headers.insert(header::HOST, HeaderValue::try_from(upstream.host.as_str())?);
    if !keep {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    head.headers.insert(header::USER_AGENT, HeaderValue::from_static(PRODUCT));
    Ok(Request::from_parts(head, Full::new(body)))
}
