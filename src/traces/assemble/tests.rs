//! Tests of `traces::assemble`.

mod answers;
mod events;
mod render;
mod requests;
mod tokens;

use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use super::*;
use crate::sse::tests::{assert_linear, chunks};
use crate::traces::json::{restored, to_json};
use crate::traces::record::{CallFacts, CutPart, TraceRecord, TraceTokens};
use render::{LINE_ENDS, SourceAnswer, source_answer};

/// Facts of a call that went well.
fn facts(api: TraceApi, stream: bool) -> CallFacts {
    CallFacts {
        trace_id: "6f1c2d9e-0000-4000-8000-000000000001".into(),
        session_id: "harbor/hello:0".into(),
        api,
        stream,
        client_model: None,
        request_id: "req-1".into(),
        weight_version: Some(3),
        arrived: 1795154964.25,
        latency: Duration::from_millis(125),
        first_token: Some(Duration::from_millis(20)),
        queued: None,
        upstream: Some("http://a:8000".into()),
        attempts: 1,
        status: 200,
        error: None,
        partial: false,
        cumulative: None,
    }
}

fn assembled<'c>(
    api: TraceApi,
    stream: bool,
    status: u16,
    pieces: impl IntoIterator<Item = &'c [u8]>,
) -> AssembledAnswer {
    let mut assembler = AnswerAssembler::new(api, stream, status);
    pieces.into_iter().for_each(|piece| assembler.feed(piece));
    assembler.finish()
}

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn bits(numbers: &[f64]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Compares a record with what the engine computed.
fn assert_holds(record: &TraceRecord, source: &SourceAnswer, api: TraceApi) {
    assert_eq!(record.prompt_token_ids, source.prompt);
    assert_eq!(record.choices.len(), source.choices.len());
    for (at, (choice, expected)) in record.choices.iter().zip(&source.choices).enumerate() {
        assert_eq!(choice.index as usize, at);
        assert_eq!(choice.token_ids, expected.ids());
        assert_eq!(bits(&choice.logprobs), bits(&expected.logprobs()));
        assert_eq!(choice.finish_reason.as_deref(), Some(expected.finish));
        assert_eq!(value(&choice.message), expected.message(api));
    }
    let wire = value(&to_json(record));
    let first = &source.choices[0];
    assert_eq!(wire["completion_token_ids"], json!(first.ids()));
    let logprobs: Vec<f64> = wire["logprobs"].as_array().into_iter().flatten().map(number).collect();
    assert_eq!(bits(&logprobs), bits(&first.logprobs()));
    assert_eq!(wire["prompt_token_ids"], json!(source.prompt));
    assert_eq!(wire["response_message"], first.message(api));
    assert_eq!(wire["choices"].as_array().map(Vec::len), Some(source.choices.len()));
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_record_holds_what_the_engine_sent(
        source in source_answer(),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
        end in 0..LINE_ENDS.len(),
        with_usage in any::<bool>(),
    ) {
        for api in [TraceApi::Chat, TraceApi::Completions] {
            let request = || read_request(api, br#"{"model":"m","messages":[{"role":"user"}]}"#);
            let stream = source.stream(api, LINE_ENDS[end], with_usage);
            let answer = assembled(api, true, 200, chunks(stream.as_bytes(), &cuts));
            prop_assert_eq!(&answer, &assembled(api, true, 200, [stream.as_bytes()]));
            prop_assert!(answer.is_complete && !answer.partial && answer.error.is_none(), "{:?}", answer);
            let streamed = record(facts(api, true), request(), Some(answer));
            assert_holds(&streamed, &source, api);

            let whole = source.whole(api);
            let answer = assembled(api, false, 200, chunks(whole.as_bytes(), &cuts));
            prop_assert!(answer.is_complete && !answer.partial && answer.error.is_none(), "{:?}", answer);
            let record = record(facts(api, false), request(), Some(answer));
            assert_holds(&record, &source, api);
            prop_assert_eq!(record.tokens.prompt, Some(source.prompt.len() as u64));
            let response = record.response.clone().unwrap();
            prop_assert_eq!(value(&restored(&response, &record)), value(&whole));
            prop_assert_eq!(&value(&to_json(&record))["raw_response"], &value(&whole));
            for gap in [CutPart::PromptIds, CutPart::ChoiceIds(0)] {
                prop_assert!(response.gaps.iter().any(|found| found.part == gap));
            }
        }
    }
}

/// The assembler takes any bytes of any answer.
#[test]
fn the_cost_of_a_byte_is_bounded() {
    for api in [TraceApi::Chat, TraceApi::Completions, TraceApi::Responses, TraceApi::Messages] {
        for stream in [true, false] {
            assert_linear(8, || {
                let mut assembler = AnswerAssembler::new(api, stream, 200);
                Box::new(move |chunk| assembler.feed(chunk))
            });
        }
    }
}
