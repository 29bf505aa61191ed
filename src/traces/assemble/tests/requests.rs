//! The request's side of a record, and any bytes.

use proptest::sample::select;
use serde_json::{Value, json};

use super::*;

const APIS: [TraceApi; 4] = [TraceApi::Chat, TraceApi::Completions, TraceApi::Responses, TraceApi::Messages];

/// The wire form of a call with this request.
fn wire(api: TraceApi, request: &[u8], answer: Option<AssembledAnswer>) -> Value {
    value(&to_json(&record(facts(api, false), read_request(api, request), answer)))
}

#[test]
fn turns_are_cut_out_and_written_back() {
    for (api, body, turns) in [
        (TraceApi::Chat, r#"{"model":"m","messages":[{"role":"user","content":"a"},{"role":"x"}],"n":2}"#, 2),
        (
            TraceApi::Messages,
            r#"{"system":"s","messages":[ {"role":"user","content":"a"} ] ,"max_tokens":2}"#,
            1,
        ),
        (TraceApi::Responses, r#"{"input":[{"role":"user","content":"a"},1,"x"],"model":"m"}"#, 3),
        (TraceApi::Chat, r#"{"messages":[],"input":[1]}"#, 0),
        (TraceApi::Chat, "\u{feff} {\"messages\":[\"caf\\u00e9\"]} ", 1),
    ] {
        let parts = read_request(api, body.as_bytes());
        assert_eq!(parts.turns.len(), turns, "{body}");
        let document = parts.document.clone().unwrap();
        assert_eq!(document.gaps.len(), 1, "{body}");
        let wire = wire(api, body.as_bytes(), None);
        let expected = value(body.trim_start_matches('\u{feff}'));
        assert_eq!(wire["raw_request"], expected);
        let name = if api == TraceApi::Responses { "input" } else { "messages" };
        assert_eq!(wire["messages"], expected[name]);
    }
}

#[test]
fn an_input_that_is_a_text_is_one_turn() {
    let body = r#"{"model":"m","input":"say \"hi\""}"#;
    let wire = wire(TraceApi::Responses, body.as_bytes(), None);
    assert_eq!(wire["messages"], json!([{"role": "user", "content": "say \"hi\""}]));
    assert_eq!(wire["raw_request"], value(body));
    assert_eq!(wire["model"], "m");
}

#[test]
fn what_some_readers_do_not_take_is_not_recorded() {
    let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let (digits, brackets) = ("1".repeat(300), "[".repeat(200));
    for (value, is_recorded) in [
        (nested(99), true),
        (nested(100), false),
        (format!("[{}]", vec![nested(98); 9].join(",")), true),
        (digits.clone(), true),
        (format!("{digits}1"), false),
        (format!("-{digits}.{digits}"), true),
        (format!("\"{brackets}{digits}{digits}\\\"{brackets}\""), true),
    ] {
        let member = format!("\"messages\":[],\"choices\":[],\"x\":{value}");
        let body = format!("{{\"model\":\"m\",{member}}}");
        for api in APIS {
            let answer = assembled(api, false, 200, [body.as_bytes()]);
            let wire = wire(api, body.as_bytes(), Some(answer));
            assert_eq!(wire["raw_request"].is_object(), is_recorded, "{value}");
            assert_eq!(wire["raw_response"].is_object(), is_recorded, "{value}");
        }
    }
}

#[test]
fn a_prompt_of_token_ids_is_that_of_the_record() {
    let body = r#"{"model":"m","prompt":[1,2,3],"max_tokens":4}"#;
    let parts = read_request(TraceApi::Completions, body.as_bytes());
    assert_eq!(parts.prompt_token_ids, [1, 2, 3]);
    assert_eq!(parts.document.unwrap().gaps[0].part, CutPart::PromptIds);
    for (answered, expected) in [(vec![], [1, 2, 3]), (vec![1, 2, 3], [1, 2, 3]), (vec![7, 8, 9], [7, 8, 9])]
    {
        let answer = AssembledAnswer { prompt_token_ids: answered, ..AssembledAnswer::default() };
        let wire = wire(TraceApi::Completions, body.as_bytes(), Some(answer));
        assert_eq!(wire["raw_request"], value(body));
        assert_eq!(wire["prompt_token_ids"], json!(expected));
        assert_eq!(wire["messages"], json!([]));
    }
    // A list of prompts, and a text, stay where they are.
    for body in [r#"{"prompt":[[1],[2]]}"#, r#"{"prompt":"x"}"#, r#"{"prompt":["a"]}"#] {
        let parts = read_request(TraceApi::Completions, body.as_bytes());
        assert_eq!((parts.prompt_token_ids.len(), parts.document.unwrap().gaps.len()), (0, 0), "{body}");
    }
}

#[test]
fn a_body_that_is_no_object_has_no_document() {
    for body in ["", "x", "[1]", "[\"m\",[],[],[]]", "{\"messages\":[}", "null", "\"{}\""] {
        for api in APIS {
            assert_eq!(read_request(api, body.as_bytes()), RequestParts::default(), "{body}");
            assert_eq!(wire(api, body.as_bytes(), None)["raw_request"], Value::Null);
        }
    }
    let parts = read_request(TraceApi::Chat, b"{\"messages\":\"x\"}");
    assert!(parts.turns.is_empty() && parts.document.is_some());
}

#[test]
fn a_call_without_an_answer_has_a_record() {
    let mut facts = facts(TraceApi::Chat, false);
    (facts.status, facts.error) = (0, Some(TraceError::Connection));
    let record = record(facts, read_request(TraceApi::Chat, b"{\"model\":\"m\"}"), None);
    let wire = value(&to_json(&record));
    assert_eq!(wire["error"], "connection");
    assert_eq!((&wire["response_message"], &wire["logprobs"]), (&json!({}), &Value::Null));
    assert_eq!((&wire["choices"], &wire["raw_response"]), (&json!([]), &Value::Null));
}

/// One member of the wire form; of the others only the syntax is read.
#[derive(serde::Deserialize)]
struct WirePartial {
    partial: bool,
}

/// Pieces of requests and answers, and bytes of any kind between them.
fn soup() -> impl Strategy<Value = Vec<u8>> {
    let pieces = [
        "data: ",
        "\n",
        "\n\n",
        "\r\n\r\n",
        "event: error\n",
        "[DONE]",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "null",
        "-0.0",
        "1e999",
        "12",
        "\\ud800",
        "\\u",
        "\\",
        "\u{2028}",
        "{\"choices\":[",
        "{\"index\":0,\"delta\":{",
        "\"content\":\"x\"",
        "\"tool_calls\":[{\"index\":1,\"function\":{\"name\":\"f\"}}]",
        "\"token_ids\":[1,2]",
        "\"prompt_token_ids\":[3]",
        "\"logprobs\":{\"content\":[{\"token\":\"x\",\"logprob\":-1.5}]}",
        "}]}",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"y\"},\"token_ids\":[7]}]}\n\n",
        "data: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"text\":\"\"}}\n\n",
        "data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"partial_json\":\"{\"}}\n\n",
        "data: {\"type\":\"response.output_text.delta\",\"delta\":\"z\",\"logprobs\":[{\"logprob\":-1}]}\n\n",
        "data: {\"type\":\"response.completed\",\"response\":{\"output\":[{}, {\"content\":[null]}]}}\n\n",
        "\"usage\":{\"prompt_tokens\":-1,\"completion_tokens\":1.5}",
        "\"messages\":[{}]",
        "\"prompt\":[1]",
    ];
    let piece = prop_oneof![
        12 => select(pieces.to_vec()).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..12),
    ];
    prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces_give_one_record(
        request in soup(),
        body in soup(),
        cuts in prop::collection::vec(any::<Index>(), 0..8),
        status in select(vec![200u16, 404, 500]),
    ) {
        for api in APIS {
            for stream in [true, false] {
                let answer = assembled(api, stream, status, [&body[..]]);
                prop_assert_eq!(&answer, &assembled(api, stream, status, chunks(&body, &cuts)));
                prop_assert_eq!(&answer, &assembled(api, stream, status, body.chunks(1)));
                let record = record(facts(api, stream), read_request(api, &request), Some(answer));
                let wire = to_json(&record);
                let read = serde_json::from_str::<WirePartial>(&wire);
                prop_assert!(read.is_ok_and(|read| read.partial == record.facts.partial), "{}", wire);
                prop_assert!(status == 200 || record.choices.is_empty());
            }
        }
    }
}
