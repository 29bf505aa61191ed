//! One test a bug that was found in the running balancer, named for what went wrong.

use std::time::Duration;

use crate::common::body::{Place, chat, padded, stream};
use crate::common::raw::Raw;
use crate::common::wire::{JSON, get, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, Options, config, engine, engines, serving, upstream, upstreams,
};
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::Breaker;
use vllm_lb::fleet::{FleetChange, UpstreamState};

const CHAT: &str = "/v1/chat/completions";

/// What Java's HTTP client sends with every request on a plain connection.
const OFFER: [(&str, &str); 3] =
    [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABkAAQAAP__")];

fn offering(body: &[u8]) -> Vec<u8> {
    request("POST", CHAT, &[[JSON].as_slice(), OFFER.as_slice()].concat(), body)
}

/// Two engines, the first of which gets every request first.
async fn two() -> (Vec<EngineServer>, vllm_lb::config::types::Config) {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    (engines, config)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_h2c_offer_bypassed_model_retry_and_limit() {
    let models = [serving(&["one"]).await, serving(&["two"]).await];
    let balancer = Balancer::over(&models).await;
    for model in ["one", "two", "one", "two"] {
        balancer.ask(offering(chat(model).as_bytes())).await.expect(200);
    }
    let (engines, mut config) = two().await;
    config.peek.max_body = 1 << 20;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::Status { status: 503, body: "{}".into() }).await;
    balancer.ask(offering(chat("sim").as_bytes())).await.expect(200);
    balancer.ask(offering(&padded(2 << 20, "sim", Place::First))).await.expect(413);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_expect_was_not_retried() {
    let (engines, config) = two().await;
    let balancer = Balancer::ready(config).await;
    engines[0].set_fault(InjectedFault::Status { status: 502, body: "{}".into() }).await;
    let body = chat("sim");
    let length = body.len().to_string();
    let mut client = balancer.client().await;
    client.send(head("POST", CHAT, &[JSON, ("content-length", &length), ("expect", "100-continue")])).await;
    assert_eq!(client.any_head().await.expect("leave comes").status, 100);
    client.send(&body).await;
    client.answer().await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_on_pooled_connections_were_not_counted() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.retry.attempts = 0;
    let balancer = Balancer::ready(config).await;
    for _ in 0..6 {
        // A good answer leaves a connection in the pool, on which the next stream then breaks.
        balancer.ask(post(CHAT, chat("sim"))).await;
        engine.set_fault_for(1, InjectedFault::CutStream { events: 3, reset: false }).await;
        balancer.ask(post(CHAT, stream("sim", 20))).await;
    }
    let failed = balancer.metric("vllm_lb_attempt_failures_total").await;
    assert!(failed >= 5.0, "{failed} failures were counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_timed_out_in_the_queue_got_no_answer() {
    // It is full, and is left alone for much longer than requests may take.
    let full = Raw::start("HTTP/1.1 503 X\r\nretry-after: 60\r\ncontent-length: 2\r\n\r\n{}").await;
    let mut config = config(vec![full.upstream()]);
    config.timeouts.total = Some(Duration::from_millis(300));
    let balancer = Balancer::ready(config).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    let late = balancer.ask(post(CHAT, chat("sim"))).await.expect(504);
    assert_eq!(late.json()["error"]["type"], "Gateway Timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_left_the_queue_during_its_upload_kept_its_slot() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].max_active = Some(1);
    let balancer = Balancer::ready(config).await;
    engine.set_fault(InjectedFault::StallHeaders).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("sim"))).await;
    balancer.until_active(1).await;
    let body = padded(4 << 20, "sim", Place::First);
    let length = body.len().to_string();
    let mut leaving = balancer.client().await;
    leaving.send(head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
    leaving.send(&body[..3 << 20]).await;
    balancer.until_metric("vllm_lb_queued", 1.0).await;
    drop(leaving);
    balancer.until_metric("vllm_lb_queued", 0.0).await;
    drop(first);
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_length_alone_reserved_memory() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.peek.memory = 4 << 20;
    config.peek.max_body = 4 << 20;
    let balancer = Balancer::ready(config).await;
    let mut idle = Vec::new();
    for _ in 0..8 {
        let mut client = balancer.client().await;
        client.send(head("POST", CHAT, &[JSON, ("content-length", "2097152")])).await;
        client.send(b"{").await;
        idle.push(client);
    }
    balancer.until_metric("vllm_lb_peeked_bytes", 8.0 * 1024.0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_errors_without_a_body_never_tripped() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    engine.set_fault(InjectedFault::Status { status: 500, body: String::new() }).await;
    for _ in 0..5 {
        balancer.ask(post(CHAT, chat("sim"))).await;
    }
    let fleet = &balancer.running.fleet;
    crate::common::eventually("it is tripped", async || {
        (fleet.snapshot().entries[0].state() == UpstreamState::Tripped).then_some(())
    })
    .await;
}

/// It had counted as a good answer, whatever it said: now by its code, the client's own faults not against
/// the upstream.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_an_error_event_counted_as_ok() {
    let text =
        r#"{"choices":[{"index":0,"delta":{"content":"an \"error\""},"finish_reason":null}],"error":null}"#;
    let code = |code: u16| format!(r#"{{"error":{{"message":"x","type":"y","param":null,"code":{code}}}}}"#);
    let (messages, responses) = ("/v1/messages", "/v1/responses");
    let delta = r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"a"}}"#;
    let internal = r#"{"type":"error","error":{"type":"internal_error","message":"x"}}"#;
    let written = r#"{"type":"response.output_text.delta","delta":"a"}"#;
    let failed = r#"{"response":{"status":"failed"},"sequence_number":9,"type":"response.failed"}"#;
    for (path, events, outcome, trips) in [
        (CHAT, [text, text], "ok", false),
        (CHAT, [text, &code(400)], "client_error", false),
        (CHAT, [&code(400), text], "client_error", false),
        // Whose fault it is is not said.
        (messages, [delta, internal], "server_error", false),
        (responses, [written, failed], "server_error", false),
        (CHAT, [text, &code(500)], "server_error", true),
    ] {
        let stream: String = events.map(|event| format!("event: x\ndata: {event}\n\n")).concat();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length";
        let raw = Raw::start(&format!("{head}: {}\r\n\r\n{stream}", stream.len())).await;
        let balancer = Balancer::ready(config(vec![raw.upstream()])).await;
        let body =
            r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"hi"}],"input":"hi"}"#;
        let enough = Breaker::default().failures;
        for _ in 0..enough {
            let answer = balancer.ask(post(path, body)).await.expect(200);
            assert_eq!(answer.text(), stream, "{path} {outcome}");
        }
        balancer.until_idle().await;
        let counted = |page: &str| {
            let mut lines = page.lines().filter(|line| line.starts_with("vllm_lb_requests_total"));
            let line = lines.find(|line| line.contains(&format!("upstream=\"{}\"", raw.address())));
            line.is_some_and(|line| line.contains(outcome) && line.ends_with(&format!(" {enough}")))
        };
        let mut page = String::new();
        crate::common::eventually(&format!("{path} is {outcome}"), async || {
            page = balancer.admin(get("/metrics")).await.expect(200).text().to_string();
            counted(&page).then_some(())
        })
        .await;
        if trips {
            let fleet = &balancer.running.fleet;
            crate::common::eventually("it is tripped", async || {
                (fleet.snapshot().entries[0].state() == UpstreamState::Tripped).then_some(())
            })
            .await;
            // Of all balancers of the process.
            page = balancer.admin(get("/metrics")).await.expect(200).text().to_string();
            let changes = page.lines().filter(|line| line.starts_with("vllm_lb_upstream_changes_total"));
            let tripped = changes.filter(|line| line.contains(r#"state="tripped""#));
            assert_eq!(tripped.count(), 1, "{page}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_http_1_0_got_chunks() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let body = stream("sim", 3);
    let mut client = balancer.client().await;
    let length = body.len();
    let head = format!("POST {CHAT} HTTP/1.0\r\nhost: a\r\ncontent-type: application/json");
    client.send(format!("{head}\r\ncontent-length: {length}\r\n\r\n{body}")).await;
    let all = String::from_utf8(client.rest().await.to_vec()).expect("text");
    let (head, body) = all.split_once("\r\n\r\n").expect("a head");
    assert!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{head}");
    assert!(body.starts_with("data: {") && body.ends_with("data: [DONE]\n\n"), "{body}");
}

/// The session's bonus was weighed by no knob: where nothing else costs anything, it decided alone.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_pinned_under_round_robin() {
    use vllm_lb::config::types::Preset;
    for preset in [Preset::RoundRobin, Preset::LeastRequests] {
        let engines = engines(2).await;
        let mut config = config(upstreams(&engines));
        config.balance = preset.balance();
        let balancer = Balancer::ready(config).await;
        let body = r#"{"model":"sim","user":"app","messages":[{"role":"user","content":"hi"}]}"#;
        for _ in 0..40 {
            balancer.ask(post(CHAT, body)).await.expect(200);
            balancer.until_idle().await;
        }
        let got: Vec<usize> = engines.iter().map(|engine| engine.requests().len()).collect();
        assert!(got.iter().all(|got| *got >= 5), "{preset:?}: {got:?}");
    }
}

/// A prompt that was answered as an overflow was believed to be held, though the engine had refused it.
#[tokio::test(flavor = "multi_thread")]
async fn an_overflowing_prompt_was_indexed() {
    let engines = [engine(Options { max_model_len: 64, ..Options::default() }).await];
    let mut config = config(upstreams(&engines));
    let text = "routes: [{model: long, to: sim, overflow: length}]\nupstreams: [http://a]";
    config.routes = vllm_lb::config::check::check(text, &|_| None).expect("is right").routes;
    let balancer = Balancer::ready(config).await;
    let words = "word ".repeat(2000);
    let body = format!(r#"{{"model":"long","messages":[{{"role":"user","content":"{words}"}}]}}"#);
    balancer.ask(post(CHAT, body)).await.expect(200);
    balancer.until_idle().await;
    assert_eq!(balancer.metric("vllm_lb_index_pairs").await, 0.0);
}

/// So was one that a stream refused in its first event.
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_rejected_in_a_stream_was_indexed() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let words = "word ".repeat(2000);
    let body =
        format!(r#"{{"model":"sim","stream":true,"messages":[{{"role":"user","content":"{words}"}}]}}"#);
    engine.set_fault_for(1, InjectedFault::ErrorEvent { status: 400 }).await;
    for (outcome, held) in [("client_error", false), ("ok", true)] {
        balancer.ask(post(CHAT, &body)).await.expect(200);
        balancer.until_recorded().await;
        let page = balancer.admin(get("/metrics")).await.expect(200);
        assert!(page.text().contains(&format!("outcome=\"{outcome}\"")), "{}", page.text());
        assert_eq!(balancer.metric("vllm_lb_index_pairs").await > 0.0, held, "{outcome}");
    }
}

/// An upstream that is the balancer itself, or one that leads back to it, took every connection there was.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_loop_is_refused() {
    let engines = engines(1).await;
    let first = Balancer::over(&engines).await;
    let back = Balancer::ready(config(vec![upstream(&format!("http://{}", first.address()))])).await;
    // The first now has the second for an upstream, which has it.
    let url = format!("http://{}", back.address());
    first.running.fleet.apply(vec![FleetChange::Upsert(upstream(&url))]).await.unwrap();
    first.until_ready(2).await;
    let mut drain = upstreams(&engines);
    let name = drain.remove(0).name;
    first.running.fleet.apply(vec![FleetChange::Drain { name, drain: true }]).await.unwrap();
    for balancer in [&first, &back] {
        let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(508);
        assert!(
            answer.json()["error"]["message"].as_str().unwrap().contains("came back"),
            "{}",
            answer.text()
        );
    }
    first.until_idle().await;
    // Two in a row are none.
    first
        .running
        .fleet
        .apply(vec![FleetChange::Remove { name: back.address().into(), force: true }])
        .await
        .unwrap();
    let name = crate::common::direct(&engines[0]);
    first.running.fleet.apply(vec![FleetChange::Drain { name, drain: false }]).await.unwrap();
    first.until_ready(1).await;
    back.ask(post(CHAT, chat("sim"))).await.expect(200);
    let via = engines[0].requests().pop().unwrap().header("via").map(str::to_string).unwrap_or_default();
    assert!(via.starts_with("1.1 vllm-lb-"), "{via}");
}

/// Anthropic's clients have their key in a field of its own, which went to upstreams that have another.
#[tokio::test(flavor = "multi_thread")]
async fn the_clients_key_was_forwarded_beside_the_upstreams() {
    let engines = engines(1).await;
    let mut keyed = config(upstreams(&engines));
    keyed.upstreams[0].api_key = Some(Secret::new("its own"));
    let mine = [JSON, ("x-api-key", "mine"), ("authorization", "Bearer mine")];
    let ask = request("POST", CHAT, &mine, chat("sim").as_bytes());
    let plain = config(upstreams(&engines));
    for (config, wanted) in [(keyed, ("Bearer its own", None)), (plain, ("Bearer mine", Some("mine")))] {
        let balancer = Balancer::ready(config).await;
        balancer.ask(&ask).await.expect(200);
        let got = engines[0].requests().pop().unwrap();
        assert_eq!((got.header("authorization"), got.header("x-api-key")), (Some(wanted.0), wanted.1));
    }
}
