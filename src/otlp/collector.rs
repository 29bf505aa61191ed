//! The connection to the collector, on which one export follows the other.
//!
//! A server may close an idle connection at any time: an export that fails on a kept connection is sent again
//! on a new one at once, and only the result of that counts.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::types::{OtlpConfig, UpstreamUrl};
use crate::names::{MAX_SHOWN_BYTES, PRODUCT, cut};

/// The path of spans at a collector.
const TRACES_PATH: &str = "/v1/traces";

/// The most of an answer that is read.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// How long the body of a success is read, which normally is empty.
const MAX_SUCCESS_READ: Duration = Duration::from_secs(1);

/// Why an export failed.
#[derive(Debug, Error)]
pub(super) enum ExportFailure {
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
    #[error("the collector answers {status} {text:?}")]
    Refused { status: StatusCode, retry_after: Option<Duration>, text: String },
}

/// A connection with or without TLS.
trait CollectorStream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> CollectorStream for T {}

/// The connection to the collector, if one is open.
#[derive(Default)]
pub(super) struct CollectorLink {
    open: Option<OpenLink>,
    /// The settings of TLS, which are made for the first connection.
    tls: Option<TlsConnector>,
}

struct OpenLink {
    requests: SendRequest<Full<Bytes>>,
    endpoint: UpstreamUrl,
    /// The task that drives the connection; it ends when this is dropped.
    _driver: JoinSet<()>,
}

// === impl ExportFailure ===

impl ExportFailure {
    /// Whether the same export may succeed later.
    pub(super) fn is_temporary(&self) -> bool {
        match self {
            ExportFailure::Request(_) => false,
            ExportFailure::Refused { status, .. } => matches!(status.as_u16(), 429 | 502..=504),
            _ => true,
        }
    }

    /// How long the collector wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            ExportFailure::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

// === impl CollectorLink ===

impl CollectorLink {
    /// Sends an export. Returns the number of spans that the collector has rejected of it.
    pub(super) async fn send(
        &mut self,
        config: &OtlpConfig,
        endpoint: &UpstreamUrl,
        body: &Bytes,
    ) -> Result<u64, ExportFailure> {
        // An export that ends here by its limit takes its connection along.
        let sending = async {
            if let Some(mut kept) = self.reusable(endpoint).await
                && let Ok(answer) = kept.exchange(config, body).await
            {
                self.open = Some(kept);
                return Ok(answer);
            }
            let mut open = self.connect(endpoint).await?;
            let answer = open.exchange(config, body).await?;
            self.open = Some(open);
            Ok(answer)
        };
        let limit = config.timeout;
        let answer = timeout(limit, sending).await.unwrap_or(Err(ExportFailure::Timeout(limit)))?;
        judge(answer)
    }

    /// Takes the open connection if it leads to this endpoint.
    async fn reusable(&mut self, endpoint: &UpstreamUrl) -> Option<OpenLink> {
        let mut kept = self.open.take().filter(|open| open.endpoint == *endpoint)?;
        kept.requests.ready().await.ok()?;
        Some(kept)
    }

    async fn connect(&mut self, endpoint: &UpstreamUrl) -> Result<OpenLink, ExportFailure> {
        let stream = self.stream(endpoint).await.map_err(ExportFailure::Connect)?;
        let (requests, connection) = handshake(TokioIo::new(stream)).await?;
        let mut driver = JoinSet::new();
        // The request returns the error of its connection.
        driver.spawn(async { drop(connection.await) });
        Ok(OpenLink { requests, endpoint: endpoint.clone(), _driver: driver })
    }

    async fn stream(&mut self, endpoint: &UpstreamUrl) -> io::Result<Box<dyn CollectorStream>> {
        if let Some(path) = &endpoint.unix {
            return Ok(Box::new(UnixStream::connect(path).await?));
        }
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await?;
        if !endpoint.https {
            return Ok(Box::new(stream));
        }
        let tls = match &self.tls {
            Some(tls) => tls,
            None => self.tls.insert(tls_connector().await?),
        };
        let name = ServerName::try_from(endpoint.host.clone()).map_err(io::Error::other)?;
        Ok(Box::new(tls.connect(name, stream).await?))
    }
}

// === impl OpenLink ===

impl OpenLink {
    async fn exchange(
        &mut self,
        config: &OtlpConfig,
        body: &Bytes,
    ) -> Result<Response<Bytes>, ExportFailure> {
        let request = export_request(config, &self.endpoint, body)?;
        read_answer(self.requests.send_request(request).await?).await
    }
}

/// Makes the request of an export.
fn export_request(
    config: &OtlpConfig,
    endpoint: &UpstreamUrl,
    body: &Bytes,
) -> Result<Request<Full<Bytes>>, http::Error> {
    // An endpoint may be given with the path of spans.
    let prefix = endpoint.prefix.strip_suffix(TRACES_PATH).unwrap_or(&endpoint.prefix);
    let host = if endpoint.unix.is_some() { "localhost".into() } else { endpoint.authority() };
    let mut request = Request::post(format!("{prefix}{TRACES_PATH}"))
        .header(header::HOST, host)
        .header(header::CONTENT_TYPE, "application/x-protobuf")
        .header(header::USER_AGENT, PRODUCT)
        .body(Full::new(body.clone()))?;
    for (name, value) in &config.headers {
        let name = HeaderName::try_from(name.as_str())?;
        request.headers_mut().insert(name, HeaderValue::try_from(value.as_str())?);
    }
    Ok(request)
}

async fn read_answer(answer: Response<Incoming>) -> Result<Response<Bytes>, ExportFailure> {
    let (head, body) = answer.into_parts();
    let reading = Limited::new(body, MAX_ANSWER_BYTES).collect();
    let body = if head.status.is_success() {
        // The collector has the spans: they are not sent again for the sake of its answer's body.
        let read = timeout(MAX_SUCCESS_READ, reading).await;
        read.map_or_else(|_| Bytes::new(), |read| read.map(Collected::to_bytes).unwrap_or_default())
    } else {
        reading.await.map_err(ExportFailure::Answer)?.to_bytes()
    };
    Ok(Response::from_parts(head, body))
}

/// The number of rejected spans by an answer. A success whose body cannot be read has taken all.
fn judge(answer: Response<Bytes>) -> Result<u64, ExportFailure> {
    let (head, body) = answer.into_parts();
    if head.status.is_success() {
        let read = ExportTraceServiceResponse::decode(body).unwrap_or_default();
        let rejected = read.partial_success.map_or(0, |partial| partial.rejected_spans);
        return Ok(u64::try_from(rejected).unwrap_or_default());
    }
    let retry_after = head.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    let text = cut(&String::from_utf8_lossy(&body), MAX_SHOWN_BYTES).concat();
    Err(ExportFailure::Refused { status: head.status, retry_after, text })
}

/// Makes the settings of TLS, with the authorities of the system.
async fn tls_connector() -> io::Result<TlsConnector> {
    let roots = tokio::task::spawn_blocking(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    });
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config =
        builder.map_err(io::Error::other)?.with_root_certificates(roots.await?).with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::url;

    #[test]
    fn an_endpoint_is_given_with_or_without_the_path_of_spans() {
        let config = OtlpConfig { headers: vec![("x-team".into(), "a b".into())], ..OtlpConfig::default() };
        for (text, host, path) in [
            ("http://otel:4318", "otel:4318", "/v1/traces"),
            ("http://otel:4318/", "otel:4318", "/v1/traces"),
            ("http://otel:4318/v1/traces", "otel:4318", "/v1/traces"),
            ("https://api.example/otlp", "api.example:443", "/otlp/v1/traces"),
            ("unix:/run/otel.sock", "localhost", "/v1/traces"),
        ] {
            let request = export_request(&config, &url::upstream(text).unwrap(), &Bytes::new()).unwrap();
            assert_eq!((request.uri().path(), &request.headers()["host"]), (path, &host.parse().unwrap()));
            assert_eq!(request.headers()["x-team"], "a b");
        }
    }

    #[test]
    fn answers_are_judged_by_their_status() {
        let answer = |status: u16, body: &'static [u8]| {
            let answer = Response::builder().status(status).header("retry-after", "7");
            judge(answer.body(Bytes::from_static(body)).unwrap())
        };
        assert_eq!(answer(200, b"").unwrap(), 0);
        assert_eq!(answer(200, b"{}").unwrap(), 0, "a body that is no message");
        assert_eq!(answer(200, &[0x0a, 2, 0x08, 3]).unwrap(), 3, "partial success");
        for (status, temporary) in [(400, false), (401, false), (429, true), (500, false), (503, true)] {
            let failure = answer(status, b"no").unwrap_err();
            assert_eq!(
                (failure.is_temporary(), failure.retry_after()),
                (temporary, Some(Duration::from_secs(7)))
            );
            assert!(failure.to_string().contains("\"no\""), "{failure}");
        }
    }
}
