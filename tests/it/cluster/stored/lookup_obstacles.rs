//! What stands in the way of finding a stored response: fleets that drain, bodies that are long, routes that
//! edit, engines that hang, clients that leave in other ways.

use super::*;
use crate::common::body::normal_refusal;

async fn drain(balancer: &Balancer, name: &str) {
    let change = FleetChange::Drain { name: name.into(), drain: true };
    balancer.running.fleet.apply(vec![change]).await.expect("it is there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_drained_engine_answers_for_its_stored_responses() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let id = id_of(&make(&balancer, json!({"model": "sim", "input": "a"})).await);
    drain(&balancer, &crate::common::direct(&engines[0])).await;
    make(&balancer, json!({"model": "sim", "input": "b", "previous_response_id": id})).await;
    balancer.ask(get(&format!("{RESPONSES}/{id}"))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_engine_is_searched_for_unknown_ids() {
    for count in [2, 3] {
        let engines = engines(count).await;
        let before = Balancer::ready(settings(&engines)).await;
        let made = make(&before, json!({"model": "sim", "input": "a", "request_id": "mine"})).await;
        let balancer = Balancer::ready(settings(&engines)).await;
        drain(&balancer, &upstream_of(&made)).await;
        balancer.ask(get(&format!("{RESPONSES}/mine"))).await.expect(200);
        let next = json!({"model": "sim", "input": "b", "previous_response_id": "mine"});
        assert_eq!(upstream_of(&make(&balancer, next).await), upstream_of(&made));
    }
}

/// A route that takes every request must not edit a body that another route's face then frames.
#[tokio::test(flavor = "multi_thread")]
async fn the_body_of_a_cancel_is_forwarded_unchanged() {
    let engines = engines(2).await;
    let routes = "
  - {model: fast, to: sim}
  - {model: '*', body: {overrides: {temperature: 0}}}
";
    let balancer = Balancer::ready(routed(&engines, routes)).await;
    let id = id_of(&make(&balancer, json!({"model": "fast", "input": "a"})).await);
    // It was no job.
    balancer.ask(post(&format!("{RESPONSES}/{id}/cancel"), "{}")).await.expect(400);
    let all: Vec<_> = engines.iter().flat_map(EngineServer::requests).collect();
    let cancel = all.iter().find(|one| one.path.ends_with("/cancel")).unwrap();
    assert_eq!(cancel.body, "{}");
}

/// OpenAI's clients write the id behind the input, and an image is larger than what is peeked.
#[tokio::test(flavor = "multi_thread")]
async fn previous_response_id_is_found_behind_the_peek() {
    let roomy = Options { max_model_len: 1_000_000, ..Options::default() };
    let engines = [engine(roomy.clone()).await, engine(roomy.clone()).await, engine(roomy).await];
    let mut config = settings(&engines);
    config.peek.bytes = 4_096;
    let balancer = Balancer::ready(config).await;
    let input = "long ".repeat(100_000);
    for _ in 0..4 {
        let first = make(&balancer, json!({"model": "sim", "input": "a"})).await;
        let id = id_of(&first);
        let body = format!(
            r#"{{"input":"{input}","model":"sim","max_output_tokens":1,"previous_response_id":"{id}"}}"#
        );
        let next = balancer.ask(post(RESPONSES, body)).await.expect(200);
        assert_eq!(upstream_of(&next), upstream_of(&first));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_does_not_wait_for_a_hanging_engine() {
    let engines = engines(3).await;
    let before = Balancer::ready(settings(&engines)).await;
    let made = make(&before, json!({"model": "sim", "input": "a", "request_id": "mine"})).await;
    let other = engines.iter().find(|engine| crate::common::direct(engine) != upstream_of(&made)).unwrap();
    other.set_fault(InjectedFault::StallHeaders).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let asked = balancer.ask(get(&format!("{RESPONSES}/mine")));
    tokio::time::timeout(Duration::from_millis(1_500), asked).await.expect("in time").expect(200);
}

/// A client that is told 404 gives its conversation up, while the engine that has it is only slow.
#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_not_404_while_one_engine_is_silent() {
    let engines = engines(3).await;
    let before = Balancer::ready(settings(&engines)).await;
    let made = make(&before, json!({"model": "sim", "input": "a", "request_id": "mine"})).await;
    let holder = engines.iter().find(|engine| crate::common::direct(engine) == upstream_of(&made)).unwrap();
    let balancer = Balancer::ready(settings(&engines)).await;
    let next = json!({"model": "sim", "input": "b", "previous_response_id": "mine"}).to_string();
    let asks = [get(&format!("{RESPONSES}/mine")), post(RESPONSES, next)];
    for fault in [InjectedFault::StallHeaders, InjectedFault::Status { status: 500, body: "{}".into() }] {
        holder.set_fault(fault).await;
        for ask in &asks {
            let answer = balancer.ask(ask).await.expect(503);
            assert_eq!(answer.header("retry-after"), "1");
        }
    }
    holder.clear_fault().await;
    for ask in &asks {
        balancer.ask(ask).await.expect(200);
    }
    balancer.ask(get(&format!("{RESPONSES}/nobodys"))).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_field_starts_no_search() {
    let engines = engines(3).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let messages = json!([{"role": "user", "content": "a"}]);
    let body = json!({"model": "sim", "messages": messages, "previous_response_id": "mine"});
    balancer.ask(post("/v1/chat/completions", body.to_string())).await.expect(200);
    assert_eq!(asked_for(&engines), 0);
}

/// By an end of its half, by one request upon another, and over HTTP/2.
#[tokio::test(flavor = "multi_thread")]
async fn a_background_job_survives_disconnects_and_leaks_nothing() {
    let engines = [paced(Duration::from_millis(10)).await];
    let balancer = Balancer::ready(settings(&engines)).await;
    let job = |id: &str| {
        let body =
            json!({"model": "sim", "input": "a", "stream": true, "background": true, "request_id": id});
        body.to_string()
    };
    let mut half = balancer.client().await;
    half.send(post(RESPONSES, job("half"))).await;
    half.finish().await;
    let mut more = balancer.client().await;
    more.send([post(RESPONSES, job("more")), get("/health")].concat()).await;
    for client in [&mut half, &mut more] {
        let answer = client.answer().await.expect(200);
        assert!(answer.text().contains("response.completed"), "{}", answer.text());
    }
    // A client has its answer a moment before the place is free.
    balancer.until_idle().await;
    let mut client = H2::connect(balancer.address()).await;
    let mut asked = client.begin(h2::post(RESPONSES), false).await;
    asked.body.send_data(job("h2").into(), true).unwrap();
    balancer.until_active(1).await;
    drop(asked);
    client.cut();
    balancer.until_idle().await;
    assert_eq!(status_of(&balancer, "h2").await, "completed");
}

/// Its stream ends without a token, as that of an engine that leaves.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_cancelled_before_its_first_token_is_not_run_again() {
    let long = Duration::from_secs(60);
    let engines = [paced(long).await, paced(long).await];
    let balancer = Balancer::ready(settings(&engines)).await;
    let body = json!({"model": "sim", "input": "a", "stream": true, "background": true, "request_id": "job"});
    let mut client = balancer.client().await;
    client.send(post(RESPONSES, body.to_string())).await;
    eventually("it is known", async || {
        let cancelled = balancer.ask(post(&format!("{RESPONSES}/job/cancel"), "")).await;
        (cancelled.status == 200 && cancelled.json()["status"] == "cancelled").then_some(())
    })
    .await;
    client.answer().await.expect(200);
    let made = engines.iter().flat_map(EngineServer::requests).filter(|one| one.path == RESPONSES).count();
    assert_eq!(made, 1);
    assert_eq!(status_of(&balancer, "job").await, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_of_the_clients_may_be_written_as_paths_allow() {
    let engines = engines(3).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    let made = make(&balancer, json!({"model": "sim", "input": "a", "request_id": "user@host:1"})).await;
    let next = json!({"model": "sim", "input": "b", "previous_response_id": "user@host:1"});
    assert_eq!(upstream_of(&make(&balancer, next).await), upstream_of(&made));
    balancer.ask(get(&format!("{RESPONSES}/user@host:1"))).await.expect(200);
    // The engine of the tests does not decode a path.
    let found = balancer.ask(get(&format!("{RESPONSES}/user%40host%3a1"))).await;
    assert_eq!(upstream_of(&found), upstream_of(&made));
    assert_eq!(asked_for(&engines), 2, "nobody else was asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_of_broken_json_reaches_the_client() {
    let engines = engines(1).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    for body in [
        r#"{"model":"sim","input":[{"role":"user",}]}"#,
        r#" {"model":"sim","input":"a","tools":[1 2]}"#,
        &format!(r#"{{"model":"sim","input":"{}","tools":[1 2]}}"#, "long".repeat(20)),
    ] {
        let there = Wire::connect(&crate::common::direct(&engines[0])).await.ask(post(RESPONSES, body)).await;
        let here = balancer.ask(post(RESPONSES, body)).await;
        assert!(there.text().contains("json_invalid"));
        let normal = |answer: &Answer| normal_refusal(answer.status, RESPONSES, &answer.body);
        assert_eq!((here.status, normal(&here)), (there.status, normal(&there)));
    }
}

/// It was 503 with `retry-after`, for ever: the model is nowhere near the response.
#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_unknown_to_a_model_that_its_holder_does_not_serve() {
    let serving = |model: &str| engine(Options { models: vec![model.into()], ..Options::default() });
    let engines = [serving("one").await, serving("other").await];
    let mut config = settings(&engines);
    let routes = "upstreams: [http://a]\nroutes: [{model: face, to: other}]";
    config.routes = check(routes, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes;
    let balancer = Balancer::ready(config).await;
    for named in
        [json!({"model": "one", "input": "a"}), json!({"model": "one", "input": "a", "request_id": "x"})]
    {
        let id = id_of(&make(&balancer, named).await);
        let next =
            |model: &str| json!({"model": model, "input": "b", "previous_response_id": id}).to_string();
        for model in ["other", "face"] {
            let refused = balancer.ask(post(RESPONSES, next(model))).await.expect(404);
            let there = Wire::connect(&crate::common::direct(&engines[1])).await;
            let wanted = { there }.ask(post(RESPONSES, next("other"))).await.expect(404);
            assert_eq!(refused.json(), wanted.json());
            assert!(!refused.headers.contains_key("retry-after"));
        }
        balancer.ask(post(RESPONSES, next("one"))).await.expect(200);
        let unknown = balancer.ask(post(RESPONSES, next("nobody"))).await.expect(404);
        assert!(unknown.text().contains("The model `nobody` does not exist"));
    }
}

/// The only upstream of a model does not count as the holder of every response.
#[tokio::test(flavor = "multi_thread")]
async fn any_upstream_of_the_model_may_hold_the_response() {
    let serving = |model: &str| engine(Options { models: vec![model.into()], ..Options::default() });
    let engines = [serving("one").await, serving("other").await];
    let mut config = settings(&engines);
    config.health.fall = 1;
    let made = {
        let before = Balancer::ready(config.clone()).await;
        id_of(&make(&before, json!({"model": "other", "input": "a", "request_id": "mine"})).await)
    };
    let balancer = Balancer::ready(config).await;
    engines[1].set_fault(InjectedFault::Refuse).await;
    balancer.until_ready(1).await;
    let next = json!({"model": "other", "input": "b", "previous_response_id": made}).to_string();
    balancer.ask(post(RESPONSES, &next)).await.expect(503);
    engines[1].clear_fault().await;
    balancer.until_ready(2).await;
    balancer.ask(post(RESPONSES, &next)).await.expect(200);
}
