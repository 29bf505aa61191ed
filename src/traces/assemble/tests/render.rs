//! Answers as an engine computes them, and the bytes that it sends of them.

use std::fmt::Write;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::traces::record::TraceApi;

/// The line ends of streams.
pub(super) const LINE_ENDS: [&str; 3] = ["\n", "\r\n", "\r"];

/// What the engine computed.
#[derive(Clone, Debug)]
pub(super) struct SourceAnswer {
    pub prompt: Vec<u32>,
    pub choices: Vec<SourceChoice>,
    /// Characters beyond ASCII are escaped.
    pub is_ascii: bool,
    /// How many tokens a chunk carries.
    pub per_chunk: usize,
    /// The order in which choices have their turns.
    pub order: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(super) struct SourceChoice {
    /// Tokens without a text of the message.
    pub silent: Vec<SourceToken>,
    pub reasoning: Vec<SourceToken>,
    pub content: Vec<SourceToken>,
    /// The name of each tool, and the tokens of its arguments.
    pub tools: Vec<(String, Vec<SourceToken>)>,
    pub finish: &'static str,
}

#[derive(Clone, Debug)]
pub(super) struct SourceToken {
    pub id: u32,
    pub logprob: f64,
    pub text: String,
}

impl SourceChoice {
    fn tokens(&self) -> Vec<&SourceToken> {
        let tools = self.tools.iter().flat_map(|(_, tokens)| tokens);
        self.silent.iter().chain(&self.reasoning).chain(&self.content).chain(tools).collect()
    }

    pub(super) fn ids(&self) -> Vec<u32> {
        self.tokens().iter().map(|token| token.id).collect()
    }

    pub(super) fn logprobs(&self) -> Vec<f64> {
        self.tokens().iter().map(|token| token.logprob).collect()
    }

    fn call_id(at: usize) -> String {
        format!("chatcmpl-tool-{at}")
    }

    /// The message without nulls, but for its content.
    pub(super) fn message(&self, api: TraceApi) -> Value {
        if api == TraceApi::Completions {
            let tokens = self.tokens();
            return json!({"role": "assistant", "content": joined(&tokens)});
        }
        let (reasoning, content) = (joined(&self.reasoning), joined(&self.content));
        let is_absent = content.is_empty() && !(self.tools.is_empty() && reasoning.is_empty());
        let content = if is_absent { Value::Null } else { json!(content) };
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning"] = json!(reasoning);
        }
        if !self.tools.is_empty() {
            let calls = self.tools.iter().enumerate().map(|(at, (name, tokens))| {
                let function = json!({"name": name, "arguments": joined(tokens)});
                json!({"id": Self::call_id(at), "type": "function", "function": function})
            });
            message["tool_calls"] = calls.collect();
        }
        message
    }

    /// The deltas of the stream, each with its token.
    fn deltas(&self) -> Vec<(Value, &SourceToken)> {
        let mut deltas: Vec<_> = self.silent.iter().map(|token| (json!({}), token)).collect();
        deltas.extend(self.reasoning.iter().map(|token| (json!({"reasoning": token.text}), token)));
        deltas.extend(self.content.iter().map(|token| (json!({"content": token.text}), token)));
        for (at, (name, tokens)) in self.tools.iter().enumerate() {
            for (place, token) in tokens.iter().enumerate() {
                let mut call = json!({"index": at, "function": {"arguments": token.text}});
                if place == 0 {
                    call = json!({
                        "id": Self::call_id(at), "type": "function", "index": at,
                        "function": {"name": name, "arguments": token.text},
                    });
                }
                deltas.push((json!({"tool_calls": [call]}), token));
            }
        }
        deltas
    }
}

impl SourceAnswer {
    fn quote(&self, text: &str) -> String {
        let plain = serde_json::to_string(text).unwrap();
        if !self.is_ascii {
            return plain;
        }
        let mut escaped = String::new();
        for character in plain.chars() {
            if character.is_ascii() {
                escaped.push(character);
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(escaped, "\\u{unit:04X}").unwrap();
                }
            }
        }
        escaped
    }

    fn write(&self, value: &Value) -> String {
        match value {
            Value::String(text) => self.quote(text),
            Value::Array(items) => {
                format!("[{}]", items.iter().map(|item| self.write(item)).collect::<Vec<_>>().join(","))
            }
            Value::Object(members) => {
                let members =
                    members.iter().map(|(key, value)| format!("{}:{}", self.quote(key), self.write(value)));
                format!("{{{}}}", members.collect::<Vec<_>>().join(","))
            }
            other => other.to_string(),
        }
    }

    /// A chat's, or a completion's, log-probabilities. Numbers are not written by the crate's writer.
    fn logprobs(&self, api: TraceApi, tokens: &[&SourceToken]) -> String {
        if api == TraceApi::Completions {
            let numbers: Vec<_> = tokens.iter().map(|token| format!("{:?}", token.logprob)).collect();
            let texts: Vec<_> = tokens.iter().map(|token| self.quote(&token.text)).collect();
            return format!(
                "{{\"text_offset\":[],\"token_logprobs\":[{}],\"tokens\":[{}],\"top_logprobs\":[]}}",
                numbers.join(","),
                texts.join(",")
            );
        }
        let entry = |token: &&SourceToken| {
            format!(
                "{{\"token\":{},\"logprob\":{:?},\"bytes\":{},\"top_logprobs\":[]}}",
                self.quote(&token.text),
                token.logprob,
                json!(token.text.as_bytes())
            )
        };
        format!("{{\"content\":[{}]}}", tokens.iter().map(entry).collect::<Vec<_>>().join(","))
    }

    fn usage(&self) -> String {
        let completion: usize = self.choices.iter().map(|choice| choice.tokens().len()).sum();
        format!(
            "{{\"prompt_tokens\":{},\"total_tokens\":{},\"completion_tokens\":{completion},\
             \"prompt_tokens_details\":{{\"cached_tokens\":0}},\"completion_tokens_details\":null}}",
            self.prompt.len(),
            self.prompt.len() + completion
        )
    }

    /// The answer as one document.
    pub(super) fn whole(&self, api: TraceApi) -> String {
        let is_chat = api == TraceApi::Chat;
        let prompt = json!(self.prompt);
        let choices = self.choices.iter().enumerate().map(|(index, choice)| {
            let tokens = choice.tokens();
            let said = if is_chat {
                let mut message = choice.message(api);
                for absent in ["refusal", "annotations", "audio", "function_call"] {
                    message[absent] = Value::Null;
                }
                if message.get("reasoning").is_none() {
                    message["reasoning"] = Value::Null;
                }
                format!("\"message\":{}", self.write(&message))
            } else {
                format!(
                    "\"prompt_logprobs\":null,\"prompt_token_ids\":{prompt},\"text\":{}",
                    self.quote(&joined(&tokens))
                )
            };
            format!(
                "{{\"index\":{index},{said},\"logprobs\":{},\"finish_reason\":\"{}\",\"stop_reason\":null,\
                 \"token_ids\":{},\"routed_experts\":null}}",
                self.logprobs(api, &tokens),
                choice.finish,
                json!(choice.ids())
            )
        });
        let root = if is_chat {
            format!(",\"prompt_token_ids\":{prompt},\"prompt_text\":null")
        } else {
            String::new()
        };
        format!(
            "{{\"id\":\"x-1\",\"object\":\"x\",\"created\":1795154962,\"model\":\"tiny\",\"choices\":[{}],\
             \"service_tier\":null,\"usage\":{}{root},\"kv_transfer_params\":null}}",
            choices.collect::<Vec<_>>().join(","),
            self.usage()
        )
    }

    /// The answer as events; the choices have their turns in any order.
    pub(super) fn stream(&self, api: TraceApi, line_end: &str, with_usage: bool) -> String {
        let mut out = String::new();
        let mut event = |data: &str| {
            out.push_str("data: ");
            out.push_str(data);
            out.push_str(line_end);
            out.push_str(line_end);
        };
        let head = "\"id\":\"x-1\",\"object\":\"x.chunk\",\"created\":1795154964,\"model\":\"tiny\"";
        let usage = if with_usage { ",\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}" } else { "" };
        let is_chat = api == TraceApi::Chat;
        let prompt = json!(self.prompt);
        if is_chat {
            for index in 0..self.choices.len() {
                let ids = if index == 0 { prompt.to_string() } else { "null".to_owned() };
                event(&format!(
                    "{{{head},\"choices\":[{{\"index\":{index},\
                     \"delta\":{{\"role\":\"assistant\",\"content\":\"\"}},\"logprobs\":null,\
                     \"finish_reason\":null}}]{usage},\"prompt_token_ids\":{ids}}}"
                ));
            }
        }
        let mut open: Vec<_> =
            self.choices.iter().map(|choice| choice.deltas()).map(Vec::into_iter).collect();
        let mut turns = self.order.iter().copied().chain((0..open.len()).cycle());
        let mut ended = vec![false; open.len()];
        while ended.iter().any(|ended| !ended) {
            let index = turns.next().unwrap() % open.len();
            if ended[index] {
                continue;
            }
            let pieces: Vec<_> = open[index].by_ref().take(self.per_chunk).collect();
            ended[index] = open[index].len() == 0;
            let tokens: Vec<&SourceToken> = pieces.iter().map(|(_, token)| *token).collect();
            let said = if is_chat {
                format!("\"delta\":{}", self.write(&merged(pieces.iter().map(|(delta, _)| delta))))
            } else {
                let ids = if tokens.is_empty() { "null".to_owned() } else { prompt.to_string() };
                format!("\"text\":{},\"prompt_token_ids\":{ids}", self.quote(&joined(&tokens)))
            };
            let finish =
                if ended[index] { format!("\"{}\"", self.choices[index].finish) } else { "null".to_owned() };
            let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
            event(&format!(
                "{{{head},\"choices\":[{{\"index\":{index},{said},\"logprobs\":{},\"finish_reason\":{finish},\
                 \"stop_reason\":null,\"token_ids\":{}}}]{usage}}}",
                self.logprobs(api, &tokens),
                json!(ids)
            ));
        }
        if with_usage {
            event(&format!("{{{head},\"choices\":[],\"usage\":{}}}", self.usage()));
        }
        event("[DONE]");
        out
    }
}

/// The deltas of one chunk as one: the engine adds their texts up.
fn merged<'d>(deltas: impl Iterator<Item = &'d Value>) -> Value {
    let mut sum = json!({});
    for delta in deltas {
        for (key, value) in delta.as_object().unwrap() {
            match (&mut sum[key], value) {
                (Value::String(before), Value::String(more)) => before.push_str(more),
                (Value::Array(before), Value::Array(more)) => before.extend(more.clone()),
                (before, value) => *before = value.clone(),
            }
        }
    }
    sum
}

fn joined<T: std::borrow::Borrow<SourceToken>>(tokens: &[T]) -> String {
    tokens.iter().map(|token| token.borrow().text.as_str()).collect()
}

fn token() -> impl Strategy<Value = SourceToken> {
    let text = prop_oneof![
        4 => "[ a-z]{1,6}",
        1 => any::<String>(),
        1 => prop::sample::select(vec![
            "\u{2028}", "\u{2029}", "\u{85}", "\u{7f}", "😀", "\"", "\\", "\\u0041", "\n", "\r\n", "\0",
            "\u{feff}", "[DONE]", "data: x", "\u{fffd}", "null", "é",
        ]).prop_map(String::from),
    ];
    let logprob = prop_oneof![
        4 => (-20.0..0.0f64).prop_map(|number| f64::from(number as f32)),
        2 => -20.0..0.0f64,
        1 => any::<f64>().prop_filter("JSON has none of it", |number| number.is_finite()),
        1 => prop::sample::select(vec![0.0, -0.0, -9999.0, -1e-7, f64::MIN_POSITIVE, 5e-324, f64::MIN]),
    ];
    let id = prop_oneof![4 => 0..200_000u32, 1 => any::<u32>()];
    (id, logprob, text).prop_map(|(id, logprob, text)| SourceToken { id, logprob, text })
}

fn choice() -> impl Strategy<Value = SourceChoice> {
    let tokens = |most| prop::collection::vec(token(), 0..most);
    let tool = ("[a-z_]{1,8}", prop::collection::vec(token(), 1..6));
    let finish = prop::sample::select(vec!["stop", "length", "tool_calls", "abort"]);
    (tokens(3), tokens(6), tokens(12), prop::collection::vec(tool, 0..3), finish).prop_map(
        |(silent, reasoning, content, tools, finish)| SourceChoice {
            silent,
            reasoning,
            content,
            tools,
            finish,
        },
    )
}

/// Any answer. At least one token: an engine sends none without.
pub(super) fn source_answer() -> impl Strategy<Value = SourceAnswer> {
    (
        prop::collection::vec(0..200_000u32, 1..40),
        prop::collection::vec(choice(), 1..4),
        any::<bool>(),
        1..4usize,
        prop::collection::vec(0..4usize, 0..30),
    )
        .prop_map(|(prompt, choices, is_ascii, per_chunk, order)| SourceAnswer {
            prompt,
            choices,
            is_ascii,
            per_chunk,
            order,
        })
        .prop_filter("an answer has a token", |source| {
            source.choices.iter().all(|choice| !choice.tokens().is_empty())
        })
}
