//! Which turns are kept, for how long, and when a request waits for one.

use super::*;
use crate::traces::record::{ChoiceRecord, CutPart, DocumentGap, TraceError, TraceTokens};

fn record(session: &str, ids: &[u32]) -> TraceRecord {
    let facts = CallFacts {
        trace_id: "t".into(),
        session_id: session.into(),
        api: TraceApi::Chat,
        stream: false,
        client_model: None,
        request_id: "r".into(),
        weight_version: None,
        arrived: 0.0,
        latency: Duration::ZERO,
        first_token: None,
        queued: None,
        upstream: Some("a".into()),
        attempts: 1,
        status: 200,
        error: None,
        partial: false,
        cumulative: None,
    };
    let request = CutDocument {
        text: r#"{"model":"sim","messages":,"stop":"x"}"#.into(),
        gaps: vec![DocumentGap { at: 26, part: CutPart::Turns }],
    };
    let message = r#"{"role":"assistant","content":"ho"}"#.into();
    let choice = ChoiceRecord { message, token_ids: ids.to_vec(), ..ChoiceRecord::default() };
    TraceRecord {
        facts,
        model: "sim".into(),
        turns: vec![r#"{"role":"user","content":"hi"}"#.into()],
        request: Some(request),
        prompt_token_ids: vec![1, 2],
        choices: vec![choice],
        tokens: TraceTokens::default(),
        response: None,
    }
}

fn without(change: impl Fn(&mut TraceRecord)) -> Option<RecordedTurn> {
    let mut record = record("s", &[3]);
    change(&mut record);
    recorded_turn(&record)
}

#[test]
fn only_whole_chats_of_a_session_are_continued() {
    assert!(without(|_| {}).is_some());
    let unnamed = without(|record| record.facts.session_id = UNNAMED_SESSION.into());
    for none in [
        unnamed,
        without(|record| record.facts.api = TraceApi::Messages),
        without(|record| record.facts.status = 400),
        without(|record| record.facts.partial = true),
        without(|record| record.facts.error = Some(TraceError::ClientGone)),
        without(|record| record.request = None),
        without(|record| record.turns = vec!["{".into()]),
    ] {
        assert_eq!(none, None);
    }
}

#[test]
fn a_document_is_read_around_its_gaps() {
    let fields = fields(record("s", &[]).request.as_ref().unwrap()).unwrap();
    assert_eq!(Value::Object(fields), serde_json::json!({"model": "sim", "messages": null, "stop": "x"}));
}

#[tokio::test]
async fn the_last_turn_of_each_session_is_kept() {
    let turns = Arc::new(LastTurns::default());
    for (session, id) in [("a", 3), ("b", 4), ("a", 5)] {
        turns.keep(&record(session, &[id]));
    }
    let kept = async |session: &str| turns.get(session).await.unwrap().map(|turn| (*turn).clone());
    assert_eq!(kept("a").await, recorded_turn(&record("a", &[5])));
    assert_eq!(kept("b").await, recorded_turn(&record("b", &[4])));
    assert_eq!(kept("c").await, None);
    turns.remove("a");
    assert_eq!(kept("a").await, None);
    let state = turns.lock();
    assert_eq!((state.by_use.len(), state.sessions.len()), (1, 1));
    assert_eq!(state.bytes, recorded_turn(&record("b", &[4])).unwrap().bytes());
}

#[test]
fn sessions_that_were_not_used_for_longest_go_first() {
    let turn = Arc::new(recorded_turn(&record("s", &[3])).unwrap());
    let (mut state, room) = (LastTurnsState::default(), 3 * turn.bytes());
    for session in ["a", "b", "c"] {
        state.keep(session, turn.clone(), room);
    }
    assert!(state.get("a").is_some());
    for session in ["d", "d", "e"] {
        state.keep(session, turn.clone(), room);
        assert!(state.bytes <= room && state.by_use.len() == state.sessions.len());
    }
    let known: Vec<&str> =
        ["a", "b", "c", "d", "e"].into_iter().filter(|id| state.get(id).is_some()).collect();
    assert_eq!(known, ["a", "d", "e"]);
}

#[tokio::test(start_paused = true)]
async fn a_turn_waits_for_calls_that_have_ended_and_for_no_others() {
    let turns = Arc::new(LastTurns::default());
    let begun = Instant::now();
    assert_eq!(turns.get("s").await, Ok(None));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let last = record("s", &[3]);
    let (first, second) = (turns.expect(&last.facts).unwrap(), turns.expect(&last.facts).unwrap());
    assert_eq!(turns.get("other").await, Ok(None));
    let writer = {
        let turns = turns.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(first);
            tokio::time::sleep(Duration::from_millis(100)).await;
            turns.keep(&record("s", &[3]));
            drop(second);
        }
    };
    let (found, ()) = futures_util::future::join(turns.get("s"), writer).await;
    assert_eq!((found.unwrap().is_some(), begun.elapsed()), (true, Duration::from_millis(200)));
    let _never = turns.expect(&last.facts);
    assert_eq!(turns.get("s").await, Err(Late));
    let waited = Duration::from_millis(200) + MAX_LATENESS;
    assert_eq!(begun.elapsed(), waited);
    assert_eq!((turns.get("s").await, begun.elapsed()), (Err(Late), waited), "others do not wait");
    drop(turns.expect(&record("other", &[3]).facts));
    assert_eq!((turns.get("s").await, begun.elapsed()), (Err(Late), waited), "a dropped call is no progress");
    turns.expect(&record("other", &[3]).facts).unwrap().taken();
    assert_eq!(turns.get("s").await, Err(Late));
    assert_eq!(begun.elapsed(), waited + MAX_LATENESS, "the writer works again");
}
