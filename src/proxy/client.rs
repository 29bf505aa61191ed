//! The client of one request: pingora's session with deadlines and with the handling of disconnects.
//!
//! Every write of `MAX_WRITE_BYTES` ends within `MAX_CLIENT_STALL`: a client that stops reading cannot hold a
//! lease for ever. The client of a background job may disconnect: later writes are dropped, and the job
//! continues.
//!
//! Never: write an answer of its own, retry.

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorSource, ErrorType, Result};
use tokio::time::{sleep, timeout};

use super::wire::ClientWire;
use crate::names::X_FORWARDED_FOR;

/// How long a client may leave a write unread before it is disconnected.
pub(super) const MAX_CLIENT_STALL: Duration = Duration::from_secs(120);

/// The most bytes that a client has to read within `MAX_CLIENT_STALL`.
const MAX_WRITE_BYTES: usize = 256 << 10;

/// The largest piece of a body that is read at once, where it is not read into a buffer.
const MAX_PIECE_BYTES: usize = 64 << 10;

/// How often a client that is not read is checked for a disconnect.
const DISCONNECT_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The client of one request.
pub(super) struct Client<'s> {
    session: &'s mut ServerSession,
    presence: ClientPresence,
    /// The client's disconnect does not end the request.
    background: bool,
    /// The client was permitted to send its body.
    permitted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientPresence {
    Connected,
    /// The client has sent more than its request, and waits for the answer.
    Pipelining,
    /// The client has closed its side for writing; it may still read.
    HalfClosed,
    Gone,
}

/// An event of the client while the request is in progress.
#[derive(Debug)]
pub(super) enum ClientEvent {
    /// A piece of the body; `None`: it has ended.
    Piece(Option<Bytes>),
    /// The client has disconnected, and the request goes on without it.
    Abandoned,
}

fn wire(session: &ServerSession) -> Option<&ClientWire> {
    match session {
        ServerSession::H1(session) => session.stream().as_any().downcast_ref(),
        _ => None,
    }
}

fn read_error(error: io::Error) -> Box<Error> {
    let kind = match error.kind() {
        io::ErrorKind::UnexpectedEof => ErrorType::ConnectionClosed,
        _ => ErrorType::ReadError,
    };
    Error::because(kind, "reading a request's body", error)
}

/// The next piece of a body that the connection reads itself; `None`: it has ended.
async fn read_piece(wire: &ClientWire) -> Result<Option<Bytes>> {
    let received = wire.take_received();
    if !received.is_empty() {
        return Ok(Some(received));
    }
    loop {
        let length = wire.received().await.map_err(read_error)?.min(MAX_PIECE_BYTES);
        if length == 0 {
            return Ok(None);
        }
        let mut piece = BytesMut::with_capacity(length);
        if wire.try_read_body(&mut piece, length).map_err(read_error)? > 0 {
            return Ok(Some(piece.freeze()));
        }
    }
}

fn disconnected(mut error: Box<Error>) -> Box<Error> {
    error.esource = ErrorSource::Downstream;
    error
}

// === impl Client ===

impl<'s> Client<'s> {
    pub(super) fn new(session: &'s mut ServerSession) -> Self {
        if let Some(length) = wire(session).and_then(ClientWire::body_length) {
            // Pingora reads the length once, and takes the body for empty from here on.
            session.is_body_empty();
            // A number is a value of a field.
            let _ = session.req_header_mut().insert_header(CONTENT_LENGTH, length);
        }
        Client { session, presence: ClientPresence::Connected, background: false, permitted: false }
    }

    fn wire(&self) -> Option<&ClientWire> {
        wire(self.session)
    }

    /// The connection, where it reads the body itself.
    fn sized(&self) -> Option<&ClientWire> {
        self.wire().filter(|wire| wire.body_length().is_some())
    }

    pub(super) fn head(&self) -> &RequestHeader {
        self.session.req_header()
    }

    pub(super) fn head_mut(&mut self) -> &mut RequestHeader {
        self.session.req_header_mut()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        &self.session.req_header().headers
    }

    pub(super) fn session(&self) -> &ServerSession {
        self.session
    }

    pub(super) fn address(&self) -> Option<&SocketAddr> {
        self.session.client_addr()
    }

    pub(super) fn is_https(&self) -> bool {
        self.session.digest().is_some_and(|digest| digest.ssl_digest.is_some())
    }

    pub(super) fn is_upgrade(&self) -> bool {
        self.session.is_upgrade_req()
    }

    pub(super) fn has_no_body(&mut self) -> bool {
        self.sized().is_none() && self.session.is_body_empty()
    }

    /// Whether the whole body of the request has been read.
    pub(super) fn is_body_done(&mut self) -> bool {
        match self.sized() {
            Some(wire) => wire.is_body_done(),
            None => self.session.is_body_done(),
        }
    }

    pub(super) fn bytes_sent(&self) -> u64 {
        self.session.body_bytes_sent() as u64
    }

    /// Whether a part of an answer was sent; `100 Continue` does not count.
    pub(super) fn has_answer(&self) -> bool {
        let begun = |head: &ResponseHeader| !head.status.is_informational() || head.status.as_u16() == 101;
        self.session.response_written().is_some_and(begun)
    }

    /// Whether the client left an answer unread: the written part must not look complete.
    pub(super) fn is_gone(&self) -> bool {
        self.presence == ClientPresence::Gone
    }

    /// Waits for the client's bytes without a limit of the session's own: the caller has a watch.
    pub(super) fn wait_without_limit(&mut self) {
        if let ServerSession::H1(session) = &mut *self.session {
            session.set_read_timeout(None);
        }
    }

    /// The request goes on when its client disconnects.
    pub(super) fn set_background(&mut self, background: bool) {
        self.background = background;
    }

    /// Whether the rest of a body in chunks is still to come. Pingora cannot find the next request behind it.
    pub(super) fn sends_chunks(&mut self) -> bool {
        self.headers().contains_key(TRANSFER_ENCODING) && !self.session.is_body_done()
    }

    /// Frees the request's fields, which are not read after the answer's head. With `keeps_forwarded`,
    /// `x-forwarded-for` stays: the log record names the client by it.
    pub(super) fn forget_fields(&mut self, keeps_forwarded: bool) {
        let head = self.session.req_header();
        // What was parsed once can be parsed again.
        if let Ok(mut bare) = RequestHeader::build_no_case(head.method.clone(), head.raw_path(), Some(0)) {
            bare.set_version(head.version);
            for hops in head.headers.get_all(X_FORWARDED_FOR).iter().filter(|_| keeps_forwarded) {
                // A value of a field is one again.
                let _ = bare.append_header(X_FORWARDED_FOR, hops);
            }
            *self.session.req_header_mut() = bare;
        }
    }

    /// The connection ends behind this request.
    pub(super) fn close_after(&mut self) {
        self.session.set_keepalive(None);
    }

    /// Sends `100 Continue` to a client that expects it.
    pub(super) async fn permit_body(&mut self) -> Result<()> {
        self.permitted = true;
        within_deadline(self.session.write_continue_response()).await
    }

    /// Whether the client expects `100 Continue`, which HTTP/1.0 does not have.
    pub(super) fn asks_permission(&self) -> bool {
        let expects = self.headers().get(EXPECT);
        !self.is_http10()
            && expects.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    }

    /// Whether the client may omit the body that it announced: no `100 Continue` was sent.
    pub(super) fn may_omit_body(&mut self) -> bool {
        !self.permitted && self.asks_permission() && !self.is_body_done()
    }

    /// Whether the client has sent more than is read, or may do so.
    pub(super) fn sends_more(&mut self) -> bool {
        self.presence == ClientPresence::Pipelining || self.may_omit_body()
    }

    /// Reads the next piece of the body. The caller has a deadline.
    pub(super) async fn read(&mut self) -> Result<Option<Bytes>> {
        match self.sized() {
            Some(wire) => read_piece(wire).await,
            None => self.session.read_request_body().await,
        }
    }

    /// Whether the rest of the body is read by `received` and `read_into`: the connection reads it, and
    /// what was received with the head has been taken.
    pub(super) fn reads_into(&self) -> bool {
        self.sized().is_some_and(ClientWire::is_received_taken)
    }

    /// Waits for more of a body that is read into a buffer. Returns the number of bytes; 0 is its end. The
    /// caller has a deadline.
    pub(super) async fn received(&mut self) -> Result<usize> {
        match self.sized() {
            Some(wire) => wire.received().await.map_err(read_error),
            None => Ok(0),
        }
    }

    /// Reads up to `most` bytes of what was received of the body into the room that the buffer has. Returns
    /// their number.
    pub(super) fn read_into(&mut self, buffer: &mut BytesMut, most: usize) -> Result<usize> {
        match self.sized() {
            Some(wire) => wire.try_read_body(buffer, most).map_err(read_error),
            None => Ok(0),
        }
    }

    /// Reads and discards the rest of a body that the connection reads itself, so that the next request can
    /// be read, or the client receives its answer.
    pub(super) async fn discard_body(&mut self, limit: Duration) {
        let Some(wire) = self.sized().filter(|wire| !wire.is_body_done()) else { return };
        let discarding = async { while let Ok(Some(_)) = read_piece(wire).await {} };
        drop(timeout(limit, discarding).await);
        if !wire.is_body_done() {
            self.close_after();
        }
    }

    /// Waits for the next piece of the body, or, after its end, for the client's disconnect. The caller has a
    /// watch. `complete`: the body has ended, even if the connection does not report it: an HTTP/2 stream
    /// that its client has reset no longer reports the end. Unless `reads`, only a disconnect is awaited.
    pub(super) async fn next(&mut self, complete: bool, reads: bool) -> Result<ClientEvent> {
        let event = match self.presence {
            ClientPresence::HalfClosed | ClientPresence::Gone => std::future::pending().await,
            ClientPresence::Pipelining => self.disconnect().await,
            ClientPresence::Connected if !reads => self.disconnect().await,
            ClientPresence::Connected if !complete && self.sized().is_some() => self.read().await,
            ClientPresence::Connected => self.session.read_body_or_idle(complete).await,
        };
        match event {
            // The beginning of a pipelined request: the client repeats it after this connection has ended
            // with the answer.
            Err(error) if complete && *error.etype() == ErrorType::ConnectError => {
                self.lose(ClientPresence::Pipelining);
                Box::pin(self.next(complete, reads)).await
            }
            _ if complete && self.background => {
                self.lose(ClientPresence::HalfClosed);
                Ok(ClientEvent::Abandoned)
            }
            Ok(piece) if !complete => Ok(ClientEvent::Piece(piece)),
            Ok(_) => Err(Error::new_down(ErrorType::ConnectionClosed)),
            Err(error) => Err(disconnected(error)),
        }
    }

    /// Waits for the client's disconnect without reading what it sends.
    async fn disconnect(&mut self) -> Result<Option<Bytes>> {
        match &mut *self.session {
            ServerSession::H1(session) => loop {
                sleep(DISCONNECT_CHECK_INTERVAL).await;
                let wire = session.stream().as_any().downcast_ref::<ClientWire>();
                if wire.is_some_and(ClientWire::is_read_closed) {
                    return Err(Error::new_down(ErrorType::ConnectionClosed));
                }
            },
            other => other.read_body_or_idle(true).await,
        }
    }

    /// Marks the connection as lost after a disconnect.
    fn lose(&mut self, presence: ClientPresence) {
        self.presence = presence;
        self.close_after();
    }

    /// Drops the failure of a write where the request goes on without its client.
    fn settle(&mut self, written: Result<()>) -> Result<()> {
        match written {
            Err(_) if self.background => {
                self.lose(ClientPresence::Gone);
                Ok(())
            }
            written => written.map_err(disconnected),
        }
    }

    /// Writes the head of an answer and the beginning of its body, together; `end`: it has no body.
    pub(super) async fn write_head(&mut self, head: ResponseHeader, first: &[u8], end: bool) -> Result<()> {
        if self.presence == ClientPresence::Gone {
            return Ok(());
        }
        let head = Box::new(head);
        let written = match &mut *self.session {
            ServerSession::H1(session) => {
                if let Some(wire) = session.stream().as_any().downcast_ref::<ClientWire>()
                    && !first.is_empty()
                {
                    wire.cork();
                }
                within_deadline(session.write_response_header(head)).await
            }
            ServerSession::H2(session) => session.write_response_header(head, end),
            other => within_deadline(other.write_response_header(head)).await,
        };
        self.settle(written)?;
        self.write(first).await
    }

    /// Writes a piece of an answer's body.
    pub(super) async fn write(&mut self, piece: &[u8]) -> Result<()> {
        if self.presence == ClientPresence::Gone || piece.is_empty() {
            return Ok(());
        }
        let written = self.write_slices(piece).await;
        self.settle(written)
    }

    /// Writes a piece in slices with a deadline each: a client that reads slowly may take longer for a large
    /// piece than for one that it does not read.
    async fn write_slices(&mut self, piece: &[u8]) -> Result<()> {
        for slice in piece.chunks(MAX_WRITE_BYTES) {
            match &mut *self.session {
                ServerSession::H1(session) => drop(within_deadline(session.write_body(slice)).await?),
                other => {
                    let slice = Bytes::copy_from_slice(slice);
                    within_deadline(other.write_response_body(slice, false)).await?;
                }
            }
        }
        Ok(())
    }

    /// Ends an answer's body.
    pub(super) async fn finish(&mut self) -> Result<()> {
        if self.presence == ClientPresence::Gone {
            return Ok(());
        }
        let written = match &mut *self.session {
            ServerSession::H1(session) => within_deadline(session.finish_body()).await.map(drop),
            ServerSession::H2(session) => session.finish(),
            other => within_deadline(other.write_response_body(Bytes::new(), true)).await,
        };
        self.settle(written)
    }

    /// Marks the answer as cut. In HTTP/1.0 the end of the connection ends an answer, so the connection is
    /// reset.
    pub(super) fn cut(&mut self) {
        if self.is_http10()
            && let ServerSession::H1(session) = &*self.session
            && let Some(wire) = session.stream().as_any().downcast_ref::<ClientWire>()
        {
            wire.end_with_reset();
        }
    }

    pub(super) fn is_http10(&self) -> bool {
        self.head().version == Version::HTTP_10
    }

    pub(super) fn is_head(&self) -> bool {
        self.head().method == Method::HEAD
    }
}

/// Bounds a write.
async fn within_deadline<T>(write: impl Future<Output = Result<T>>) -> Result<T> {
    match timeout(MAX_CLIENT_STALL, write).await {
        Ok(written) => written,
        Err(_) => Err(Error::new_down(ErrorType::WriteTimedout)),
    }
}

#[cfg(test)]
mod tests;
