//! What every store does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::contents::StoreLimits;
use super::contract::{START_TIME, arcs, check_expiry, check_repeated, check_sessions, check_store};
use super::samples::{self, conversation, record};
use super::*;
use crate::observe::Observer;

fn config() -> TracesConfig {
    TracesConfig { keep: Duration::from_secs(100), ..TracesConfig::default() }
}

fn limits(max_bytes: u64) -> StoreLimits {
    StoreLimits { keep: Duration::from_secs(100), max_bytes }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(future)
}

fn memory(limit: u64) -> Store {
    Store::Memory(MemoryStore::new(limits(limit)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn memory_returns_what_was_put(steps in samples::steps()) {
        let store = memory(1 << 30);
        run(check_store(&store, &samples::records(&steps)))?;
        prop_assert_eq!(store.bytes(), 0, "each byte is given back");
    }

    #[test]
    fn memory_counts_bytes_under_eviction(steps in samples::steps(), limit in 0..20_000_u64) {
        let store = memory(limit);
        let records = samples::records(&steps);
        run(async {
            for record in &records {
                store.put(std::slice::from_ref(record), START_TIME).await.expect("is stored");
                prop_assert!(store.bytes() <= limit);
            }
            for session in store.sessions(None, None).await.expect("is read") {
                for stored in store.traces(&session.session_id, None, None).await.expect("is read") {
                    prop_assert!(records.contains(&stored.record));
                }
                store.delete_sessions(&[session.session_id]).await.expect("is deleted");
            }
            Ok(())
        })?;
        prop_assert_eq!(store.bytes(), 0);
    }
}

#[test]
fn finds_the_database() {
    type Row<'a> = (Option<&'a str>, &'a [(&'a str, &'a str)], &'a str);
    let cases: [Row<'_>; 7] = [
        (Some("/a/b.db"), &[("HOME", "/h")], "/a/b.db"),
        (Some("~/b.db"), &[("HOME", "/h")], "/h/b.db"),
        (Some("~/b.db"), &[], "~/b.db"),
        (None, &[("STATE_DIRECTORY", "/s:/t"), ("HOME", "/h")], "/s/traces.db"),
        (None, &[("XDG_STATE_HOME", "/x"), ("HOME", "/h")], "/x/vllm-lb/traces.db"),
        (None, &[("XDG_STATE_HOME", ""), ("HOME", "/h")], "/h/.local/state/vllm-lb/traces.db"),
        (None, &[("STATE_DIRECTORY", "")], "TEMP/vllm-lb/traces.db"),
    ];
    for (named, env, wanted) in cases {
        let lookup =
            |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        let wanted = wanted.replace("TEMP", &std::env::temp_dir().display().to_string());
        assert_eq!(sqlite_path(named.map(Path::new), lookup), Path::new(&wanted), "{named:?} {env:?}");
    }
}

#[tokio::test]
async fn a_store_of_none_holds_nothing() {
    let store = Store::open(&TracesConfig { store: TraceStore::None, ..config() }, &Observer::default())
        .await
        .expect("opens");
    store.put(&arcs(conversation("s", 2, 10, 3)), START_TIME).await.expect("is accepted");
    assert_eq!(store.traces("s", None, None).await.expect("is read"), []);
    assert_eq!(store.bytes(), 0);
}

#[tokio::test]
async fn memory_lists_sessions() {
    let store = memory(1 << 20);
    check_sessions(&store).await;
    assert_eq!(store.bytes(), 0);
}

#[tokio::test]
async fn memory_keeps_a_repeated_trace_as_it_is() {
    check_repeated(&memory(1 << 20)).await;
}

#[tokio::test]
async fn memory_forgets_sessions_by_age() {
    check_expiry(&memory(1 << 20)).await;
}

#[tokio::test]
async fn memory_holds_its_limit_under_ten_times_as_many_traces() {
    const LIMIT: u64 = 1 << 20;
    let Store::Memory(store) = memory(LIMIT) else { panic!("made so") };
    let (mut put, mut dropped, mut raw) = (0, 0, 0);
    for session in 0.. {
        let records = arcs(conversation(&format!("s{session}"), 5, 2_000, 100));
        put += records.len() as u64;
        raw += records[0].turns[0].len() as u64 + 4 * records[0].prompt_token_ids.len() as u64;
        store.put(&records, START_TIME);
        dropped += store.expire(START_TIME);
        assert!(store.bytes() <= LIMIT);
        if raw > 10 * LIMIT {
            break;
        }
    }
    let held: u64 = store.sessions(None, None).iter().map(|session| session.trace_count).sum();
    assert_eq!(held + dropped, put);
    assert!(store.bytes() > LIMIT / 2, "the limit is used: {}", store.bytes());
}

#[tokio::test]
async fn memory_drops_the_oldest_traces_of_the_least_recently_active_session() {
    let store = MemoryStore::new(limits(40_000));
    store.put(&arcs(conversation("a", 4, 500, 10)), START_TIME);
    store.put(&arcs(conversation("b", 4, 500, 10)), START_TIME + 1.0);
    let mut dropped = 0;
    for number in 0.. {
        let new = record("a", &format!("new{number}"), &["{}"], &[1], &[2]);
        store.put(&[Arc::new(new)], START_TIME + 2.0);
        dropped += store.expire(START_TIME);
        if dropped > 0 {
            break;
        }
    }
    let b = store.traces("b", None, None).await.expect("is read");
    assert_eq!(b.len() as u64, 4 - dropped);
    let whole = conversation("b", 4, 500, 10);
    let left: Vec<_> = b.iter().map(|stored| &*stored.record).collect();
    assert_eq!(left, whole[dropped as usize..].iter().collect::<Vec<_>>());
    assert!(store.trace("b/0").is_none());
    assert_eq!(store.traces("a", None, None).await.expect("is read")[..4].len(), 4);
}

#[tokio::test]
async fn memory_stores_what_a_turn_adds() {
    let Store::Memory(store) = memory(1 << 30) else { panic!("made so") };
    let records = arcs(conversation("s", 20, 8_000, 200));
    store.put(&records[..1], START_TIME);
    let first = store.bytes();
    store.put(&records[1..], START_TIME);
    let each = (store.bytes() - first) / 19;
    println!("memory: {first} bytes of the first turn, {each} of each further turn");
    assert!(each < 20_000, "{each} bytes of 200 new tokens");
    assert!(first > 8_000 * 4 + 32_000);
}

#[tokio::test]
async fn memory_follows_subagents_that_take_turns() {
    let Store::Memory(store) = memory(1 << 30) else { panic!("made so") };
    let main = arcs(conversation("s", 6, 4_000, 50));
    let other = conversation("s", 6, 4_000, 50).into_iter().map(|mut record| {
        record.turns[0] = "{\"role\":\"system\",\"content\":\"another\"}".into();
        record.prompt_token_ids[0] = 1;
        record.facts.trace_id += "-other";
        Arc::new(record)
    });
    for (main, other) in main.iter().zip(other) {
        store.put(&[main.clone(), other], START_TIME);
    }
    // Two first prompts of 16 kB of ids and one of text, and ten small turns.
    assert!(store.bytes() < 120_000, "{}", store.bytes());
}

#[test]
fn memory_drops_a_long_session_on_a_small_stack() {
    let drop_it = || {
        let store = MemoryStore::new(limits(1 << 30));
        for turn in 0..2_000_u32 {
            // Each prompt is the one before it with its answer.
            let prompt: Vec<u32> = (0..turn).collect();
            store.put(&[Arc::new(record("s", &turn.to_string(), &[], &prompt, &[turn]))], START_TIME);
        }
        store.delete_sessions(&["s".into()])
    };
    let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(drop_it).expect("a thread");
    assert_eq!(thread.join().expect("no overflow"), 2_000);
}

/// They were fixed when the store was opened, although a reload reported them as changed.
#[test]
fn a_reload_changes_the_limits_of_a_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = TraceStore::Sqlite(Some(folder.path().join("traces.db")));
    for store in [TraceStore::Memory, file] {
        let config = TracesConfig { store, ..config() };
        run(async {
            let store = Store::open(&config, &Observer::default()).await.expect("opens");
            store.put(&arcs(conversation("s", 3, 100, 5)), START_TIME).await.expect("is stored");
            assert_eq!(store.expire(START_TIME + 50.0).await.expect("runs"), 0);
            store.set_limits(&TracesConfig { keep: Duration::from_secs(10), ..config.clone() });
            assert_eq!(store.expire(START_TIME + 50.0).await.expect("runs"), 3);
        });
    }
}
