//! One HTTP/1 request after another on a connection.

use std::fmt::Write;
use std::time::Duration;

use pingora::protocols::http::ServerSession;
use pingora::protocols::http::date::get_cached_date;
use pingora::protocols::{Shutdown, Stream};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use super::connection_server::SharedServer;
use super::head::{HeadReader, IncomingRequest, ReceivedHead};
use crate::config::types::ConnectionLimits;
use crate::names::PRODUCT;
use crate::observe::Observer;
use crate::proxy::linger::linger;
use crate::proxy::respond;
use crate::proxy::wire::ClientWire;
use crate::proxy::wire::sized_body::SizedBody;
use crate::reject::{ErrorShape, Reject};

/// The time in which a refusal must be written.
const MAX_REFUSAL_TIME: Duration = Duration::from_secs(1);

/// Serves the request with this head, and the following requests of the connection.
pub(super) async fn serve(
    mut stream: Stream,
    mut head: ReceivedHead,
    mut reader: HeadReader,
    server: SharedServer,
    closing: watch::Receiver<bool>,
) {
    loop {
        let session = session(stream, head, &server.limits);
        let is_closing = *closing.borrow();
        // Boxed: a connection between two requests should not hold a request's room.
        let Some(reused) = Box::pin(server.balancer.serve(session, is_closing)).await else { return };
        stream = reused;
        head = match reader.next(&mut stream, server.header_bytes()).await {
            IncomingRequest::Request(head) => head,
            IncomingRequest::Refused(reject) => {
                return Box::pin(refuse(stream, reject, server.observer())).await;
            }
            IncomingRequest::Http2(_) | IncomingRequest::Gone => {
                return Shutdown::shutdown(stream.as_mut()).await;
            }
        };
    }
}

/// A request whose head has been received.
fn session(stream: Stream, mut head: ReceivedHead, limits: &ConnectionLimits) -> ServerSession {
    if let Some(wire) = stream.as_any().downcast_ref::<ClientWire>() {
        let allowed = wire.is_read_shared();
        wire.take_body(allowed.then(|| SizedBody::split(&mut head.bytes, head.length)).flatten());
    }
    let mut session = ServerSession::new_http1(stream);
    // Should pingora want more of the head than is here, it does not wait without end.
    session.set_keepalive(Some(limits.head.as_secs().max(1)));
    session.set_pipelined_prefix(head.bytes);
    session
}

/// Answers an unreadable request with a refusal, and ends the connection.
pub(super) async fn refuse(mut stream: Stream, reject: Reject, observer: &Observer) {
    observer.head_refused(reject.label());
    let answer = respond::refusal(&reject, ErrorShape::default());
    let status = answer.status();
    let mut text = format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or(""));
    for (name, value) in answer.headers() {
        // Values of our own are text.
        if let Ok(value) = value.to_str() {
            let _ = write!(text, "{name}: {value}\r\n");
        }
    }
    let date = String::from_utf8_lossy(get_cached_date().as_bytes()).into_owned();
    let length = answer.body().len();
    let _ = write!(
        text,
        "date: {date}\r\nserver: {PRODUCT}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    let writing = async {
        stream.write_all(text.as_bytes()).await?;
        stream.write_all(answer.body()).await?;
        stream.flush().await
    };
    if let Ok(Ok(())) = tokio::time::timeout(MAX_REFUSAL_TIME, writing).await {
        linger(stream).await;
    }
}
