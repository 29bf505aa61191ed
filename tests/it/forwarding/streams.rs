//! Answers pass through as they are made, and what ends on one side ends on the other: a client that
//! leaves frees the engine, an engine that dies is never taken for one that has finished.

use std::time::Duration;

use crate::common::body::{Place, chat, events, normal, padded, stream};
use crate::common::h2::{self, H2};
use crate::common::raw::Raw;
use crate::common::staged::Staged;
use crate::common::wire::{self, Answer, CHUNKED, JSON, Wire, chunk, head, post};
use crate::common::{
    Balancer, EngineServer, InjectedFault, config, direct, engine, engines, eventually, paced, serving,
    upstreams,
};
use bytes::Bytes;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

// === as they are made ===

/// The engine stops dead after so many events, so that none of them can have waited for the next; but for
/// the role that comes before the first token, which waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_goes_out_before_the_next_is_made() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    for made in 2..=6 {
        engine.set_fault(InjectedFault::StallStream { events: made }).await;
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 20))).await;
        let head = client.head().await;
        assert_eq!(head.headers["content-type"], "text/event-stream; charset=utf-8");
        let mut framing = head.framing;
        let mut seen = 0;
        while seen < made {
            let piece = client.piece(&mut framing).await.expect("the stream goes on");
            seen += events(&piece.expect("and has not ended")).len();
        }
        assert_eq!(seen, made);
    }
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_clients_get_each_event_before_the_next_is_made() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    engine.set_fault(InjectedFault::StallStream { events: 4 }).await;
    let mut client = H2::connect(balancer.address()).await;
    let mut asked = client.begin(h2::post(CHAT), false).await;
    asked.body.send_data(Bytes::from(stream("sim", 20)), true).expect("the stream is open");
    let mut body = asked.answer.await.expect("an answer comes").into_body();
    let mut seen = 0;
    while seen < 4 {
        let piece =
            tokio::time::timeout(crate::common::PATIENCE, body.data()).await.expect("a piece comes in time");
        seen += events(&piece.expect("the stream goes on").expect("and is not broken")).len();
    }
    assert_eq!(seen, 4);
    drop((asked.body, body));
    balancer.until_idle().await;
}

/// Each event is made once the client has the one before: nothing gathers events, or holds one back.
#[tokio::test(flavor = "multi_thread")]
async fn events_with_time_between_them_come_one_by_one() {
    let upstream = Staged::start().await;
    let balancer = Balancer::ready(config(vec![upstream.upstream()])).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 1_000))).await;
    upstream.begins();
    let mut framing = None;
    for number in 0..12 {
        let event = format!("data: {{\"choices\":[],\"number\":{number}}}\n\n");
        upstream.chunk(&event);
        let framing = match &mut framing {
            Some(framing) => framing,
            // The head waits for the first event.
            None => framing.insert(client.head().await.framing),
        };
        let piece = client.piece(framing).await.expect("the stream goes on").expect("and has not ended");
        assert_eq!(piece, event);
    }
    upstream.chunk("");
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_equals_the_engines_bytes() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let responses = r#"{"model":"sim","input":"hi","stream":true,"max_output_tokens":8}"#.to_string();
    let messages = stream("sim", 30);
    let usage =
        stream("sim", 30).replace("\"stream\"", "\"stream_options\":{\"include_usage\":true},\"stream\"");
    let completions = r#"{"model":"sim","prompt":"hi","stream":true,"max_tokens":30}"#.to_string();
    for (path, body) in [
        (CHAT, stream("sim", 30)),
        (CHAT, usage),
        ("/v1/completions", completions),
        ("/v1/responses", responses),
        (MESSAGES, messages),
    ] {
        let there = Wire::connect(&direct(&engine)).await.ask(post(path, &body)).await.expect(200);
        let here = balancer.ask(post(path, &body)).await.expect(200);
        let by_h2 = H2::connect(balancer.address()).await;
        let by_h2 = { by_h2 }.ask(h2::post(path), &[Bytes::from(body)]).await.expect(200);
        assert!(events(&there.body).len() > 8, "{path}: {:?}", there.body);
        for answer in [&here, &by_h2] {
            assert_eq!(events(&answer.body).len(), events(&there.body).len(), "{path}");
            assert_eq!(normal(&answer.body), normal(&there.body), "{path}");
        }
    }
}

// === clients that leave ===

#[derive(Clone, Copy, Debug)]
enum Leave {
    /// An orderly end.
    Fin,
    Reset,
}

/// A client whose connection can be ended either way.
async fn client(balancer: &Balancer) -> TcpStream {
    wire::tcp(balancer.address()).await
}

fn leave(client: TcpStream, how: Leave) {
    match how {
        Leave::Fin => {}
        Leave::Reset => client.set_zero_linger().expect("an open socket takes options"),
    }
    drop(client);
}

/// Reads until so many events came, and all of what is there: unread bytes would turn a FIN into a reset.
async fn read_events(client: &TcpStream, count: usize) {
    let mut seen = Vec::new();
    eventually("the events come", async || {
        let readable = tokio::time::timeout(crate::common::PATIENCE, client.readable()).await;
        readable.expect("more comes in time").expect("the connection lives");
        let mut buffer = [0; 16 << 10];
        while let Ok(read) = client.try_read(&mut buffer) {
            assert!(read > 0, "the stream ended: {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..read]);
        }
        (String::from_utf8_lossy(&seen).matches("data: ").count() >= count).then_some(())
    })
    .await;
}

/// Nothing is left of a request: in the engine, on its connections, in the gauges.
async fn all_is_free(engine: &EngineServer, balancer: &Balancer) {
    engine.wait_until("the engine is free", |stats| stats.running + stats.waiting == 0).await;
    // The connections of probes stay; one that a request left behind would stay too.
    engine.wait_until("no connection is left", |stats| stats.used == 0).await;
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_before_the_answer_frees_the_engine() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    engine.set_fault(InjectedFault::StallHeaders).await;
    for how in [Leave::Fin, Leave::Reset] {
        let received = engine.stats().received;
        let mut client = client(&balancer).await;
        client.write_all(&post(CHAT, stream("sim", 5))).await.unwrap();
        engine.wait_until("the request is there", |stats| stats.received == received + 1).await;
        balancer.until_active(1).await;
        leave(client, how);
        all_is_free(&engine, &balancer).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_within_a_stream_frees_the_engine() {
    let engine = paced(Duration::from_millis(5)).await;
    let balancer = Balancer::over([&engine]).await;
    for how in [Leave::Fin, Leave::Reset] {
        let mut client = client(&balancer).await;
        client.write_all(&post(CHAT, stream("sim", 30_000))).await.unwrap();
        read_events(&client, 3).await;
        assert_eq!(engine.stats().running, 1);
        leave(client, how);
        all_is_free(&engine, &balancer).await;
    }
    assert_eq!(engine.stats().aborted, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_between_two_events_frees_the_engine() {
    let engine = engine(Default::default()).await;
    let balancer = Balancer::over([&engine]).await;
    engine.set_fault(InjectedFault::StallStream { events: 3 }).await;
    for how in [Leave::Fin, Leave::Reset] {
        let mut client = client(&balancer).await;
        client.write_all(&post(CHAT, stream("sim", 50))).await.unwrap();
        read_events(&client, 3).await;
        balancer.until_active(1).await;
        leave(client, how);
        all_is_free(&engine, &balancer).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_before_a_whole_answer_frees_the_engine() {
    let engine = paced(ENDLESS).await;
    let balancer = Balancer::over([&engine]).await;
    for how in [Leave::Fin, Leave::Reset] {
        let mut client = client(&balancer).await;
        let body = chat("sim").replace("\"max_tokens\":3", "\"max_tokens\":30000");
        client.write_all(&post(CHAT, body)).await.unwrap();
        engine.wait_until("it runs", |stats| stats.running == 1).await;
        leave(client, how);
        all_is_free(&engine, &balancer).await;
    }
    assert_eq!(engine.stats().aborted, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_within_an_upload_frees_the_upstream_connection() {
    let engine = engine(Default::default()).await;
    let mut config = config(upstreams([&engine]));
    config.peek.bytes = 64 << 10;
    let balancer = Balancer::ready(config).await;
    let body = padded(1 << 20, "sim", Place::First);
    let length = body.len().to_string();
    for framing in [("content-length", length.as_str()), CHUNKED] {
        for how in [Leave::Fin, Leave::Reset] {
            let mut client = client(&balancer).await;
            client.write_all(&head("POST", CHAT, &[JSON, framing])).await.unwrap();
            let half = body.slice(..body.len() / 2);
            let half = if framing == CHUNKED { Bytes::from(chunk(&half)) } else { half };
            client.write_all(&half).await.unwrap();
            balancer.until_active(1).await;
            leave(client, how);
            all_is_free(&engine, &balancer).await;
        }
    }
    assert_eq!(engine.stats().received, 0, "half a request is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_within_the_peek_leaves_nothing() {
    let engines = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&engines).await;
    let body = padded(300 << 10, "two", Place::Last);
    for how in [Leave::Fin, Leave::Reset] {
        let mut client = client(&balancer).await;
        let length = body.len().to_string();
        client.write_all(&head("POST", CHAT, &[JSON, ("content-length", &length)])).await.unwrap();
        client.write_all(&body[..body.len() / 2]).await.unwrap();
        eventually("the beginning is held", async || {
            (balancer.metric("vllm_lb_peeked_bytes").await > 0.0).then_some(())
        })
        .await;
        leave(client, how);
        for engine in &engines {
            all_is_free(engine, &balancer).await;
            assert_eq!(engine.stats().received, 0);
        }
        balancer.until_metric("vllm_lb_connections", 1.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_over_http2_frees_the_engine() {
    let engine = paced(ENDLESS).await;
    let balancer = Balancer::over([&engine]).await;
    for whole_connection in [false, true] {
        let mut client = H2::connect(balancer.address()).await;
        let mut asked = client.begin(h2::post(CHAT), false).await;
        asked.body.send_data(Bytes::from(stream("sim", 30_000)), true).expect("the stream is open");
        let mut body = asked.answer.await.expect("an answer comes").into_body();
        body.data().await.expect("the stream goes on").expect("and is not broken");
        assert_eq!(engine.stats().running, 1);
        if whole_connection {
            client.cut();
        } else {
            drop((asked.body, body));
            // The connection is as good as before.
            all_is_free(&engine, &balancer).await;
            client.ask(h2::post("/v1/models"), &[]).await.expect(405);
        }
        all_is_free(&engine, &balancer).await;
    }
    assert_eq!(engine.stats().aborted, 2);
}

// === engines that die ===

/// What a stream's last events have to say, by the route's form.
fn assert_tells_of_its_end(path: &str, body: &[u8]) {
    let events = events(body);
    let (last, done) = match path {
        CHAT | "/v1/completions" => {
            (&events[events.len() - 2], events.last().is_some_and(|e| e == "data: [DONE]"))
        }
        _ => (&events[events.len() - 1], true),
    };
    let named = path == MESSAGES || path == RESPONSES;
    let data = if named { last.strip_prefix("event: error\ndata: ") } else { last.strip_prefix("data: ") };
    let event: Value = serde_json::from_str(data.unwrap_or_default()).unwrap_or_default();
    assert!(done && event["error"]["message"].is_string(), "{path}: {}", String::from_utf8_lossy(body));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_never_looks_finished() {
    let engine = engine(Default::default()).await;
    let balancer = steadfast(&engine).await;
    let completion = r#"{"model":"sim","prompt":"hi","stream":true,"max_tokens":20}"#.to_string();
    let response = r#"{"model":"sim","input":"hi","stream":true,"max_output_tokens":20}"#.to_string();
    let cases = [
        (CHAT, stream("sim", 20)),
        ("/v1/completions", completion),
        (RESPONSES, response),
        (MESSAGES, stream("sim", 20)),
    ];
    for (path, body) in cases {
        engine.clear_fault().await;
        let whole = Wire::connect(&direct(&engine)).await.ask(post(path, &body)).await.expect(200);
        for reset in [false, true] {
            engine.set_fault(InjectedFault::CutStream { events: 3, reset }).await;
            let mut client = balancer.client().await;
            let by_http1 = client.ask(post(path, &body)).await;
            assert_eq!(client.rest().await, b""[..], "the connection ends");
            let mut client = H2::connect(balancer.address()).await;
            let by_http2 = client.ask(h2::post(path), &[Bytes::from(body.clone())]).await;
            for cut in [by_http1, by_http2] {
                assert_eq!(cut.status, 200);
                assert_tells_of_its_end(path, &cut.body);
                let came: Vec<String> = events(&cut.body)[..3].iter().map(|e| normal(e.as_bytes())).collect();
                let made: Vec<String> =
                    events(&whole.body)[..3].iter().map(|e| normal(e.as_bytes())).collect();
                assert_eq!(came, made, "what came before arrived");
            }
            balancer.until_idle().await;
        }
    }
}

/// Without events there is nothing to say it with: the framing must not close.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_never_looks_finished() {
    let half = "{\"half\":";
    for framing in [
        format!("content-length: 100000\r\n\r\n{half}"),
        format!("transfer-encoding: chunked\r\n\r\n8\r\n{half}\r\n"),
        format!("transfer-encoding: chunked\r\n\r\n8\r\n{half}\r\n10\r\n"),
    ] {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{framing}");
        let raw = Raw::holding(&answer).await;
        let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
        let mut by_http1 = balancer.client().await;
        by_http1.send(post(CHAT, chat("sim"))).await;
        let mut way = by_http1.head().await.framing;
        assert_eq!(by_http1.piece(&mut way).await.unwrap().unwrap(), half);
        let mut by_http2 = H2::connect(balancer.address()).await;
        let mut asked = by_http2.begin(h2::post(CHAT), false).await;
        asked.body.send_data(Bytes::from(chat("sim")), true).expect("the stream is open");
        let mut body = asked.answer.await.expect("an answer comes").into_body();
        assert_eq!(body.data().await.expect("it goes on").expect("and is not broken"), half);
        raw.close();
        assert!(by_http1.piece(&mut way).await.is_err(), "{framing}");
        assert!(!matches!(body.data().await, None | Some(Ok(_))), "{framing}");
        balancer.until_idle().await;
    }
}

fn assert_openai(answer: &Answer, code: u16) {
    let error = &answer.json()["error"];
    assert_eq!((&error["code"], &error["param"]), (&code.into(), &serde_json::Value::Null));
    assert!(error["message"].is_string() && error["type"].is_string(), "{answer:?}");
}

fn assert_anthropic(answer: &Answer) {
    let body = answer.json();
    assert_eq!((&body["type"], &body["error"]["type"]), (&"error".into(), &"api_error".into()));
    assert!(body["error"]["message"].is_string(), "{answer:?}");
}

/// Over one upstream that is not given up for failing requests.
async fn steadfast(engine: &EngineServer) -> Balancer {
    let mut config = config(upstreams([engine]));
    config.breaker.failures = u32::MAX;
    Balancer::ready(config).await
}

/// The first request after a failure meets it; later ones may meet an upstream that is known to be down.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_cannot_be_reached_is_a_bad_gateway() {
    for fault in [InjectedFault::Refuse, InjectedFault::CloseAfterAccept] {
        for body in [Bytes::from(chat("sim")), padded(8 << 20, "sim", Place::First)] {
            for path in [CHAT, MESSAGES] {
                for by_http2 in [false, true] {
                    let engine = engine(Default::default()).await;
                    let mut config = config(upstreams([&engine]));
                    // A probe must not find the failure before the request does.
                    config.health.interval = Duration::from_secs(3600);
                    let balancer = Balancer::ready(config).await;
                    engine.set_fault(fault.clone()).await;
                    let answer = if by_http2 {
                        let mut client = H2::connect(balancer.address()).await;
                        client.ask(h2::post(path), std::slice::from_ref(&body)).await
                    } else {
                        balancer.ask(post(path, &body)).await
                    };
                    let answer = answer.expect(502);
                    if path == CHAT {
                        assert_openai(&answer, 502)
                    } else {
                        assert_anthropic(&answer)
                    }
                    balancer.until_idle().await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_comes_back_is_used_again() {
    let engine = engine(Default::default()).await;
    let balancer = steadfast(&engine).await;
    engine.set_fault(InjectedFault::Refuse).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(502);
    balancer.until_ready(0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    engine.clear_fault().await;
    balancer.until_ready(1).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_dies_before_it_answers_is_a_bad_gateway() {
    let engine = engine(Default::default()).await;
    let mut config = config(upstreams([&engine]));
    config.retry.attempts = 0;
    let balancer = Balancer::ready(config).await;
    engine.set_fault(InjectedFault::StallHeaders).await;
    let asked = async {
        let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(502);
        assert_openai(&answer, 502);
    };
    let dying = async {
        engine.wait_until("the request is there", |stats| stats.received == 1).await;
        engine.restart().await;
    };
    tokio::join!(asked, dying);
    balancer.until_idle().await;
}

/// Upstreams close idle connections whenever they like; a request must not be lost to that.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_that_the_upstream_closed_cost_no_request() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    // A probe would connect again before its engine is looked at.
    config.health.interval = Duration::from_secs(600);
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    for _ in 0..10 {
        for engine in &engines {
            engine.set_fault(InjectedFault::CloseIdle).await;
            engine.wait_until("idle connections are closed", |stats| stats.connections == 0).await;
        }
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
}
