//! `POST /inference/v1/generate`: token ids in, token ids out.

use serde_json::{Value, json};

use super::clock;
use super::driver::Step;
use super::error::ApiError;
use super::plan::PlannedAnswer;
use super::reply::{self, Reply};
use super::run::{EngineCall, GenerationRequest, Job, finish_reason};
use super::stream::{self, EventWriter, ReplyEvents};
use super::usage::{AnswerUsage, CachedReport};

struct GenerateReplyForm {
    id: String,
    reports_cached: CachedReport,
    include_usage: bool,
}

/// Answers `POST /inference/v1/generate`.
pub(super) async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    for name in ["token_ids", "sampling_params"] {
        input.require(name);
    }
    input.list("token_ids");
    let sampling = input.object("sampling_params").unwrap_or_default();
    let streams = input.boolean("stream").unwrap_or(false);
    let cache_salt = input.string("cache_salt");
    let model = input.string("model");
    let input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    let ids = input.body["token_ids"].as_array().into_iter().flatten();
    let ids: Option<Vec<u32>> = ids.map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
    let prompt = ids.ok_or_else(|| ApiError::bad_request("token_ids must be token ids"))?;
    let number = |key: &str| sampling.get(key).and_then(Value::as_i64);
    let mut request = GenerationRequest {
        prompt,
        exact: true,
        n: 1,
        cache_salt,
        use_cache: true,
        ..GenerationRequest::default()
    };
    request.limit = number("max_tokens").map(|value| ("max_tokens", value));
    request.sampling.max_tokens = number("max_tokens").and_then(|value| usize::try_from(value).ok());
    request.n = number("n").and_then(|n| usize::try_from(n).ok()).unwrap_or(1);
    let form = GenerateReplyForm {
        id: call.id("generate-tokens", &input),
        reports_cached: call.shared.options.cached_report(),
        include_usage: input.body["stream_options"]["include_usage"].as_bool().unwrap_or(false),
    };
    let mut job = call.start(request, lora.as_deref())?;
    if streams {
        let Job { prompt, answers, generation } = job;
        let writer = GenerateWriter { form, prompt: prompt.len(), answers, reported: 0, cached: 0 };
        return Ok(stream::answer(call, generation, writer));
    }
    let cached = job.generation.finish().await;
    Ok(reply::ok(&form.whole(&job, &name, cached)))
}

// === impl Form ===

impl GenerateReplyForm {
    fn whole(&self, job: &Job, model: &str, cached: usize) -> Value {
        let mut completion = 0;
        let choices = job.answers.iter().enumerate().map(|(index, answer)| {
            let (reported, aborted) = job.generation.reported(index);
            completion += reported;
            json!({
                "index": index,
                "finish_reason": if aborted { "abort" } else { finish_reason(answer.finish) },
                "stop_reason": answer.stop_reason,
                "token_ids": answer.ids(reported),
                "routed_experts": null,
                "sampling_mask": null,
                "weight_versions": [{"version": "default", "start": 0, "end": reported}],
                "logprobs": null,
            })
        });
        let choices: Vec<Value> = choices.collect();
        let cached = self.reports_cached.of(cached);
        let usage = AnswerUsage { prompt: job.prompt.len(), completion, cached };
        json!({
            "request_id": self.id,
            "model": model,
            "created": clock::created(),
            "usage": usage.whole(Value::Null),
            "prompt_logprobs": null,
            "prompt_token_id_logprobs": null,
            "prompt_token_ids": null,
            "mm_placeholders": null,
            "metrics": null,
            "kv_transfer_params": null,
            "ec_transfer_params": null,
            "output_mode": "tokens",
            "choices": choices,
        })
    }
}

struct GenerateWriter {
    form: GenerateReplyForm,
    prompt: usize,
    answers: Vec<PlannedAnswer>,
    reported: usize,
    cached: usize,
}

impl GenerateWriter {
    fn chunk(&self, choice: usize, ids: &[u32], finish: Option<&str>) -> Value {
        let end = finish.map(|_| json!([{"version": "default", "start": 0, "end": self.reported}]));
        let choice = json!({
            "index": choice, "finish_reason": finish, "stop_reason": null, "token_ids": ids,
            "routed_experts": null, "sampling_mask": null, "weight_versions": end, "logprobs": null,
        });
        json!({"request_id": self.form.id, "usage": null, "output_mode": "tokens", "choices": [choice]})
    }
}

impl EventWriter for GenerateWriter {
    fn write(&mut self, step: Step, events: &mut ReplyEvents) {
        match step {
            Step::Begun { cached_tokens } => self.cached = cached_tokens,
            Step::Token { choice, index, last } => {
                self.reported += 1;
                let answer = &self.answers[choice];
                let finish = last.then(|| finish_reason(answer.finish));
                events.data(&self.chunk(choice, &[answer.pieces[index].id], finish));
            }
            Step::Aborted { choice } => events.data(&self.chunk(choice, &[], Some("abort"))),
            Step::End => {
                if self.form.include_usage {
                    let cached = self.form.reports_cached.of(self.cached);
                    let usage = AnswerUsage { prompt: self.prompt, completion: self.reported, cached };
                    events.data(&json!({
                        "request_id": self.form.id, "usage": usage.last(false), "output_mode": "tokens",
                        "choices": [],
                    }));
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
