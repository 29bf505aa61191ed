//! `POST /v1/responses`, and what was stored of it: `GET /v1/responses/{id}` and its `cancel`.

use serde_json::{Value, json};

use super::background;
use super::clock;
use super::error::ApiError;
use super::input::Input;
use super::plan::{AnswerPart, PlannedAnswer, SamplingWishes};
use super::render;
use super::reply::{self, Reply};
use super::responses_stream::ResponseTalk;
use super::run::{EngineCall, GenerationRequest};
use super::store::{StoredAnswer, StoredAnswers};
use super::stream;
use crate::engine::batch::Finish;

/// One response on its way, as far as its request decides it.
#[derive(Debug, Clone)]
pub struct ResponsesReplyForm {
    pub id: String,
    model: String,
    created: u64,
    /// The request, for the fields that are sent back.
    request: Value,
    /// What was asked for, or else all that the context leaves.
    max_output_tokens: usize,
    prompt: usize,
    pub answer: PlannedAnswer,
    /// Ids of the items of the output.
    pub random: String,
    background: bool,
    /// The conversation before this answer, if it is to be stored.
    keeps: Option<Vec<Value>>,
}

/// How far a response is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseProgress {
    Queued,
    Running,
    Ended { told: usize, cached: usize, aborted: bool },
}

pub async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    input.require("input");
    let mut ask = GenerationRequest::read(&mut input, &["max_output_tokens"]);
    let streams = input.boolean("stream").unwrap_or(false);
    let background = input.boolean("background").unwrap_or(false);
    let stores = input.boolean("store").unwrap_or(true) && call.shared.options.responses_store;
    let model = input.string("model");
    input.list("tools");
    let mut input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    ask.check(&mut input)?;
    if background && !stores {
        let message = "This vLLM engine does not support `store=True` and therefore does not support the \
                       background mode. To enable these features, set the environment variable \
                       `VLLM_ENABLE_RESPONSES_API_STORE=1` when launching the vLLM server.";
        return Err(ApiError::responses(400, message.to_owned(), "background"));
    }
    let before = match input.string("previous_response_id") {
        Some(id) => call.shared.store.get(&id).ok_or_else(|| unknown(&id))?.turns,
        None => Vec::new(),
    };
    ask.prompt = render::responses(&input.body, &before);
    ask.n = 1;
    read_sampling(&input.body, &mut ask.wishes, model.as_deref());
    let job = call.start(ask, lora.as_deref())?;
    let Some(answer) = job.answers.into_iter().next() else { return Ok(reply::empty(500)) };
    let keeps = stores.then_some(before);
    let form = ResponsesReplyForm::new(call, input, name, job.prompt.len(), answer, keeps, background);
    let mut generation = job.generation;
    if background {
        return Ok(background::begin(call, form, generation, streams));
    }
    if streams {
        let shared = std::sync::Arc::clone(&call.shared);
        return Ok(stream::answer(call, generation, ResponseTalk::new(form, shared)));
    }
    let cached = generation.finish().await;
    let (told, aborted) = generation.reported(0);
    let response = form.response(ResponseProgress::Ended { told, cached, aborted });
    form.keep(&call.shared.store, &response);
    Ok(reply::ok(&response))
}

pub fn get(call: &EngineCall) -> Result<Reply, ApiError> {
    let id = id_of(call);
    let kept = call.shared.store.get(id).ok_or_else(|| unknown(id))?;
    if call.query("stream") != Some("true") {
        return Ok(reply::ok(&kept.response));
    }
    let refused = || ApiError::responses(400, "Unknown response_id".to_owned(), "response_id");
    let log = kept.log.ok_or_else(refused)?;
    let after = call.query("starting_after").and_then(|number| number.parse::<usize>().ok());
    Ok(log.follow(after.map_or(0, |number| number.saturating_add(1))))
}

/// Only a background response that is not done can be cancelled.
pub fn cancel(call: &EngineCall) -> Result<Reply, ApiError> {
    let id = id_of(call);
    let kept = call.shared.store.get(id).ok_or_else(|| unknown(id))?;
    let Some(task) =
        kept.task.filter(|_| matches!(kept.response["status"].as_str(), Some("queued" | "in_progress")))
    else {
        let message = "Cannot cancel a synchronous response.".to_owned();
        return Err(ApiError::responses(400, message, "response_id"));
    };
    task.abort();
    let mut response = kept.response;
    response["status"] = json!("cancelled");
    call.shared.store.put(
        id.to_owned(),
        StoredAnswer { response: response.clone(), turns: kept.turns, task: None, log: None },
    );
    Ok(reply::ok(&response))
}

fn id_of(call: &EngineCall) -> &str {
    let path = call.uri.path().strip_prefix("/v1/responses/").unwrap_or_default();
    path.split('/').next().unwrap_or_default()
}

fn unknown(id: &str) -> ApiError {
    ApiError::responses(404, format!("Response with id '{id}' not found."), "response_id")
}

fn read_sampling(body: &Value, wishes: &mut SamplingWishes, model: Option<&str>) {
    wishes.reasoning = super::chat::thinks(body, model);
    let functions =
        || body["tools"].as_array().into_iter().flatten().filter(|tool| tool["type"] == "function");
    let function = match &body["tool_choice"] {
        Value::String(choice) if choice == "required" => functions().next(),
        choice => functions().find(|tool| tool["name"].is_string() && tool["name"] == choice["name"]),
    };
    wishes.call = function
        .map(|tool| (tool["name"].as_str().unwrap_or_default().to_owned(), tool["parameters"].clone()));
    wishes.schema = match body["text"]["format"]["type"].as_str() {
        Some("json_schema") => Some(body["text"]["format"]["schema"].clone()),
        Some("json_object") => Some(super::chat::any_object()),
        _ => None,
    };
}

// === impl Form ===

impl ResponsesReplyForm {
    /// `keeps` are the turns before this request, if the response is to be stored.
    fn new(
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

    /// Remembers the response, with the conversation that a next request may go on from.
    pub fn keep(&self, store: &StoredAnswers, response: &Value) {
        let Some(before) = &self.keeps else { return };
        let mut turns = before.clone();
        turns.extend(response["output"].as_array().into_iter().flatten().cloned());
        store.put(self.id.clone(), StoredAnswer { response: response.clone(), turns, task: None, log: None });
    }

    pub fn response(&self, progress: ResponseProgress) -> Value {
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
        let ResponseProgress::Ended { told, cached, .. } = progress else { return Value::Null };
        let is_reasoning = |piece: &&super::plan::AnswerToken| piece.part == AnswerPart::Reasoning;
        let reasoning = self.answer.pieces.iter().take(told).filter(is_reasoning).count();
        json!({
            "input_tokens": self.prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": told,
            "output_tokens_details": {
                "reasoning_tokens": reasoning,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": self.prompt + told,
        })
    }

    /// Items of the output, each with what was told of it.
    fn output(&self, progress: ResponseProgress) -> Vec<Value> {
        let ResponseProgress::Ended { told, .. } = progress else { return Vec::new() };
        let parts = [AnswerPart::Reasoning, AnswerPart::Text, AnswerPart::Arguments];
        let mut items: Vec<Value> = parts
            .into_iter()
            .filter(|part| self.answer.pieces.iter().take(told).any(|piece| piece.part == *part))
            .map(|part| self.item(part, &self.answer.text(part, told)))
            .collect();
        if items.is_empty() {
            items.push(self.item(AnswerPart::Text, ""));
        }
        items
    }

    /// A finished item.
    pub fn item(&self, part: AnswerPart, text: &str) -> Value {
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

    pub fn call_item(&self, arguments: &str, status: &str) -> Value {
        json!({
            "arguments": arguments,
            "call_id": format!("call_{}", self.random),
            "name": self.answer.tool,
            "type": "function_call",
            "id": self.item_id(AnswerPart::Arguments),
            "status": status,
        })
    }

    pub fn item_id(&self, part: AnswerPart) -> String {
        let kind = match part {
            AnswerPart::Reasoning => "rs",
            AnswerPart::Text => "msg",
            AnswerPart::Arguments => "fc",
        };
        format!("{kind}_{}", self.random)
    }
}
