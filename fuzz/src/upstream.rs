//! Answers of upstreams, read by pingora's client session: any bytes end in an answer or an error, the same
//! in whatever pieces they arrive, and never in more body than was received or announced.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use pingora::http::RequestHeader;
use pingora::protocols::http::v1::client::HttpSession;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, Ssl};
use pingora::protocols::{SocketDigest, TimingDigest, UniqueID, UniqueIDType};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::cuts;

/// Interim answers that are read before the answer must come.
const MAX_INTERIM: usize = 100;

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

pub fn run(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
    let at_once = runtime.block_on(read(data, std::slice::from_ref(&(0..data.len()))));
    for way in cuts::ways(data) {
        let in_pieces = runtime.block_on(read(data, &way));
        assert_eq!(in_pieces, at_once, "in pieces {way:?}");
    }
}

/// `None`: an error, of which only the fact counts.
async fn read(data: &[u8], pieces: &[Range<usize>]) -> Option<Answer> {
    let mut session = HttpSession::new(Box::new(Replay::new(data, pieces)));
    let mut request = RequestHeader::build("POST", b"/v1/chat/completions", None).expect("it is a request");
    request.insert_header("host", "upstream").expect("it is a header");
    session.write_request_header(Box::new(request)).await.ok()?;
    session.finish_body().await.ok()?;
    for _ in 0..MAX_INTERIM {
        session.read_response().await.ok()?;
        let head = session.resp_header()?;
        let status = head.status.as_u16();
        match status {
            // Nothing was to be upgraded.
            101 => return None,
            100..=199 => continue,
            _ => {}
        }
        let headers = head.headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
        let headers: Vec<_> = headers.collect();
        let mut body = Vec::new();
        let mut reads = 0;
        while !session.is_body_done() {
            let Some(piece) = session.read_body_ref().await.ok()? else { break };
            body.extend_from_slice(piece);
            reads += 1;
            assert!(reads <= data.len() + 2, "it reads on and on");
        }
        check(data, &headers, &body);
        return Some(Answer { status, headers, body });
    }
    None
}

fn check(data: &[u8], headers: &[(String, Vec<u8>)], body: &[u8]) {
    assert!(body.len() <= data.len(), "more body than bytes");
    let value = |name: &str| headers.iter().find(|header| header.0 == name).map(|header| &header.1[..]);
    let breaks = |header: &(String, Vec<u8>)| header.1.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0));
    assert!(!headers.iter().any(breaks), "a header holds a line end");
    let length = value("content-length").and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
    if let (Some(length), None) = (length, value("transfer-encoding")) {
        assert!(body.len() <= length, "more body than was announced");
    }
}

/// A connection on which these bytes arrive in these pieces, and then its end.
#[derive(Debug)]
struct Replay {
    data: Vec<u8>,
    pieces: Vec<Range<usize>>,
    /// The piece that arrives next is there.
    is_ready: bool,
}

impl Replay {
    fn new(data: &[u8], pieces: &[Range<usize>]) -> Self {
        // The next one is the last one.
        let pieces = pieces.iter().rev().filter(|piece| !piece.is_empty()).cloned().collect();
        Replay { data: data.to_vec(), pieces, is_ready: false }
    }
}

impl AsyncRead for Replay {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.is_ready = !self.is_ready;
        if self.is_ready {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(piece) = self.pieces.pop() {
            let taken = piece.start..piece.end.min(piece.start + out.remaining());
            out.put_slice(&self.data[taken.clone()]);
            if taken.end < piece.end {
                self.pieces.push(taken.end..piece.end);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Replay {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl Shutdown for Replay {
    async fn shutdown(&mut self) {}
}

impl UniqueID for Replay {
    fn id(&self) -> UniqueIDType {
        0
    }
}

impl Ssl for Replay {}

impl Peek for Replay {}

impl GetTimingDigest for Replay {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Replay {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Replay {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        None
    }
}
