//! The choices for one request, and calls that name parameters which do not exist.

use serde_json::{Value, json};
use vllm_lb::config::check::check;

use crate::common::body::chat;
use crate::common::wire::{Answer, JSON, get, request};
use crate::common::{Balancer, InjectedFault, admin, config, engines, upstreams};

const CHAT: &str = "/v1/chat/completions";

async fn call(balancer: &Balancer, query: &str) -> Answer {
    balancer.admin(get(&format!("/admin/decisions{query}"))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_choices_for_one_request_are_found_by_its_id() {
    let engines = engines(2).await;
    let mut config = config(upstreams(&engines));
    config.upstreams[0].weight = 1000.0;
    config.upstreams[1].weight = 0.001;
    let balancer = Balancer::ready(config).await;
    let long = "i".repeat(200);
    let ask = async |id: &str| {
        let headers = [JSON, ("x-request-id", id)];
        balancer.ask(request("POST", CHAT, &headers, chat("sim").as_bytes())).await.expect(200)
    };
    for id in ["first", "a b/&=", &long] {
        ask(id).await;
    }
    engines[0].set_fault(InjectedFault::Status { status: 502, body: "{}".into() }).await;
    ask("second").await;

    let all = call(&balancer, "").await.expect(200).json();
    let attempts: Vec<_> = all.as_array().expect("is a list").iter().map(|row| &row["attempt"]).collect();
    assert_eq!(attempts, [2, 1, 1, 1, 1], "{all}");
    assert_eq!(call(&balancer, "?id=second").await.expect(200).json(), json!([all[0], all[1]]));
    assert_eq!(call(&balancer, "?limit=1&id=%73econd").await.expect(200).json(), json!([all[0]]));
    assert_eq!(call(&balancer, &format!("?id={long}")).await.expect(200).json(), json!([all[2]]));
    assert_eq!(call(&balancer, "?id=a%20b/%26=").await.expect(200).json(), json!([all[3]]));
    assert_eq!(call(&balancer, "?id=first&limit=256").await.expect(200).json(), json!([all[4]]));
    assert_eq!(call(&balancer, "?id=sec").await.expect(200).json(), json!([]));
}

/// A choice named the engine's model alone: the client's word for it led nowhere. A request without a model
/// has the only one.
#[tokio::test(flavor = "multi_thread")]
async fn a_choice_names_the_route_and_the_clients_model() {
    let engines = engines(1).await;
    let mut config = config(upstreams(&engines));
    let written = "upstreams: [http://a]\nroutes: [{model: fast, to: sim}, {path: /v1/completions}]";
    config.routes = check(written, &|_| None).expect("a right configuration").routes;
    let balancer = Balancer::ready(config).await;
    for (path, body) in [
        (CHAT, chat("fast")),
        (CHAT, chat("sim")),
        ("/v1/completions", r#"{"model":"sim","prompt":"a","max_tokens":1}"#.to_string()),
        ("/v1/completions", r#"{"prompt":"a","max_tokens":1}"#.to_string()),
    ] {
        balancer.ask(request("POST", path, &[JSON], body.as_bytes())).await.expect(200);
    }
    let all = call(&balancer, "").await.expect(200).json();
    let rows = all.as_array().expect("is a list").iter().rev();
    let names: Vec<Value> =
        rows.map(|row| json!([row["client_model"], row["route"], row["model"]])).collect();
    assert_eq!(
        names,
        [
            json!(["fast", "fast", "sim"]),
            json!(["sim", null, "sim"]),
            json!(["sim", "/v1/completions", "sim"]),
            json!(["sim", "/v1/completions", "sim"]),
        ]
    );
}

/// A parameter that does not exist was ignored, and the answer had other requests.
#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_do_not_exist_are_refused() {
    let engines = engines(1).await;
    let balancer = Balancer::over(&engines).await;
    for query in ["?ids=a", "?request=a&limit=1", "?id=a&Limit=1", "?="] {
        let error = call(&balancer, query).await.expect(400).text().to_string();
        assert!(error.contains("known are id, limit"), "{query}: {error}");
    }
    for (query, wanted) in [("?id=", "id: "), ("?limit=2&id=%zz", "the id "), ("?id=a&limit=0", "limit: ")] {
        let error = call(&balancer, query).await.expect(400).text().to_string();
        assert!(error.contains(wanted), "{query}: {error}");
    }
    let error = admin(&balancer, "GET", "/admin/usage?sesion=a", Value::Null).await.expect(400);
    assert!(error.text().contains("known are session, limit"), "{}", error.text());
}
