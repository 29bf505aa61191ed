//! Traces of a balancer whose process or database is lost.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::postgres::PostgresServer;
use crate::common::process::{Process, Setup};
use crate::common::wire::{self, JSON, Wire, with_host};
use crate::common::{InjectedFault, engine, engines, eventually};
use rustix::process::Signal;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, SqliteConnection};
use tokio::task::JoinSet;

/// A trace whose answer ended so long before a kill is on disk.
const MAX_UNSTORED: Duration = Duration::from_secs(1);

const CLIENTS: usize = 8;

fn sqlite(more: &str) -> String {
    format!("traces: {{store: 'sqlite:@folder@/traces.db'{more}}}")
}

/// A configuration with a database in its folder.
fn setup(engines: &[crate::common::EngineServer], more: &str) -> Setup {
    let setup = Setup::over(engines, "");
    let urls: Vec<String> = engines.iter().map(|engine| format!("{:?}", engine.url())).collect();
    setup.write(&urls.join(", "), &sqlite(more).replace("@folder@", &setup.path("")));
    setup
}

fn call(session: &str, stream: bool) -> Vec<u8> {
    call_of("sim", session, stream)
}

fn call_of(model: &str, session: &str, stream: bool) -> Vec<u8> {
    let messages = json!([{"role": "user", "content": format!("of {session}")}]);
    let body = json!({"model": model, "messages": messages, "max_tokens": 12, "stream": stream}).to_string();
    let path = format!("/sessions/{session}/v1/chat/completions");
    wire::request("POST", &path, &[JSON, ("x-request-id", session)], body.as_bytes())
}

async fn traces(process: &Process, session: &str) -> Vec<Value> {
    let answer = process.admin(&format!("/sessions/{session}/traces")).await.expect(200);
    answer.json().as_array().expect("a list").clone()
}

async fn integrity(file: &str) -> String {
    let mut database = SqliteConnection::connect(&format!("sqlite:{file}")).await.expect("opens");
    let row = database.fetch_one("PRAGMA integrity_check").await.expect("runs");
    sqlx::Row::get::<String, _>(&row, 0)
}

/// Clients that call until they are told to stop. Returns the sessions of whole answers with their ends.
fn clients(address: String, stop: Arc<AtomicBool>) -> JoinSet<Vec<(String, Instant)>> {
    let mut running = JoinSet::new();
    for client in 0..CLIENTS {
        let (address, stop) = (address.clone(), stop.clone());
        running.spawn(async move {
            let (mut ended, mut connection) = (Vec::new(), Wire::connect(&address).await);
            for turn in 0.. {
                if stop.load(Ordering::Acquire) {
                    break;
                }
                let session = format!("c{client}-{turn}");
                if connection.try_send(call(&session, turn % 2 == 0)).await.is_err() {
                    break;
                }
                let Some(head) = connection.any_head().await else { break };
                let mut framing = head.framing;
                loop {
                    match connection.piece(&mut framing).await {
                        Ok(Some(_)) => {}
                        Ok(None) => {
                            ended.push((session, Instant::now()));
                            break;
                        }
                        Err(_) => return ended,
                    }
                }
            }
            ended
        });
    }
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_balancer_loses_only_the_last_second() {
    // As fast as a machine with other work can still assemble and store.
    let pace = Duration::from_millis(3);
    let engines = [crate::common::paced(pace).await, crate::common::paced(pace).await];
    let setup = setup(&engines, "");
    let process = setup.start().await;
    let stop = Arc::new(AtomicBool::new(false));
    let running = clients(process.addresses[0].clone(), stop.clone());
    eventually("enough calls have ended", async || {
        let made: u64 = engines.iter().map(|engine| engine.stats().finished).sum();
        (made > 400).then_some(())
    })
    .await;
    tokio::time::sleep(MAX_UNSTORED).await;
    let killed = Instant::now();
    process.signal(Signal::KILL);
    stop.store(true, Ordering::Release);
    let ended: Vec<(String, Instant)> = running.join_all().await.into_iter().flatten().collect();
    drop(process);
    assert_eq!(integrity(&setup.path("traces.db")).await, "ok");
    let process = setup.start().await;
    let sessions = process.admin("/sessions").await.expect(200).json();
    let stored: HashSet<&str> = sessions
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|session| session["session_id"].as_str())
        .collect();
    let due: Vec<&str> = ended
        .iter()
        .filter(|(_, end)| *end + MAX_UNSTORED < killed)
        .map(|(session, _)| session.as_str())
        .collect();
    assert!(due.len() > 100, "{} answers had ended", due.len());
    let lost: Vec<&&str> = due.iter().filter(|session| !stored.contains(**session)).collect();
    assert!(lost.is_empty(), "of {} traces {lost:?} are lost", due.len());
    let trace = &traces(&process, due[0]).await[0];
    assert_eq!((&trace["request_id"], &trace["status"]), (&json!(due[0]), &json!(200)));
}

/// With `sync`, a client that has read the end of an answer finds its trace, also after a kill.
#[tokio::test(flavor = "multi_thread")]
async fn sync_holds_the_end_of_an_answer_until_its_trace_is_stored() {
    let engines = engines(1).await;
    let setup = setup(&engines, ", sync: true");
    for (at, stream) in [true, false, true, false].into_iter().enumerate() {
        let process = setup.start().await;
        let session = format!("s{at}");
        let mut client = Wire::connect(&process.addresses[0]).await;
        let answer = client.ask(call(&session, stream)).await.expect(200);
        process.signal(Signal::KILL);
        assert!(!stream || answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
        drop(process);
        let again = setup.start().await;
        assert_eq!(traces(&again, &session).await.len(), 1, "streams: {stream}");
    }
}

/// The same of an answer that breaks off, and of the balancer's own.
#[tokio::test(flavor = "multi_thread")]
async fn sync_holds_the_end_of_a_failed_answer_too() {
    let engines = engines(1).await;
    let setup = setup(&engines, ", sync: true");
    for (session, model, error) in [("cut", "sim", "incomplete"), ("refused", "unknown", "not_found")] {
        let process = setup.start().await;
        engines[0].set_fault_for(1, InjectedFault::CutStream { events: 3, reset: false }).await;
        let mut client = Wire::connect(&process.addresses[0]).await;
        client.send(call_of(model, session, true)).await;
        let mut framing = client.head().await.framing;
        while let Ok(Some(_)) = client.piece(&mut framing).await {}
        process.signal(Signal::KILL);
        drop(process);
        engines[0].clear_fault().await;
        let again = setup.start().await;
        let stored = traces(&again, session).await;
        assert_eq!((stored.len(), &stored[0]["error"]), (1, &json!(error)), "{session}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_on_while_the_database_is_locked() {
    let engine = engine(Default::default()).await;
    let setup = setup(std::slice::from_ref(&engine), ", queue: 40");
    let process = setup.start().await;
    let mut client = Wire::connect(&process.addresses[0]).await;
    client.ask(call("before", false)).await.expect(200);
    eventually("it is stored", async || (traces(&process, "before").await.len() == 1).then_some(())).await;
    let url = format!("sqlite:{}", setup.path("traces.db"));
    let mut lock = SqliteConnection::connect(&url).await.expect("opens");
    lock.execute("BEGIN EXCLUSIVE").await.expect("locks");
    let begun = Instant::now();
    for at in 0..400 {
        client.ask(call(&format!("s{at}"), at % 2 == 0)).await.expect(200);
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    lock.execute("ROLLBACK").await.expect("unlocks");
    drop(lock);
    // The batch in hand and the queue are stored, and what was too much is counted.
    let metric = async |result: &str| -> f64 {
        let page = process.admin("/metrics").await.expect(200);
        let name = format!("vllm_lb_traces_total{{result=\"{result}\"}} ");
        page.text().lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0.0)
    };
    eventually("all others are stored", async || {
        (metric("stored").await + metric("full").await >= 401.0).then_some(())
    })
    .await;
    assert!(metric("full").await >= 1.0 && metric("stored").await >= 41.0);
    assert_eq!(traces(&process, "s399").await.len(), 1, "the latest is there");
    client.ask(call("after", true)).await.expect(200);
    eventually("the next is stored", async || (traces(&process, "after").await.len() == 1).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_stores_the_traces_of_all_answers() {
    let engine = engine(Default::default()).await;
    let setup = setup(std::slice::from_ref(&engine), "");
    let mut process = setup.start().await;
    let mut client = Wire::connect(&process.addresses[0]).await;
    client.ask(call("last", true)).await.expect(200);
    process.signal(Signal::TERM);
    drop(client);
    assert_eq!(process.ended().await, Some(0));
    let again = setup.start().await;
    assert_eq!(traces(&again, "last").await.len(), 1);
    let flush = with_host(&wire::post("/admin/flush", ""), &again.admin);
    Wire::connect(&again.admin).await.ask(flush).await.expect(200);
}

/// With one database, it does not matter which balancer serves a turn, or is asked for the traces.
#[tokio::test(flavor = "multi_thread")]
async fn two_balancers_on_one_database_have_one_list() {
    let engines = engines(2).await;
    let server = PostgresServer::start().await;
    server.create("traces").await;
    let more = format!("traces: {{store: '{}'}}", server.url("traces"));
    let setups = [Setup::over(&engines, &more), Setup::over(&engines, &more)];
    let balancers = [setups[0].start().await, setups[1].start().await];
    let post = async |process: &Process, path: &str, body: Value| {
        let request = with_host(&wire::post(path, body.to_string()), &process.admin);
        Wire::connect(&process.admin).await.ask(request).await.expect(200)
    };
    let settings =
        json!({"session_id": "shared", "sampling_params": {"max_tokens": 7}, "metadata": {"a": 1}});
    post(&balancers[0], "/sessions", settings).await;
    post(&balancers[0], "/admin/weight_version", json!({"weight_version": 3})).await;
    eventually("the other balancer has the weight version", async || {
        let told = balancers[1].admin("/admin/weight_version").await.expect(200).json();
        (told["weight_version"] == 3).then_some(())
    })
    .await;
    for turn in 0..6 {
        let mut client = Wire::connect(&balancers[turn % 2].addresses[0]).await;
        client.ask(call("shared", turn % 3 == 0)).await.expect(200);
        post(&balancers[turn % 2], "/admin/flush", json!({})).await;
    }
    let lists = [traces(&balancers[0], "shared").await, traces(&balancers[1], "shared").await];
    assert_eq!(lists[0], lists[1]);
    assert_eq!(lists[0].len(), 6);
    for trace in &lists[0] {
        assert_eq!(trace["weight_version"], 3);
        assert_eq!(trace["raw_request"]["max_tokens"], 7, "the session's settings are known to both");
    }
    let info = balancers[1].admin("/sessions/shared").await.expect(200).json();
    assert_eq!((&info["trace_count"], &info["metadata"]), (&json!(6), &json!({"a": 1})));
    let delete = with_host(&wire::request("DELETE", "/sessions/shared", &[], b""), &balancers[1].admin);
    let gone = Wire::connect(&balancers[1].admin).await.ask(delete).await.expect(200).json();
    assert_eq!(gone, json!({"deleted": 6}));
    assert_eq!(traces(&balancers[0], "shared").await, Vec::<Value>::new());
}

/// A stop with a database that is gone lost every waiting trace without a word, and took ten seconds more.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_without_a_database_logs_the_lost_traces() {
    let engine = engine(Default::default()).await;
    let setup = Setup::over([&engine], "traces: {store: 'postgres://nobody@127.0.0.1:1/none'}");
    let begun = Instant::now();
    let mut process = setup.start().await;
    assert!(begun.elapsed() < Duration::from_secs(6), "the start waits: {:?}", begun.elapsed());
    let warning = process.says("traces cannot be stored: they wait, and the oldest are dropped").await;
    assert!(warning["error"].as_str().expect("a text").contains("refused"), "{warning}");
    let named = process.says("store of traces").await;
    assert_eq!(named["store"], "postgres://***@127.0.0.1:1/none");
    let mut client = Wire::connect(&process.addresses[0]).await;
    let begun = Instant::now();
    for at in 0..300 {
        client.ask(call(&format!("s{at}"), false)).await.expect(200);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "requests wait for it: {:?}", begun.elapsed());
    drop(client);
    process.signal(Signal::TERM);
    assert_eq!(process.ended().await, Some(0));
    let lost = |record: &Value| -> u64 {
        let is_loss = record["message"] == "traces lost: the store did not take them before the end";
        if is_loss { record["count"].as_u64().expect("a number") } else { 0 }
    };
    assert_eq!(process.records().iter().map(lost).sum::<u64>(), 300);
}
