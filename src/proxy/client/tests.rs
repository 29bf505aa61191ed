//! Tests of a client that disconnects or stops reading.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;

/// A client that has sent this head.
async fn sent(head: &str, room: usize) -> (DuplexStream, ServerSession) {
    let (mut client, here) = tokio::io::duplex(room);
    client.write_all(head.as_bytes()).await.unwrap();
    let mut session = ServerSession::new_http1(Box::new(here));
    session.read_request().await.unwrap();
    (client, session)
}

#[tokio::test]
async fn disconnect_ends_a_request_but_not_a_background_job() {
    for background in [true, false] {
        let (client, mut session) = sent("GET / HTTP/1.1\r\nhost: a\r\n\r\n", 1024).await;
        let mut here = Client::new(&mut session);
        here.set_background(background);
        drop(client);
        let event = here.next(true, true).await;
        assert_eq!(matches!(event, Ok(ClientEvent::Abandoned)), background, "{event:?}");
        assert_eq!(event.is_err(), !background);
        let head = ResponseHeader::build(200, None).unwrap();
        assert_eq!(here.write_head(head, b"", true).await.is_ok(), background);
    }
}

/// Regression: a job was lost when its client reset the stream right behind the body: h2 no longer
/// reported the end of the body.
#[tokio::test]
async fn complete_body_stays_complete_after_a_reset() {
    let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n";
    let (client, mut session) = sent(head, 1024).await;
    let mut here = Client::new(&mut session);
    here.set_background(true);
    assert!(!here.is_body_done(), "nobody has read it from the connection");
    drop(client);
    assert!(matches!(here.next(true, true).await, Ok(ClientEvent::Abandoned)));
}

/// Regression: writes of heads and last chunks had no deadline, so a client that stopped reading held its
/// lease.
#[tokio::test(start_paused = true)]
async fn disconnects_clients_that_stop_reading() {
    let text = "x".repeat(4096);
    for step in ["head", "body", "end"] {
        let (mut client, mut session) = sent("GET / HTTP/1.1\r\nhost: a\r\n\r\n", 64).await;
        let mut here = Client::new(&mut session);
        let mut head = ResponseHeader::build(200, None).unwrap();
        head.insert_header("transfer-encoding", "chunked").unwrap();
        if step == "head" {
            head.insert_header("x-long", &text).unwrap();
            assert!(here.write_head(head, b"", false).await.is_err());
            continue;
        }
        let mut got = vec![0; 4096];
        let write = async {
            here.write_head(head, b"", false).await?;
            if step == "body" { here.write(text.as_bytes()).await } else { here.write(&[b'x'; 50]).await }
        };
        let read = async {
            let mut length = 0;
            while !got[..length].ends_with(b"\r\n\r\n") {
                length += client.read(&mut got[length..length + 1]).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(write, read);
        if step == "body" {
            assert!(written.is_err());
            continue;
        }
        written.unwrap();
        // The peer's buffer has room for a few bytes only.
        let mut refused = here.write(&[b'y'; 40]).await.is_err();
        refused |= here.finish().await.is_err();
        assert!(refused);
    }
}

/// Regression: the deadline was one of the whole write, so that a client that read a large answer steadily
/// and slowly was cut off.
#[tokio::test(start_paused = true)]
async fn slow_client_gets_a_large_piece_that_it_reads_steadily() {
    let (mut client, mut session) = sent("GET / HTTP/1.1\r\nhost: a\r\n\r\n", MAX_WRITE_BYTES).await;
    let mut here = Client::new(&mut session);
    let mut head = ResponseHeader::build(200, None).unwrap();
    let piece = vec![b'x'; 8 * MAX_WRITE_BYTES];
    head.insert_header("content-length", piece.len()).unwrap();
    let write = async {
        here.write_head(head, b"", false).await?;
        here.write(&piece).await
    };
    let begun = tokio::time::Instant::now();
    let read = async {
        let (mut slice, mut received) = (vec![0; MAX_WRITE_BYTES], 0);
        while received < piece.len() {
            sleep(MAX_CLIENT_STALL / 2).await;
            received += client.read(&mut slice).await.unwrap();
        }
    };
    let (written, ()) = tokio::join!(write, read);
    written.unwrap();
    assert!(begun.elapsed() > 2 * MAX_CLIENT_STALL, "it took longer than one write may");
}
