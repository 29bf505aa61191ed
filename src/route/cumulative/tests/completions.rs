//! Tests of the translation of a completion into the answer of a chat.

use super::super::answer::CompletionFault;
use super::*;

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
