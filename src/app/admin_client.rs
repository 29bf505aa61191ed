//! A client of the admin listener of a balancer, for the commands that read one.

use std::fmt::Display;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::cli::traces::ADMIN_TOKEN;
use crate::config::secret::Secret;
use crate::config::types::UpstreamUrl;
use crate::names::PRODUCT;

/// The most of a refusal that is shown.
const MAX_REFUSAL_BYTES: usize = 4096;

/// The admin listener of a balancer. Errors are texts that name it.
pub(super) struct AdminClient<'a> {
    url: &'a UpstreamUrl,
    authorization: Option<HeaderValue>,
    /// How long the balancer may be silent.
    silence: Duration,
    /// The connection of the request before.
    kept: Option<SendRequest<Full<Bytes>>>,
}

// === impl AdminClient ===

impl<'a> AdminClient<'a> {
    /// `tokens`: that of the arguments and that of the environment, of which the first counts.
    pub(super) fn new(
        url: &'a UpstreamUrl,
        tokens: (Option<&Secret>, Option<&str>),
        silence: Duration,
    ) -> Result<Self, String> {
        let token = tokens.0.map(|token| token.expose()).or(tokens.1.filter(|token| !token.is_empty()));
        let authorization = token.map(|token| HeaderValue::try_from(format!("Bearer {token}"))).transpose();
        let authorization = authorization.map_err(|_| "the token cannot be sent in a header".to_string())?;
        Ok(AdminClient { url, authorization, silence, kept: None })
    }

    /// Sends a `GET`. Returns an answer that is no refusal.
    pub(super) async fn get(&mut self, path: &str) -> Result<Response<Incoming>, String> {
        self.call(Method::GET, path, None).await
    }

    /// Sends a request, with a body of JSON if there is one. Returns an answer that is no refusal.
    pub(super) async fn call(
        &mut self,
        method: Method,
        path: &str,
        json: Option<String>,
    ) -> Result<Response<Incoming>, String> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url.prefix));
        let host = if self.url.unix.is_some() { "localhost".into() } else { self.url.authority() };
        request = request.header(header::HOST, host).header(header::USER_AGENT, PRODUCT);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if json.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(json.unwrap_or_default()));
        let request = request.body(body).map_err(|error| self.failed(error))?;
        let mut kept = self.kept.take();
        let is_open = match &mut kept {
            Some(kept) => kept.ready().await.is_ok(),
            None => false,
        };
        let mut sender = match kept.filter(|_| is_open) {
            Some(kept) => kept,
            None => self.connect().await?,
        };
        let answer = self.within(sender.send_request(request)).await?;
        self.kept = Some(sender);
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        // The status is reported in any case, also when the text of the refusal does not come.
        let body = self.read(answer, MAX_REFUSAL_BYTES).await.unwrap_or_default();
        let text = printable(String::from_utf8_lossy(&body).trim());
        let hint = match status.as_u16() {
            401 => format!(": give its token by --token or {ADMIN_TOKEN}"),
            // The listener for clients, or a vLLM.
            404 if path.starts_with("/admin/") || path == "/ready" => {
                ": this is no admin listener; name the address of admin.address".into()
            }
            _ => String::new(),
        };
        Err(self.failed(format!("{status}{hint}: {text}")))
    }

    /// Reads a body of at most `limit` bytes.
    pub(super) async fn read(&self, answer: Response<Incoming>, limit: usize) -> Result<Bytes, String> {
        Ok(self.within(Limited::new(answer.into_body(), limit).collect()).await?.to_bytes())
    }

    /// Waits for a step, for as long as the balancer may be silent.
    pub(super) async fn within<T, E: Display>(
        &self,
        step: impl Future<Output = Result<T, E>>,
    ) -> Result<T, String> {
        match timeout(self.silence, step).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => Err(self.failed(error)),
            Err(_) => Err(self.failed(format!("silent for {:?}", self.silence))),
        }
    }

    /// Waits for the next piece of an answer, for as long as the balancer may be silent.
    pub(super) async fn within_some<T, E: Display>(
        &self,
        step: impl Future<Output = Option<Result<T, E>>>,
    ) -> Result<Option<T>, String> {
        self.within(async { step.await.transpose() }).await
    }

    /// The text of an error.
    pub(super) fn failed(&self, what: impl Display) -> String {
        format!("{}: {what}", self.url.display())
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        match &self.url.unix {
            Some(path) => {
                let connect = async { UnixStream::connect(path).await.map_err(with_remedy) };
                self.begin(self.within(connect).await?).await
            }
            None => {
                let address = (self.url.host.as_str(), self.url.port);
                let connect = async { TcpStream::connect(address).await.map_err(with_remedy) };
                self.begin(self.within(connect).await?).await
            }
        }
    }

    async fn begin(
        &self,
        stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    ) -> Result<SendRequest<Full<Bytes>>, String> {
        let (sender, connection) = self.within(handshake(TokioIo::new(stream))).await?;
        // Its errors are those of the requests on it.
        tokio::spawn(async move { connection.await.ok() });
        Ok(sender)
    }
}

/// Why there is no connection, and what to do where nothing listens.
fn with_remedy(error: io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::NotFound => {
            format!("{error}: start the balancer, or name its admin listener (admin.address)")
        }
        _ => error.to_string(),
    }
}

/// A text as one segment of a path.
pub(super) fn escaped(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(char::from(byte)),
            // Dots, too: a segment of two of them would be removed.
            _ => path.push_str(&format!("%{byte:02X}")),
        }
    }
    path
}

/// A text of a server, without what would control a terminal.
fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;
    use crate::config::url;

    /// The error of a call to a server that answers with this text and keeps the connection open.
    async fn refusal(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = url::upstream(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
            stream.write_all(answer.as_bytes()).await.unwrap();
            sleep(Duration::from_secs(60)).await;
        });
        let mut client = AdminClient::new(&url, (None, None), Duration::from_secs(2)).unwrap();
        let called = timeout(Duration::from_secs(20), client.get("/")).await;
        called.expect("a silent server is given up").expect_err("a refusal")
    }

    /// Regression: the body of a refusal was awaited without a limit.
    #[tokio::test]
    async fn a_refusal_whose_text_does_not_come_is_reported() {
        let error = refusal("HTTP/1.1 503 Busy\r\ncontent-length: 100\r\n\r\nbeginning").await;
        assert!(error.contains("503 Service Unavailable"), "{error}");
    }

    /// Regression: a refusal was printed with the escape codes in it.
    #[tokio::test]
    async fn a_refusal_does_not_control_the_terminal() {
        let error = refusal("HTTP/1.1 503 Busy\r\ncontent-length: 11\r\n\r\n\u{1b}[2J\"no\" \u{9b}").await;
        assert!(error.ends_with("\\u{1b}[2J\"no\" \\u{9b}"), "{error}");
    }
}
