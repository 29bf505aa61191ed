//! Tests of `cumulative`: a chat continues from its own recorded turns only, and a completion's answer cut
//! anywhere becomes a chat's.

mod completions;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

const PROMPT: [u32; 3] = [1, 10, 2];
const IDS: [u32; 3] = [20, 21, 2];

fn fields(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

/// A recorded turn of one question and one answer.
fn recorded(reply: &Value, finish: &str, ids: &[u32], settings: &Value) -> RecordedTurn {
    let (question, reply) = (json!({"role": "user", "content": "hi"}).to_string(), reply.to_string());
    let reply = RecordedReply { message: &reply, ids, finish_reason: Some(finish) };
    RecordedTurn::new(&RecordedChat {
        model: "sim",
        upstream: Some("a"),
        fields: fields(settings),
        messages: vec![&question],
        prompt: &PROMPT,
        replies: vec![reply],
    })
    .unwrap()
}

fn plain() -> RecordedTurn {
    let reply = json!({"role": "assistant", "content": "ho", "refusal": null, "tool_calls": []});
    recorded(&reply, "stop", &IDS, &json!({"model": "sim", "messages": null}))
}

fn chat(value: &Value) -> ChatTurn {
    ChatTurn::read(value.to_string().as_bytes()).unwrap()
}

/// A chat of a question, an answer, and what else there is.
fn next(said: Value, more: &[Value]) -> Value {
    let mut messages = vec![json!({"role": "user", "content": "hi"}), said];
    messages.extend_from_slice(more);
    json!({"model": "sim", "messages": messages})
}

fn verdict(turn: &RecordedTurn, value: &Value) -> Option<FallbackReason> {
    turn.continued_by(&chat(value)).err()
}

#[test]
fn continues_a_chat_from_its_own_history_only() {
    use FallbackReason::{History, Ids, Reasoning, Settings, Tools};
    let said = json!({"role": "assistant", "content": "ho"});
    let new = json!({"role": "user", "content": "and"});
    let result = json!({"role": "tool", "content": "r"});
    let with = |mut value: Value, key: &str, set: Value| {
        value[key] = set;
        value
    };
    let good = next(said.clone(), std::slice::from_ref(&new));
    let changed = with(good.clone(), "messages", json!([{"role": "user", "content": "hi!"}, said, new]));
    for (value, wanted) in [
        (good.clone(), None),
        (next(said.clone(), &[result, new.clone()]), None),
        (
            next(json!({"content": "ho", "audio": null, "role": "assistant"}), std::slice::from_ref(&new)),
            None,
        ),
        (
            next(
                json!({"role": "assistant", "content": [{"type": "text", "text": "ho"}]}),
                std::slice::from_ref(&new),
            ),
            None,
        ),
        (
            next(json!({"role": "assistant", "content": "ho", "tool_calls": []}), std::slice::from_ref(&new)),
            None,
        ),
        (with(good.clone(), "temperature", json!(0.5)), None),
        (with(good.clone(), "tools", json!([])), None),
        (next(json!({"role": "assistant", "content": "ho "}), std::slice::from_ref(&new)), Some(History)),
        (
            next(json!({"role": "assistant", "content": "ho", "name": "x"}), std::slice::from_ref(&new)),
            Some(History),
        ),
        (next(said.clone(), &[]), Some(History)),
        (next(said.clone(), &[new.clone(), said.clone()]), Some(History)),
        (changed, Some(History)),
        (json!({"model": "sim", "messages": [new.clone()]}), Some(History)),
        (with(good.clone(), "model", json!("other")), Some(Settings)),
        (with(good.clone(), "chat_template_kwargs", json!({"enable_thinking": true})), Some(Settings)),
        (with(good.clone(), "tools", json!([{"type": "function"}])), Some(Settings)),
    ] {
        assert_eq!(verdict(&plain(), &value), wanted, "{value}");
    }
    let none = json!({});
    for (reply, ids, wanted) in [
        (json!({"role": "assistant", "content": "ho", "reasoning": "hm"}), &IDS[..], Reasoning),
        (json!({"role": "assistant", "content": "ho"}), &[], Ids),
    ] {
        assert_eq!(verdict(&recorded(&reply, "stop", ids, &none), &good), Some(wanted));
    }
    let call = json!({"role": "assistant", "content": "ho", "tool_calls": [{"id": "1"}]});
    let turn = recorded(&call, "tool_calls", &IDS, &none);
    assert_eq!(verdict(&turn, &next(call, &[new])), Some(Tools));
}

#[test]
fn answers_plain_text_chats_only_by_a_completion() {
    use FallbackReason::{Choices, Fields, Logprobs, Media, Structured, Tools};
    let picture = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
    let call = json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]);
    for (key, value, wanted) in [
        ("temperature", json!(1), None),
        ("n", json!(1), None),
        ("n", json!(2), Some(Choices)),
        ("use_beam_search", json!(true), Some(Choices)),
        ("tools", json!([{"type": "function"}]), Some(Tools)),
        ("tools", json!([]), None),
        ("tools", json!(null), None),
        ("tool_choice", json!("none"), None),
        ("tool_choice", json!("required"), Some(Tools)),
        ("response_format", json!({"type": "text"}), None),
        ("response_format", json!({"type": "json_object"}), Some(Structured)),
        ("guided_json", json!({}), Some(Structured)),
        ("logprobs", json!(true), None),
        ("top_logprobs", json!(0), None),
        ("top_logprobs", json!(2), Some(Logprobs)),
        ("prompt_logprobs", json!(1), Some(Logprobs)),
        ("messages", picture, Some(Media)),
        ("messages", call, Some(Tools)),
        ("modalities", json!(["text"]), None),
        ("modalities", json!(["audio"]), Some(Media)),
        ("echo", json!(true), Some(Fields)),
        ("reasoning_effort", json!("low"), Some(Fields)),
        ("add_generation_prompt", json!(true), None),
        ("add_generation_prompt", json!(false), Some(Fields)),
        ("truncate_prompt_tokens", json!(100), Some(Fields)),
        ("metadata", json!({"a": "b"}), None),
        ("unheard_of", json!(1), Some(Fields)),
    ] {
        let mut body = json!({"model": "sim", "messages": [{"role": "user", "content": "hi"}]});
        body[key] = value;
        assert_eq!(chat(&body).check().err(), wanted, "{body}");
    }
    assert_eq!(ChatTurn::read(b"[]").err(), Some(Fields));
    assert_eq!(ChatTurn::read(br#"{"model":"sim"}"#).err(), Some(Fields));
}

#[test]
fn prompt_begins_with_all_recorded_ids() {
    // 2 ends an answer, 3 is a line end behind it, 1 begins a turn.
    let behind: &[u32] = &[2, 3, 1, 30, 2, 3, 1, 4];
    let stop = json!({"stop": ["x"]});
    let none = json!({});
    type Row<'a> = (&'a str, &'a [u32], &'a Value, &'a [u32], &'a [u32]);
    let cases: [Row<'_>; 7] = [
        ("stop", &[20, 2], &none, behind, &[3, 1, 30, 2, 3, 1, 4]),
        ("length", &[20, 21], &none, behind, behind),
        ("stop", &[20, 21], &none, behind, behind),
        // The last token only looks like a part of the template.
        ("stop", &[20, 3], &stop, behind, behind),
        ("length", &[20, 3], &none, behind, behind),
        ("stop", &[20, 2], &stop, behind, &[3, 1, 30, 2, 3, 1, 4]),
        // A space of the template before the end.
        ("stop", &[20, 2], &none, &[9, 2, 1, 30, 4], &[1, 30, 4]),
    ];
    for (finish, ids, settings, behind, wanted) in cases {
        let reply = json!({"role": "assistant", "content": "ho"});
        let turn = recorded(&reply, finish, ids, settings);
        let chat = chat(&next(reply, &[json!({"role": "user", "content": "and"})]));
        let continuation = turn.continued_by(&chat).unwrap();
        // The history is tokenised in another way, which does not matter.
        let (tokens, probe) = ([&[1, 77, 78, 50][..], behind].concat(), [&[1, 77, 51][..], behind].concat());
        let prompt = continuation.prompt(&tokens, &probe).unwrap();
        assert_eq!(prompt, [&PROMPT[..], ids, wanted].concat(), "{finish} {ids:?}");
        for (tokens, probe) in [(&tokens[..], &tokens[..]), (&[1, 2], &[1, 3]), (&[], &[1]), (&[3], &[1, 3])]
        {
            assert_eq!(continuation.prompt(tokens, probe), Err(FallbackReason::Template));
        }
    }
}

#[test]
fn probe_differs_in_the_answer_alone() {
    for (content, other) in [(json!("ho"), "0"), (json!("10"), "1"), (json!("10 \n"), "1"), (json!(""), "0")]
    {
        let reply = json!({"role": "assistant", "content": content});
        let turn = recorded(&reply, "stop", &IDS, &json!({"chat_template_kwargs": {"a": 1}}));
        let new = json!({"role": "user", "content": "and"});
        let mut body = next(reply, std::slice::from_ref(&new));
        body["chat_template_kwargs"] = json!({"a": 1});
        let chat = chat(&body);
        let [real, probe] = turn.continued_by(&chat).unwrap().tokenize_bodies();
        let (real, probe): (Value, Value) =
            (serde_json::from_slice(&real).unwrap(), serde_json::from_slice(&probe).unwrap());
        let mut wanted = json!({
            "model": "sim", "chat_template_kwargs": {"a": 1}, "messages": body["messages"],
            "add_generation_prompt": true,
        });
        assert_eq!(real, wanted);
        wanted["messages"][1]["content"] = json!(other);
        assert_eq!(probe, wanted);
    }
}

#[test]
fn completion_has_the_settings_of_the_chat() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (body, wanted) in [
        (json!({"model": "sim"}), json!({"model": "sim", "max_tokens": null})),
        (
            json!({
                "model": "sim", "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.0,
                "stop": ["x"],
                "logprobs": true, "return_token_ids": true, "stream": true, "tool_choice": "none",
                "tools": [],
                "stream_options": {"include_usage": true}, "chat_template_kwargs": {"a": 1}, "metadata": {},
            }),
            json!({
                "model": "sim", "temperature": 0.0, "stop": ["x"], "return_token_ids": true, "stream": true,
                "stream_options": {"include_usage": true}, "max_tokens": 7, "logprobs": 0,
            }),
        ),
        (json!({"max_tokens": 5, "logprobs": false}), json!({"max_tokens": 5})),
    ] {
        let (mut body, mut wanted) = (body, wanted);
        body["messages"] = messages.clone();
        wanted["prompt"] = json!([1, 2]);
        wanted["add_special_tokens"] = json!(false);
        let made: Value = serde_json::from_slice(&chat(&body).completion(&[1, 2])).unwrap();
        assert_eq!(made, wanted);
    }
}
