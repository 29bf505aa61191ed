//! One HTTP/1 request after another on a connection.

use std::fmt::Write;
use std::time::Duration;

use pingora::protocols::http::ServerSession;
use pingora::protocols::http::date::get_cached_date;
use pingora::protocols::{Shutdown, Stream};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use super::Engine;
use super::head::{HeadReader, Incoming, ReceivedHead};
use crate::config::types::ConnectionLimits;
use crate::names::PRODUCT;
use crate::observe;
use crate::proxy::linger::linger;
use crate::proxy::respond;
use crate::proxy::wire::ClientWire;
use crate::proxy::wire::sized_body::SizedBody;
use crate::reject::{Reject, Style};

/// The time for the refusal of what is not yet a request.
const MAX_REFUSING: Duration = Duration::from_secs(1);

/// Serves the request whose head has been received, and those that follow it.
pub async fn serve(
    mut stream: Stream,
    mut head: ReceivedHead,
    mut reader: HeadReader,
    engine: Engine,
    closing: watch::Receiver<bool>,
) {
    loop {
        let session = session(stream, head, &engine.limits);
        let is_closing = *closing.borrow();
        // Boxed: a connection between two requests should not hold a request's room.
        let Some(reused) = Box::pin(engine.balancer.serve(session, is_closing)).await else { return };
        stream = reused;
        head = match reader.next(&mut stream, engine.header_bytes()).await {
            Incoming::Request(head) => head,
            Incoming::Refused(reject) => return Box::pin(refuse(stream, reject)).await,
            Incoming::Http2(_) | Incoming::Gone => return Shutdown::shutdown(stream.as_mut()).await,
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

/// Refuses what is not yet a request, and ends the connection.
pub async fn refuse(mut stream: Stream, reject: Reject) {
    observe::head_refused(reject.label());
    let answer = respond::refusal(&reject, Style::default());
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
    if let Ok(Ok(())) = tokio::time::timeout(MAX_REFUSING, writing).await {
        linger(stream).await;
    }
}
