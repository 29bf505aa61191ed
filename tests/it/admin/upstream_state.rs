//! The state of an upstream, which all calls of the admin API show in the same words.

use serde_json::{Value, json};

use crate::common::body::chat;
use crate::common::wire::{get, post};
use crate::common::{Balancer, Options, admin, config, direct, engine, engines, eventually, upstreams};

async fn rows(balancer: &Balancer) -> [Vec<Value>; 2] {
    let list = balancer.admin(get("/admin/upstreams")).await.expect(200).json();
    let overview = balancer.admin(get("/admin/overview")).await.expect(200).json();
    [&list, &overview["upstreams"]].map(|rows| rows.as_array().expect("is a list").clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_of_upstreams_tells_why_each_is_in_its_state() {
    let mut engines = engines(3).await;
    let balancer = Balancer::over(&engines).await;
    let drained = format!("/admin/upstreams/{}", direct(&engines[0]));
    let row = admin(&balancer, "PATCH", &drained, json!({"drain": true})).await.expect(200).json();
    let why = "an operator drains it";
    assert_eq!(
        (&row["state"], &row["reason"], &row["drained"]),
        (&json!("draining"), &json!(why), &json!(true))
    );
    engines.remove(1).stop().await;
    let [list, overview] = eventually("the stopped one is down", async || {
        let both = rows(&balancer).await;
        both.iter().all(|rows| rows[1]["state"] == "down").then_some(both)
    })
    .await;
    for key in ["name", "state", "reason", "drained", "removing", "full"] {
        let of = |rows: &[Value]| rows.iter().map(|row| row[key].clone()).collect::<Vec<_>>();
        assert_eq!(of(&list), of(&overview), "{key}");
    }
    assert!(list[1]["reason"].is_string(), "{}", list[1]);
    assert_eq!((&list[2]["state"], &list[2]["reason"]), (&json!("ready"), &Value::Null));
    let row = admin(&balancer, "PATCH", &drained, json!({"drain": false})).await.expect(200).json();
    assert_eq!(
        (&row["state"], &row["reason"], &row["drained"]),
        (&json!("ready"), &Value::Null, &json!(false))
    );
}

/// With the header of an answer an operator finds the balancer that made the choice.
#[tokio::test(flavor = "multi_thread")]
async fn the_overview_has_the_name_by_which_answers_call_the_balancer() {
    let engine = engine(Options::default()).await;
    let mut config = config(upstreams([&engine]));
    config.expose = true;
    let balancer = Balancer::ready(config).await;
    let answer = balancer.ask(post("/v1/chat/completions", chat("sim"))).await.expect(200);
    let overview = balancer.admin(get("/admin/overview")).await.expect(200).json();
    assert_eq!(overview["balancer"]["identity"], answer.header("x-vllm-lb-balancer"));
    assert!(answer.header("x-vllm-lb-balancer").ends_with(&format!("@{}", balancer.address())));
}
