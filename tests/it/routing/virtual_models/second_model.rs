//! Bodies that name their model twice: engines take the last, and no route is walked around with it.

use super::*;
use crate::common::eventually;
use crate::common::raw::Raw;

/// What is written behind the peeked part of a body, and in front of a second model.
const PADDING: usize = 300_000;

/// Upstreams of `Raw` serve `sim` alone, and each of these routes sends it there.
const ROUTES: &str = "
  - {model: open, upstreams: ['one:80'], to: sim}
  - {model: sim, upstreams: ['one:80']}
  - {model: held, upstreams: ['two:80'], body: {overrides: {max_tokens: 1}}}";

/// With so little peeked that everything else streams past.
fn peeking(mut config: Config) -> Config {
    config.peek.bytes = 1000;
    config
}

/// A chat that names `sim`, and another model behind so many bytes, under a key that is written so.
fn twice(first: &str, padding: usize, key: &str) -> String {
    let padding = "x".repeat(padding);
    let messages = r#""messages":[{"role":"user","content":"hi"}],"max_tokens":3"#;
    format!(r#"{{"model":"{first}",{messages},"padding":"{padding}","{key}":"held"}}"#)
}

#[track_caller]
fn assert_refused(answer: crate::common::wire::Answer) {
    let error: Value = answer.expect(400).json();
    let expected = json!({
        "message": "The body names its model more than once.",
        "type": "invalid_request_error", "param": "model", "code": 400,
    });
    assert_eq!(error["error"], expected);
}

/// The second model walked around its route: it was never looked up.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_model_behind_the_peek_is_refused_before_an_engine_has_the_body() {
    let raw = Raw::start("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    let mut config = peeking(routed(&[], ROUTES));
    config.upstreams = vec![raw.upstream()];
    config.upstreams[0].name = "one:80".into();
    let balancer = Balancer::ready(config).await;
    for key in ["model", "mod\\u0065l"] {
        let body = twice("sim", PADDING, key);
        assert_refused(balancer.ask(post(CHAT, &body)).await);
        let mut client = balancer.client().await;
        client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
        // The key itself comes in two pieces, when the upstream has all before it.
        let (before, behind) = body.split_at(body.len() - r#"del":"held"}"#.len());
        client.send(chunk(before.as_bytes())).await;
        balancer.until_active(1).await;
        client.send([chunk(behind.as_bytes()), chunk(b"")].concat()).await;
        assert_refused(client.answer().await);
        let mut h2 = H2::connect(balancer.address()).await;
        let pieces: Vec<Bytes> =
            body.as_bytes().chunks(10_000).map(|piece| Bytes::from(piece.to_vec())).collect();
        assert_refused(h2.ask(h2::post(CHAT), &pieces).await);
    }
    balancer.until_idle().await;
    eventually("the uploads have ended", async || (raw.cut_off().len() == 6).then_some(())).await;
    // The upstream's metrics are asked for, too.
    let whole = || raw.posts().len();
    assert_eq!(whole(), 0, "no body was whole");
    let is_before = |body: &Vec<u8>| !body.windows(6).any(|part| part == b"\"held\"");
    assert!(raw.cut_off().iter().all(is_before), "what follows the second key was sent");
    // Once named, the same body goes through.
    let once = twice("sim", PADDING, "other");
    balancer.ask(post(CHAT, once)).await.expect(200);
    assert_eq!((whole(), raw.cut_off().len()), (1, 6));
}

/// A route whose edits need the whole body was chosen by the first model, and the second was sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_model_behind_the_peek_is_refused_where_the_body_is_edited() {
    let engines = [serving(&["sim", "held"]).await, serving(&["held"]).await];
    let balancer = Balancer::ready(peeking(routed(&engines, ROUTES))).await;
    assert_refused(balancer.ask(post(CHAT, twice("open", PADDING, "model"))).await);
    assert!(engines.iter().all(|engine| engine.requests().is_empty()));
    balancer.ask(post(CHAT, twice("open", PADDING, "other"))).await.expect(200);
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_model_within_the_peek_has_its_route() {
    let engines = [serving(&["sim", "held"]).await, serving(&["held"]).await];
    let balancer = Balancer::ready(routed(&engines, ROUTES)).await;
    for key in ["model", "mod\\u0065l"] {
        balancer.ask(post(CHAT, twice("sim", 10, key))).await.expect(200);
        assert_eq!(last_body(&engines[1])["max_tokens"], 1);
    }
    assert!(engines[0].requests().is_empty() && engines[1].requests().len() == 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_model_of_a_form_is_refused_behind_the_peek() {
    let engines = [serving(&["sim", "held"]).await, serving(&["held"]).await];
    let balancer = Balancer::ready(peeking(routed(&engines, ROUTES))).await;
    let path = "/v1/audio/transcriptions";
    let kind = ("content-type", "multipart/form-data; boundary=line");
    let sound = "sound".repeat(PADDING / 5);
    for first in ["sim", "open"] {
        let body = form("line", &[("model", first), ("file", &sound), ("model", "held")]);
        assert_refused(balancer.ask(request("POST", path, &[kind], &body)).await);
        assert!(engines.iter().all(|engine| engine.requests().is_empty()));
    }
    let body = form("line", &[("model", "sim"), ("file", &sound), ("language", "en")]);
    balancer.ask(request("POST", path, &[kind], &body)).await.expect(200);
    balancer.until_idle().await;
}

/// While a request waits for room its rest is read, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_model_is_refused_while_its_request_waits() {
    let engines = [crate::common::paced(std::time::Duration::from_millis(50)).await];
    let mut config = peeking(routed(&engines, ROUTES));
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    let mut running = balancer.client().await;
    running.send(post(CHAT, crate::common::body::stream("sim", 1000))).await;
    // It is active a moment before the engine has it.
    eventually("the engine has it", async || (engines[0].requests().len() == 1).then_some(())).await;
    let mut waiting = balancer.client().await;
    waiting.send(post(CHAT, twice("sim", PADDING, "model"))).await;
    assert_refused(waiting.answer().await);
    assert_eq!(engines[0].requests().len(), 1);
}

/// A form whose parts cannot be followed went on, whatever its route says: without the served name, or past
/// the route.
#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_cannot_be_followed_is_refused_where_routes_are() {
    let engines = [serving(&["sim", "held"]).await, serving(&["held"]).await];
    let balancer = Balancer::ready(routed(&engines, ROUTES)).await;
    let path = "/v1/audio/transcriptions";
    let kind = |boundary: &str| format!("multipart/form-data; {boundary}");
    let whole = |model: &str| form("line", &[("model", model), ("file", "sound")]);
    let cut = |model: &str| whole(model)[..whole(model).len() - "--line--\r\n".len()].to_vec();
    let headers = "x".repeat(40_000);
    let long =
        format!("--line\r\nx-long: {headers}\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\n");
    let long = [long.as_bytes(), b"held\r\n", &whole("sim")].concat();
    for (boundary, body) in [
        ("boundary*=utf-8''line", whole("open")),
        ("boundary=l\u{ef}ne", form("l\u{ef}ne", &[("model", "open"), ("file", "sound")])),
        ("boundary=line", cut("open")),
        ("boundary=line", long),
    ] {
        let kind = kind(boundary);
        let refused =
            balancer.ask(request("POST", path, &[("content-type", &kind)], &body)).await.expect(400);
        let message = "The parts of the form cannot be followed.";
        assert_eq!(refused.json()["error"]["message"], message, "{boundary}");
    }
    assert!(engines.iter().all(|engine| engine.requests().is_empty()));
    // Whatever is no form of several parts, or needs no edit, is for the engine to refuse.
    for (kind, body) in [("text/plain".to_string(), whole("open")), (kind("boundary=line"), cut("sim"))] {
        balancer.ask(request("POST", path, &[("content-type", &kind)], &body)).await;
    }
    assert_eq!(engines.iter().map(|engine| engine.requests().len()).sum::<usize>(), 2);
    let before = engines[0].requests().len();
    let balancer = Balancer::over(&engines[..1]).await;
    let kind = kind("boundary*=utf-8''line");
    balancer.ask(request("POST", path, &[("content-type", &kind)], &whole("sim"))).await;
    assert_eq!(engines[0].requests().len(), before + 1, "without routes it goes on");
}

/// Engines read the second field of each of these forms, which the balancer took for something else: a route
/// of the first was applied.
#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_engines_read_differently_is_refused_where_routes_are() {
    let engines = [serving(&["sim", "held"]).await, serving(&["held"]).await];
    let path = "/v1/audio/transcriptions";
    let type_of = |boundary: &str| format!("multipart/form-data; {boundary}");
    let line = type_of("boundary=line");
    let whole = |sound: &str| form("line", &[("model", "sim"), ("file", sound)]);
    let second = |sound: &str, part: &str| {
        let first = whole(sound);
        let first = &first[..first.len() - "--line--\r\n".len()];
        [first, part.as_bytes(), b"\r\n\r\nheld\r\n--line--\r\n"].concat()
    };
    let named = "form-data; name=\"model\"";
    let parts = [
        format!("--line \r\ncontent-disposition: {named}"),
        format!("--line\r\ncontent-disposition: {named}; x=\"a\\\\\"; filename=\"b\""),
        "--line\r\ncontent-disposition: form-data; x=\\\"; name=\"model\"; y=\";filename=z\"".into(),
        "--line\r\ncontent-disposition: form-data; name*=utf-8''model".into(),
        "--line\r\ncontent-disposition: form-data; name=<model>".into(),
    ];
    let long = "sound".repeat(PADDING / 5);
    // Within the peek, and behind it.
    let seconds = parts.iter().flat_map(|part| [second("sound", part), second(&long, part)]);
    let mut cases: Vec<_> = seconds.map(|body| (line.clone(), body)).collect();
    for before in ["\n", "\r", "\r\n"] {
        cases.push((line.clone(), [before.as_bytes(), &whole("sound")].concat()));
    }
    cases.push((type_of("boundary=line; boundary*=utf-8''other"), whole("sound")));
    cases.push((type_of("boundary=<line>"), form("<line>", &[("model", "sim"), ("file", "sound")])));
    let balancer = Balancer::ready(peeking(routed(&engines, ROUTES))).await;
    for (kind, body) in &cases {
        let answer = balancer.ask(request("POST", path, &[("content-type", kind)], body)).await;
        let message = answer.expect(400).json()["error"]["message"].clone();
        assert_eq!(message, "The parts of the form cannot be followed.", "{}", String::from_utf8_lossy(body));
    }
    assert!(engines.iter().all(|engine| engine.requests().is_empty()));
    let file = "--line\r\ncontent-disposition: form-data; name=\"other\"; filename*=utf-8''%C3%BC.wav";
    let body = second(&long, file);
    balancer.ask(request("POST", path, &[("content-type", &line)], &body)).await.expect(200);
    balancer.until_idle().await;
    let before = engines[0].requests().len();
    let balancer = Balancer::over(&engines[..1]).await;
    let (kind, body) = &cases[0];
    balancer.ask(request("POST", path, &[("content-type", kind)], body)).await.expect(200);
    assert_eq!(engines[0].requests().len(), before + 1, "without routes it goes on");
}
