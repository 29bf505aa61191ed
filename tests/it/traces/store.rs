//! The stores of traces in databases: a real PostgreSQL server, and a writer that is killed.

#[path = "../../../src/traces/store/contract.rs"]
mod contract;
#[path = "../../../src/traces/store/samples.rs"]
mod samples;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::eventually;
use crate::common::postgres::{PostgresServer, signal};
use contract::{START_TIME, arcs, check_expiry, check_repeated, check_sessions, check_store};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use rustix::process::Signal;
use samples::conversation;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Executor, Row};
use vllm_lb::config::secret::Secret;
use vllm_lb::config::types::{TraceStore, TracesConfig};
use vllm_lb::observe::Observer;
use vllm_lb::traces::record::TraceRecord;
use vllm_lb::traces::store::{Store, StoreError, StoreTimeouts};

const SHORT: StoreTimeouts = StoreTimeouts {
    busy: Duration::from_secs(5),
    acquire: Duration::from_secs(2),
    statement: Duration::from_secs(3),
};

/// The directory in which the writer process stores has this file.
const WRITER_MARK: &str = "trace-store-writer";

// === PostgreSQL ===

fn config(server: &PostgresServer, database: &str) -> TracesConfig {
    TracesConfig {
        store: TraceStore::Postgres(Secret::new(server.url(database))),
        keep: Duration::from_secs(100),
        ..TracesConfig::default()
    }
}

async fn store_of(server: &PostgresServer, database: &str) -> Store {
    Store::open_with(&config(server, database), SHORT, &Observer::default()).await.expect("opens")
}

async fn records_of(store: &Store, session: &str) -> Vec<Arc<TraceRecord>> {
    let read = store.traces(session, None, None).await.expect("is read");
    read.into_iter().map(|stored| stored.record).collect()
}

#[tokio::test]
async fn postgres_meets_the_contract_of_stores() {
    let server = PostgresServer::start().await;
    server.create("one").await;
    let store = store_of(&server, "one").await;
    check_sessions(&store).await;
    let mut runner = TestRunner::deterministic();
    for _ in 0..12 {
        let steps = samples::steps().new_tree(&mut runner).expect("a value").current();
        check_store(&store, &samples::records(&steps)).await.expect("holds");
    }
    check_repeated(&store).await;
    store.delete_sessions(&["s".into()]).await.expect("is deleted");
    check_expiry(&store).await;
    let mut odd = conversation("odd\0", 1, 10, 2);
    odd[0].model = "a\0b".into();
    store.put(&arcs(odd), START_TIME).await.expect("a text that PostgreSQL does not take fails no batch");
    assert_eq!(records_of(&store, "odd\0").await[0].model, "a\u{1a}b");
    assert_eq!(store.delete_sessions(&["x".repeat(100_000)]).await.expect("no such session"), 0);
}

#[tokio::test]
async fn postgres_respects_the_size_limit() {
    let server = PostgresServer::start().await;
    server.create("one").await;
    let config = TracesConfig { max_bytes: 1 << 18, ..config(&server, "one") };
    let store = Store::open_with(&config, SHORT, &Observer::default()).await.expect("opens");
    for number in 0..40 {
        let records = arcs(conversation(&format!("s{number}"), 2, 4_000, 100));
        store.put(&records, START_TIME + f64::from(number)).await.expect("is stored");
    }
    let deleted = store.expire(START_TIME + 50.0).await.expect("expires");
    let left = store.sessions(None, None).await.expect("is read");
    assert!(deleted > 0);
    assert_eq!(left.len() as u64, 40 - deleted / 2);
    assert_eq!(left[0].session_id, "s39");
    assert!(store.bytes() > 1 << 17 && store.bytes() <= 1 << 18, "{}", store.bytes());
}

#[tokio::test]
async fn balancers_share_a_postgres_database() {
    let server = PostgresServer::start().await;
    server.create("shared").await;
    // Both migrate at the same time.
    let (first, second) = tokio::join!(store_of(&server, "shared"), store_of(&server, "shared"));
    let records = arcs(conversation("s", 10, 100, 5));
    for (place, record) in records.iter().enumerate() {
        let balancer = if place % 2 == 0 { &first } else { &second };
        balancer.put(std::slice::from_ref(record), START_TIME).await.expect("is stored");
    }
    assert_eq!(records_of(&first, "s").await, records, "one list, in the order in which they were stored");
    assert_eq!(records_of(&second, "s").await, records);

    // Many sessions at once, in different orders: no deadlock, nothing lost.
    let forth: Vec<_> =
        (0..40).flat_map(|n| conversation(&format!("f{n}"), 1, 50, 3)).map(Arc::new).collect();
    let second_turns = (0..40).rev().map(|n| conversation(&format!("f{n}"), 2, 50, 3).remove(1));
    let back: Vec<_> = second_turns.map(Arc::new).collect();
    let (one, other) = tokio::join!(first.put(&forth, START_TIME), second.put(&back, START_TIME));
    one.and(other).expect("are stored");
    for session in 0..40 {
        assert_eq!(records_of(&second, &format!("f{session}")).await.len(), 2);
    }

    // One deletes what the other one's next trace goes on with.
    first.delete_sessions(&["s".into()]).await.expect("is deleted");
    second.put(&arcs(conversation("s", 11, 100, 5))[10..], START_TIME).await.expect("is stored");
    assert_eq!(*records_of(&first, "s").await[0], conversation("s", 11, 100, 5)[10]);

    second.set_weight_version(Some(7)).await.expect("is stored");
    assert_eq!(first.weight_version().await.expect("is read"), Some(7));
    let later = "INSERT INTO trace_schema (version) VALUES (99)";
    server.connect("shared").await.execute(later).await.expect("inserts");
    let error = Store::open_with(&config(&server, "shared"), SHORT, &Observer::default())
        .await
        .err()
        .expect("is refused");
    assert!(matches!(error, StoreError::NewerSchema { found: 99, .. }), "{error}");
}

#[tokio::test]
async fn writes_resume_after_postgres_was_unreachable() {
    let mut server = PostgresServer::start().await;
    server.create("one").await;
    server.crash();
    // The balancer starts without its database.
    let store = store_of(&server, "one").await;
    let records = arcs(conversation("s", 4, 100, 5));
    let begun = Instant::now();
    store.put(&records[..2], START_TIME).await.expect_err("there is no server");
    assert!(begun.elapsed() < SHORT.acquire + SHORT.statement, "{:?}", begun.elapsed());
    server.again().await;
    store.put(&records[..2], START_TIME).await.expect("is stored");
    server.crash();
    store.put(&records[2..3], START_TIME).await.expect_err("there is no server");
    store.traces("s", None, None).await.expect_err("there is no server");
    server.again().await;
    store.put(&records[2..3], START_TIME).await.expect("is stored");
    assert_eq!(records_of(&store, "s").await, records[..3]);

    // A lock that lasts: the server ends the statement.
    let mut other = server.connect("one").await;
    other.execute("BEGIN; LOCK TABLE sessions").await.expect("locks");
    let error = store.put(&records[3..], START_TIME).await.expect_err("is locked");
    assert!(error.to_string().contains("timeout"), "{error}");
    other.execute("ROLLBACK").await.expect("unlocks");

    // Connections that do not answer: they are given up, and others are made.
    let pids = "SELECT pid FROM pg_stat_activity WHERE application_name = 'vllm-lb'";
    let frozen: Vec<i32> = other.fetch_all(pids).await.expect("runs").iter().map(|row| row.get(0)).collect();
    assert!(!frozen.is_empty());
    frozen.iter().for_each(|pid| signal(pid.unsigned_abs(), Signal::STOP));
    let put = eventually("a new connection", async || {
        let begun = Instant::now();
        let put = store.put(&records[3..], START_TIME).await;
        assert!(begun.elapsed() < SHORT.acquire + SHORT.statement, "{:?}", begun.elapsed());
        put.ok()
    });
    put.await;
    frozen.iter().for_each(|pid| signal(pid.unsigned_abs(), Signal::CONT));
    assert_eq!(records_of(&store, "s").await, records);
}

// === kill -9 ===

/// Not a test: the process that `sqlite_holds_what_was_stored_before_a_kill` starts and kills.
#[tokio::test]
#[ignore = "another test starts it"]
#[allow(clippy::disallowed_methods, reason = "how a test runs is no setting of the product")]
async fn writer_process() {
    assert!(Path::new(WRITER_MARK).exists(), "only another test starts it");
    let store = Store::open_with(&sqlite_config(Path::new("traces.db")), SHORT, &Observer::default())
        .await
        .expect("opens");
    for number in 0.. {
        let records = arcs(conversation(&format!("s{number}"), 3, 2_000, 50));
        store.put(&records, START_TIME).await.expect("is stored");
        println!("\nstored {number}");
        std::io::stdout().flush().expect("the other process reads");
    }
}

fn sqlite_config(file: &Path) -> TracesConfig {
    TracesConfig { store: TraceStore::Sqlite(Some(file.to_path_buf())), ..TracesConfig::default() }
}

#[tokio::test]
async fn sqlite_holds_what_was_stored_before_a_kill() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("traces.db");
    std::fs::write(folder.path().join(WRITER_MARK), "").expect("is written");
    let mut last = None;
    // A second writer goes on with what the first one left.
    for least in [20, 40] {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "store::writer_process", "--ignored", "--nocapture"])
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        for line in BufReader::new(child.stdout.take().expect("is piped")).lines() {
            let line = line.expect("is text");
            let Some(number) = line.strip_prefix("stored ") else { continue };
            last = last.max(number.parse::<u32>().ok());
            if last == Some(least) {
                child.kill().expect("is there");
            }
        }
        child.wait().expect("its own child can be waited for");
        assert!(last >= Some(least), "the writer ended by itself");
    }
    let options = SqliteConnectOptions::new().filename(&file);
    let mut database = SqliteConnection::connect_with(&options).await.expect("connects");
    let check = database.fetch_one("PRAGMA integrity_check").await.expect("runs");
    assert_eq!(check.get::<String, _>(0), "ok");
    let store = Store::open_with(&sqlite_config(&file), SHORT, &Observer::default()).await.expect("opens");
    for number in 0..=last.expect("some were stored") {
        let session = format!("s{number}");
        assert_eq!(records_of(&store, &session).await, arcs(conversation(&session, 3, 2_000, 50)));
    }
    let sessions = store.sessions(None, None).await.expect("is read");
    assert!(sessions.iter().all(|session| session.trace_count == 3), "no part of a batch: {sessions:?}");
}
