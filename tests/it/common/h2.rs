//! An HTTP/2 client, by prior knowledge or after ALPN.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use h2::RecvStream;
use h2::client::{self, ResponseFuture, SendRequest};
use http::{Request, Response};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::PATIENCE;
use super::wire::{Answer, Stream, tcp};

/// One connection.
pub struct H2 {
    sender: SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

/// A request that is under way. Dropping it resets its stream.
pub struct Asked {
    pub answer: ResponseFuture,
    pub body: h2::SendStream<Bytes>,
}

/// `POST` of JSON to a path.
pub fn post(path: &str) -> Request<()> {
    let request = Request::post(format!("http://balancer.test{path}"));
    request.header("content-type", "application/json").body(()).expect("a path makes a request")
}

// === impl H2 ===

impl H2 {
    pub async fn connect(address: &str) -> Self {
        Self::over(tcp(address).await).await
    }

    pub async fn over(stream: impl Stream + 'static) -> Self {
        Self::with_window(stream, 1 << 20).await
    }

    /// Takes so many bytes of an answer before it must be read.
    pub async fn with_window(stream: impl Stream + 'static, window: u32) -> Self {
        let mut builder = client::Builder::new();
        builder.initial_window_size(window).initial_connection_window_size(window);
        let (sender, connection) = builder.handshake(stream).await.expect("the balancer speaks HTTP/2");
        // How a connection ends is seen in its requests.
        let connection = tokio::spawn(async { drop(connection.await) });
        H2 { sender, connection }
    }

    /// Sends a head; with `end` there is no body.
    pub async fn begin(&mut self, request: Request<()>, end: bool) -> Asked {
        let ready = timeout(PATIENCE, poll_fn(|context| self.sender.poll_ready(context)));
        ready.await.expect("a stream is free in time").expect("the connection lives");
        let (answer, body) = self.sender.send_request(request, end).expect("the request is one");
        Asked { answer, body }
    }

    /// Sends a request with its body in pieces, and reads the answer.
    pub async fn ask(&mut self, request: Request<()>, body: &[Bytes]) -> Answer {
        let mut asked = self.begin(request, body.is_empty()).await;
        for (index, piece) in body.iter().enumerate() {
            let last = index + 1 == body.len();
            asked.body.send_data(piece.clone(), last).expect("the stream is open");
        }
        asked.answer().await
    }

    /// Waits for the balancer to end the connection.
    pub async fn closed(self) {
        let H2 { sender, connection } = self;
        timeout(PATIENCE, connection).await.expect("the connection ends in time").expect("without a panic");
        drop(sender);
    }

    /// Ends the connection without a word.
    pub fn cut(self) {
        self.connection.abort();
    }
}

// === impl Asked ===

impl Asked {
    pub async fn answer(self) -> Answer {
        // Kept: a dropped half resets the stream when its end was not sent.
        let Asked { answer, body: _body } = self;
        let answer = timeout(PATIENCE, answer).await.expect("an answer comes in time");
        read(answer.expect("an answer comes")).await
    }
}

/// Reads a body to its end, or to where the stream breaks.
pub async fn read(answer: Response<RecvStream>) -> Answer {
    let (head, mut stream) = answer.into_parts();
    let (mut body, mut pieces, mut whole) = (BytesMut::new(), Vec::new(), true);
    while let Some(piece) = timeout(PATIENCE, stream.data()).await.expect("a piece comes in time") {
        let Ok(piece) = piece else {
            whole = false;
            break;
        };
        // Fails only for more than was received.
        stream.flow_control().release_capacity(piece.len()).expect("what came can be released");
        pieces.push(piece.len());
        body.extend_from_slice(&piece);
    }
    Answer { status: head.status.as_u16(), headers: head.headers, body: body.freeze(), pieces, whole }
}
