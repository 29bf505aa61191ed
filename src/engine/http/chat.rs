//! `POST /v1/chat/completions`.

use serde_json::{Map, Value, json};

use super::clock;
use super::driver::Step;
use super::error::ApiError;
use super::input::Input;
use super::plan::{AnswerPart, PlannedAnswer, SamplingOptions};
use super::render;
use super::reply::{self, Reply};
use super::run::{EngineCall, GenerationRequest, Job, chat_logprob, finish_reason};
use super::stream::{self, EventWriter, ReplyEvents};
use super::token;
use super::usage::{AnswerUsage, CachedReport};

/// The parts of the answer that follow from the request.
#[derive(Debug, Clone)]
struct ChatReplyForm {
    id: String,
    model: String,
    created: u64,
    fingerprint: String,
    /// The request names a tool: the call ends with `stop`, any other call with `tool_calls`.
    named_tool: bool,
    /// The number of alternatives beside each token's log probability; `None`: no log probabilities.
    logprobs: Option<usize>,
    prompt_logprobs: bool,
    token_ids: bool,
    prompt_text: bool,
    include_usage: bool,
    continuous_usage: bool,
    reports_cached: CachedReport,
}

/// Answers `POST /v1/chat/completions`.
pub(super) async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    let (mut request, streams) = read(&mut input);
    let model = input.string("model");
    let mut input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    request.check(&mut input)?;
    request.prompt = render::chat(&input.body);
    read_sampling(&input.body, &mut request.sampling, model.as_deref());
    let form = ChatReplyForm::new(call, &input, name);
    let mut job = call.start(request, lora.as_deref())?;
    if streams {
        let Job { prompt, answers, generation } = job;
        let writer = ChatWriter { reported: vec![0; answers.len()], form, prompt, answers, cached: 0 };
        return Ok(stream::answer(call, generation, writer));
    }
    let cached = job.generation.finish().await;
    Ok(reply::ok(&form.whole(&job, cached)))
}

fn read(input: &mut Input) -> (GenerationRequest, bool) {
    input.require("messages");
    input.list("messages");
    input.list("tools");
    let request = GenerationRequest::read(input, &["max_completion_tokens", "max_tokens"]);
    let streams = input.boolean("stream").unwrap_or(false);
    let options = input.object("stream_options");
    for name in ["logprobs", "return_token_ids"] {
        input.boolean(name);
    }
    input.integer("top_logprobs");
    if options.is_some() && !streams {
        input.broken_rule("Stream options can only be defined when `stream=True`.", "stream_options");
    }
    if input.get("tool_choice").is_some_and(|choice| choice != "none") && input.get("tools").is_none() {
        input.broken_rule("When using `tool_choice`, `tools` must be set.", "tool_choice");
    }
    (request, streams)
}

/// Reads the fields of a chat that shape the answer.
fn read_sampling(body: &Value, sampling: &mut SamplingOptions, model: Option<&str>) {
    sampling.reasoning = thinks(body, model);
    let tools = body["tools"].as_array().map_or(&[][..], Vec::as_slice);
    let functions = || tools.iter().map(|tool| &tool["function"]);
    let function = match &body["tool_choice"] {
        Value::String(choice) if choice == "required" => functions().next(),
        choice => {
            let name = &choice["function"]["name"];
            functions().find(|function| name.is_string() && function["name"] == *name)
        }
    };
    sampling.call = function.map(|function| {
        (function["name"].as_str().unwrap_or_default().to_owned(), function["parameters"].clone())
    });
    sampling.schema = match body["response_format"]["type"].as_str() {
        Some("json_schema") => Some(body["response_format"]["json_schema"]["schema"].clone()),
        Some("json_object") => Some(any_object()),
        _ => None,
    };
}

/// Returns a schema for an answer that may be any object.
pub(super) fn any_object() -> Value {
    json!({"type": "object", "required": ["answer"], "properties": {"answer": {"type": "string"}}})
}

/// Whether the model reasons: by the request, else by the suffix `-reasoning` of its name.
pub(super) fn thinks(body: &Value, model: Option<&str>) -> bool {
    let enabled = &body["chat_template_kwargs"]["enable_thinking"];
    let effort = || body["reasoning_effort"].as_str().map(|effort| effort != "none");
    let budget = || body["thinking_token_budget"].is_u64().then_some(true);
    let by_name = || model.is_some_and(|model| model.ends_with("-reasoning"));
    enabled.as_bool().or_else(effort).or_else(budget).unwrap_or_else(by_name)
}

// === impl ChatReplyForm ===

impl ChatReplyForm {
    fn new(call: &EngineCall, input: &Input, model: String) -> Self {
        let body = &input.body;
        let is_on = |value: &Value| value.as_bool().unwrap_or(false);
        let tops = body["top_logprobs"].as_u64().unwrap_or(0).min(20) as usize;
        let usage = is_on(&body["stream_options"]["include_usage"]);
        Self {
            id: call.id("chatcmpl", input),
            model,
            created: clock::created(),
            fingerprint: call.fingerprint(),
            named_tool: body["tool_choice"].is_object(),
            logprobs: is_on(&body["logprobs"]).then_some(tops),
            prompt_logprobs: input.get("prompt_logprobs").is_some(),
            token_ids: is_on(&body["return_token_ids"]),
            prompt_text: is_on(&body["return_prompt_text"]),
            include_usage: usage,
            continuous_usage: usage && is_on(&body["stream_options"]["continuous_usage_stats"]),
            reports_cached: call.shared.options.cached_report(),
        }
    }

    fn finish(&self, answer: &PlannedAnswer) -> &'static str {
        let reason = finish_reason(answer.finish);
        if answer.tool.is_some() && !self.named_tool && reason == "stop" { "tool_calls" } else { reason }
    }

    fn logprobs(&self, ids: &[u32]) -> Value {
        let Some(tops) = self.logprobs else { return Value::Null };
        let content: Vec<Value> = ids.iter().map(|&id| chat_logprob(id, tops)).collect();
        json!({"content": content})
    }

    /// Returns the whole answer.
    fn whole(&self, job: &Job, cached: usize) -> Value {
        let choices: Vec<Value> = (0..job.answers.len()).map(|index| self.choice(job, index)).collect();
        let completion = (0..job.answers.len()).map(|index| job.generation.reported(index).0).sum();
        let cached = self.reports_cached.of(cached);
        let usage = AnswerUsage { prompt: job.prompt.len(), completion, cached };
        let prompt_text = self.prompt_text.then(|| token::decode(&job.prompt));
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "service_tier": null,
            "system_fingerprint": self.fingerprint,
            "usage": usage.whole(json!(0)),
            "prompt_logprobs": self.prompt_logprobs.then(|| prompt_logprobs(&job.prompt)),
            "prompt_token_ids": self.token_ids.then_some(&job.prompt),
            "prompt_text": prompt_text,
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "metrics": null,
        })
    }

    fn choice(&self, job: &Job, index: usize) -> Value {
        let answer = &job.answers[index];
        let (reported, aborted) = job.generation.reported(index);
        let ids = answer.ids(reported);
        json!({
            "index": index,
            "message": self.message(answer, reported),
            "logprobs": self.logprobs(&ids),
            "finish_reason": if aborted { "abort" } else { self.finish(answer) },
            "stop_reason": answer.stop_reason,
            "token_ids": self.token_ids.then_some(ids),
            "routed_experts": null,
        })
    }

    fn message(&self, answer: &PlannedAnswer, reported: usize) -> Value {
        let text = answer.text(AnswerPart::Text, reported);
        let reasoning = answer.text(AnswerPart::Reasoning, reported);
        let has_reasoning = answer.pieces.iter().any(|piece| piece.part == AnswerPart::Reasoning);
        let mut message = Map::new();
        message.insert("role".to_owned(), json!("assistant"));
        let content = if answer.tool.is_some() && !self.named_tool { Value::Null } else { json!(text) };
        message.insert("content".to_owned(), content);
        for absent in ["refusal", "annotations", "audio", "function_call"] {
            message.insert(absent.to_owned(), Value::Null);
        }
        if let Some(name) = &answer.tool {
            let arguments = answer.text(AnswerPart::Arguments, reported);
            let function = json!({"name": name, "arguments": arguments});
            let call = json!({"id": self.call_id(0), "type": "function", "function": function});
            message.insert("tool_calls".to_owned(), json!([call]));
        }
        message.insert("reasoning".to_owned(), json!(has_reasoning.then_some(reasoning)));
        Value::Object(message)
    }

    /// Returns the id of the tool call: derived from the request's id, so that it is unique too.
    fn call_id(&self, choice: usize) -> String {
        format!("chatcmpl-tool-{}{choice}", self.id.trim_start_matches("chatcmpl-"))
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// Returns the log probabilities of a prompt; the first token has none.
fn prompt_logprobs(prompt: &[u32]) -> Vec<Value> {
    let known = prompt.iter().skip(1).enumerate().map(|(at, &id)| {
        let text = token::decode(&[id]);
        let entry = json!({"logprob": super::run::logprob(id), "rank": at + 1, "decoded_token": text});
        Value::Object(Map::from_iter([(id.to_string(), entry)]))
    });
    std::iter::once(Value::Null).chain(known).collect()
}

/// Writes the stream of a chat.
struct ChatWriter {
    form: ChatReplyForm,
    prompt: Vec<u32>,
    answers: Vec<PlannedAnswer>,
    cached: usize,
    /// The reported tokens of each choice.
    reported: Vec<usize>,
}

impl EventWriter for ChatWriter {
    fn write(&mut self, step: Step, events: &mut ReplyEvents) {
        match step {
            Step::Begun { cached_tokens } => {
                self.cached = cached_tokens;
                for index in 0..self.answers.len() {
                    events.data(&self.role_chunk(index));
                }
            }
            Step::Token { choice, index, last } => {
                self.reported[choice] = index + 1;
                events.data(&self.token_chunk(choice, index, last));
            }
            Step::Aborted { choice } => {
                let delta = json!({
                    "index": choice, "delta": {"content": ""}, "logprobs": null,
                    "finish_reason": "abort", "stop_reason": null, "token_ids": null,
                });
                events.data(&self.terminal(json!([delta]), choice));
            }
            Step::End => {
                if self.form.include_usage {
                    events.data(&self.usage_chunk());
                }
                events.done();
            }
        }
    }

    fn fail(&mut self, error: &ApiError, events: &mut ReplyEvents) {
        events.data(&error.openai());
        events.done();
    }
}

impl ChatWriter {
    fn role_chunk(&self, index: usize) -> Value {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        let mut chunk = self.form.chunk(json!([choice]));
        self.add_running_usage(&mut chunk, index);
        chunk["prompt_token_ids"] = json!(self.form.token_ids.then_some(&self.prompt));
        chunk["prompt_text"] = json!(self.form.prompt_text.then(|| token::decode(&self.prompt)));
        chunk
    }

    fn token_chunk(&self, choice: usize, index: usize, last: bool) -> Value {
        let answer = &self.answers[choice];
        let piece = &answer.pieces[index];
        let ids = [piece.id];
        let mut entry = json!({
            "index": choice,
            "delta": self.delta(choice, index),
            "logprobs": self.form.logprobs(&ids),
            "finish_reason": last.then(|| self.form.finish(answer)),
        });
        if last {
            entry["stop_reason"] = json!(answer.stop_reason);
        }
        entry["token_ids"] = json!(self.form.token_ids.then_some(ids));
        if last {
            return self.terminal(json!([entry]), choice);
        }
        let mut chunk = self.form.chunk(json!([entry]));
        self.add_running_usage(&mut chunk, choice);
        chunk
    }

    fn delta(&self, choice: usize, index: usize) -> Value {
        let answer = &self.answers[choice];
        let piece = &answer.pieces[index];
        match piece.part {
            AnswerPart::Text => json!({"content": piece.text}),
            AnswerPart::Reasoning => json!({"reasoning": piece.text}),
            AnswerPart::Arguments => {
                let first = index == 0 || answer.pieces[index - 1].part != AnswerPart::Arguments;
                let call = if first {
                    json!({
                        "id": self.form.call_id(choice),
                        "type": "function",
                        "index": 0,
                        "function": {"name": answer.tool, "arguments": piece.text},
                    })
                } else {
                    json!({"index": 0, "function": {"arguments": piece.text}})
                };
                json!({"tool_calls": [call]})
            }
        }
    }

    /// Returns a choice's last chunk; it has the fingerprint unless a usage chunk follows.
    fn terminal(&self, choices: Value, choice: usize) -> Value {
        let mut chunk = self.form.chunk(choices);
        self.add_running_usage(&mut chunk, choice);
        if !self.form.include_usage {
            chunk["system_fingerprint"] = json!(self.form.fingerprint);
        }
        chunk
    }

    fn usage_chunk(&self) -> Value {
        let completion = self.reported.iter().sum();
        let cached = self.form.reports_cached.of(self.cached);
        let mut chunk = self.form.chunk(json!([]));
        chunk["usage"] = AnswerUsage { prompt: self.prompt.len(), completion, cached }.last(true);
        chunk["system_fingerprint"] = json!(self.form.fingerprint);
        chunk
    }

    fn add_running_usage(&self, chunk: &mut Value, choice: usize) {
        if self.form.continuous_usage {
            let usage =
                AnswerUsage { prompt: self.prompt.len(), completion: self.reported[choice], cached: None };
            chunk["usage"] = usage.running();
        }
    }
}
