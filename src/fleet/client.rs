//! A small HTTP client for what the balancer itself asks: probes, model lists and metrics of upstreams, and
//! sources for which upstreams there are.
//!
//! One connection a question: nothing is pooled, so a question also tells whether new connections are
//! taken. Requests of clients never go through here, with the exception of control calls that are fanned
//! out to all upstreams. Every question has a time limit and a limit on the answer's size.

use std::future::Future;
use std::io;
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

/// The most that an answer to one of our questions may hold.
const MOST_ANSWER: usize = 16 << 20;

/// The most that a page of metrics may hold, many times of what vLLM says: these are asked of all upstreams
/// at once, for whoever wants to know, and all are held together.
const MOST_SCRAPED: usize = 4 << 20;

/// The most that a document may hold which is a few lines of settings.
const MOST_SMALL: usize = 1 << 20;

#[derive(Debug, Error)]
pub enum AskError {
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
    #[error("cannot be asked: {0}")]
    Request(#[from] http::Error),
}

/// Keeps nothing between two questions.
pub struct Client;

trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

impl Client {
    /// Asks with GET.
    pub async fn get(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, AskError> {
        self.ask(upstream, Request::get(path).body(Bytes::new())?, limit).await
    }

    /// Asks with GET for a page of numbers.
    pub async fn scrape(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, AskError> {
        self.page(upstream, path, limit, MOST_SCRAPED).await
    }

    /// Asks with GET for a small document.
    pub async fn small(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
    ) -> Result<Response<Bytes>, AskError> {
        self.page(upstream, path, limit, MOST_SMALL).await
    }

    /// Asks with GET for what has `most` bytes.
    async fn page(
        &self,
        upstream: &Upstream,
        path: &str,
        limit: Duration,
        most: usize,
    ) -> Result<Response<Bytes>, AskError> {
        let request = with_own_key(upstream, Request::get(path).body(Bytes::new())?)?;
        within(limit, self.exchange(upstream, request, most)).await
    }

    /// Sends `request`, whose URI is a path, and reads the whole answer. An `authorization` that it brings
    /// gives way to the upstream's own key.
    pub async fn ask(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        limit: Duration,
    ) -> Result<Response<Bytes>, AskError> {
        self.ask_with_key(upstream, with_own_key(upstream, request)?, limit).await
    }

    /// As `ask`, of a request that brings the key which the upstream is to be shown, if any.
    pub async fn ask_with_key(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        limit: Duration,
    ) -> Result<Response<Bytes>, AskError> {
        within(limit, self.exchange(upstream, request, MOST_ANSWER)).await
    }

    async fn exchange(
        &self,
        upstream: &Upstream,
        request: Request<Bytes>,
        most: usize,
    ) -> Result<Response<Bytes>, AskError> {
        let stream = self.connect(upstream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = addressed(upstream, request)?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = Limited::new(body, most).collect().await.map_err(AskError::Answer)?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        // An ended connection has handed over what it had: the exchange tells how it went.
        let driven = async {
            drop(connection.await);
            std::future::pending().await
        };
        tokio::select! {
            answer = exchange => answer,
            never = driven => never,
        }
    }

    async fn connect(&self, upstream: &Upstream) -> Result<Box<dyn Connection>, AskError> {
        let url = &upstream.config.url;
        if let Some(path) = &url.unix {
            return Ok(Box::new(UnixStream::connect(path).await.map_err(AskError::Connect)?));
        }
        let addresses =
            tokio::net::lookup_host((url.host.as_str(), url.port)).await.map_err(AskError::Resolve)?;
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "name has no address");
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    upstream.set_address(address);
                    return self.secure(upstream, stream).await;
                }
                Err(error) => failure = error,
            }
        }
        Err(AskError::Connect(failure))
    }

    async fn secure(&self, upstream: &Upstream, stream: TcpStream) -> Result<Box<dyn Connection>, AskError> {
        match &upstream.secure {
            None => Ok(Box::new(stream)),
            Some((connector, name)) => {
                let secured = connector.connect(name.clone(), stream).await;
                Ok(Box::new(secured.map_err(AskError::Connect)?))
            }
        }
    }
}

async fn within(
    limit: Duration,
    exchange: impl Future<Output = Result<Response<Bytes>, AskError>>,
) -> Result<Response<Bytes>, AskError> {
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(AskError::Timeout(limit)))
}

/// Puts the upstream's own key on a request, if it has one.
fn with_own_key(upstream: &Upstream, mut request: Request<Bytes>) -> Result<Request<Bytes>, http::Error> {
    if let Some(value) = &upstream.authorization {
        request.headers_mut().insert(header::AUTHORIZATION, HeaderValue::try_from(value.as_str())?);
    }
    Ok(request)
}

/// Puts the upstream's prefix and name on a request.
fn addressed(upstream: &Upstream, request: Request<Bytes>) -> Result<Request<Full<Bytes>>, http::Error> {
    let (mut head, body) = request.into_parts();
    let url = &upstream.config.url;
    if !url.prefix.is_empty() {
        head.uri = format!("{}{}", url.prefix, head.uri).parse()?;
    }
    let host = if url.unix.is_some() { "localhost".into() } else { url.authority() };
    head.headers.insert(header::HOST, HeaderValue::try_from(host)?);
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    head.headers.insert(header::USER_AGENT, HeaderValue::from_static(PRODUCT));
    Ok(Request::from_parts(head, Full::new(body)))
}
