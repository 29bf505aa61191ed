//! Sessions: however a request names its own, it stays near where that was, and is never kept waiting for it.

use std::time::Duration;

use serde_json::{Value, json};
use vllm_lb::config::check::check;
use vllm_lb::config::types::{Config, RouteConfig};

use super::{CHAT, chat_of, pending, telling, who, words};
use crate::common::body::form;
use crate::common::wire::{JSON, post, request};
use crate::common::{Balancer, EngineServer, InjectedFault, admin, config, engines, eventually, upstreams};

/// By chance, all of these would stay in one case of half a million.
const TIMES: u64 = 12;

/// The headers that name a session.
const HEADERS: [&str; 7] = [
    "header x-session-id",
    "header x-rllm-session-id",
    "header x-dynamo-session-id",
    "header x-claude-code-session-id",
    "header x-session-affinity",
    "header session-id",
    "header session_id",
];

/// `{"session_id": "gym"}` in base64.
const GYM_SESSION: &str = "eyJzZXNzaW9uX2lkIjogImd5bSJ9";

/// A chat of its own that names its session in some way.
fn named(way: &str, session: &str, number: u64) -> Vec<u8> {
    // What it says has nothing in common with any other.
    let mut body = chat_of(&words(1_000 + number, 200));
    let (mut path, mut headers) = (CHAT.to_string(), vec![JSON]);
    let cookie = format!("a=b; vllm_lb_session={session}");
    // Gym's servers sign a session anew with each answer.
    let signed = format!("VLLMModel___policy={GYM_SESSION}.time{number}.signature{number}");
    match way {
        "path" => path = format!("/sessions/{session}{CHAT}"),
        "rollout" => path = format!("/ng-rollout/{session}{CHAT}"),
        "captured rollout" => path = format!("/ng-rollout/{session}/training-token-capture{CHAT}"),
        "cookie" => headers.push(("cookie", &cookie)),
        "signed cookie" => headers.push(("cookie", &signed)),
        "metadata" => body["metadata"] = json!({"session_id": session}),
        "metadata.rllm" => body["metadata"] = json!({"rllm": {"run_id": number, "session_id": session}}),
        "rllm" | "session_params" => body[way] = json!({"session_id": session}),
        _ => match way.strip_prefix("header ") {
            Some(header) => headers.push((header, session)),
            None => body[way] = session.into(),
        },
    }
    request("POST", &path, &headers, body.to_string().as_bytes())
}

fn routes(text: &str) -> Vec<RouteConfig> {
    let checked = check(&format!("upstreams: [http://a]\nroutes: {text}"), &|_| None);
    checked.unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

async fn over(engines: &[EngineServer], change: impl Fn(&mut Config)) -> Balancer {
    let mut config = config(upstreams(engines));
    // What is held does not matter here; what the session is worth does.
    config.sessions.bonus = 20.0;
    change(&mut config);
    telling(config).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_for_every_way_to_name_it() {
    let engines = engines(3).await;
    // Nothing is remembered of prompts, so that the session alone can hold them together.
    let balancer = over(&engines, |config| config.index.blocks = Some(0)).await;
    let ways = ["path", "rollout", "captured rollout", "cookie", "signed cookie"].into_iter();
    let fields =
        ["session_id", "prompt_cache_key", "user", "metadata", "metadata.rllm", "rllm", "session_params"];
    for (number, way) in (0u64..).zip(ways.chain(HEADERS).chain(fields)) {
        let session = format!("session-{number}");
        let mut places = Vec::new();
        for turn in 0..TIMES {
            let answer = balancer.ask(named(way, &session, 100 * number + turn)).await.expect(200);
            places.push(who(&engines, &answer));
        }
        assert!(places.iter().all(|place| *place == places[0]), "{way}: {places:?}");
    }
    for recorded in engines.iter().flat_map(EngineServer::requests) {
        assert_eq!(recorded.path, CHAT, "the engine sees its own path");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_gateway_headers_of_rllm_are_not_forwarded() {
    let engines = engines(1).await;
    let balancer = over(&engines, |_| {}).await;
    let ours = ["x-rllm-session-id", "X-RLLM-Run-Id", "x-rllm-step-id"];
    let theirs = ["x-session-id", "session_id", "session-id", "x-claude-code-session-id", "x-rll"];
    let headers: Vec<_> = ours.iter().chain(&theirs).map(|name| (*name, "s")).collect();
    let body = chat_of("x").to_string();
    let request = request("POST", CHAT, &[&[JSON], headers.as_slice()].concat(), body.as_bytes());
    balancer.ask(request).await.expect(200);
    let recorded = engines[0].requests().pop().expect("a request");
    let seen = |name: &&&str| recorded.headers.contains_key(**name);
    assert_eq!((ours.iter().filter(seen).count(), theirs.iter().filter(seen).count()), (0, theirs.len()));
}

/// Fifty conversations under way stay where they are when another upstream comes, whether prompts are
/// remembered or sessions alone hold them together; new ones use it.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_is_added_moves_no_session() {
    const SESSIONS: u64 = 50;
    for remembers in [true, false] {
        let mut engines = engines(3).await;
        let balancer = over(&engines, |config| {
            config.sessions.bonus = 1.0;
            if !remembers {
                config.index.blocks = Some(0);
            }
        })
        .await;
        let text = |session: u64, turn: u64| {
            (0..=turn).map(|at| words(1_000 * session + at, 150)).collect::<String>()
        };
        let mut places = Vec::new();
        for session in 0..SESSIONS {
            balancer.until_idle().await;
            places.push(turn(&balancer, &engines, &format!("s{session}"), &text(session, 0)).await);
        }
        assert!((0..3).all(|engine| places.contains(&engine)), "they are spread: {places:?}");
        engines.extend(crate::common::engines(1).await);
        let added = json!({"url": engines[3].url()});
        admin(&balancer, "POST", "/admin/upstreams?wait=20s", added).await.expect(201);
        let mut moved = 0;
        for later in 1..4 {
            for session in 0..SESSIONS {
                balancer.until_idle().await;
                let place = turn(&balancer, &engines, &format!("s{session}"), &text(session, later)).await;
                moved += usize::from(place != places[session as usize]);
            }
        }
        assert_eq!(moved, 0, "of {SESSIONS} sessions with three turns each");
        for session in SESSIONS..2 * SESSIONS {
            balancer.until_idle().await;
            places.push(turn(&balancer, &engines, &format!("s{session}"), &text(session, 0)).await);
        }
        assert!(places.contains(&3), "new sessions go there, too: {places:?}");
    }
}

/// The balancer looked for the session in the edited body, and found none.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_removed_from_the_body_by_a_route_still_counts() {
    let engines = engines(3).await;
    let balancer = over(&engines, |config| {
        config.index.blocks = Some(0);
        config.routes = routes("[{body: {remove: [session_id], overrides: {user: null}}}]");
    })
    .await;
    for (number, way) in (0u64..).zip(["session_id", "user"]) {
        let mut places = Vec::new();
        for turn in 0..TIMES {
            let answer = balancer.ask(named(way, "s", 100 * number + turn)).await.expect(200);
            places.push(who(&engines, &answer));
        }
        assert!(places.iter().all(|place| *place == places[0]), "{way}: {places:?}");
    }
    for recorded in engines.iter().flat_map(EngineServer::requests) {
        assert_eq!((&recorded.json()["session_id"], &recorded.json()["user"]), (&Value::Null, &Value::Null));
    }
}

/// Forms cannot be read: nothing is known of their prompts, and their session is all there is to go by.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_when_its_prompts_cannot_be_read() {
    let engines = engines(3).await;
    let balancer = over(&engines, |config| config.sessions.bonus = 1.0).await;
    let kind = ("content-type", "multipart/form-data; boundary=a-boundary");
    let body = form("a-boundary", &[("model", "sim"), ("file", "RIFF--not really--")]);
    let mut first = Vec::new();
    for number in 0..4 {
        let session = format!("recordings-{number}");
        let mut places = Vec::new();
        for _ in 0..TIMES {
            let headers = [kind, ("x-session-id", session.as_str())];
            let request = request("POST", "/v1/audio/transcriptions", &headers, &body);
            places.push(who(&engines, &balancer.ask(request).await.expect(200)));
        }
        assert!(places.iter().all(|place| *place == places[0]), "{places:?}");
        first.push(places[0]);
    }
    let mut places = Vec::new();
    for _ in 0..TIMES {
        let request = request("POST", "/v1/audio/transcriptions", &[kind], &body);
        places.push(who(&engines, &balancer.ask(request).await.expect(200)));
    }
    assert!(places.iter().any(|place| *place != places[0]), "without a session nothing holds them");
}

async fn turn(balancer: &Balancer, engines: &[EngineServer], session: &str, text: &str) -> usize {
    let mut body = chat_of(text);
    body["session_id"] = session.into();
    who(engines, &balancer.ask(post(CHAT, body.to_string())).await.expect(200))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_does_not_wait_for_an_upstream_that_is_full() {
    let engines = engines(2).await;
    let balancer = over(&engines, |config| {
        config.upstreams.iter_mut().for_each(|upstream| upstream.max_active = Some(1));
    })
    .await;
    let text = words(1, 4_000);
    let first = turn(&balancer, &engines, "s", &text).await;
    engines[first].set_fault(InjectedFault::StallHeaders).await;
    let mut body = chat_of(&text);
    body["session_id"] = "s".into();
    let stalled = pending(&balancer, CHAT, &body).await;
    engines[first].wait_until("it is there", |stats| stats.received == 2).await;
    assert_eq!(turn(&balancer, &engines, "s", &text).await, 1 - first, "there is no room where it was");
    drop(stalled);
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_does_not_wait_behind_a_large_backlog() {
    let engines = engines(2).await;
    let balancer = over(&engines, |config| config.sessions.bonus = 1.0).await;
    let text = words(1, 1_000);
    let first = turn(&balancer, &engines, "s", &text).await;
    assert_eq!(turn(&balancer, &engines, "s", &text).await, first, "it is drawn there while there is room");
    engines[first].set_fault(InjectedFault::StallHeaders).await;
    // A stream of another session without an answer, sent to the upstream of the first.
    let mut long: Value = chat_of(&format!("{text}{}", words(2, 20_000)));
    long["stream"] = true.into();
    long["session_id"] = "s".into();
    let stalled = pending(&balancer, CHAT, &long).await;
    assert!(super::row(&balancer, &engines[first]).await["backlog_tokens"].as_u64() > Some(15_000));
    assert_eq!(turn(&balancer, &engines, "s", &text).await, 1 - first, "20,000 tokens are in the way");
    drop(stalled);
    balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_forgotten_after_its_time() {
    let engines = engines(3).await;
    let ttl = Duration::from_millis(200);
    let balancer = over(&engines, |config| {
        config.sessions.ttl = ttl;
        // Nothing else is to hold them.
        config.index.blocks = Some(0);
    })
    .await;
    let mut moved = 0;
    for number in 0..TIMES {
        let session = format!("s{number}");
        let text = words(number, 100);
        let first = turn(&balancer, &engines, &session, &text).await;
        tokio::time::sleep(2 * ttl).await;
        moved += usize::from(turn(&balancer, &engines, &session, &text).await != first);
    }
    assert!(moved > 0, "none of {TIMES} sessions that are over has moved");
    balancer.running.state.set_ttl(Duration::from_secs(60));
    let first = turn(&balancer, &engines, "t", "again").await;
    for _ in 0..TIMES {
        // A request that is just ending weighs more than so short a session.
        balancer.until_idle().await;
        assert_eq!(turn(&balancer, &engines, "t", "again").await, first);
    }
}

/// A session whose upstream is gone is bound anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_moves_when_its_upstream_is_gone() {
    let engines = engines(3).await;
    let balancer = over(&engines, |_| {}).await;
    let text = words(1, 500);
    let first = turn(&balancer, &engines, "s", &text).await;
    engines[first].set_health(Some(503));
    balancer.until_ready(2).await;
    let second = turn(&balancer, &engines, "s", &text).await;
    assert_ne!(second, first);
    engines[first].set_health(None);
    balancer.until_ready(3).await;
    eventually("it stays where it is now", async || {
        (turn(&balancer, &engines, "s", &text).await == second).then_some(())
    })
    .await;
}
