//! The connection of one attempt: the request goes out on it piece by piece, and the answer is read.
//!
//! Pingora's client session parses the answer; `wire` sends. Never: wait until the upstream reads.

use bytes::Bytes;
use pingora::http::ResponseHeader;
use pingora::protocols::http::v1::client::HttpSession;
use pingora::{Error, ErrorType, Result};

use super::wire::{Outgoing, UpstreamWire};
use crate::proxy::client::{Client, ClientEvent};
use crate::proxy::placement::Placement;
use crate::proxy::request::{ClientRequest, RequestScope};
use crate::proxy::request_end::{RequestEnd, client_failure};
use crate::proxy::upstream_head::UpstreamHead;
use crate::proxy::watch::RequestWatch;
use crate::reject::Reject;

/// A chunk below this size is copied together with its framing.
const MIN_SEPARATE_BYTES: usize = 1 << 10;

/// The end of a body in chunks.
const LAST_CHUNK: Bytes = Bytes::from_static(b"0\r\n\r\n");

/// The connection of one attempt to its upstream.
pub(crate) struct UpstreamConnection {
    session: HttpSession,
    outgoing: Outgoing,
    reused: bool,
    /// The body is sent in chunks.
    chunked: bool,
    /// Every byte of the request has been queued.
    queued_all: bool,
}

// === impl UpstreamConnection ===

impl UpstreamConnection {
    pub(crate) fn new(wire: Box<UpstreamWire>, reused: bool) -> Self {
        let outgoing = wire.outgoing();
        // An earlier request may have reduced the limit for lack of memory.
        outgoing.set_ample(true);
        let session = HttpSession::new(wire);
        UpstreamConnection { session, outgoing, reused, chunked: false, queued_all: false }
    }

    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Whether the connection may have ended before it was used: it has served, and no answer began.
    pub(crate) fn may_be_stale(&self) -> bool {
        self.reused && self.session.resp_header().is_none()
    }

    /// Whether the answer's body is framed in a way that is understood.
    pub(crate) fn is_framed_plainly(&self) -> bool {
        let mut codings = self.head().headers.get_all(http::header::TRANSFER_ENCODING).iter();
        codings.all(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"))
    }

    /// Whether the answer switches to WebSocket, the only upgrade that is forwarded.
    pub(crate) fn switches_to_websocket(&self) -> bool {
        let mut protocols = self.head().headers.get_all(http::header::UPGRADE).iter();
        protocols.any(|protocol| protocol.as_bytes().trim_ascii().eq_ignore_ascii_case(b"websocket"))
    }

    /// Queues the head. After a failure nothing else may be queued.
    pub(crate) async fn send_head(&mut self, head: &UpstreamHead) -> Result<()> {
        self.chunked = head.is_chunked();
        let bytes = head.to_bytes().ok_or_else(|| Error::new(ErrorType::InvalidHTTPHeader))?;
        // The wire drops what the session writes.
        self.session.write_request_header(Box::new(head.for_session()?)).await?;
        self.outgoing.push(bytes);
        Ok(())
    }

    /// Queues what is held of the body.
    pub(crate) fn send_held(
        &mut self,
        scope: &RequestScope<'_>,
        request: &mut ClientRequest,
        placement: &mut Placement,
    ) {
        let (held, complete) = (request.body.replay(), request.body.is_complete());
        request.forwarded = 0;
        placement.send();
        placement.follow(scope, request, 0, &held, complete);
        request.forwarded = held.len() as u64;
        let name = placement.upstream().name();
        let pending = request.pending_response.as_ref().filter(|_| !held.is_empty());
        let stamp = pending.and_then(|pending| pending.insertion(name));
        for piece in request.body.pieces(held, stamp) {
            self.queue(piece);
        }
        if complete {
            self.end_request();
        }
    }

    /// Reserves memory for the queued bytes and a further piece. Without memory the client is not read while
    /// bytes wait, so that at most one piece is not counted.
    fn reserve(&mut self, request: &mut ClientRequest, piece: usize) {
        let waiting = self.outgoing.waiting();
        if waiting == 0 {
            request.body.release_waiting();
        }
        self.outgoing.set_ample(request.body.reserve_waiting(waiting + piece));
    }

    fn queue(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        if !self.chunked {
            return self.outgoing.push(piece);
        }
        let size = format!("{:x}\r\n", piece.len());
        if piece.len() < MIN_SEPARATE_BYTES {
            return self.outgoing.push([size.as_bytes(), &piece, b"\r\n"].concat().into());
        }
        self.outgoing.push(size.into());
        self.outgoing.push(piece);
        self.outgoing.push(Bytes::from_static(b"\r\n"));
    }

    fn end_request(&mut self) {
        if self.chunked && !self.queued_all {
            self.outgoing.push(LAST_CHUNK);
        }
        self.queued_all = true;
    }

    /// Whether the client should be read now: after the body's end to detect a disconnect, before its end
    /// while the upstream keeps up.
    pub(crate) fn takes_more(&self, complete: bool) -> bool {
        complete || self.outgoing.has_room()
    }

    /// Pauses the upload's clock while the client is not read.
    pub(crate) fn pace(&self, request: &mut ClientRequest, watch: &mut RequestWatch) {
        if request.body.has_waiting() && self.outgoing.waiting() == 0 {
            request.body.release_waiting();
        }
        let reads = self.takes_more(request.body.is_complete());
        match watch.upload() {
            Some(upload) if reads => upload.resume(),
            Some(upload) => upload.pause(),
            None => {}
        }
    }

    /// Forwards an event of the client.
    pub(crate) fn forward(
        &mut self,
        scope: &RequestScope<'_>,
        client: &mut Client<'_>,
        request: &mut ClientRequest,
        placement: &mut Placement,
        watch: &mut RequestWatch,
        event: Result<ClientEvent, Box<Error>>,
    ) -> Result<(), RequestEnd> {
        let piece = match event.map_err(client_failure)? {
            ClientEvent::Abandoned => {
                watch.abandon();
                return Ok(());
            }
            ClientEvent::Piece(piece) => piece,
        };
        // An empty piece may be the framing of a chunk, so that it is not the last one.
        let complete = piece.is_none() || client.is_body_done();
        let piece = piece.unwrap_or_default();
        let before = request.forwarded;
        request.forwarded += piece.len() as u64;
        let limit = scope.settings.peeker.limits.max_body;
        if request.forwarded > limit {
            return Err(Reject::TooLarge { limit }.into());
        }
        watch.record_upload(piece.len());
        request.body.read_on(&piece)?;
        request.body.hold_if_possible(&piece);
        placement.follow(scope, request, before, &piece, complete);
        self.reserve(request, piece.len());
        self.queue(piece);
        if complete {
            request.body.complete();
            watch.set_upload(None);
            self.end_request();
        }
        Ok(())
    }

    /// Queues bytes of an upgraded connection as they are.
    pub(crate) fn pass(&self, piece: Bytes) {
        self.outgoing.push(piece);
    }

    /// Reads the head of an answer, and of each informational one before it. Returns its status.
    pub(crate) async fn read_head(&mut self) -> Result<u16> {
        self.session.read_response().await?;
        Ok(self.head().status.as_u16())
    }

    /// The head that was read last.
    pub(crate) fn head(&self) -> &ResponseHeader {
        self.session.resp_header().expect("an answer has a head, which was read first")
    }

    /// Reads the next piece of the answer's body, which may be empty; `None`: the body has ended. Dropped
    /// while it waits, it has read nothing.
    pub(crate) async fn read_piece(&mut self) -> Result<Option<&[u8]>> {
        if self.session.is_body_done() {
            return Ok(None);
        }
        Ok(Some(self.session.read_body_ref().await?.unwrap_or_default()))
    }

    /// The connection for its next request, if its answer was read to its end and the request was sent to its
    /// end.
    pub(crate) async fn into_idle(mut self) -> Option<Box<UpstreamWire>> {
        if !self.queued_all || !self.outgoing.is_sent() || !self.session.is_body_done() {
            return None;
        }
        self.session.respect_keepalive();
        if !self.session.will_keepalive() {
            return None;
        }
        let stream = self.session.reuse().await?;
        stream.into_any().downcast::<UpstreamWire>().ok()
    }
}
