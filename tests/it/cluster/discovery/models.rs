//! Routes over a model server need not say what its engines serve: it is asked for, as they are.

use super::*;
use vllm_lb::config::types::RouteConfig;

/// A route for this model, and nothing said of what it is served by.
fn routes(model: &str) -> Vec<RouteConfig> {
    let text = format!("upstreams: [http://a]\nroutes: [{{model: {model}}}]");
    check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

/// What a model server says of this engine.
fn says(engine: &EngineServer, model: Value) -> Value {
    let mut said = document([engine]);
    said["model"] = model;
    said
}

/// What its engines serve by then is nowhere in the file: the clients' `sim` is a name of a route.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_server_that_comes_back_with_another_model_goes_on_working() {
    let address = reserved_address();
    let engines = [serving(&["first"]).await, serving(&["second"]).await, serving(&["third"]).await];
    let mut config = asking([source(&address)]);
    config.routes = routes("sim");
    config.queue.wait = Duration::ZERO;
    let balancer = Balancer::start(config).await;
    let refused = balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    assert_eq!(refused.header("retry-after"), "1", "as for any model of a source that is not up");
    let said = |index: usize, model: Value| says(&engines[index], model);
    let server = ModelServer::at(&address, said(0, json!("first"))).await;
    until_ready(&balancer, &engines[..1]).await;
    let load = Clients::start(&balancer, 4);
    // By its own word, and by what its engines say.
    for (index, model) in [(1, json!("second")), (2, Value::Null), (0, json!("first")), (2, json!("third"))] {
        load.until_more(20).await;
        server.say(&said(index, model));
        until_ready(&balancer, [&engines[index]]).await;
    }
    load.until_more(20).await;
    // One that was made for a model in the moment before it went is told to try again, and finds the next: at
    // the most one of each client at each change.
    let wrong = load.end().await;
    let late = |told: &&String| told.starts_with("503 ") && told.contains("the model `sim`");
    assert!(wrong.len() <= 16 && wrong.iter().all(|told| late(&told)), "{wrong:?}");
    let answer = balancer.ask(post(CHAT, chat("sim"))).await.expect(200).json();
    assert_eq!(answer["model"], "sim");
    let models = balancer.ask(get("/v1/models")).await.expect(200).json();
    let ids: Vec<&str> =
        models["data"].as_array().into_iter().flatten().flat_map(|card| card["id"].as_str()).collect();
    assert_eq!(ids, ["sim", "third"]);
    // While its engine is away it is waited for.
    engines[2].set_fault(crate::common::InjectedFault::Refuse).await;
    balancer.until_ready(0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
}

/// No upstream serves the first model any more, and another model is served in its place.
#[tokio::test(flavor = "multi_thread")]
async fn queued_requests_get_503_when_their_model_goes() {
    let (old, new) = (paced(Duration::from_secs(3_600)).await, serving(&["other"]).await);
    let server = ModelServer::start(document([&old])).await;
    let mut config = asking([DiscoverySource { max_active: Some(1), ..server.source() }]);
    config.routes = routes("face");
    let balancer = Balancer::start(config).await;
    until_ready(&balancer, [&old]).await;
    let mut first = balancer.client().await;
    first.send(post(CHAT, chat("face"))).await;
    balancer.until_active(1).await;
    let mut second = balancer.client().await;
    second.send(post(CHAT, chat("face"))).await;
    let queue = balancer.running.fleet.queue();
    eventually("it waits", async || (queue.len() == 1).then_some(())).await;
    server.say(&says(&new, json!("other")));
    until_ready(&balancer, [&new]).await;
    let refused = second.answer().await.expect(503);
    assert!(refused.header("retry-after") == "1" && refused.text().contains("the model `face`"));
    assert_eq!(second.ask(post(CHAT, chat("face"))).await.expect(200).json()["model"], "face");
}
