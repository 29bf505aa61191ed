//! What the names of routes stand for, when that depends on what the upstreams serve: the only model, the
//! card of the upstream that would receive the request, and nothing where no upstream would.

use super::*;
use crate::common::model_server::{ModelServer, document};
use crate::common::names;
use crate::common::wire::upgrade;
use vllm_lb::fleet::FleetChange;

async fn with(models: &[&str], loras: &[&str], max_model_len: usize) -> EngineServer {
    engine(Options { models: names(models), loras: names(loras), max_model_len, ..Options::default() }).await
}

/// Over model servers, each of which has one of these engines.
async fn discovering(
    engines: &[EngineServer],
    routes: impl Fn(&[String]) -> String,
) -> (Balancer, Vec<ModelServer>) {
    let mut servers = Vec::new();
    for engine in engines {
        let mut said = document([engine]);
        said["model"] = Value::Null;
        servers.push(ModelServer::start(said).await);
    }
    let names: Vec<String> = servers.iter().map(|server| format!("gym http://{}", server.address)).collect();
    let sources: Vec<String> = names.iter().map(|name| format!("gym: {}", &name[4..])).collect();
    let text = format!("upstreams: [{{{}}}]\nroutes:\n{}", sources.join("}, {"), routes(&names));
    let mut config = config(Vec::new());
    config.routes = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes;
    config.sources = servers.iter().map(ModelServer::source).collect();
    let balancer = Balancer::start(config).await;
    balancer.until_ready(engines.len()).await;
    (balancer, servers)
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

/// It was 404 without a `to` in the file.
#[tokio::test(flavor = "multi_thread")]
async fn a_route_without_to_uses_the_only_base_model() {
    let engines = [with(&["base"], &["lora"], 9_000).await, with(&["base"], &[], 8_000).await];
    let routes = "
  - {model: face, body: {defaults: {max_tokens: 3}}}";
    let (balancer, _servers) = discovering(&engines, |_| routes.into()).await;
    let got = || engines.iter().flat_map(EngineServer::requests).collect::<Vec<_>>();
    let answer = balancer.ask(post(CHAT, json!({"model": "face", "messages": []}).to_string())).await;
    assert_eq!(answer.expect(200).json()["model"], "face");
    let sent: Value = serde_json::from_slice(&got()[0].body).expect("JSON");
    assert_eq!(sent, json!({"model": "base", "messages": [], "max_tokens": 3}));
    let events = balancer.ask(post(CHAT, crate::common::body::stream("face", 2))).await.expect(200);
    assert!(events.text().contains(r#""model":"face""#) && !events.text().contains("base"));
    let wrong = balancer.ask(post(CHAT, json!({"model": "face", "messages": 1}).to_string())).await;
    assert!(!wrong.expect(400).text().contains("base"));

    let kind = ("content-type", "multipart/form-data; boundary=cut");
    let body = |model| form("cut", &[("model", model), ("file", "RIFF")]);
    balancer.ask(request("POST", "/v1/audio/transcriptions", &[kind], &body("face"))).await;
    assert!(got().iter().any(|one| one.body == body("base")), "in a form, too");

    let mut client = balancer.client().await;
    client.send(upgrade("/v1/realtime?model=face")).await;
    assert_eq!(client.head().await.status, 101);
    assert!(got().iter().any(|one| one.path == "/v1/realtime?model=base"), "in a query, too");
    drop(client);

    let kept = json!({"model": "face", "input": "hi"}).to_string();
    let made: Value = balancer.ask(post("/v1/responses", kept)).await.expect(200).json();
    let path = format!("/v1/responses/{}", made["id"].as_str().expect("an id"));
    let again: Value = balancer.ask(get(&path)).await.expect(200).json();
    assert_eq!((&made["model"], &again["model"]), (&json!("face"), &json!("face")));

    assert_eq!(listed(&balancer).await, rows(&[("face", 8_000), ("base", 8_000), ("lora", 0)]));
    let refused = balancer.ask(post(CHAT, chat("nobody"))).await.expect(404);
    assert_eq!(aliases(refused.text()), "face, base, lora");
    eventually("what it took is counted for the served model and the route", async || {
        let page = balancer.admin(get("/metrics")).await.expect(200);
        let counted = |line: &str| line.contains(r#"model="base""#) && line.contains(r#"route="face""#);
        page.text().lines().any(counted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_base_models_are_ambiguous() {
    let engines =
        [serving(&["one"]).await, with(&["two"], &["lora"], 100).await, serving(&["three", "four"]).await];
    let routes = |names: &[String]| {
        let [_, two, three] = names else { panic!("there are three") };
        format!(
            "
  - {{model: any}}
  - {{model: second, upstreams: ['{two}']}}
  - {{model: third, upstreams: ['{three}']}}
  - {{model: lora, upstreams: ['{two}'], body: {{defaults: {{max_tokens: 1}}}}}}
  - {{model: 'like-*', upstreams: ['{two}']}}
  - {{path: /v1/completions, upstreams: ['{two}']}}"
        )
    };
    let (balancer, _servers) = discovering(&engines, routes).await;
    for model in ["any", "third", "like-that"] {
        let refused = balancer.ask(post(CHAT, chat(model))).await.expect(404);
        assert!(refused.text().contains(&format!("The model `{model}` does not exist")));
        let mut offered: Vec<&str> = aliases(refused.text()).split(", ").collect();
        offered.sort_unstable();
        assert_eq!(offered, ["four", "lora", "one", "second", "three", "two"]);
    }
    let answer: Value = balancer.ask(post(CHAT, chat("second"))).await.expect(200).json();
    assert_eq!((&answer["model"], &last_body(&engines[1])["model"]), (&json!("second"), &json!("two")));
    balancer.ask(post(CHAT, chat("lora"))).await.expect(200);
    assert_eq!(last_body(&engines[1])["model"], "lora", "a name that is served is kept");
    let other = json!({"model": "other", "prompt": "hi"}).to_string();
    balancer.ask(post("/v1/completions", other)).await.expect(404);
    let listed = listed(&balancer).await;
    assert!(rows(&[("second", 100), ("two", 100), ("lora", 0)]).iter().all(|row| listed.contains(row)));
}

/// A request for a model whose upstream was away, or had been taken out, was answered by another model under
/// its name.
#[tokio::test(flavor = "multi_thread")]
async fn no_other_model_substitutes_an_absent_one() {
    let engines = [serving(&["small"]).await, serving(&["big"]).await];
    engines[1].set_fault(InjectedFault::Refuse).await;
    let routes = "
  - {model: big, timeouts: {total: 600s}}
  - {model: lora, body: {defaults: {max_tokens: 1}}}";
    let balancer = Balancer::start(routed(&engines, routes)).await;
    balancer.until_ready(1).await;
    for model in ["big", "lora"] {
        let refused = balancer.ask(post(CHAT, chat(model))).await;
        assert!(refused.status == 503 || refused.status == 404, "{refused:?}");
    }
    engines[1].clear_fault().await;
    balancer.until_ready(2).await;
    let answer = balancer.ask(post(CHAT, chat("big"))).await.expect(200);
    assert_eq!(last_body(&engines[1])["model"], answer.json()["model"]);
    let name = balancer.running.fleet.snapshot().entries[1].upstream.name().to_string();
    balancer.running.fleet.apply(vec![FleetChange::Remove { name, force: false }]).await.expect("it goes");
    let refused = balancer.ask(post(CHAT, chat("big"))).await.expect(404);
    assert_eq!(aliases(refused.text()), "small");
    assert!(engines[0].requests().iter().all(|one| one.path != CHAT), "it was never asked");
}

/// Cards were shown, and names offered, of upstreams to which the route never leads: asked for, they were
/// 503.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_card_comes_from_the_routes_upstreams() {
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
    // The route wins over upstreams that serve a model of the name.
    engines[2].set_fault(InjectedFault::Refuse).await;
    balancer.until_ready(2).await;
    assert_eq!(listed(&balancer).await, rows(&[("vb", 2_000), ("part", 2_000), ("big", 1_000)]));
    balancer.ask(post(CHAT, chat("other"))).await.expect(503);
}
