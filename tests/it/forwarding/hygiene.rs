//! What of a head goes on and what does not, on the way to an engine and back.

use crate::common::body::{chat, stream};
use crate::common::h2::{self, H2};
use crate::common::raw::Raw;
use crate::common::wire::{Answer, JSON, post, request};
use crate::common::{Balancer, EngineServer, Options, Recorded, config, engine, upstreams};
use vllm_lb::config::types::{Config, ListenAddress};

const CHAT: &str = "/v1/chat/completions";

async fn stand() -> (EngineServer, Balancer) {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    (engine, balancer)
}

fn last(engine: &EngineServer) -> Recorded {
    engine.requests().pop().expect("a request arrived")
}

fn values(recorded: &Recorded, name: &str) -> Vec<String> {
    let values = recorded.headers.get_all(name).iter();
    values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
}

const FORWARDED: [(&str, &str); 4] = [
    ("x-forwarded-for", "203.0.113.7, 10.0.0.1"),
    ("x-forwarded-for", "10.0.0.2"),
    ("x-forwarded-proto", "https"),
    ("x-forwarded-host", "public.example"),
];

/// What an engine gets for a request with these headers.
async fn sent_on(headers: &[(&str, &str)]) -> Recorded {
    let (engine, balancer) = stand().await;
    sent_through(&engine, &balancer, headers).await
}

/// The same, where clients on this machine are trusted.
async fn sent_on_trusted(headers: &[(&str, &str)]) -> Recorded {
    let engine = engine(Options::default()).await;
    let config = Config { trusted_proxies: crate::common::loopback(), ..config(upstreams([&engine])) };
    let balancer = Balancer::ready(config).await;
    sent_through(&engine, &balancer, headers).await
}

async fn sent_through(engine: &EngineServer, balancer: &Balancer, headers: &[(&str, &str)]) -> Recorded {
    let headers = [&[JSON], headers].concat();
    balancer.ask(request("POST", CHAT, &headers, chat("sim").as_bytes())).await.expect(200);
    last(engine)
}

// === towards the engine ===

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_request_fields_are_not_forwarded() {
    let arrived = sent_on(&[
        ("connection", "keep-alive, X-Mine, x-other"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("te", "trailers"),
        ("trailer", "x-checksum"),
        ("x-mine", "not for you"),
        ("X-OTHER", "nor this"),
        ("x-kept", "for you"),
    ])
    .await;
    for name in ["keep-alive", "proxy-connection", "te", "trailer", "x-mine", "x-other", "upgrade"] {
        assert_eq!(values(&arrived, name), [""; 0], "{name}");
    }
    assert!(!values(&arrived, "connection").join(",").to_lowercase().contains("x-"));
    assert_eq!(values(&arrived, "x-kept"), ["for you"]);
}

/// `connection` must not be able to take away what is ours to say, or what makes the request one: such a
/// request is refused, or goes on with them.
#[tokio::test(flavor = "multi_thread")]
async fn connection_cannot_nominate_needed_fields() {
    let (engine, balancer) = stand().await;
    let chain = ("x-forwarded-for", "10.0.0.1");
    for needed in ["host", "content-length", "transfer-encoding", "x-forwarded-for", "x-forwarded-host"] {
        let asked = request("POST", CHAT, &[JSON, chain, ("connection", needed)], chat("sim").as_bytes());
        let answer = balancer.ask(asked).await;
        if answer.status == 200 {
            let arrived = last(&engine);
            assert_eq!(arrived.body_length, chat("sim").len(), "{needed}");
            assert!(values(&arrived, "x-forwarded-for")[0].ends_with("127.0.0.1"), "{needed}");
            assert_eq!(values(&arrived, "x-forwarded-host"), ["balancer.test"], "{needed}");
        } else {
            assert_eq!(answer.status, 400, "{needed}");
        }
    }
}

/// Regression: each field was compared with each name in `connection`, 17 ms of CPU for one head.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_nominates_many_fields_is_refused() {
    let (_engine, balancer) = stand().await;
    for (count, status) in [(64, 200), (65, 400), (5_000, 400)] {
        let names = (0..count).map(|number| format!("x{number}")).collect::<Vec<_>>().join(",");
        let asked = request("POST", CHAT, &[JSON, ("connection", &names)], chat("sim").as_bytes());
        balancer.ask(asked).await.expect(status);
    }
}

/// Regression: HTTP/2 splits cookies into fields, of which many servers of HTTP/1.1 read the first.
#[tokio::test(flavor = "multi_thread")]
async fn cookies_go_to_the_engine_in_one_field() {
    let arrived = sent_on(&[("cookie", "a=1"), ("x-other", "o"), ("cookie", "b=2; c=3")]).await;
    assert_eq!(values(&arrived, "cookie"), ["a=1; b=2; c=3"]);
    assert_eq!(values(&sent_on(&[("cookie", "a=1")]).await, "cookie"), ["a=1"]);
    let nominated = sent_on(&[("connection", "cookie"), ("cookie", "a=1"), ("cookie", "b=2")]).await;
    assert_eq!(values(&nominated, "cookie"), [""; 0]);
}

/// Regression: a client that believed the `transfer-encoding` of a 204 waited for chunks.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_content_has_no_framing() {
    for framing in ["transfer-encoding: chunked\r\n", "content-length: 0\r\n", ""] {
        let raw = Raw::start(&format!("HTTP/1.1 204 No Content\r\n{framing}\r\n")).await;
        let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
        let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(204);
        assert_eq!((answer.header("transfer-encoding"), answer.header("content-length")), ("", ""));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_other_request_fields_are_forwarded() {
    let kept = [
        ("authorization", "Bearer the client's key"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=b,c=d"),
        ("x-session-id", "session"),
        ("anthropic-version", "2023-06-01"),
        ("anthropic-beta", "one,two"),
        ("x-api-key", "key"),
        ("accept", "*/*"),
        ("accept-encoding", "gzip, br"),
        ("user-agent", "OpenAI/Python 1.0"),
        ("x-stainless-retry-count", "0"),
        ("cookie", "a=b; c=d"),
        ("x-empty", ""),
        ("x-spaces", "a  b"),
        ("x-high", "é"),
    ];
    let arrived = sent_on(&kept).await;
    for (name, value) in kept {
        assert_eq!(values(&arrived, name), [value], "{name}");
    }
    assert_eq!(values(&arrived, "content-type"), ["application/json"]);
    let twice = sent_on(&[("x-twice", "one"), ("x-twice", "two")]).await;
    assert_eq!(values(&twice, "x-twice"), ["one", "two"]);
}

/// vLLM lets a caller choose one of its engines, past any balance of theirs: a trusted caller may.
#[tokio::test(flavor = "multi_thread")]
async fn only_trusted_clients_choose_a_data_parallel_rank() {
    let rank = [("X-data-parallel-rank", "1")];
    assert_eq!(values(&sent_on_trusted(&rank).await, "x-data-parallel-rank"), ["1"]);
    assert_eq!(values(&sent_on(&rank).await, "x-data-parallel-rank"), [""; 0]);
}

/// Any client could choose the scheme and the host that engines are told.
#[tokio::test(flavor = "multi_thread")]
async fn forwarded_fields_of_untrusted_clients_are_replaced() {
    let arrived = sent_on(&FORWARDED).await;
    assert_eq!(values(&arrived, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(values(&arrived, "x-forwarded-proto"), ["http"]);
    assert_eq!(values(&arrived, "x-forwarded-host"), ["balancer.test"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_queries_are_forwarded_unchanged() {
    let (engine, balancer) = stand().await;
    for path in [
        "/v1/chat/completions?beta=true",
        "/v1/chat/completions?a=%20%2F%C3%A9&b=c+d&&=x",
        "/v1/chat/completions?",
        "/v1/chat/completions?a=/../b?c",
    ] {
        balancer.ask(post(path, chat("sim"))).await.expect(200);
        assert_eq!(last(&engine).path, path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_is_the_upstreams_and_x_forwarded_host_the_clients() {
    let (engine, balancer) = stand().await;
    let asked = request("POST", CHAT, &[JSON, ("host", "api.example:8443")], chat("sim").as_bytes());
    balancer.ask(asked).await.expect(200);
    let arrived = last(&engine);
    assert_eq!(values(&arrived, "host"), [crate::common::direct(&engine)]);
    assert_eq!(values(&arrived, "x-forwarded-host"), ["api.example:8443"]);
    assert_eq!(values(&arrived, "x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(values(&arrived, "x-forwarded-proto"), ["http"]);

    let mut client = H2::connect(balancer.address()).await;
    client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
    let arrived = last(&engine);
    assert_eq!(values(&arrived, "host"), [crate::common::direct(&engine)]);
    assert_eq!(values(&arrived, "x-forwarded-host"), ["balancer.test"]);
    assert_eq!(values(&arrived, "x-forwarded-for"), ["127.0.0.1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn forwarded_fields_of_trusted_proxies_are_extended() {
    let arrived = sent_on_trusted(&FORWARDED).await;
    assert_eq!(values(&arrived, "x-forwarded-for"), ["203.0.113.7, 10.0.0.1, 10.0.0.2, 127.0.0.1"]);
    assert_eq!(values(&arrived, "x-forwarded-proto"), ["https"]);
    assert_eq!(values(&arrived, "x-forwarded-host"), ["public.example"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_on_a_unix_socket_has_no_forwarded_address() {
    let engine = engine(Options::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(upstreams([&engine]));
    config.listen[0].address = ListenAddress::Unix(directory.path().join("lb.sock"));
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    assert_eq!(values(&last(&engine), "x-forwarded-for"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn expect_is_answered_by_the_balancer() {
    let (engine, balancer) = stand().await;
    let asked = request("POST", CHAT, &[JSON, ("expect", "100-continue")], chat("sim").as_bytes());
    balancer.ask(asked).await.expect(200);
    assert_eq!(values(&last(&engine), "expect"), [""; 0]);
}

/// HTTP/1.0 has no informational answers: a client of it takes the first for the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_1_0_gets_no_100() {
    let (_engine, balancer) = stand().await;
    let body = chat("sim");
    let mut client = balancer.client().await;
    let length = body.len();
    let fields = format!("content-type: application/json\r\ncontent-length: {length}");
    client.send(format!("POST {CHAT} HTTP/1.0\r\nexpect: 100-continue\r\n{fields}\r\n\r\n")).await;
    client.send(body).await;
    assert_eq!(client.any_head().await.expect("an answer comes").status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn framing_of_a_request_is_one_and_true() {
    let (engine, balancer) = stand().await;
    let body = chat("sim");
    balancer.ask(post(CHAT, &body)).await.expect(200);
    let arrived = last(&engine);
    assert_eq!(values(&arrived, "content-length"), [body.len().to_string()]);
    assert_eq!(values(&arrived, "transfer-encoding"), [""; 0]);
    let mut client = H2::connect(balancer.address()).await;
    client.ask(h2::post(CHAT), &[body.clone().into()]).await.expect(200);
    let arrived = last(&engine);
    let framing = [values(&arrived, "content-length"), values(&arrived, "transfer-encoding")].concat();
    assert!(framing == ["chunked"] || framing == [body.len().to_string()], "{framing:?}");
}

// === request ids ===

fn id_of(answer: &Answer) -> String {
    let ids: Vec<_> = answer.headers.get_all("x-request-id").iter().collect();
    assert_eq!(ids.len(), 1, "{answer:?}");
    ids[0].to_str().expect("an id is text").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_request_id_goes_through_and_comes_back() {
    let (engine, balancer) = stand().await;
    let mine = ("x-request-id", "my-id-1");
    for body in [chat("sim"), stream("sim", 3)] {
        let answer = balancer.ask(request("POST", CHAT, &[JSON, mine], body.as_bytes())).await.expect(200);
        assert_eq!(id_of(&answer), "my-id-1");
        assert!(answer.text().contains("chatcmpl-my-id-1"));
        assert_eq!(values(&last(&engine), "x-request-id"), ["my-id-1"]);
    }
    for path in ["/no/such/path", "/v1/models"] {
        let answer = balancer.ask(request("GET", path, &[mine], b"")).await;
        assert_eq!(id_of(&answer), "my-id-1", "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_an_id_gets_one() {
    let (_engine, balancer) = stand().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(id_of(&balancer.ask(post(CHAT, chat("sim"))).await.expect(200)));
        ids.push(id_of(&balancer.ask(post("/no/such/path", "{}")).await.expect(404)));
    }
    assert!(
        ids.iter().all(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())),
        "{ids:?}"
    );
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6, "each its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engines_request_id_is_kept() {
    let engine = engine(Options { request_id_headers: true, ..Options::default() }).await;
    let balancer = Balancer::over([&engine]).await;
    let mine = ("x-request-id", "my-id-2");
    let answer = balancer.ask(request("POST", CHAT, &[JSON, mine], chat("sim").as_bytes())).await.expect(200);
    assert_eq!(id_of(&answer), "my-id-2");
    id_of(&balancer.ask(post(CHAT, chat("sim"))).await.expect(200));
}

// === back to the client ===

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_answer_fields_are_not_forwarded() {
    let raw = Raw::start(
        "HTTP/1.1 200 OK\r\nconnection: close, x-mine\r\nkeep-alive: timeout=99\r\nx-mine: no\r\n\
         proxy-connection: close\r\nx-kept: yes\r\nset-cookie: a=b\r\nset-cookie: c=d\r\n\
         content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    )
    .await;
    let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
    let by_http1 = balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    let mut client = H2::connect(balancer.address()).await;
    let by_http2 = client.ask(h2::post(CHAT), &[chat("sim").into()]).await.expect(200);
    for answer in [&by_http1, &by_http2] {
        for name in ["x-mine", "proxy-connection"] {
            assert!(!answer.headers.contains_key(name), "{name}");
        }
        assert_ne!(answer.header("keep-alive"), "timeout=99");
        assert_ne!(answer.header("connection"), "close, x-mine");
        assert_eq!(answer.header("x-kept"), "yes");
        assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
        assert_eq!(&answer.body[..], b"{}");
    }
    assert!(!by_http2.headers.contains_key("connection"), "HTTP/2 has none");
    // One connection ends at the engine, the client's goes on.
    let mut client = balancer.client().await;
    for _ in 0..2 {
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
    }
    assert_eq!(raw.posts().len(), 4);
}

/// An answer with two readings of its length is forwarded to no client.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_http_is_a_bad_gateway() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 20\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}",
        "HTTP/1.1 20x OK\r\n\r\n{}",
        "not HTTP at all\r\n\r\n",
        "",
    ] {
        let raw = Raw::start(answer).await;
        let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
        let refused = balancer.ask(post(CHAT, chat("sim"))).await;
        assert_eq!(refused.status, 502, "{answer:?}: {refused:?}");
        assert_eq!(refused.json()["error"]["code"], 502);
        balancer.until_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_other_kinds_come_through() {
    for (answer, status, body) in [
        ("HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, ""),
        ("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nuntil the end", 200, "until the end"),
        ("HTTP/1.0 200 OK\r\n\r\nold", 200, "old"),
        ("HTTP/1.1 418 I'm a teapot\r\ncontent-length: 3\r\n\r\npot", 418, "pot"),
        ("HTTP/1.1 299 Odd\r\ncontent-length: 3\r\n\r\nodd", 299, "odd"),
        ("HTTP/1.1 301 Moved\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n", 301, ""),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
             3;x=y\r\none\r\n3\r\ntwo\r\n0\r\nx-t: v\r\n\r\n",
            200,
            "onetwo",
        ),
    ] {
        let raw = Raw::start(answer).await;
        let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
        let by_http1 = balancer.ask(post(CHAT, chat("sim"))).await;
        let mut client = H2::connect(balancer.address()).await;
        let by_http2 = client.ask(h2::post(CHAT), &[chat("sim").into()]).await;
        for came in [by_http1, by_http2] {
            assert_eq!((came.status, came.whole, came.text()), (status, true, body), "{answer:?}");
        }
        balancer.until_idle().await;
    }
}
