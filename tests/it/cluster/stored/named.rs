//! Responses that their clients have named: where they are, and by which route they were made, is learnt and
//! told, also where their ids say otherwise.

use super::*;

const ROUTES: &str = "
  - {model: fast, to: sim, upstreams: ['two:80'], api_key: inner, headers: {set: {x-stage: prod}},
     response_headers: {set: {x-face: fast}}}
  - {api_key: inner}
";

/// Two engines that require the route's key.
async fn locked() -> [EngineServer; 2] {
    let locked = Options { api_key: Some("inner".into()), ..Options::default() };
    [engine(locked.clone()).await, engine(Options { seed: 1, ..locked }).await]
}

fn shared(mut config: Config, redis: &Redis) -> Config {
    config.redis = Some(redis::url(&redis.url()).expect("a URL"));
    config.upstreams.iter_mut().for_each(|upstream| upstream.models = Some(vec!["sim".into()]));
    config
}

async fn until_kept(redis: &Redis, id: &str) {
    let key = format!("vllm-lb:{{lb}}:r:{id}");
    eventually("Redis has it", async || (redis.count(&["EXISTS", &key]).await == 1).then_some(())).await;
}

/// A balancer begins without Redis where that takes more than a second to connect to.
async fn until_connected(balancer: &Balancer) {
    eventually("Redis is connected", async || {
        let page = balancer.admin(get("/admin/siblings")).await.expect(200).json();
        (page["works"] == true).then_some(())
    })
    .await;
}

/// A balancer that only Redis can tell of these is told.
async fn until_told(balancer: &Balancer, id: &str) {
    eventually("Redis was in time", async || {
        let found = balancer.ask(get(&format!("{RESPONSES}/{id}"))).await;
        (found.header("x-face") == "fast").then_some(())
    })
    .await;
}

/// What a response of the route `fast` looks like when it is asked for again.
async fn is_fast(balancer: &Balancer, id: &str) {
    let found = in_time(balancer, get(&format!("{RESPONSES}/{id}"))).await.expect(200);
    assert_eq!((found.json()["model"].as_str(), found.header("x-face")), (Some("fast"), "fast"), "{id}");
    // It was no job: the refusal is the engine's, by the same route.
    let cancelled = in_time(balancer, post(&format!("{RESPONSES}/{id}/cancel"), "")).await.expect(400);
    assert_eq!((upstream_of(&cancelled), cancelled.header("x-face")), ("two:80".to_string(), "fast"));
}

/// It knew neither the client's name of the model nor the route's key and headers.
#[tokio::test(flavor = "multi_thread")]
async fn a_response_that_its_client_named_is_found_by_the_route_that_made_it() {
    let (redis, engines) = (Redis::start(&[]).await, locked().await);
    let mut config = shared(routed(&engines, ROUTES), &redis);
    // Without it only the route has the key.
    config.routes.truncate(1);
    let [one, other] = [Balancer::ready(config.clone()).await, Balancer::ready(config.clone()).await];
    for (id, stream) in [("mine", false), ("resp_0123456789abcdef0123456789abcdef", true)] {
        let body = json!({"model": "fast", "input": "a", "request_id": id, "stream": stream});
        make(&one, body).await;
        until_kept(&redis, id).await;
    }
    // A balancer that starts later has Redis as its only source.
    redis.ask(&["DEL", "vllm-lb:{lb}:stream"]).await;
    let third = Balancer::ready(config).await;
    let ids = ["mine", "resp_0123456789abcdef0123456789abcdef"];
    for id in ids {
        until_told(&third, id).await;
    }
    // A lookup that Redis answers too late is followed by a search, whose requests do not count here.
    eventually("Redis was in time for all requests", async || {
        let (before, others) = (engines[1].requests().len(), asked_for(&engines[..1]));
        let late = too_late(&third).await;
        for balancer in [&one, &other, &third] {
            for id in ids {
                is_fast(balancer, id).await;
                let body = json!({"model": "fast", "input": "b", "previous_response_id": id});
                let next = in_time(balancer, post(RESPONSES, body.to_string())).await.expect(200);
                assert_eq!(upstream_of(&next), "two:80");
            }
        }
        if too_late(&third).await > late {
            return None;
        }
        let again = engines[1].requests().split_off(before);
        let again: Vec<_> = again.iter().filter(|one| one.path.starts_with("/v1/responses/")).collect();
        assert_eq!(again.len(), 12, "each was found at once");
        for one in again {
            assert_eq!(
                (one.header("authorization"), one.header("x-stage")),
                (Some("Bearer inner"), Some("prod"))
            );
        }
        assert_eq!(asked_for(&engines[..1]), others, "nobody else was asked");
        Some(())
    })
    .await;
}

/// There is no doubt where it is, but about the key.
#[tokio::test(flavor = "multi_thread")]
async fn the_route_of_a_named_response_is_known_also_where_there_is_one_upstream() {
    let (redis, engines) = (Redis::start(&[]).await, locked().await);
    let mut config = shared(routed(&engines, ROUTES), &redis);
    config.upstreams.remove(0);
    config.routes.truncate(1);
    let one = Balancer::ready(config.clone()).await;
    make(&one, json!({"model": "fast", "input": "a", "request_id": "mine"})).await;
    until_kept(&redis, "mine").await;
    redis.ask(&["DEL", "vllm-lb:{lb}:stream"]).await;
    let other = Balancer::ready(config).await;
    until_told(&other, "mine").await;
    is_fast(&other, "mine").await;
}

/// A Redis in which an older balancer has left where a response is, that response, and a balancer on it.
async fn after_an_older_balancer(engines: &[EngineServer; 2]) -> (Redis, Answer, Balancer) {
    let redis = Redis::start(&[]).await;
    let config = shared(routed(engines, ROUTES), &redis);
    let before = Balancer::ready(Config { redis: None, ..config.clone() }).await;
    let made = make(&before, json!({"model": "sim", "input": "a", "request_id": "old"})).await;
    redis.ask(&["SET", "vllm-lb:{lb}:r:old", &upstream_of(&made)]).await;
    let balancer = Balancer::ready(config).await;
    until_connected(&balancer).await;
    (redis, made, balancer)
}

/// Balancers of the version before wrote the upstream's name alone.
#[tokio::test(flavor = "multi_thread")]
async fn bindings_of_an_older_version_are_read_from_redis() {
    let engines = locked().await;
    let (_redis, made, balancer) = after_an_older_balancer(&engines).await;
    let found = balancer.ask(get(&format!("{RESPONSES}/old"))).await.expect(200);
    assert_eq!(found.json(), made.json());
    let (late, asked) = (too_late(&balancer).await, asked_for(&engines));
    assert!(asked <= 1 + 2 * late, "{asked} were asked, and Redis was too late {late} times");
}

/// A lookup that Redis answers too late, as on a busy machine, was followed by a search without the route's
/// key: the response was not found.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_redis_answer_falls_back_to_a_search() {
    let engines = locked().await;
    let (redis, made, balancer) = after_an_older_balancer(&engines).await;
    redis.freeze();
    let found = balancer.ask(get(&format!("{RESPONSES}/old"))).await.expect(200);
    redis.thaw();
    assert_eq!(found.json(), made.json());
    assert!(too_late(&balancer).await >= 1);
}

/// Makes a response, and another one elsewhere that is to be called the same. Returns the id, the upstream of
/// the first and that of the second.
async fn replayed(balancer: &Balancer) -> (String, String, String) {
    let first = make(balancer, json!({"model": "sim", "input": "first"})).await;
    let (id, was) = (id_of(&first), upstream_of(&first));
    let body = json!({"model": "sim", "input": "second", "request_id": id, "max_output_tokens": 3});
    let second = make(balancer, body).await;
    assert_eq!(id_of(&second), id);
    assert_ne!(upstream_of(&second), was, "they take turns");
    (id, was, upstream_of(&second))
}

async fn finds(balancer: &Balancer, id: &str, there: &str) {
    let found = balancer.ask(get(&format!("{RESPONSES}/{id}"))).await.expect(200);
    assert_eq!((upstream_of(&found).as_str(), found.json()["id"].as_str()), (there, Some(id)));
    let next = json!({"model": "sim", "input": "more", "previous_response_id": id});
    assert_eq!(upstream_of(&make(balancer, next).await), there);
}

/// It was looked for where its id says, as an earlier response of this id is there.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_of_ours_on_a_later_response_is_found_where_that_was_made() {
    let (redis, engines) = (Redis::start(&[]).await, engines(2).await);
    let config = shared(settings(&engines), &redis);
    let [one, other] = [Balancer::ready(config.clone()).await, Balancer::ready(config).await];
    let (id, was, is) = replayed(&one).await;
    finds(&one, &id, &is).await;
    eventually("the other is told", async || {
        let found = other.ask(get(&format!("{RESPONSES}/{id}"))).await.expect(200);
        (upstream_of(&found) == is).then_some(())
    })
    .await;
    finds(&other, &id, &is).await;
    assert_eq!(asked_for(&engines), engines.iter().map(|engine| gets(engine, &id)).sum::<usize>());
    // Once more, where the id says: what was learnt before no longer counts.
    let body = json!({"model": "sim", "input": "third", "request_id": id});
    while upstream_of(&make(&one, body.clone()).await) != was {}
    finds(&one, &id, &was).await;
}

fn gets(engine: &EngineServer, id: &str) -> usize {
    let path = format!("{RESPONSES}/{id}");
    engine.requests().iter().filter(|one| one.method == "GET" && one.path == path).count()
}

/// The upstream that the id names no longer knows it; that was the end of it. Only Redis is asked then:
/// any client could cause a search of all upstreams with one old id.
#[tokio::test(flavor = "multi_thread")]
async fn redis_finds_an_id_that_its_named_upstream_does_not_hold() {
    let (redis, engines) = (Redis::start(&[]).await, engines(3).await);
    let config = shared(settings(&engines), &redis);
    let one = Balancer::ready(config.clone()).await;
    let (id, was, is) = replayed(&one).await;
    until_kept(&redis, &id).await;
    redis.ask(&["DEL", "vllm-lb:{lb}:stream"]).await;
    let at = |name: &str| {
        engines.iter().find(|engine| crate::common::direct(engine) == name).expect("it is there")
    };
    at(&was).restart().await;
    one.until_ready(3).await;
    finds(&one, &id, &is).await;
    let other = Balancer::ready(config).await;
    eventually("Redis was in time", async || {
        let found = other.ask(get(&format!("{RESPONSES}/{id}"))).await;
        (upstream_of(&found) == is && found.status == 200).then_some(())
    })
    .await;
    let next = json!({"model": "sim", "input": "more", "previous_response_id": id});
    eventually("Redis was in time again", async || {
        let made = other.ask(post(RESPONSES, next.to_string())).await;
        (upstream_of(&made) == is && made.status == 200).then_some(())
    })
    .await;
    // The owner has lost it: the upstream that the id names answers so.
    at(&is).restart().await;
    other.until_ready(3).await;
    let found = in_time(&other, get(&format!("{RESPONSES}/{id}"))).await.expect(404);
    assert_eq!(found.json()["error"]["message"], format!("Response with id '{id}' not found."));
    in_time(&other, post(RESPONSES, next.to_string())).await.expect(404);
    let third = engines.iter().find(|engine| ![&was, &is].contains(&&crate::common::direct(engine)));
    assert_eq!(gets(third.expect("there are three"), &id), 0, "no search was made");
}

/// The last route matches all other requests, and its key is for its own upstream.
#[tokio::test(flavor = "multi_thread")]
async fn a_routes_key_is_sent_to_no_foreign_upstream() {
    let redis = Redis::start(&[]).await;
    let engines = [engine(Options::default()).await, engine(Options::default()).await];
    let routes = "
  - {model: 'star-*', to: sim, upstreams: ['one:80'], api_key: first}
  - {model: face, to: sim, header: {x-team: research}, upstreams: ['one:80'], api_key: first}
  - {model: face, to: sim, upstreams: ['two:80'], api_key: second}
  - {upstreams: ['two:80'], api_key: second}";
    let config = shared(routed(&engines, routes), &redis);
    let balancer = Balancer::ready(config.clone()).await;
    let star = make(&balancer, json!({"model": "star-1", "input": "a"})).await;
    let body = json!({"model": "face", "input": "a", "request_id": "resp_mine"}).to_string();
    let made = balancer
        .ask(request("POST", RESPONSES, &[JSON, ("x-team", "research")], body.as_bytes()))
        .await
        .expect(200);
    assert_eq!((upstream_of(&star), upstream_of(&made)), ("one:80".to_string(), "one:80".to_string()));
    until_kept(&redis, "resp_mine").await;
    redis.ask(&["DEL", "vllm-lb:{lb}:stream"]).await;
    // By Redis alone it is found before its route is.
    let other = Balancer::ready(config).await;
    eventually("Redis was in time", async || {
        (other.ask(get(&format!("{RESPONSES}/resp_mine"))).await.status == 200).then_some(())
    })
    .await;
    for balancer in [&balancer, &other] {
        balancer.ask(get(&format!("{RESPONSES}/{}", id_of(&star)))).await.expect(200);
        balancer.ask(get(&format!("{RESPONSES}/resp_mine"))).await;
    }
    let keys = engines[0].requests().into_iter().filter(|one| one.path.starts_with(RESPONSES));
    let keys: Vec<_> = keys.map(|one| one.header("authorization").map(str::to_string)).collect();
    assert!(keys.len() >= 5 && keys.iter().all(|key| key.as_deref() != Some("Bearer second")), "{keys:?}");
}

/// The first upstream's stream has said the id before it failed, and was remembered for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_named_response_is_where_the_last_attempt_has_made_it() {
    let engines = engines(2).await;
    let balancer = Balancer::ready(settings(&engines)).await;
    engines[0].set_fault(InjectedFault::AbortEmpty).await;
    for number in 0..4 {
        let id = format!("mine-{number}");
        let body = json!({"model": "sim", "input": "a", "stream": true, "request_id": id});
        make(&balancer, body).await;
        finds(&balancer, &id, &crate::common::direct(&engines[1])).await;
    }
    assert!(balancer.metric("vllm_lb_retries_total").await > 0.0, "none was tried again");
}

/// The search asked with the client's key, or the upstream's own in place of the route's: nothing was found.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_shows_each_upstream_the_key_of_the_request_that_follows_it() {
    let engines = locked().await;
    let everywhere = "
  - {api_key: inner}";
    let at_two = "
  - {upstreams: ['two:80'], api_key: inner}";
    for (case, (routes, own, found_at)) in
        [(everywhere, None, 0), (everywhere, Some("own"), 1), (at_two, Some("inner"), 0), (at_two, None, 1)]
            .into_iter()
            .enumerate()
    {
        let mut config = routed(&engines, routes);
        for upstream in &mut config.upstreams {
            upstream.models = Some(vec!["sim".into()]);
            upstream.api_key = own.map(Secret::new);
        }
        let balancer = Balancer::ready(config).await;
        let id = format!("elsewhere-{case}");
        let body = json!({"model": "sim", "input": "a", "request_id": id}).to_string();
        let headers = [JSON, ("authorization", "Bearer inner")];
        let mut direct = Wire::connect(&crate::common::direct(&engines[found_at])).await;
        let made = direct.ask(request("POST", RESPONSES, &headers, body.as_bytes())).await.expect(200);
        let asked_before = engines[0].requests().len();
        let headers = [("authorization", "Bearer mine")];
        let path = format!("{RESPONSES}/{id}");
        let found = balancer.ask(request("GET", &path, &headers, b"")).await.expect(200);
        assert_eq!((found.json(), upstream_of(&found)), (made.json(), ["one:80", "two:80"][found_at].into()));
        let shown = engines[0].requests().split_off(asked_before);
        let shown = shown.iter().filter(|one| one.path == path).map(|one| one.header("authorization"));
        let leads_to_one = routes == everywhere || own.is_some();
        let key = if leads_to_one { "Bearer inner" } else { "Bearer mine" };
        let shown: Vec<_> = shown.collect();
        assert!(
            shown.len() + found_at >= 1 && shown.iter().all(|shown| *shown == Some(key)),
            "{case}: {shown:?}"
        );
    }
}
