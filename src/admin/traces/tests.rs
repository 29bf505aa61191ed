//! Lists of traces, page by page.

use std::sync::Arc;

use super::*;
use crate::config::types::TracesConfig;
use crate::observe::Observer;
use crate::traces::store::samples::record;

#[test]
fn joins_lists_by_their_format() {
    for (form, none, one, two) in
        [(ListForm::Array, "[]", "[{}]", "[{},{}]"), (ListForm::Lines, "", "{}\n", "{}\n{}\n")]
    {
        for (count, expected) in [none, one, two].into_iter().enumerate() {
            let mut list = TraceList::new(form);
            (0..count).for_each(|_| assert!(list.add("{}").is_ok()));
            let answer = respond(list.answer());
            assert_eq!(answer.body(), expected, "{form:?} of {count}");
        }
    }
}

/// Reads a session of `session` traces of `each` bytes. Returns the number of traces read, and the
/// size of the largest page after the first.
fn read_pages(range: ListRange, session: usize, each: usize) -> (usize, usize) {
    let (mut pages, mut read, mut most) = (ListPages::new(range), 0, 0);
    while let Some((since, wanted)) = pages.next() {
        if read > 0 {
            assert_eq!(since, Some(((read - 1) as f64).next_up()), "it begins behind the one before");
            most = most.max(wanted * each);
        }
        let count = wanted.min(session - read);
        read += count;
        pages.add(count, read.checked_sub(1).map(|last| last as f64), count * each);
    }
    (read, most)
}

#[test]
fn reads_long_sessions_in_small_pages() {
    let all = ListRange::default();
    for (session, each) in [(0, 1), (1, 1), (31, 1), (32, 1), (33, 10), (5_000, 100), (200, 5 << 20)] {
        let (read, most) = read_pages(all, session, each);
        assert!(read == session && most <= MAX_PAGE_BYTES, "{session}: {read} {most}");
    }
    assert_eq!(read_pages(all, 40, 64 << 20).0, 40, "one is read at least");
    for limit in [0, 1, 32, 40, 5_000, usize::MAX] {
        let range = ListRange { since: None, limit: Some(limit) };
        assert_eq!(read_pages(range, 4_000, 1_000).0, limit.min(4_000));
    }
}

#[tokio::test]
async fn lists_a_whole_session_from_several_pages() {
    let store = Store::open(&TracesConfig::default(), &Observer::default()).await.expect("a store in memory");
    let records = (0..100).map(|at| Arc::new(record("s", &at.to_string(), &["{}"], &[1], &[2])));
    store.put(&records.collect::<Vec<_>>(), 1.0).await.expect("is stored");
    let list = async |limit, body| {
        let range = ListRange { since: None, limit };
        TraceList { limit: body, ..TraceList::new(ListForm::Lines) }.with_session(&store, "s", range).await
    };
    let whole = list(None, 1 << 20).await.ok().expect("fits").body;
    let ids = |body: &[u8]| -> Vec<Value> {
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| serde_json::from_slice::<Value>(line).expect("JSON")["trace_id"].clone()).collect()
    };
    let wanted: Vec<Value> = (0..100).map(|at| json!(at.to_string())).collect();
    assert_eq!(ids(&whole), wanted);
    assert_eq!(ids(&list(Some(70), 1 << 20).await.ok().expect("fits").body), wanted[..70]);
    let failed = list(None, 10_000).await.err().expect("is too long");
    assert_eq!(failed.0, StatusCode::PAYLOAD_TOO_LARGE);
}

#[test]
fn accepts_numbers_and_texts_of_numbers_as_weight_versions() {
    for (given, expected) in [
        (json!(7), Some(7)),
        (json!(-7), Some(-7)),
        (json!("42"), Some(42)),
        (json!(" 42 "), Some(42)),
        (json!(i64::MAX), Some(i64::MAX)),
        (json!(i64::MIN), None),
        (json!(u64::MAX), None),
        (json!(1.5), None),
        (json!("1.5"), None),
        (json!("x"), None),
        (json!(""), None),
        (json!(true), None),
        (json!([1]), None),
    ] {
        assert_eq!(version(&given), expected, "{given}");
    }
    assert_eq!(quoted(&json!("x")), "'x'");
    assert_eq!(quoted(&json!(1.5)), "1.5");
}
