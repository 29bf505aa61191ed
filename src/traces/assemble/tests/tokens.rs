//! Events of one token: the short way to read them, and the way of tokens that the relay has read.

use proptest::prelude::*;

use super::*;
use crate::reply::token_event::read_token_event;

fn assembled(events: &[String], list: &str) -> AssembledAnswer {
    let mut assembler = AnswerAssembler::new(TraceApi::Chat, true, 200);
    for event in events {
        let head = "{\"id\":\"c\",\"created\":1,\"model\":\"m\",\"choices\":";
        assembler.feed(format!("data: {head}{list}{event}\n\n").as_bytes());
    }
    assembler.feed(b"data: [DONE]\n\n");
    assembler.finish()
}

prop_compose! {
    fn event()(
        index in 0u32..3,
        key in prop::sample::select(vec!["content", "reasoning", "role", "x"]),
        text in "[a-zé\"\\\\\n]{0,4}",
        logprob in prop::option::of(-20.0f64..0.0),
        id in prop::option::of(any::<u64>().prop_map(|id| id >> (id % 64))),
        usage in prop::option::of(prop::sample::select(vec!["null", "{\"prompt_tokens\":7}", "{"])),
    ) -> String {
        let text = serde_json::to_string(&text).expect("a string");
        let bytes = "1,2";
        let logprobs = logprob.map_or("null".into(), |value| format!(
            "{{\"content\":[{{\"token\":{text},\"logprob\":{value:?},\"bytes\":[{bytes}],\
             \"top_logprobs\":[]}}]}}"
        ));
        let ids = id.map_or("null".into(), |id| format!("[{id}]"));
        let usage = usage.map_or(String::new(), |usage| format!(",\"usage\":{usage}"));
        format!(
            "{{\"index\":{index},\"delta\":{{\"{key}\":{text}}},\"logprobs\":{logprobs},\
             \"finish_reason\":null,\"token_ids\":{ids}}}]{usage}}}"
        )
    }
}

/// As `assembled`. The relay reads tokens once it has read the head of an event: a quarter of the events goes
/// on as it came.
fn assembled_from_buffers(events: &[String], parts: usize) -> AssembledAnswer {
    let mut assembler = AnswerAssembler::new(TraceApi::Chat, true, 200);
    let (mut buffer, mut is_head_known) = (AnswerBuffer::default(), false);
    for (place, event) in events.iter().enumerate() {
        let token = read_token_event(event.as_bytes()).map(|(token, _)| token);
        match token.filter(|token| is_head_known && place % 4 != 3 && token.usage.is_none()) {
            Some(token) => buffer.push_token(&token),
            None => {
                let data = format!("{{\"id\":\"c\",\"created\":1,\"model\":\"m\",\"choices\":[{event}");
                buffer.push_piece(format!("data: {data}\n\n").as_bytes());
                is_head_known |= serde_json::from_str::<Value>(&data).is_ok();
            }
        }
        if place % parts == 0 {
            assembler.read(&buffer);
            buffer.clear();
        }
    }
    buffer.push_piece(b"data: [DONE]\n\n");
    assembler.read(&buffer);
    assembler.finish()
}

#[test]
fn tokens_count_for_the_bound_of_an_answer() {
    let mut assembler = AnswerAssembler::bounded(TraceApi::Chat, true, 200, 4 << 10);
    let text = "a".repeat(1_000);
    let mut buffer = AnswerBuffer::default();
    for id in 0..5 {
        let (key, token_id) = ("content", Some(id));
        buffer.push_token(&TokenEvent { index: 0, key, text: &text, logprob: None, token_id, usage: None });
    }
    assembler.read(&buffer);
    assert_eq!(assembler.finish().error, Some(TraceError::Overflow));
}

proptest! {
    #[test]
    fn tokens_of_the_relay_are_those_of_the_stream(
        events in prop::collection::vec(event(), 0..12),
        parts in 1usize..5,
    ) {
        prop_assert_eq!(assembled_from_buffers(&events, parts), assembled(&events, "["));
    }

    /// A space before the bracket of the choices sends every chunk to the parser.
    #[test]
    fn reads_what_the_parser_reads(events in prop::collection::vec(event(), 0..12)) {
        prop_assert_eq!(assembled(&events, "["), assembled(&events, " ["));
    }
}
