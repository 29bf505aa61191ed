//! Calls that were given up, and tiny messages.

use super::super::record::TraceApi;
use super::*;
use crate::config::types::TracesConfig;
use crate::traces::Traces;
use crate::traces::assemble::AnswerBuffer;

#[tokio::test]
async fn nothing_of_a_call_that_was_given_up_is_stored() {
    let traces = Traces::start(&TracesConfig::default(), Observer::default()).await.unwrap();
    let mut batch = WriterBatch::default();
    let mark = CaptureMark::new(1);
    let form = AnswerForm { api: TraceApi::Chat, stream: true, status: 200 };
    let piece = || {
        let mut part = AnswerBuffer::default();
        part.push_piece(b"data: {\"choices\":[");
        TraceMessage::Piece { mark: mark.clone(), form, part }
    };
    let later = piece();
    batch.add(&traces.shared, piece());
    assert_eq!(batch.open.len(), 1);
    batch.give_up_largest(&traces.shared.observer);
    // Taken from the queue together with the first one.
    batch.add(&traces.shared, later);
    assert!(batch.open.is_empty() && batch.open_bytes == 0);
    traces.stop(Duration::from_secs(5)).await;
}

#[test]
fn tiny_messages_take_little_memory() {
    let body = |count: usize| format!(r#"{{"model":"m","messages":[{}0]}}"#, "0,".repeat(count));
    for (count, is_cut) in [(10, true), (1_000_000, false)] {
        let body = body(count);
        for api in [TraceApi::Chat, TraceApi::Responses, TraceApi::Messages] {
            let body =
                body.replace("messages", if api == TraceApi::Responses { "input" } else { "messages" });
            let parts = assemble::read_request(api, body.as_bytes());
            assert_eq!(!parts.turns.is_empty(), is_cut);
            let text = &parts.document.as_ref().unwrap().text;
            assert_eq!(text.len() == body.len(), !is_cut, "nothing is lost");
        }
    }
}
