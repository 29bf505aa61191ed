//! What trainers rely on: token ids on every answer, or an error that says why there are none.

use crate::common::raw::Raw;
use crate::common::wire::{get, post};
use crate::common::{Balancer, config};
use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{Config, RouteConfig};
use vllm_lb::fleet::SnapshotEntry;

const CHAT: &str = "/v1/chat/completions";
const RESPONSES: &str = "/v1/responses";

fn routes(written: &str) -> Vec<RouteConfig> {
    let text = format!("upstreams: [http://a]\nroutes: [{written}]");
    check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

/// A whole answer with this body.
fn answer(kind: &str, body: &str) -> String {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}", body.len());
    format!("{head}\r\n\r\n{body}")
}

/// It was a 200 without ids, which a trainer learns nothing from.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_token_ids_is_refused_and_blamed_on_no_upstream() {
    let message = json!({"role": "assistant", "content": "wo"});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    let chat = answer("application/json", &json!({"model": "sim", "choices": [choice]}).to_string());
    let raws = [Raw::start(&chat).await, Raw::start(&chat).await];
    let routes = routes("{model: fast, to: sim, responses: chat, token_ids: true}");
    let mut config = Config { routes, ..config(raws.iter().map(Raw::upstream).collect()) };
    config.breaker.failures = 1;
    let balancer = Balancer::ready(config).await;
    let requests = [
        post(CHAT, r#"{"model":"fast","messages":[{"role":"user","content":"hi"}]}"#),
        post(RESPONSES, r#"{"model":"fast","input":"hi"}"#),
    ];
    for (asked, request) in requests.iter().enumerate() {
        let refused = balancer.ask(request).await.expect(500);
        assert_eq!(refused.header("x-should-retry"), "false");
        let error = &refused.json()["error"];
        assert_eq!((&error["code"], &error["param"]), (&json!(500), &Value::Null));
        assert!(error["message"].as_str().unwrap().contains("`return_token_ids: true`"), "{error}");
        let heads = raws.iter().flat_map(Raw::heads);
        assert_eq!(heads.filter(|head| head.starts_with("POST ")).count(), asked + 1, "each was tried once");
    }
    balancer.until_idle().await;
    let snapshot = balancer.running.fleet.snapshot();
    assert!(snapshot.entries.iter().all(SnapshotEntry::is_ready), "no upstream is to blame");
}

/// The trace was that of an answer which no client has received.
#[tokio::test(flavor = "multi_thread")]
async fn the_trace_of_an_untranslatable_answer_has_its_error() {
    let message = json!({"role": "assistant", "content": "wo"});
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"});
    let chat = answer("application/json", &json!({"model": "sim", "choices": [choice]}).to_string());
    let none = answer("application/json", "[]");
    for (raws, routed, expected) in [
        (vec![chat.clone()], "{model: fast, to: sim, responses: chat, token_ids: true}", (500, 0)),
        (vec![none, chat], "{model: fast, to: sim, responses: chat}", (200, 1)),
    ] {
        let mut upstreams = Vec::new();
        for raw in &raws {
            upstreams.push(Raw::start(raw).await);
        }
        let config =
            Config { routes: routes(routed), ..config(upstreams.iter().map(Raw::upstream).collect()) };
        let balancer = Balancer::ready(config).await;
        for turn in 0..4 {
            let request = post(&format!("/sessions/s{turn}{RESPONSES}"), r#"{"model":"fast","input":"hi"}"#);
            balancer.ask(request).await.expect(expected.0);
            balancer.admin(post("/admin/flush", "")).await.expect(200);
            let found = balancer.admin(get(&format!("/sessions/s{turn}/traces"))).await.expect(200).json();
            let found = &found.as_array().expect("a list")[0];
            assert_eq!(found["status"], json!(expected.0), "{found}");
            assert_eq!(found["error"].is_null(), expected.0 == 200, "{found}");
            if expected.1 > 0 {
                assert_eq!(found["response_message"]["content"], "wo", "{found}");
            }
        }
    }
}
