//! What the names of routes stand for, when that depends on what the upstreams serve: the card of who
//! would have the request, and nothing where nobody would.

use super::*;
use common::names;

async fn with(models: &[&str], loras: &[&str], max_model_len: usize) -> Engine {
    engine(Options { models: names(models), loras: names(loras), max_model_len, ..Options::default() }).await
}

/// Names and lengths of the list.
async fn listed(balancer: &Balancer) -> Vec<(String, u64)> {
    let list: Value = balancer.ask(get("/v1/models")).await.expect(200).json();
    let card = |card: &Value| {
        (card["id"].as_str().unwrap_or("").to_string(), card["max_model_len"].as_u64().unwrap_or(0))
    };
    list["data"].as_array().expect("a list").iter().map(card).collect()
}

fn rows(rows: &[(&str, u64)]) -> Vec<(String, u64)> {
    rows.iter().map(|(name, length)| ((*name).to_string(), *length)).collect()
}

/// The names that a refusal tells.
fn aliases(refusal: &str) -> &str {
    let names = refusal.split("Valid aliases: ").nth(1).unwrap_or_default();
    names.split(".\"").next().unwrap_or_default()
}

/// Cards were shown, and names offered, of upstreams to which the route never leads: asked for, they were
/// 503.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_has_the_card_of_who_would_have_its_requests() {
    let engines = [
        with(&["big"], &[], 1_000).await,
        with(&["big", "other"], &[], 2_000).await,
        serving(&["sim"]).await,
    ];
    let routes = "
  - {model: other, to: sim}
  - {model: vb, to: big, upstreams: ['two:80']}
  - {model: vother, to: other, upstreams: ['one:80']}
  - {model: part, path: /v1/completions, to: big, upstreams: ['two:80']}
  - {model: part, to: sim}";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let all = [("other", 32_768), ("vb", 2_000), ("part", 32_768), ("big", 1_000), ("sim", 32_768)];
    assert_eq!(listed(&balancer).await, rows(&all));
    let refused = balancer.ask(post(CHAT, chat("vother"))).await.expect(404);
    assert!(!refused.headers.contains_key("retry-after"));
    assert_eq!(aliases(refused.text()), "other, vb, part, big, sim");
    balancer.ask(post(CHAT, chat("other"))).await.expect(200);
    assert_eq!(last_body(&engines[2])["model"], "sim");
    // Its route goes before those who serve the name.
    engines[2].set_fault(Fault::Refuse).await;
    balancer.until_ready(2).await;
    assert_eq!(listed(&balancer).await, rows(&[("vb", 2_000), ("part", 2_000), ("big", 1_000)]));
    balancer.ask(post(CHAT, chat("other"))).await.expect(503);
}
