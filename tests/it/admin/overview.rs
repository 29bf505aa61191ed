//! The overview of the admin API, and the page that shows it.

use serde_json::{Value, json};

use crate::common::wire::{self, Wire};
use crate::common::{Balancer, InjectedFault, Options, admin, config, engine, serving, upstreams};

fn completion(prompt: &str) -> Vec<u8> {
    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 3, "stream": true});
    wire::post("/v1/completions", body.to_string())
}

async fn overview(balancer: &Balancer) -> Value {
    let answer = balancer.admin(wire::get("/admin/overview")).await.expect(200);
    assert_eq!(answer.headers["content-type"], "application/json");
    serde_json::from_slice(&answer.body).expect("the overview is JSON")
}

fn sum(rows: &Value, key: &str) -> u64 {
    rows.as_array().expect("is a list").iter().map(|row| row[key].as_u64().expect("is a number")).sum()
}

#[tokio::test]
async fn the_overview_counts_what_clients_did() {
    let engines = [serving(&["m"]).await, serving(&["m"]).await];
    let balancer = Balancer::over(&engines).await;
    let idle = overview(&balancer).await;
    assert_eq!(idle["totals"]["requests"], 0);
    assert_eq!(idle["totals"]["in_flight"], 0, "the call itself is no request of a client");
    assert_eq!(idle["totals"]["first_byte_ms"], Value::Null, "nothing was measured");
    let prompt = "the same beginning of every prompt ".repeat(40);
    for number in 0..30 {
        balancer.ask(completion(&format!("{prompt}{number}"))).await.expect(200);
    }
    balancer.ask(wire::get("/nowhere")).await.expect(404);
    let busy = overview(&balancer).await;
    let (totals, upstreams) = (&busy["totals"], &busy["upstreams"]);
    assert_eq!(totals["requests"], 31, "{totals}");
    assert_eq!((totals["errors"].as_u64(), totals["rejects"].as_u64()), (Some(0), Some(1)));
    assert_eq!(sum(upstreams, "requests"), 30, "{upstreams}");
    assert_eq!(sum(upstreams, "prompt_tokens"), totals["prompt_tokens"].as_u64().unwrap());
    let times = &totals["first_byte_ms"];
    let [p50, p90, p99] = ["p50", "p90", "p99"].map(|key| times[key].as_f64().expect("was measured"));
    assert!(0.0 < p50 && p50 <= p90 && p90 <= p99, "{times}");
    let model = &busy["models"][0];
    assert_eq!((&model["name"], &model["upstreams"], &model["ready"]), (&json!("m"), &json!(2), &json!(2)));
    assert_eq!((&model["requests"], &model["output_tokens"]), (&json!(30), &totals["output_tokens"]));
    assert!(totals["output_tokens"].as_u64() >= Some(30), "{totals}");
    let decisions = busy["decisions"].as_array().expect("is a list");
    assert_eq!(decisions.len(), 20, "the latest ones");
    assert!(decisions.windows(2).all(|pair| pair[0]["time"].as_f64() >= pair[1]["time"].as_f64()));
    assert_eq!(decisions[0]["candidates"].as_array().map(Vec::len), Some(2));
    assert_eq!(busy["siblings"], json!({"enabled": false, "redis_up": false, "balancers": []}));
    let balancer_row = &busy["balancer"];
    assert_eq!((&balancer_row["ready"], &balancer_row["leaving"]), (&json!(true), &json!(false)));
    balancer.stop().await;
}

/// Regression: the share of hits was one of all prompts, so that engines without usage details looked cold.
#[tokio::test]
async fn hits_are_compared_with_the_prompts_of_answers_that_report_them() {
    let silent = Options { prompt_tokens_details: false, seed: 1, ..Options::default() };
    let engines = [engine(Options::default()).await, engine(silent).await];
    let balancer = Balancer::over(&engines).await;
    let prompts = (0..40).map(|number| format!("{number} begins a prompt of its own ").repeat(60));
    for prompt in prompts {
        let body = json!({"model": "sim", "prompt": prompt, "max_tokens": 3});
        balancer.ask(wire::post("/v1/completions", body.to_string())).await.expect(200);
    }
    balancer.until_idle().await;
    let view = overview(&balancer).await;
    let [reporting, silent] = [0, 1].map(|row| &view["upstreams"][row]);
    let tokens = |row: &Value, key: &str| row[key].as_u64().expect("is a number");
    assert!(tokens(reporting, "prompt_tokens") > 0 && tokens(silent, "prompt_tokens") > 0, "{view}");
    assert_eq!(reporting["compared_tokens"], reporting["prompt_tokens"]);
    assert_eq!(silent["compared_tokens"], 0);
    assert_eq!(view["totals"]["compared_tokens"], reporting["prompt_tokens"]);
    balancer.stop().await;
}

#[tokio::test]
async fn the_overview_shows_failures_and_an_operators_drain() {
    let engines = [serving(&["m"]).await, serving(&["m"]).await];
    let balancer = Balancer::over(&engines).await;
    let names: Vec<String> =
        balancer.running.fleet.snapshot().entries.iter().map(|entry| entry.upstream.name().into()).collect();
    admin(&balancer, "PATCH", &format!("/admin/upstreams/{}", names[0]), json!({"drain": true})).await;
    let row = overview(&balancer).await["upstreams"][0].clone();
    assert_eq!((&row["name"], &row["state"]), (&json!(names[0]), &json!("draining")));
    assert_eq!((&row["drained"], &row["reason"]), (&json!(true), &json!("an operator drains it")));
    let broken = InjectedFault::Status { status: 500, body: "{}".into() };
    engines[1].set_fault(broken).await;
    balancer.ask(completion("a")).await;
    let view = overview(&balancer).await;
    assert_eq!(view["totals"]["errors"], 1, "{view}");
    assert_eq!(view["upstreams"][1]["failures"], 1, "{view}");
    assert_eq!(view["upstreams"][0]["failures"], 0, "{view}");
    balancer.stop().await;
}

#[tokio::test]
async fn the_page_needs_no_token_and_its_data_do() {
    let engine = serving(&["m"]).await;
    let mut config = config(upstreams([&engine]));
    config.admin.token = Some(vllm_lb::config::values::secret("s3cret").expect("is a secret"));
    let balancer = Balancer::ready(config).await;
    let page = balancer.admin(wire::get("/")).await.expect(200);
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    assert!(page.text().starts_with("<!doctype html>"));
    assert!(page.headers.contains_key("content-security-policy"));
    let etag = page.headers["etag"].to_str().expect("is text");
    let again = wire::request("GET", "/", &[("if-none-match", etag)], b"");
    let mut client = Wire::connect(&balancer.running.admin).await;
    let unchanged = client.ask_head(wire::with_host(&again, &balancer.running.admin)).await;
    assert_eq!((unchanged.status, unchanged.headers.get("content-length")), (304, None));
    for path in ["/admin/overview", "/admin/live"] {
        balancer.admin(wire::get(path)).await.expect(401);
        let known = wire::request("GET", path, &[("authorization", "Bearer wrong")], b"");
        balancer.admin(known).await.expect(401);
    }
    let known = wire::request("GET", "/admin/overview", &[("authorization", "Bearer s3cret")], b"");
    balancer.admin(known).await.expect(200);
    for path in ["/", "/admin/overview", "/admin/live"] {
        balancer.ask(wire::get(path)).await.expect(404);
    }
    balancer.stop().await;
}
