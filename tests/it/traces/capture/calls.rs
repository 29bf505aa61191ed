//! Seeded calls of every interface.

use serde_json::{Value, json};

use crate::common::dice::Dice;

/// One call, and what will become of it.
#[derive(Debug)]
pub struct Call {
    pub api: &'static str,
    pub path: &'static str,
    pub body: Value,
    pub streams: bool,
    /// The engine refuses it.
    pub fails: bool,
    /// Its stream is to be cut.
    pub cuts: bool,
}

impl Call {
    pub fn chat(text: &str, tokens: u64) -> Self {
        let messages = json!([{"role": "user", "content": text}]);
        let body = json!({"model": "sim", "messages": messages, "max_tokens": tokens});
        let path = "/v1/chat/completions";
        Call { api: "chat", path, body, streams: false, fails: false, cuts: false }
    }
}

/// So many calls, the same for a seed.
pub fn seeded(seed: u64, count: usize) -> Vec<Call> {
    let mut dice = Dice::new(seed, 0);
    (0..count).map(|at| call(&mut dice, at)).collect()
}

fn call(dice: &mut Dice, at: usize) -> Call {
    let text = format!(
        "call {at} \u{2028} with \"words\" \\ and {}",
        "more ".repeat(usize::try_from(dice.between(0, 39)).expect("small"))
    );
    let tokens = 8 + dice.between(0, 39);
    let mut call = Call::chat(&text, tokens);
    match dice.between(0, 9) {
        0..5 => chat_fields(dice, &mut call),
        5..7 => {
            (call.api, call.path) = ("completions", "/v1/completions");
            call.body = json!({"model": "sim", "prompt": text, "max_tokens": tokens});
            match dice.between(0, 3) {
                0 => call.body["n"] = 2.into(),
                1 => call.body["prompt"] = json!([1, 2, 3, 500 + at]),
                2 => call.body["prompt"] = json!([text, "another"]),
                _ => {}
            }
        }
        7 | 8 => {
            (call.api, call.path) = ("responses", "/v1/responses");
            call.body = json!({"model": "sim", "input": text, "max_output_tokens": tokens});
        }
        _ => {
            (call.api, call.path) = ("messages", "/v1/messages");
            let messages = json!([{"role": "user", "content": text}]);
            call.body = json!({"model": "sim", "messages": messages, "max_tokens": tokens});
        }
    }
    if dice.between(0, 1) == 1 {
        call.body["stream"] = true.into();
        call.streams = true;
        call.cuts = matches!(call.api, "chat" | "completions") && dice.between(0, 9) == 0;
    }
    if dice.between(0, 11) == 0 {
        call.body["temperature"] = 9.into();
        (call.fails, call.streams, call.cuts) = (true, false, false);
    }
    call
}

fn chat_fields(dice: &mut Dice, call: &mut Call) {
    match dice.between(0, 6) {
        0 => call.body["n"] = 2.into(),
        1 => {
            let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
            let function = json!({"name": "weather", "parameters": parameters});
            call.body["tools"] = json!([{"type": "function", "function": function}]);
            call.body["tool_choice"] = "required".into();
        }
        2 => call.body["model"] = "sim-reasoning".into(),
        3 => call.body["logprobs"] = true.into(),
        4 => {
            call.body["logprobs"] = true.into();
            call.body["top_logprobs"] = 2.into();
        }
        5 => call.body["return_token_ids"] = true.into(),
        _ => {}
    }
}
