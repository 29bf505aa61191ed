//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's API as vLLM implements it.

use serde_json::{Map, Value, json};

use super::driver::Step;
use super::error::ApiError;
use super::input::Input;
use super::plan::{AnswerPart, PlannedAnswer, SamplingOptions};
use super::render;
use super::reply::{self, Reply};
use super::run::{EngineCall, GenerationRequest, Job};
use super::stream::{self, EventWriter, ReplyEvents};
use super::usage::CachedReport;
use crate::engine::batch::Finish;

#[derive(Debug, Clone)]
struct MessagesReplyForm {
    id: String,
    model: String,
    /// The source of the ids and signatures of blocks.
    random: String,
    reports_cached: CachedReport,
}

/// Answers `POST /v1/messages`.
pub(super) async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    for name in ["model", "messages", "max_tokens"] {
        input.require(name);
    }
    input.list("messages");
    input.list("tools");
    let mut request = GenerationRequest::read(&mut input, &["max_tokens"]);
    let streams = input.boolean("stream").unwrap_or(false);
    let model = input.string("model");
    let mut input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    request.check(&mut input)?;
    request.prompt = render::messages(&input.body);
    request.n = 1;
    read_sampling(&input.body, &mut request.sampling, model.as_deref());
    let form = MessagesReplyForm {
        id: call.id("chatcmpl", &input),
        model: name,
        random: call.shared.random_hex(),
        reports_cached: call.shared.options.cached_report(),
    };
    let mut job = call.start(request, lora.as_deref())?;
    if streams {
        let Job { prompt, mut answers, generation } = job;
        let Some(answer) = answers.pop() else { return Ok(reply::empty(500)) };
        let writer = MessageWriter {
            form,
            prompt: prompt.len(),
            answer,
            open: None,
            index: 0,
            reported: 0,
            cached: 0,
            aborted: false,
        };
        return Ok(stream::answer(call, generation, writer));
    }
    let cached = job.generation.finish().await;
    Ok(reply::ok(&form.whole(&job, cached)))
}

/// Returns the number of tokens of the prompt, without generating.
pub(super) fn count(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    for name in ["model", "messages"] {
        input.require(name);
    }
    input.list("messages");
    let model = input.string("model");
    let input: Input = input.checked()?;
    call.model(model.as_deref())?;
    let tokens = render::messages(&input.body).len();
    Ok(reply::ok(&json!({
        "input_tokens": tokens,
        "context_management": {"original_input_tokens": tokens},
    })))
}

fn read_sampling(body: &Value, sampling: &mut SamplingOptions, model: Option<&str>) {
    let stops = body["stop_sequences"].as_array().into_iter().flatten();
    sampling.stop = stops.filter_map(Value::as_str).map(str::to_owned).collect();
    sampling.reasoning = match body["thinking"]["type"].as_str() {
        Some("enabled") => true,
        Some("disabled") => false,
        _ => super::chat::thinks(body, model) || body["output_config"]["effort"].is_string(),
    };
    let schema = &body["output_config"]["format"]["schema"];
    sampling.schema = schema.is_object().then(|| schema.clone());
    let tools = body["tools"].as_array().map_or(&[][..], Vec::as_slice);
    let choice = &body["tool_choice"];
    let tool = match choice["type"].as_str() {
        Some("any") => tools.first(),
        Some("tool") => tools.iter().find(|tool| tool["name"].is_string() && tool["name"] == choice["name"]),
        _ => None,
    };
    sampling.call =
        tool.map(|tool| (tool["name"].as_str().unwrap_or_default().to_owned(), tool["input_schema"].clone()));
}

/// Returns Anthropic's stop reason, and the stop sequence that caused it.
fn stop_reason(answer: &PlannedAnswer, aborted: bool) -> (Option<&'static str>, Option<&str>) {
    if aborted {
        return (None, None);
    }
    match (answer.finish, &answer.stop_reason) {
        (Finish::Length, _) => (Some("max_tokens"), None),
        (Finish::Stop, _) if answer.tool.is_some() => (Some("tool_use"), None),
        (Finish::Stop, Some(stop)) => (Some("stop_sequence"), Some(stop)),
        (Finish::Stop, None) => (Some("end_turn"), None),
    }
}

// === impl MessagesReplyForm ===

impl MessagesReplyForm {
    fn whole(&self, job: &Job, cached: usize) -> Value {
        let answer = &job.answers[0];
        let (reported, aborted) = job.generation.reported(0);
        let mut content = Vec::new();
        let thinking = answer.text(AnswerPart::Reasoning, reported);
        if !thinking.is_empty() {
            content.push(json!({"type": "thinking", "thinking": thinking, "signature": self.random}));
        }
        let text = answer.text(AnswerPart::Text, reported);
        if !text.is_empty() {
            content.push(json!({"type": "text", "text": text}));
        }
        if let Some(name) = &answer.tool {
            let arguments =
                serde_json::from_str(&answer.text(AnswerPart::Arguments, reported)).unwrap_or(json!({}));
            content.push(json!({"type": "tool_use", "id": self.tool_id(), "name": name, "input": arguments}));
        }
        if content.is_empty() {
            content.push(json!({"type": "text", "text": ""}));
        }
        let mut message = Map::new();
        for (key, value) in [
            ("id", json!(self.id)),
            ("type", json!("message")),
            ("role", json!("assistant")),
            ("content", json!(content)),
            ("model", json!(self.model)),
        ] {
            message.insert(key.to_owned(), value);
        }
        // Whole answers omit null values.
        let (reason, sequence) = stop_reason(answer, aborted);
        for (key, value) in [("stop_reason", reason), ("stop_sequence", sequence)] {
            if let Some(value) = value {
                message.insert(key.to_owned(), json!(value));
            }
        }
        message.insert("usage".to_owned(), self.usage(job.prompt.len(), reported, cached));
        Value::Object(message)
    }

    fn tool_id(&self) -> String {
        format!("chatcmpl-tool-{}", self.random)
    }

    /// Returns the usage; `input_tokens` excludes cached tokens.
    fn usage(&self, prompt: usize, completion: usize, cached: usize) -> Value {
        let Some(cached) = self.reports_cached.of(cached) else {
            return json!({"input_tokens": prompt, "output_tokens": completion});
        };
        json!({
            "input_tokens": prompt - cached.min(prompt),
            "output_tokens": completion,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        })
    }
}

/// Writes the stream of a message.
struct MessageWriter {
    form: MessagesReplyForm,
    prompt: usize,
    answer: PlannedAnswer,
    /// The part of the open block.
    open: Option<AnswerPart>,
    /// The number of closed blocks.
    index: usize,
    reported: usize,
    cached: usize,
    aborted: bool,
}

impl EventWriter for MessageWriter {
    fn write(&mut self, step: Step, events: &mut ReplyEvents) {
        match step {
            Step::Begun { cached_tokens } => {
                self.cached = cached_tokens;
                events.event("message_start", &self.start());
            }
            Step::Token { index, .. } => {
                self.reported = index + 1;
                self.piece(index, events);
            }
            Step::Aborted { .. } => self.aborted = true,
            Step::End => {
                self.close(events);
                let (reason, sequence) = stop_reason(&self.answer, self.aborted);
                let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
                let usage = self.form.usage(self.prompt, self.reported, self.cached);
                let delta = json!({"type": "message_delta", "delta": delta, "usage": usage});
                events.event("message_delta", &delta);
                events.event("message_stop", &json!({"type": "message_stop"}));
            }
        }
    }

    fn fail(&mut self, error: &ApiError, events: &mut ReplyEvents) {
        let error = json!({"type": "internal_error", "message": error.message});
        events.event("error", &json!({"type": "error", "error": error}));
    }
}

impl MessageWriter {
    fn start(&self) -> Value {
        json!({"type": "message_start", "message": {
            "id": self.form.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.form.model,
            "stop_reason": null,
            "stop_sequence": null,
            // Cached tokens are reported at the end only; here `input_tokens` is the whole prompt.
            "usage": {"input_tokens": self.prompt, "output_tokens": 0},
        }})
    }

    fn piece(&mut self, index: usize, events: &mut ReplyEvents) {
        let piece = self.answer.pieces[index].clone();
        if self.open != Some(piece.part) {
            self.close(events);
            let block = match piece.part {
                AnswerPart::Text => json!({"type": "text", "text": ""}),
                AnswerPart::Reasoning => json!({"type": "thinking", "thinking": ""}),
                AnswerPart::Arguments => {
                    let (id, name) = (self.form.tool_id(), &self.answer.tool);
                    json!({"type": "tool_use", "id": id, "name": name, "input": {}})
                }
            };
            self.open = Some(piece.part);
            let start = json!({"type": "content_block_start", "content_block": block, "index": self.index});
            events.event("content_block_start", &start);
        }
        let delta = match piece.part {
            AnswerPart::Text => json!({"type": "text_delta", "text": piece.text}),
            AnswerPart::Reasoning => json!({"type": "thinking_delta", "thinking": piece.text}),
            AnswerPart::Arguments => json!({"type": "input_json_delta", "partial_json": piece.text}),
        };
        if !piece.text.is_empty() {
            self.delta(&delta, events);
        }
    }

    fn delta(&self, delta: &Value, events: &mut ReplyEvents) {
        let event = json!({"type": "content_block_delta", "delta": delta, "index": self.index});
        events.event("content_block_delta", &event);
    }

    fn close(&mut self, events: &mut ReplyEvents) {
        let Some(part) = self.open.take() else { return };
        if part == AnswerPart::Reasoning {
            self.delta(&json!({"type": "signature_delta", "signature": self.form.random}), events);
        }
        events.event("content_block_stop", &json!({"type": "content_block_stop", "index": self.index}));
        self.index += 1;
    }
}
