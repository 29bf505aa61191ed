//! Checks of the behaviour that all stores share.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::samples::{conversation, record};
use crate::traces::record::{SessionSettings, TraceRecord};
use crate::traces::store::Store;

/// The time at which the checks begin.
pub(super) const START_TIME: f64 = 1_700_000_000.0;

pub(super) fn arcs(records: Vec<TraceRecord>) -> Vec<Arc<TraceRecord>> {
    records.into_iter().map(Arc::new).collect()
}

/// What is read equals what was put, by each way of reading.
async fn check_read(store: &Store, put: &[Arc<TraceRecord>]) -> Result<(), TestCaseError> {
    for session in ["session/0:x", "session/1:x", "session/2:x"] {
        let wanted: Vec<_> = put.iter().filter(|record| record.facts.session_id == session).collect();
        let read = store.traces(session, None, None).await.expect("is read");
        prop_assert_eq!(read.iter().map(|stored| &stored.record).collect::<Vec<_>>(), wanted.clone());
        prop_assert!(read.is_sorted_by(|a, b| a.created_at < b.created_at));
        let latest = store.latest_trace(session).await.expect("is read");
        prop_assert_eq!(latest.as_ref(), read.last());
        let middle = read.get(read.len() / 2).map(|stored| stored.created_at);
        let since = store.traces(session, middle, Some(2)).await.expect("is read");
        prop_assert_eq!(&since[..], &read[read.len() / 2..(read.len() / 2 + 2).min(read.len())]);
        let summary = store.session(session).await.expect("is read");
        prop_assert_eq!(summary.map_or(0, |summary| summary.trace_count), wanted.len() as u64);
    }
    for record in put {
        let stored = store.trace(&record.facts.trace_id).await.expect("is read").expect("is there");
        prop_assert_eq!(&stored.record, record);
    }
    Ok(())
}

/// Puts random records in batches, checks them, and deletes one session after the other.
pub(super) async fn check_store(store: &Store, records: &[Arc<TraceRecord>]) -> Result<(), TestCaseError> {
    for batch in records.chunks(5) {
        store.put(batch, START_TIME).await.expect("is stored");
    }
    check_read(store, records).await?;
    let mut rest = records.to_vec();
    for session in ["session/1:x", "session/0:x", "session/2:x"] {
        let before = rest.len();
        rest.retain(|record| record.facts.session_id != session);
        let deleted = store.delete_sessions(&[session.into(), "none".into()]).await.expect("is deleted");
        prop_assert_eq!(deleted, (before - rest.len()) as u64);
        check_read(store, &rest).await?;
    }
    Ok(())
}

/// Lists sessions, with the settings of one of them.
pub(super) async fn check_sessions(store: &Store) {
    let one = |session: &str| vec![Arc::new(record(session, session, &["{}"], &[1], &[2]))];
    store.put(&one("a"), START_TIME).await.expect("is stored");
    store.put(&one("b"), START_TIME + 1.0).await.expect("is stored");
    store
        .put(&[Arc::new(record("a", "a2", &["{}"], &[1], &[2]))], START_TIME + 2.0)
        .await
        .expect("is stored");
    let metadata = serde_json::json!({"k": "é\u{2028}"});
    let settings = SessionSettings {
        session_id: "a".into(),
        created_at: START_TIME - 5.0,
        metadata: metadata.as_object().expect("is an object").clone(),
        sampling_params: serde_json::json!({"temperature": 0.25}).as_object().expect("is an object").clone(),
        model: Some("m".into()),
    };
    store.put_session(&settings).await.expect("is stored");
    store
        .put_session(&SessionSettings { session_id: "empty".into(), ..settings.clone() })
        .await
        .expect("is stored");
    let ids = async |since, limit| -> Vec<(String, u64, f64)> {
        let sessions = store.sessions(since, limit).await.expect("is read");
        sessions.into_iter().map(|s| (s.session_id, s.trace_count, s.created_at)).collect()
    };
    let (a, b) = (("a".to_string(), 2, START_TIME - 5.0), ("b".to_string(), 1, START_TIME + 1.0));
    assert_eq!(ids(None, None).await, [b.clone(), a.clone()]);
    assert_eq!(ids(None, Some(1)).await, [b]);
    assert_eq!(ids(Some(START_TIME + 2.0), None).await, [a]);
    let summary = store.session("a").await.expect("is read").expect("is there");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&summary.metadata).expect("is JSON"), metadata);
    let empty = store.session("empty").await.expect("is read").expect("is there");
    assert_eq!((empty.trace_count, empty.created_at), (0, START_TIME - 5.0));
    assert_eq!(store.session("none").await.expect("is read"), None);
    assert_eq!(store.load_session("a").await.expect("is read"), Some(settings.clone()));
    assert_eq!(store.load_session("b").await.expect("is read"), None);

    let anew = SessionSettings { created_at: START_TIME + 9.0, model: None, ..settings };
    store.put_session(&anew).await.expect("is stored");
    assert_eq!(store.load_session("a").await.expect("is read"), Some(anew));

    assert_eq!(store.weight_version().await.expect("is read"), None);
    for version in [Some(-7), None, Some(i64::MAX)] {
        store.set_weight_version(version).await.expect("is stored");
        assert_eq!(store.weight_version().await.expect("is read"), version);
    }
    assert_eq!(
        store.delete_sessions(&["a".into(), "b".into(), "empty".into()]).await.expect("is deleted"),
        3
    );
    assert_eq!(store.session("empty").await.expect("is read"), None);
}

/// A trace that is put again stays as it is.
pub(super) async fn check_repeated(store: &Store) {
    let records = arcs(conversation("s", 2, 10, 3));
    store.put(&records, START_TIME).await.expect("is stored");
    store.put(&records, START_TIME + 1.0).await.expect("is stored");
    // The least time between two traces of a session.
    let step = 2.0_f64.powi(-20);
    let read = store.traces("s", None, None).await.expect("is read");
    assert_eq!(
        read.iter().map(|stored| stored.created_at).collect::<Vec<_>>(),
        [START_TIME, START_TIME + step]
    );
}

/// Sessions go that had no trace for too long.
pub(super) async fn check_expiry(store: &Store) {
    for (session, at) in [("old", 0.0), ("new", 50.0)] {
        let records = arcs(conversation(session, 3, 10, 3));
        store.put(&records, START_TIME + at).await.expect("is stored");
    }
    assert_eq!(store.expire(START_TIME + 99.0).await.expect("expires"), 0);
    assert_eq!(store.expire(START_TIME + 101.0).await.expect("expires"), 3);
    assert_eq!(store.session("old").await.expect("is read"), None);
    assert_eq!(store.traces("new", None, None).await.expect("is read").len(), 3);
}
