//! Tests of `cumulative`: a chat continues from its own recorded turns only, and a completion's answer cut
//! anywhere becomes a chat's.

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

/// A completion, with this token.
fn completion(token: &str) -> String {
    let logprobs = json!({
        "text_offset": [0], "token_logprobs": [-7.0481791496276855], "tokens": [token], "top_logprobs": [{}],
    });
    let choice = json!({
        "index": 0, "text": " dal\u{2028}", "logprobs": logprobs, "finish_reason": "stop",
        "stop_reason": null, "token_ids": [1186], "prompt_logprobs": null, "prompt_token_ids": [368, 434],
        "routed_experts": null,
    });
    let whole = json!({
        "id": "cmpl-8c", "object": "text_completion", "created": 17, "model": "tiny", "choices": [choice],
        "service_tier": null, "system_fingerprint": "vllm-0.32.0", "usage": {"prompt_tokens": 2},
        "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null,
    });
    whole.to_string()
}

/// The chat that it becomes, as vLLM 0.32 writes chats.
fn completed_chat(token: &str, bytes: &Value) -> String {
    let entry = json!({"token": token, "logprob": -7.0481791496276855, "bytes": bytes, "top_logprobs": []});
    let message = json!({
        "role": "assistant", "content": " dal\u{2028}", "refusal": null, "annotations": null, "audio": null,
        "function_call": null, "reasoning": null,
    });
    let choice = json!({
        "index": 0, "message": message, "logprobs": {"content": [entry]}, "finish_reason": "stop",
        "stop_reason": null, "token_ids": [1186], "routed_experts": null,
    });
    let whole = json!({
        "id": "chatcmpl-8c", "object": "chat.completion", "created": 17, "model": "tiny", "choices": [choice],
        "service_tier": null, "system_fingerprint": "vllm-0.32.0", "usage": {"prompt_tokens": 2},
        "prompt_logprobs": null, "prompt_token_ids": [368, 434], "prompt_text": null,
        "kv_transfer_params": null, "ec_transfer_params": null, "metrics": null,
    });
    whole.to_string()
}

fn translated(kind: &str, pieces: &[&[u8]]) -> Result<String, CompletionFault> {
    let mut answer = CompletionAnswer::new(Some(kind), TokenForm::default()).unwrap();
    let mut out = Vec::new();
    for (at, piece) in pieces.iter().enumerate() {
        out.extend(answer.feed(piece, at + 1 == pieces.len())?);
    }
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn translates_a_whole_answer() {
    let (given, wanted) = (completion(" dal"), completed_chat(" dal", &json!([32, 100, 97, 108])));
    assert_eq!(translated("application/json", &[given.as_bytes()]).unwrap(), wanted);
    assert_eq!(
        translated("application/json", &[&given.as_bytes()[..99], &given.as_bytes()[99..]]),
        Ok(wanted)
    );
    for broken in ["", "{}", "[]", r#"{"choices":[1]}"#, r#"{"choices":{}}"#] {
        let fault = translated("application/json", &[broken.as_bytes()]);
        assert_eq!(fault, Err(CompletionFault::Unreadable), "{broken}");
    }
    assert!(CompletionAnswer::new(Some("text/html"), TokenForm::default()).is_none());
    assert!(CompletionAnswer::new(None, TokenForm::default()).is_none());
}

/// Lines of a stream of a completion, and the documents that the chat has in the place of each.
fn stream_lines() -> Vec<(String, Vec<String>)> {
    let data = |value: &Value| format!("data: {value}");
    let same = |text: &str| (text.to_string(), vec![text.to_string()]);
    let chunk = |is_chat: bool, choices: Value, more: &Value| {
        let (id, object) =
            if is_chat { ("chatcmpl-1", "chat.completion.chunk") } else { ("cmpl-1", "text_completion") };
        let mut chunk = json!({"id": id, "object": object, "created": 17, "model": "m", "choices": choices});
        chunk.as_object_mut().unwrap().extend(fields(more));
        data(&chunk)
    };
    let usage = json!({"usage": {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1}});
    let first = json!([{
        "index": 0, "text": " d", "logprobs": {"tokens": [" d"], "token_logprobs": [-1.5]},
        "finish_reason": null, "stop_reason": null, "prompt_token_ids": [3, 4], "token_ids": [5],
    }]);
    let role = json!([{
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null,
    }]);
    let begun = json!({
        "usage": {"prompt_tokens": 2, "total_tokens": 2, "completion_tokens": 0},
        "prompt_token_ids": [3, 4], "prompt_text": null,
    });
    let entry = json!({"token": " d", "logprob": -1.5, "bytes": [32, 100], "top_logprobs": []});
    let said = json!([{
        "index": 0, "delta": {"content": " d"}, "logprobs": {"content": [entry]}, "finish_reason": null,
        "token_ids": [5],
    }]);
    let last = json!([{
        "index": 0, "text": "\u{2028}", "logprobs": null, "finish_reason": "stop", "stop_reason": 7,
        "prompt_token_ids": null, "token_ids": null,
    }]);
    let ended = json!([{
        "index": 0, "delta": {"content": "\u{2028}"}, "logprobs": null, "finish_reason": "stop",
        "stop_reason": 7, "token_ids": null,
    }]);
    let none = json!({});
    vec![
        same(": prelude"),
        (chunk(false, first, &usage), vec![chunk(true, role, &begun), chunk(true, said, &usage)]),
        (chunk(false, last, &none), vec![chunk(true, ended, &none)]),
        (chunk(false, json!([]), &usage), vec![chunk(true, json!([]), &usage)]),
        same(&data(&json!({"error": {"message": "m", "code": 500}}))),
        same("data: [DONE]"),
    ]
}

/// Both streams, with this line end.
fn streams(end: &str) -> (String, String) {
    let (mut given, mut made) = (String::new(), String::new());
    for (line, chat) in stream_lines() {
        given.push_str(&format!("{line}{end}{end}"));
        // What is added has line ends of its own.
        made.push_str(&format!("{}{end}{end}", chat.join("\n\n")));
    }
    (given, made)
}

proptest! {
    #[test]
    fn translates_a_stream_cut_anywhere(
        mut cuts in prop::collection::vec(0.0..1.0_f64, 0..12),
        end in prop::sample::select(vec!["\n", "\r\n", "\r"]),
    ) {
        let (given, wanted) = streams(end);
        cuts.sort_by(f64::total_cmp);
        let at = |cut: &f64| (cut * given.len() as f64) as usize;
        let edges: Vec<usize> = [0].into_iter().chain(cuts.iter().map(at)).chain([given.len()]).collect();
        let pieces: Vec<&[u8]> = edges.windows(2).map(|edge| &given.as_bytes()[edge[0]..edge[1]]).collect();
        prop_assert_eq!(translated("text/event-stream; charset=utf-8", &pieces).unwrap(), wanted);
    }

    #[test]
    fn no_bytes_make_it_fail_otherwise_than_with_a_fault(bytes in any::<Vec<u8>>(), is_stream: bool) {
        let kind = if is_stream { "text/event-stream" } else { "application/json" };
        let form = TokenForm { as_ids: true, hides_ids: true };
        let mut answer = CompletionAnswer::new(Some(kind), form).unwrap();
        drop(answer.feed(&bytes, true));
    }

    /// Fingerprints do not depend on the order of members, and differ where the text does.
    #[test]
    fn fingerprints_do_not_depend_on_notation(text in ".{0,20}", other in ".{0,20}") {
        let said = json!({"role": "assistant", "content": text});
        let parts = json!([{"text": text, "type": "text"}]);
        let turned = json!({"content": parts, "refusal": null, "role": "assistant"});
        prop_assert_eq!(fingerprint::of_message(&said), fingerprint::of_message(&turned));
        let another = json!({"role": "assistant", "content": other});
        prop_assert_eq!(text == other, fingerprint::of_message(&said) == fingerprint::of_message(&another));
    }
}

#[test]
fn reports_a_stream_that_is_not_a_completion() {
    for broken in ["data: {\n\n", "data: {\"choices\":[1]}\n\n"] {
        let fault = translated("text/event-stream", &[broken.as_bytes()]);
        assert_eq!(fault, Err(CompletionFault::Unreadable), "{broken}");
    }
}

/// The bytes of such a token were null, where a chat has those of its text.
#[test]
fn ids_in_the_place_of_texts_have_the_bytes_of_the_texts() {
    let fields = json!({"return_tokens_as_token_ids": true, "return_token_ids": false, "logprobs": true});
    let mut body = fields.clone();
    body["messages"] = json!([{"role": "user", "content": "a"}]);
    let turn = chat(&body);
    let sent: Value = serde_json::from_slice(&turn.completion(&[1])).unwrap();
    assert_eq!(
        (&sent["return_tokens_as_token_ids"], &sent["return_token_ids"]),
        (&json!(false), &json!(true))
    );
    let bytes = json!([32, 100, 97, 108]);
    for (hides_ids, ids) in [(false, json!([1186])), (true, Value::Null)] {
        let form = TokenForm { as_ids: true, hides_ids };
        let mut answer = CompletionAnswer::new(Some("application/json"), form).unwrap();
        let made = answer.feed(completion(" dal").as_bytes(), true).unwrap();
        let mut wanted: Value = serde_json::from_str(&completed_chat("token_id:1186", &bytes)).unwrap();
        wanted["choices"][0]["token_ids"] = ids;
        if hides_ids {
            wanted["prompt_token_ids"] = Value::Null;
        }
        assert_eq!(serde_json::from_slice::<Value>(&made).unwrap(), wanted);
    }
    assert_eq!(turn.token_form(), TokenForm { as_ids: true, hides_ids: true });
    body["return_token_ids"] = json!(true);
    assert_eq!(chat(&body).token_form(), TokenForm { as_ids: true, hides_ids: false });
    body["logprobs"] = json!(false);
    assert!(!chat(&body).token_form().as_ids);
}
