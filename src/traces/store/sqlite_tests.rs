//! What the store in SQLite does beside what every store does.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Executor, Row};
use tempfile::TempDir;

use super::contract::{START_TIME, arcs, check_expiry, check_repeated, check_sessions, check_store};
use super::samples::{self, conversation, record};
use super::*;
use crate::observe::Observer;

/// A store in a directory that goes with the test.
struct SqliteFixture {
    folder: TempDir,
    store: Store,
}

const SHORT: StoreTimeouts = StoreTimeouts {
    busy: Duration::from_millis(300),
    acquire: Duration::from_secs(5),
    statement: Duration::from_secs(10),
};

fn config(path: &Path) -> TracesConfig {
    TracesConfig {
        store: TraceStore::Sqlite(Some(path.to_path_buf())),
        keep: Duration::from_secs(100),
        ..TracesConfig::default()
    }
}

impl SqliteFixture {
    async fn new() -> Self {
        Self::with_size(u64::MAX).await
    }

    async fn with_size(max_bytes: u64) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("state/deep/traces.db");
        let config = TracesConfig { max_bytes, ..config(&path) };
        let store = Store::open_with(&config, SHORT, &Observer::default()).await.expect("opens");
        SqliteFixture { folder, store }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("state/deep/traces.db")
    }

    /// A connection of another process.
    async fn other(&self) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.path());
        SqliteConnection::connect_with(&options).await.expect("connects")
    }

    async fn reopen(&mut self) {
        self.store.close().await;
        self.store =
            Store::open_with(&config(&self.path()), SHORT, &Observer::default()).await.expect("opens");
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sqlite_returns_what_was_put(steps in samples::steps()) {
        run(async {
            let fixture = SqliteFixture::new().await;
            check_store(&fixture.store, &samples::records(&steps)).await
        })?;
    }
}

#[tokio::test]
async fn sqlite_lists_sessions() {
    check_sessions(&SqliteFixture::new().await.store).await;
}

#[tokio::test]
async fn sqlite_keeps_a_repeated_trace_as_it_is() {
    let fixture = SqliteFixture::new().await;
    check_repeated(&fixture.store).await;
    let summary = fixture.store.session("s").await.expect("is read").expect("is there");
    assert_eq!(summary.trace_count, 2);
}

#[tokio::test]
async fn sqlite_forgets_sessions_by_age() {
    check_expiry(&SqliteFixture::new().await.store).await;
}

#[tokio::test]
async fn sqlite_makes_files_for_one_user_and_finds_them_again() {
    let mut fixture = SqliteFixture::new().await;
    let records = arcs(conversation("s", 3, 10, 3));
    fixture.store.put(&records[..2], START_TIME).await.expect("is stored");
    let mode = |path: &Path| std::fs::metadata(path).expect("is there").permissions().mode() & 0o777;
    assert_eq!(mode(&fixture.path()), 0o600);
    assert_eq!(mode(&fixture.path().with_extension("db-wal")), 0o600);
    assert_eq!(mode(fixture.path().parent().expect("a directory")), 0o700);
    assert!(fixture.store.bytes() > 0);
    fixture.reopen().await;
    // What was known of the session went with the process: the row is whole.
    fixture.store.put(&records[2..], START_TIME).await.expect("is stored");
    let read = fixture.store.traces("s", None, None).await.expect("is read");
    assert_eq!(
        read.iter().map(|stored| &stored.record).collect::<Vec<_>>(),
        records.iter().collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn sqlite_reads_texts_that_a_database_cannot_hold() {
    let fixture = SqliteFixture::new().await;
    let long = "é".repeat(2_000);
    let mut odd = record(&long, "t\0", &["no JSON"], &[1], &[2]);
    odd.model = "a\0b".into();
    odd.tokens.prompt = Some(u64::MAX);
    fixture.store.put(&arcs(vec![odd]), START_TIME).await.expect("is stored");
    let read = fixture.store.traces(&long, None, None).await.expect("is read");
    assert_eq!(read[0].record.model, "a\u{1a}b");
    assert_eq!(&*read[0].record.turns[0], "\"no JSON\"");
    assert_eq!(read[0].record.tokens.prompt, Some(i64::MAX as u64));
    assert!(fixture.store.trace("t\0").await.expect("is read").is_some());
    assert_eq!(fixture.store.delete_sessions(&[long]).await.expect("is deleted"), 1);
}

/// The prompts of the header's queries are those that were put.
#[tokio::test]
async fn sqlite_rebuilds_a_prompt_with_plain_sql() {
    let fixture = SqliteFixture::new().await;
    let mut records = conversation("s", 6, 40, 5);
    // One answer without ids, one prompt that repeats none, one that is cut.
    records[1].choices[0].token_ids.clear();
    records[3].prompt_token_ids.clear();
    records[5].prompt_token_ids.truncate(43);
    records[5].turns.truncate(4);
    fixture.store.put(&arcs(records.clone()), START_TIME).await.expect("is stored");
    let header = include_str!("sql.rs").lines().map_while(|line| line.strip_prefix("//!"));
    let header: String = header.collect::<Vec<_>>().join("\n");
    let queries: Vec<&str> =
        header.split("```sql").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let mut other = fixture.other().await;
    for record in &records {
        let turns =
            sqlx::query(queries[0]).bind(&record.facts.trace_id).fetch_all(&mut other).await.expect("runs");
        let turns: Vec<String> = turns.iter().map(|row| row.get("turn")).collect();
        assert_eq!(turns, record.turns.iter().map(ToString::to_string).collect::<Vec<_>>());
        let ids =
            sqlx::query(queries[1]).bind(&record.facts.trace_id).fetch_all(&mut other).await.expect("runs");
        let ids: Vec<u32> = ids.iter().map(|row| row.get("id")).collect();
        assert_eq!(ids, record.prompt_token_ids, "{}", record.facts.trace_id);
    }
}

#[tokio::test]
async fn sqlite_waits_for_a_lock_then_fails_and_works_again() {
    let fixture = SqliteFixture::new().await;
    let records = arcs(conversation("s", 4, 10, 3));
    fixture.store.put(&records[..1], START_TIME).await.expect("is stored");
    let mut other = fixture.other().await;
    other.execute("BEGIN EXCLUSIVE").await.expect("locks");
    let begun = Instant::now();
    let error = fixture.store.put(&records[1..], START_TIME).await.expect_err("is locked");
    assert!(error.to_string().contains("locked"), "{error}");
    assert!(begun.elapsed() >= SHORT.busy, "{:?}", begun.elapsed());
    assert!(begun.elapsed() < SHORT.statement, "{:?}", begun.elapsed());
    // Readers do not wait for it.
    assert_eq!(fixture.store.traces("s", None, None).await.expect("is read").len(), 1);
    other.execute("ROLLBACK").await.expect("unlocks");
    fixture.store.put(&records[1..], START_TIME).await.expect("is stored");
    let read = fixture.store.traces("s", None, None).await.expect("is read");
    assert_eq!(
        read.iter().map(|stored| &stored.record).collect::<Vec<_>>(),
        records.iter().collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn sqlite_stores_nothing_of_a_batch_that_fails() {
    let fixture = SqliteFixture::new().await;
    let records = arcs(conversation("s", 5, 100, 3));
    fixture.store.put(&records[..1], START_TIME).await.expect("is stored");
    let mut other = fixture.other().await;
    // What a full disk does: an error at the third row of the batch.
    let full = "CREATE TRIGGER full BEFORE INSERT ON traces WHEN NEW.trace_id = 's/3' \
         BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END";
    other.execute(full).await.expect("a trigger");
    let error = fixture.store.put(&records[1..], START_TIME).await.expect_err("is full");
    assert!(error.to_string().contains("disk is full"), "{error}");
    assert_eq!(fixture.store.traces("s", None, None).await.expect("is read").len(), 1);
    other.execute("DROP TRIGGER full").await.expect("no trigger");
    fixture.store.put(&records[1..], START_TIME).await.expect("is stored");
    let read = fixture.store.traces("s", None, None).await.expect("is read");
    assert_eq!(
        read.iter().map(|stored| &stored.record).collect::<Vec<_>>(),
        records.iter().collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn sqlite_stores_a_trace_whole_when_its_parent_is_gone() {
    let fixture = SqliteFixture::new().await;
    let records = arcs(conversation("s", 3, 100, 3));
    fixture.store.put(&records[..2], START_TIME).await.expect("is stored");
    // Another process deletes the session.
    let options = SqliteConnectOptions::new().filename(fixture.path()).foreign_keys(true);
    let mut other = SqliteConnection::connect_with(&options).await.expect("connects");
    other.execute("DELETE FROM sessions").await.expect("deletes");
    fixture.store.put(&records[2..], START_TIME).await.expect("is stored");
    let read = fixture.store.traces("s", None, None).await.expect("is read");
    assert_eq!(read.iter().map(|stored| &stored.record).collect::<Vec<_>>(), [&records[2]]);
}

#[tokio::test]
async fn sqlite_refuses_a_later_schema() {
    let fixture = SqliteFixture::new().await;
    fixture.other().await.execute("INSERT INTO trace_schema (version) VALUES (99)").await.expect("inserts");
    fixture.store.close().await;
    let error = Store::open_with(&config(&fixture.path()), SHORT, &Observer::default())
        .await
        .err()
        .expect("is refused");
    assert!(matches!(error, StoreError::NewerSchema { found: 99, .. }), "{error}");
    assert!(error.to_string().contains("newer vllm-lb"), "{error}");
}

#[tokio::test]
async fn sqlite_reports_a_file_that_is_no_database() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("traces.db");
    std::fs::write(&path, "no database ".repeat(1_000)).expect("is written");
    let error =
        Store::open_with(&config(&path), SHORT, &Observer::default()).await.err().expect("is refused");
    assert!(error.to_string().contains("not a database"), "{error}");
    let below_a_file = path.join("traces.db");
    let error = Store::open_with(&config(&below_a_file), SHORT, &Observer::default())
        .await
        .err()
        .expect("is refused");
    assert!(matches!(error, StoreError::Open { .. }), "{error}");
}

#[tokio::test]
async fn sqlite_keeps_its_size() {
    const MAX_BYTES: u64 = 1 << 20;
    let fixture = SqliteFixture::with_size(MAX_BYTES).await;
    for number in 0..40 {
        let records = arcs(conversation(&format!("s{number}"), 2, 4_000, 100));
        fixture.store.put(&records, START_TIME + f64::from(number)).await.expect("is stored");
    }
    let before = fixture.store.bytes();
    let deleted = fixture.store.expire(START_TIME + 50.0).await.expect("expires");
    assert!(before > 2 * MAX_BYTES, "{before}");
    assert!(fixture.store.bytes() <= MAX_BYTES + (64 << 10), "{} bytes", fixture.store.bytes());
    assert!(fixture.store.bytes() > MAX_BYTES / 2, "{} bytes", fixture.store.bytes());
    let left = fixture.store.sessions(None, None).await.expect("is read");
    assert_eq!(left.len() as u64, 40 - deleted / 2);
    assert_eq!(left[0].session_id, "s39", "the most recent one stays");
    let read = fixture.store.traces("s39", None, None).await.expect("is read");
    assert_eq!(*read[1].record, conversation("s39", 2, 4_000, 100)[1]);
}

#[tokio::test]
async fn sqlite_stores_what_a_turn_adds() {
    let mut fixture = SqliteFixture::new().await;
    let records = arcs(conversation("s", 20, 8_000, 200));
    fixture.store.put(&records[..1], START_TIME).await.expect("is stored");
    fixture.reopen().await;
    let first = fixture.store.bytes();
    fixture.store.put(&records[..1], START_TIME).await.expect("is known");
    for record in &records[1..] {
        fixture.store.put(std::slice::from_ref(record), START_TIME).await.expect("is stored");
    }
    fixture.reopen().await;
    let each = (fixture.store.bytes() - first) / 19;
    println!("sqlite: {first} bytes of the first turn, {each} of each further turn");
    assert!(each < 16_000, "{each} bytes of 200 new tokens");
}
