//! Heads in pieces, heads that are slow, endless or none, and what pingora makes of the same bytes.

use std::time::Duration;

use pingora::protocols::http::ServerSession;
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, duplex};

use super::*;

const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

fn scanned(head: &[u8]) -> Option<usize> {
    HeadScan::default().end(head)
}

#[test]
fn a_head_ends_with_the_first_empty_line_behind_its_first_line() {
    for (head, end) in [
        (&b"GET / HTTP/1.1\r\n\r\nbody"[..], Some(18)),
        (b"GET / HTTP/1.1\n\nbody", Some(16)),
        (b"GET / HTTP/1.1\r\na: b\n\r\nbody", Some(23)),
        (b"\r\n\n\r\nGET / HTTP/1.1\r\n\r\n", Some(23)),
        (b"GET / HTTP/1.1\r\n\r", None),
        (b"GET / HTTP/1.1\r\n", None),
        (b"\r\n\r\n", None),
        (b"\r\n\r", None),
        (b"", None),
    ] {
        assert_eq!(scanned(head), end, "{:?}", head.escape_ascii().to_string());
    }
}

proptest! {
    /// However a head is cut into pieces, its end is found in the same place.
    #[test]
    fn pieces_make_no_difference(head in "[a\r\n]{0,24}", cuts in prop::collection::vec(0usize..24, 0..6)) {
        let head = head.as_bytes();
        let mut scan = HeadScan::default();
        let mut lengths: Vec<usize> = cuts.into_iter().map(|cut| cut.min(head.len())).collect();
        lengths.sort_unstable();
        lengths.push(head.len());
        let found = lengths.iter().find_map(|length| scan.end(&head[..*length]));
        prop_assert_eq!(found, scanned(head));
    }

    /// Pingora never reads on behind a head that is whole here, where no limit would apply to it, and
    /// takes none for whole that is not: whatever the bytes, it accepts or refuses them as they are.
    #[test]
    fn pingora_finds_the_same_end(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "GET ", "/", " ", " HTTP/1.1", " HTTP/1.0", "\r\n", "\n", "\r", "\r\n\r\n", "a: b", "a:",
                "\"", "host: a", "\t", "\u{0}", "\u{7f}", "é", "PRI * HTTP/2.0",
            ]),
            0..14,
        )
    ) {
        let head: String = parts.concat();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(async {
            // The other end stays open and sends nothing.
            let (near, _far) = duplex(64);
            let mut session = ServerSession::new_http1(Box::new(near));
            session.set_keepalive(None);
            session.set_pipelined_prefix(BytesMut::from(head.as_bytes()));
            let patience = Duration::from_secs(1);
            let read = tokio::time::timeout(patience, session.read_request()).await;
            match scanned(head.as_bytes()) {
                Some(end) => {
                    assert!(read.is_ok(), "pingora reads on behind {head:?}");
                    if let Ok(Ok(true)) = read {
                        let raw = session.as_http1().unwrap().get_headers_raw_bytes();
                        // Pingora escapes what may not stand in a target.
                        assert!(raw.len() == end || raw.contains(&b'%'), "{head:?}");
                    }
                }
                None => assert!(!matches!(read, Ok(Ok(true))), "pingora is content with {head:?}"),
            }
        });
    }
}

fn limits() -> ConnectionLimits {
    ConnectionLimits { idle: Duration::from_secs(60), head: Duration::from_secs(10), ..Default::default() }
}

async fn read(pieces: &[(u64, &[u8])], header_bytes: u64) -> (IncomingRequest, u64) {
    let (mut near, mut far) = duplex(1 << 20);
    let mut reader = HeadReader::new(limits());
    let begun = Instant::now();
    let send = async {
        for (seconds, piece) in pieces {
            tokio::time::sleep(Duration::from_secs(*seconds)).await;
            far.write_all(piece).await.unwrap();
        }
        std::future::pending::<()>().await;
    };
    let incoming = tokio::select! {
        incoming = reader.next(&mut near, header_bytes) => incoming,
        () = send => unreachable!("it waits"),
    };
    if matches!(incoming, IncomingRequest::Request(_)) {
        assert_eq!(reader.held.capacity(), 0, "nothing is held while the request is served");
    }
    (incoming, begun.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_head_is_read_with_what_comes_behind_it() {
    let (incoming, _) = read(&[(59, HEAD), (0, b"body")], 100).await;
    let IncomingRequest::Request(head) = incoming else { panic!("{incoming:?}") };
    assert_eq!((head.bytes.split_at(head.length)), (HEAD, &b"body"[..]));
    let halves = [(0, &HEAD[..9]), (9, &HEAD[9..])];
    assert!(matches!(read(&halves, 100).await, (IncomingRequest::Request(head), 9) if head.bytes == HEAD));
}

#[tokio::test(start_paused = true)]
async fn silence_ends_a_connection_and_a_slow_head_is_refused() {
    assert!(matches!(read(&[], 100).await, (IncomingRequest::Gone, 60)));
    // Empty lines are no head.
    assert!(matches!(read(&[(30, b"\r\n"), (20, b"\r\n")], 100).await, (IncomingRequest::Gone, 60)));
    assert!(matches!(read(&[(30, b"G")], 100).await, (IncomingRequest::Refused(Reject::Slow), 40)));
    let trickle: Vec<(u64, &[u8])> = HEAD[..20].iter().map(|byte| (1, std::slice::from_ref(byte))).collect();
    assert!(matches!(read(&trickle, 100).await, (IncomingRequest::Refused(Reject::Slow), 11)));
}

#[tokio::test(start_paused = true)]
async fn a_head_beyond_the_margin_is_refused_without_reading_on() {
    let long = vec![b'a'; 1 << 20];
    let (mut near, mut far) = duplex(2 << 20);
    far.write_all(b"GET /").await.unwrap();
    far.write_all(&long).await.unwrap();
    let mut reader = HeadReader::new(limits());
    let refused = reader.next(&mut near, 1000).await;
    assert!(matches!(refused, IncomingRequest::Refused(Reject::HeadTooLarge { limit: 1000 })));
    assert!(
        reader.held.len() <= 1000 + MAX_HEAD_EXCESS_BYTES as usize + READ_CHUNK_BYTES,
        "{}",
        reader.held.len()
    );
    // Within the margin, it is refused as a request.
    let head = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(2000));
    assert!(matches!(read(&[(0, head.as_bytes())], 1000).await, (IncomingRequest::Request(_), 0)));
}

#[tokio::test(start_paused = true)]
async fn what_is_no_http_is_refused_at_once() {
    for bytes in [
        &b"\x16\x03\x01\x02\0\x01"[..],
        b" GET / HTTP/1.1\r\n",
        b"GET / / HTTP/1.1\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\n\r\n",
        b"GET /\r HTTP/1.1\r\n\r\n",
        b"GET\t/ HTTP/1.1\r\n\r\n",
        b"\r\nGET /\r\n\r\n",
    ] {
        let (incoming, seconds) = read(&[(0, bytes)], 1000).await;
        assert!(matches!(incoming, IncomingRequest::Refused(Reject::Malformed { .. })), "{incoming:?}");
        assert_eq!(seconds, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn the_preface_of_http2_is_told_from_what_begins_like_it() {
    for (sent, is_preface) in
        [(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmore"[..], true), (b"PRI * HTTP/2.0\r\n\r\nSN", false)]
    {
        let (mut near, mut far) = duplex(1 << 10);
        let mut reader = HeadReader::new(limits());
        far.write_all(&sent[..5]).await.unwrap();
        assert!(reader.begin(&mut near).await);
        far.write_all(&sent[5..]).await.unwrap();
        match reader.finish(&mut near, 1000, true).await {
            IncomingRequest::Http2(bytes) => assert!(is_preface && bytes == sent),
            IncomingRequest::Request(head) => assert!(!is_preface && head.bytes == sent),
            other => panic!("{other:?}"),
        }
    }
}
