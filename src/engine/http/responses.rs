//! `POST /v1/responses`, and the stored responses: `GET /v1/responses/{id}` and its `cancel`.

use serde_json::{Value, json};

use super::background;
use super::error::ApiError;
use super::plan::SamplingOptions;
use super::render;
use super::reply::{self, Reply};
use super::responses_form::{ResponseProgress, ResponsesReplyForm};
use super::responses_stream::ResponseWriter;
use super::run::{EngineCall, GenerationRequest};
use super::store::StoredAnswer;
use super::stream;

/// Answers `POST /v1/responses`.
pub(super) async fn create(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    input.require("input");
    let mut request = GenerationRequest::read(&mut input, &["max_output_tokens"]);
    let streams = input.boolean("stream").unwrap_or(false);
    let background = input.boolean("background").unwrap_or(false);
    let stores = input.boolean("store").unwrap_or(true) && call.shared.options.responses_store;
    let model = input.string("model");
    input.list("tools");
    let mut input = input.checked()?;
    let (name, lora) = call.model(model.as_deref())?;
    request.check(&mut input)?;
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
    request.prompt = render::responses(&input.body, &before);
    request.n = 1;
    read_sampling(&input.body, &mut request.sampling, model.as_deref());
    let job = call.start(request, lora.as_deref())?;
    let Some(answer) = job.answers.into_iter().next() else { return Ok(reply::empty(500)) };
    let keeps = stores.then_some(before);
    let form = ResponsesReplyForm::new(call, input, name, job.prompt.len(), answer, keeps, background);
    let mut generation = job.generation;
    if background {
        return Ok(background::begin(call, form, generation, streams));
    }
    if streams {
        let shared = std::sync::Arc::clone(&call.shared);
        return Ok(stream::answer(call, generation, ResponseWriter::new(form, shared)));
    }
    let cached = generation.finish().await;
    let (reported, aborted) = generation.reported(0);
    let response = form.response(ResponseProgress::Ended { reported, cached, aborted });
    form.store(&call.shared.store, &response);
    Ok(reply::ok(&response))
}

/// Answers `GET /v1/responses/{id}`.
pub(super) fn get(call: &EngineCall) -> Result<Reply, ApiError> {
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

/// Cancels a background response that is not done; others cannot be cancelled.
pub(super) fn cancel(call: &EngineCall) -> Result<Reply, ApiError> {
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

fn read_sampling(body: &Value, sampling: &mut SamplingOptions, model: Option<&str>) {
    sampling.reasoning = super::chat::thinks(body, model);
    let functions =
        || body["tools"].as_array().into_iter().flatten().filter(|tool| tool["type"] == "function");
    let function = match &body["tool_choice"] {
        Value::String(choice) if choice == "required" => functions().next(),
        choice => functions().find(|tool| tool["name"].is_string() && tool["name"] == choice["name"]),
    };
    sampling.call = function
        .map(|tool| (tool["name"].as_str().unwrap_or_default().to_owned(), tool["parameters"].clone()));
    sampling.schema = match body["text"]["format"]["type"].as_str() {
        Some("json_schema") => Some(body["text"]["format"]["schema"].clone()),
        Some("json_object") => Some(super::chat::any_object()),
        _ => None,
    };
}
