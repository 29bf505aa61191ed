//! `POST /v1/completions`: text or token ids, one prompt or several.

use serde_json::{Map, Value, json};

use super::clock;
use super::driver::{Generation, Step};
use super::error::ApiError;
use super::input::Input;
use super::plan::{AnswerPart, PlannedAnswer};
use super::reply::{self, Reply};
use super::run::{EngineCall, GenerationRequest, finish_reason, logprob};
use super::stream::{self, EventWriter, ReplyEvents};
use super::token;
use super::usage::{AnswerUsage, CachedReport};

/// The largest number of prompts in one request (`VLLM_MAX_COMPLETION_PROMPTS`).
const MAX_PROMPTS: usize = 1_024;

#[derive(Debug, Clone)]
struct CompletionsReplyForm {
    id: String,
    model: String,
    created: u64,
    fingerprint: String,
    /// The number of alternatives beside each token's log probability; `None`: no log probabilities.
    logprobs: Option<usize>,
    token_ids: bool,
    include_usage: bool,
    continuous_usage: bool,
    reports_cached: CachedReport,
}

/// All choices of all prompts, in order.
struct Batch {
    /// The prompt and the answer of each choice.
    choices: Vec<(Vec<u32>, PlannedAnswer)>,
    prompt_tokens: usize,
}

/// Answers `POST /v1/completions`.
pub(super) async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    input.require("prompt");
    let request = GenerationRequest::read(&mut input, &["max_tokens"]);
    let streams = input.boolean("stream").unwrap_or(false);
    let options = input.object("stream_options");
    input.integer("logprobs");
    let model = input.string("model");
    if options.is_some() && !streams {
        input.broken_rule("Stream options can only be defined when `stream=True`.", "stream_options");
    }
    let mut input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    request.check(&mut input)?;
    let form = CompletionsReplyForm::new(call, &input, name);
    let prompts = prompts(&input.body["prompt"])?;
    let mut batch = Batch { choices: Vec::new(), prompt_tokens: 0 };
    let mut requests = Vec::new();
    for (prompt, exact) in prompts {
        batch.prompt_tokens += prompt.len();
        let request = GenerationRequest {
            prompt,
            exact,
            sampling: request.sampling.clone(),
            cache_salt: request.cache_salt.clone(),
            ..request
        };
        let (prepared, more) = call.prepare(request, lora.as_deref())?;
        let prompt = prepared.prompt;
        batch.choices.extend(prepared.answers.into_iter().map(|answer| (prompt.clone(), answer)));
        requests.extend(more);
    }
    let mut generation = call.begin(requests)?;
    if streams {
        let reported = vec![0; batch.choices.len()];
        return Ok(stream::answer(call, generation, CompletionWriter { form, batch, reported, cached: 0 }));
    }
    let cached = generation.finish().await;
    Ok(reply::ok(&form.whole(&batch, &generation, cached)))
}

/// Returns the token ids of each prompt, and whether the request contained token ids.
fn prompts(prompt: &Value) -> Result<Vec<(Vec<u32>, bool)>, ApiError> {
    let wrong = || ApiError::bad_request("prompt must be a string, an array of strings, or of token ids");
    let ids = |items: &[Value]| -> Option<Vec<u32>> {
        items.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
    };
    match prompt {
        Value::String(text) => Ok(vec![(token::encode(text), false)]),
        Value::Array(items) if items.is_empty() || items.len() > MAX_PROMPTS && !items[0].is_number() => {
            Err(wrong())
        }
        Value::Array(items) if items[0].is_number() => Ok(vec![(ids(items).ok_or_else(wrong)?, true)]),
        Value::Array(items) => {
            let each = items.iter().map(|item| match item {
                Value::String(text) => Some((token::encode(text), false)),
                Value::Array(items) => ids(items).map(|ids| (ids, true)),
                _ => None,
            });
            each.collect::<Option<Vec<_>>>().ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

// === impl CompletionsReplyForm ===

impl CompletionsReplyForm {
    fn new(call: &EngineCall, input: &Input, model: String) -> Self {
        let body = &input.body;
        let is_on = |value: &Value| value.as_bool().unwrap_or(false);
        let usage = is_on(&body["stream_options"]["include_usage"]);
        Self {
            id: call.id("cmpl", input),
            model,
            created: clock::created(),
            fingerprint: call.fingerprint(),
            logprobs: body["logprobs"].as_u64().map(|tops| tops.min(20) as usize),
            token_ids: is_on(&body["return_token_ids"]),
            include_usage: usage,
            continuous_usage: usage && is_on(&body["stream_options"]["continuous_usage_stats"]),
            reports_cached: call.shared.options.cached_report(),
        }
    }

    fn whole(&self, batch: &Batch, generation: &Generation, cached: usize) -> Value {
        let mut completion = 0;
        let choices = batch.choices.iter().enumerate().map(|(index, (prompt, answer))| {
            let (reported, aborted) = generation.reported(index);
            completion += reported;
            let ids = answer.ids(reported);
            json!({
                "index": index,
                "text": answer.text(AnswerPart::Text, reported),
                "logprobs": self.logprobs(&ids, 0),
                "finish_reason": if aborted { "abort" } else { finish_reason(answer.finish) },
                "stop_reason": answer.stop_reason,
                "token_ids": self.token_ids.then_some(ids),
                "prompt_logprobs": null,
                "prompt_token_ids": self.token_ids.then_some(prompt),
                "routed_experts": null,
            })
        });
        let choices: Vec<Value> = choices.collect();
        let cached = self.reports_cached.of(cached);
        let usage = AnswerUsage { prompt: batch.prompt_tokens, completion, cached };
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "service_tier": null,
            "system_fingerprint": self.fingerprint,
            "usage": usage.whole(Value::Null),
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "metrics": null,
        })
    }

    /// Returns the log probabilities of tokens; `offset` is the place of the first in the answer, in
    /// characters.
    fn logprobs(&self, ids: &[u32], mut offset: usize) -> Value {
        let Some(tops) = self.logprobs else { return Value::Null };
        let mut offsets = Vec::new();
        let mut texts = Vec::new();
        let mut top_logprobs = Vec::new();
        for &id in ids {
            let text = token::decode(&[id]);
            offsets.push(offset);
            offset += text.chars().count();
            let entries = (0..tops.max(1) as u32).map(|rank| {
                let other = id.saturating_add(rank);
                (token::decode(&[other]), json!(logprob(id) - f64::from(rank) * 0.5))
            });
            top_logprobs.push(Value::Object(Map::from_iter(entries)));
            texts.push(text);
        }
        let values: Vec<f64> = ids.iter().map(|&id| logprob(id)).collect();
        json!({
            "text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": top_logprobs,
        })
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

/// The stream of a completion.
struct CompletionWriter {
    form: CompletionsReplyForm,
    batch: Batch,
    reported: Vec<usize>,
    cached: usize,
}

impl EventWriter for CompletionWriter {
    fn write(&mut self, step: Step, events: &mut ReplyEvents) {
        match step {
            Step::Begun { cached_tokens } => self.cached = cached_tokens,
            Step::Token { choice, index, last } => {
                self.reported[choice] = index + 1;
                events.data(&self.token_chunk(choice, index, last));
            }
            Step::Aborted { choice } => {
                let entry = json!({
                    "index": choice, "text": "", "logprobs": null, "finish_reason": "abort",
                    "stop_reason": null, "prompt_token_ids": null, "token_ids": null,
                });
                events.data(&self.terminal(json!([entry])));
            }
            Step::End => {
                if self.form.include_usage {
                    let mut chunk = self.form.chunk(json!([]));
                    let cached = self.form.reports_cached.of(self.cached);
                    chunk["usage"] = AnswerUsage { cached, ..self.usage() }.last(false);
                    chunk["system_fingerprint"] = json!(self.form.fingerprint);
                    events.data(&chunk);
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

impl CompletionWriter {
    fn token_chunk(&self, choice: usize, index: usize, last: bool) -> Value {
        let (prompt, answer) = &self.batch.choices[choice];
        let piece = &answer.pieces[index];
        let offset = answer.text(AnswerPart::Text, index).chars().count();
        let tells_prompt = self.form.token_ids && index == 0;
        let entry = json!({
            "index": choice,
            "text": piece.text,
            "logprobs": self.form.logprobs(&[piece.id], offset),
            "finish_reason": last.then(|| finish_reason(answer.finish)),
            "stop_reason": answer.stop_reason.as_ref().filter(|_| last),
            "prompt_token_ids": tells_prompt.then_some(prompt),
            "token_ids": self.form.token_ids.then_some([piece.id]),
        });
        if last { self.terminal(json!([entry])) } else { self.with_usage(json!([entry])) }
    }

    /// Returns a choice's last chunk; as in a chat, it has the fingerprint unless a usage chunk follows.
    fn terminal(&self, choices: Value) -> Value {
        let mut chunk = self.with_usage(choices);
        if !self.form.include_usage {
            chunk["system_fingerprint"] = json!(self.form.fingerprint);
        }
        chunk
    }

    fn with_usage(&self, choices: Value) -> Value {
        let mut chunk = self.form.chunk(choices);
        if self.form.continuous_usage {
            chunk["usage"] = self.usage().counts();
        }
        chunk
    }

    fn usage(&self) -> AnswerUsage {
        AnswerUsage { prompt: self.batch.prompt_tokens, completion: self.reported.iter().sum(), cached: None }
    }
}
