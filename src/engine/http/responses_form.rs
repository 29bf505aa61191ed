//! The JSON of a response, at every stage of its progress.

use serde_json::{Value, json};

use super::clock;
use super::input::Input;
use super::plan::{AnswerPart, AnswerToken, PlannedAnswer};
use super::run::EngineCall;
use super::store::{StoredAnswer, StoredAnswers};
use crate::engine::batch::Finish;

/// The parts of a response that follow from its request.
#[derive(Debug, Clone)]
pub(super) struct ResponsesReplyForm {
    pub id: String,
    model: String,
    created: u64,
    /// The request, for the fields that are sent back.
    request: Value,
    /// The requested limit, or the rest of the context.
    max_output_tokens: usize,
    prompt: usize,
    pub answer: PlannedAnswer,
    /// The source of the ids of the output's items.
    pub random: String,
    background: bool,
    /// The conversation before this answer, if it is to be stored.
    keeps: Option<Vec<Value>>,
}

/// The progress of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResponseProgress {
    Queued,
    Running,
    Ended { reported: usize, cached: usize, aborted: bool },
}

// === impl ResponsesReplyForm ===

impl ResponsesReplyForm {
    /// `keeps` are the turns before this request, if the response is to be stored.
    pub(super) fn new(
        call: &EngineCall,
        input: Input,
        model: String,
        prompt: usize,
        answer: PlannedAnswer,
        mut keeps: Option<Vec<Value>>,
        background: bool,
    ) -> Self {
        let request = input.body;
        let random = call.shared.random_hex();
        let id = request["request_id"].as_str().map_or_else(|| format!("resp_{random}"), str::to_owned);
        let room = call.shared.options.max_model_len.saturating_sub(prompt);
        let asked = request["max_output_tokens"].as_u64().map(|tokens| tokens as usize);
        if let Some(turns) = &mut keeps {
            match &request["input"] {
                Value::String(text) => turns.push(json!({"role": "user", "content": text})),
                Value::Array(items) => turns.extend(items.iter().cloned()),
                _ => {}
            }
        }
        Self {
            id,
            model,
            created: clock::created(),
            max_output_tokens: asked.unwrap_or(room),
            request,
            prompt,
            answer,
            random,
            background,
            keeps,
        }
    }

    /// Stores the response, with the conversation that a later request may continue.
    pub(super) fn store(&self, store: &StoredAnswers, response: &Value) {
        let Some(before) = &self.keeps else { return };
        let mut turns = before.clone();
        turns.extend(response["output"].as_array().into_iter().flatten().cloned());
        store.put(self.id.clone(), StoredAnswer { response: response.clone(), turns, task: None, log: None });
    }

    /// The response object at this point of its progress.
    pub(super) fn response(&self, progress: ResponseProgress) -> Value {
        let request = &self.request;
        let or = |key: &str, default: Value| match &request[key] {
            Value::Null => default,
            value => value.clone(),
        };
        let choice =
            if request["tools"].as_array().is_some_and(|tools| !tools.is_empty()) { "auto" } else { "none" };
        let is_cut = matches!(progress, ResponseProgress::Ended { aborted: false, .. })
            && self.answer.finish == Finish::Length;
        let incomplete = is_cut.then(|| json!({"reason": "max_output_tokens"}));
        json!({
            "id": self.id,
            "created_at": self.created,
            "incomplete_details": incomplete,
            "instructions": request["instructions"],
            "metadata": request["metadata"],
            "model": self.model,
            "object": "response",
            "output": self.output(progress),
            "parallel_tool_calls": or("parallel_tool_calls", json!(true)),
            "temperature": or("temperature", json!(1.0)),
            "tool_choice": or("tool_choice", json!(choice)),
            "tools": or("tools", json!([])),
            "top_p": or("top_p", json!(1.0)),
            "background": self.background,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": request["max_tool_calls"],
            "previous_response_id": request["previous_response_id"],
            "prompt": null,
            "reasoning": request["reasoning"],
            "service_tier": "auto",
            "status": self.status(progress),
            "text": request["text"],
            "top_logprobs": request["top_logprobs"],
            "truncation": or("truncation", json!("disabled")),
            "usage": self.usage(progress),
            "user": request["user"],
            "presence_penalty": or("presence_penalty", json!(0.0)),
            "frequency_penalty": or("frequency_penalty", json!(0.0)),
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "input_messages": null,
            "output_messages": null,
        })
    }

    fn status(&self, progress: ResponseProgress) -> &'static str {
        match (progress, self.answer.finish) {
            (ResponseProgress::Queued, _) => "queued",
            (ResponseProgress::Running, _) => "in_progress",
            (ResponseProgress::Ended { aborted: true, .. }, _) => "cancelled",
            (ResponseProgress::Ended { .. }, Finish::Length) => "incomplete",
            (ResponseProgress::Ended { .. }, Finish::Stop) => "completed",
        }
    }

    fn usage(&self, progress: ResponseProgress) -> Value {
        let ResponseProgress::Ended { reported, cached, .. } = progress else { return Value::Null };
        let is_reasoning = |piece: &&AnswerToken| piece.part == AnswerPart::Reasoning;
        let reasoning = self.answer.pieces.iter().take(reported).filter(is_reasoning).count();
        json!({
            "input_tokens": self.prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": reported,
            "output_tokens_details": {
                "reasoning_tokens": reasoning,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": self.prompt + reported,
        })
    }

    /// Returns the items of the output so far.
    fn output(&self, progress: ResponseProgress) -> Vec<Value> {
        let ResponseProgress::Ended { reported, .. } = progress else { return Vec::new() };
        let parts = [AnswerPart::Reasoning, AnswerPart::Text, AnswerPart::Arguments];
        let mut items: Vec<Value> = parts
            .into_iter()
            .filter(|part| self.answer.pieces.iter().take(reported).any(|piece| piece.part == *part))
            .map(|part| self.item(part, &self.answer.text(part, reported)))
            .collect();
        if items.is_empty() {
            items.push(self.item(AnswerPart::Text, ""));
        }
        items
    }

    /// Returns a finished item.
    pub(super) fn item(&self, part: AnswerPart, text: &str) -> Value {
        let id = self.item_id(part);
        match part {
            AnswerPart::Reasoning => json!({
                "id": id,
                "summary": [],
                "type": "reasoning",
                "content": [{"text": text, "type": "reasoning_text"}],
                "encrypted_content": null,
                "status": "completed",
            }),
            AnswerPart::Text => json!({
                "id": id,
                "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": null}],
                "role": "assistant",
                "status": "completed",
                "type": "message",
                "phase": null,
            }),
            AnswerPart::Arguments => self.call_item(text, "completed"),
        }
    }

    /// The output item of a function call.
    pub(super) fn call_item(&self, arguments: &str, status: &str) -> Value {
        json!({
            "arguments": arguments,
            "call_id": format!("call_{}", self.random),
            "name": self.answer.tool,
            "type": "function_call",
            "id": self.item_id(AnswerPart::Arguments),
            "status": status,
        })
    }

    /// The id of the output item of a part.
    pub(super) fn item_id(&self, part: AnswerPart) -> String {
        let kind = match part {
            AnswerPart::Reasoning => "rs",
            AnswerPart::Text => "msg",
            AnswerPart::Arguments => "fc",
        };
        format!("{kind}_{}", self.random)
    }
}
