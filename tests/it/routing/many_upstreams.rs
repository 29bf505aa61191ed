//! A thousand upstreams: one simulated server at a thousand addresses of this machine.

use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpListener;
use vllm_lb::config::types::{Health, Retry, RouteConfig, Timeouts};

use crate::choice::{CHAT, chat_of, words};
use crate::common::wire::{get, post};
use crate::common::{Balancer, EngineServer, Options, Timing, config, names, upstream};

const COUNT: usize = 1000;

/// How long all of them may take to answer the first probe, on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(180);

#[tokio::test(flavor = "multi_thread")]
async fn serves_and_explains_requests_over_a_thousand_upstreams() {
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port is there");
    let options = Options { timing: Timing::instant(), ..Options::default() };
    let engine = EngineServer::start_on(listener, options).expect("a socket can be served");
    let port = engine.address().port();
    let all = (0..COUNT).map(|at| upstream(&format!("http://127.2.{}.{}:{port}", at / 250, at % 250 + 1)));
    let mut config = config(all.collect());
    config.health = Health { interval: START, timeout: START, metrics: false, ..Health::default() };
    config.expose = true;
    let mut route = RouteConfig::new(Timeouts::default(), Retry::default());
    route.model = Some("all".into());
    route.to = Some("sim".into());
    route.upstreams = Some(config.upstreams.iter().map(|upstream| upstream.name.clone()).collect());
    config.routes.push(route);
    let balancer = Balancer::start(config).await;
    let is_ready = balancer.running.fleet.wait_until(START, |fleet| fleet.ready().count() == COUNT).await;
    assert!(is_ready, "all upstreams answer probes");

    // The second turn goes to the upstream that had the first one, with a route and without.
    for (seed, model) in [(1, "sim"), (2, "all")] {
        let mut chat = chat_of(&words(seed, 2_000));
        chat["model"] = model.into();
        let first = balancer.ask(post(CHAT, chat.to_string())).await.expect(200);
        assert_eq!(first.header("x-vllm-lb-reason"), "load");
        let second = balancer.ask(post(CHAT, chat.to_string())).await.expect(200);
        let chosen = second.header("x-vllm-lb-upstream");
        assert_eq!(
            (chosen, second.header("x-vllm-lb-reason")),
            (first.header("x-vllm-lb-upstream"), "prefix")
        );

        let told = balancer.admin(get("/admin/decisions?limit=1")).await.expect(200).json();
        let decision = &told[0];
        assert_eq!((&decision["of"], &decision["upstream"]), (&COUNT.into(), &chosen.into()));
        let listed = decision["candidates"].as_array().expect("it is a list");
        let holder = listed.iter().find(|candidate| candidate["upstream"] == chosen).expect("it is listed");
        assert!(holder["hit"].as_u64() > Some(10), "{holder}");
        let least = listed.iter().filter_map(|candidate| candidate["cost"].as_f64()).fold(f64::MAX, f64::min);
        assert_eq!(holder["cost"].as_f64(), Some(least));
        assert!((32..=33).contains(&listed.len()), "the least loaded and the holder: {}", listed.len());
    }

    let rows = balancer.admin(get("/admin/upstreams")).await.expect(200).json();
    assert_eq!(rows.as_array().map(Vec::len), Some(COUNT));
    let page = balancer.admin(get("/metrics")).await.expect(200);
    let ready = page.text().lines().filter(|line| line.starts_with("vllm_lb_upstream_ready{"));
    assert_eq!(ready.filter(|line| line.ends_with(" 1")).count(), COUNT);
    let models: Value = balancer.ask(get("/v1/models")).await.expect(200).json();
    let cards = models["data"].as_array().into_iter().flatten();
    let ids: Vec<&str> = cards.filter_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, names(&["all", "sim"]));
    balancer.until_idle().await;
    engine.stop().await;
}
