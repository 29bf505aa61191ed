//! Runs checked requests in the engine: the common part of all generating routes.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};
use serde_json::{Value, json};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::connection_state::ConnectionState;
use super::driver::Generation;
use super::error::ApiError;
use super::fault::InjectedFault;
use super::input::Input;
use super::plan::{PlannedAnswer, SamplingOptions};
use super::record::RecordedGeneration;
use super::shared::EngineShared;
use super::token;
use crate::engine::batch::{EngineRequest, Finish};

/// The largest number of choices of one request (`VLLM_MAX_N_SEQUENCES`).
const MAX_CHOICES: i64 = 16_384;

/// One HTTP request in a handler.
pub(super) struct EngineCall {
    pub shared: Arc<EngineShared>,
    pub connection: Arc<ConnectionState>,
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub fault: Option<InjectedFault>,
    /// How often the server had gone silent when the request arrived.
    pub silence: u64,
}

/// A request for a generation, independent of the API.
#[derive(Debug, Default)]
pub(super) struct GenerationRequest {
    pub prompt: Vec<u32>,
    /// Whether the prompt came as token ids, whose number is known exactly.
    pub exact: bool,
    pub sampling: SamplingOptions,
    pub n: usize,
    pub cache_salt: Option<String>,
    pub use_cache: bool,
    /// The name and the value of the field that limits the output.
    pub limit: Option<(&'static str, i64)>,
}

/// A request with its planned answers.
pub(super) struct PreparedGeneration {
    pub prompt: Vec<u32>,
    pub answers: Vec<PlannedAnswer>,
}

/// A request in the engine, with its planned answers.
pub(super) struct Job {
    pub prompt: Vec<u32>,
    pub answers: Vec<PlannedAnswer>,
    pub generation: Generation,
}

// === impl EngineCall ===

impl EngineCall {
    pub(super) fn input(&self) -> Result<Input, ApiError> {
        Input::parse(&self.headers, &self.body)
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns a value of the query string, without decoding it.
    pub(super) fn query(&self, key: &str) -> Option<&str> {
        let pairs = self.uri.query()?.split('&');
        pairs.filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// Returns the name of the requested model in answers, and the adapter that it selects.
    pub(super) fn model(&self, model: Option<&str>) -> Result<(String, Option<String>), ApiError> {
        let options = &self.shared.options;
        match options.resolve(model) {
            Some(served) => Ok((served.name.to_owned(), served.lora.map(str::to_owned))),
            None => Err(ApiError::unknown_model(model.unwrap_or_default(), &options.models)),
        }
    }

    /// Returns `prefix-<id>`: by the client's header, else its field, else a new id.
    pub(super) fn id(&self, prefix: &str, input: &Input) -> String {
        let wanted = self.header("x-request-id").or(input.body["request_id"].as_str());
        let id = wanted.map_or_else(|| self.shared.random_hex(), str::to_owned);
        format!("{prefix}-{id}")
    }

    /// The `system_fingerprint` of chat and completions.
    pub(super) fn fingerprint(&self) -> String {
        let model = self.shared.options.models.first().map_or("", String::as_str);
        format!("vllm-{}-{:08x}", self.shared.options.version, xxh3_64(model.as_bytes()) as u32)
    }

    /// Submits the request to the engine.
    pub(super) fn start(&self, request: GenerationRequest, lora: Option<&str>) -> Result<Job, ApiError> {
        let (prepared, requests) = self.prepare(request, lora)?;
        let generation = self.begin(requests)?;
        Ok(Job { prompt: prepared.prompt, answers: prepared.answers, generation })
    }

    /// Plans the answers, from the prompt and the adapter alone, and the work of the engine for them.
    pub(super) fn prepare(
        &self,
        request: GenerationRequest,
        lora: Option<&str>,
    ) -> Result<(PreparedGeneration, Vec<EngineRequest>), ApiError> {
        let options = &self.shared.options;
        check_length(&request, options.max_model_len)?;
        let adapter = lora.map_or(0, |lora| xxh3_64(lora.as_bytes()));
        let salt = request.cache_salt.as_deref().unwrap_or_default();
        let space = xxh3_64_with_seed(salt.as_bytes(), adapter);
        let bytes: Vec<u8> = request.prompt.iter().flat_map(|id| id.to_le_bytes()).collect();
        let seed = xxh3_64_with_seed(&bytes, adapter);
        let room = options.max_model_len.saturating_sub(request.prompt.len()).max(1);
        let mut sampling = request.sampling;
        (sampling.end_token, sampling.split_words) = (options.end_token, options.split_words);
        sampling.max_tokens = sampling.max_tokens.map(|tokens| tokens.min(room));
        let choices = 0..request.n.max(1) as u64;
        let answers: Vec<PlannedAnswer> =
            choices.map(|choice| PlannedAnswer::new(&sampling, seed.wrapping_add(choice))).collect();
        let requests = answers.iter().map(|answer| {
            let mut tokens = request.prompt.clone();
            tokens.extend(answer.ids(usize::MAX));
            EngineRequest {
                id: 0,
                prompt_tokens: request.prompt.len().max(1),
                output_tokens: answer.pieces.len(),
                chain: token::chain(&tokens, options.block_size, space),
                finish: answer.finish,
                use_cache: request.use_cache && self.shared.options.prefix_caching,
            }
        });
        let requests = requests.collect();
        self.shared.generations.push(RecordedGeneration {
            request_id: self.header("x-request-id").unwrap_or_default().to_owned(),
            prompt: request.prompt.clone(),
            choices: answers.iter().map(|answer| answer.ids(usize::MAX)).collect(),
        });
        Ok((PreparedGeneration { prompt: request.prompt, answers }, requests))
    }

    /// Runs prompts through the engine without generating anything.
    pub(super) fn prefill(&self, prompts: &[Vec<u32>], lora: Option<&str>) -> Result<Generation, ApiError> {
        let space = lora.map_or(0, |lora| xxh3_64(lora.as_bytes()));
        let requests = prompts.iter().map(|prompt| EngineRequest {
            id: 0,
            prompt_tokens: prompt.len().max(1),
            output_tokens: 0,
            chain: token::chain(prompt, self.shared.options.block_size, space),
            finish: Finish::Stop,
            use_cache: self.shared.options.prefix_caching,
        });
        self.begin(requests.collect())
    }

    /// Starts prepared requests as the choices of one generation.
    pub(super) fn begin(&self, requests: Vec<EngineRequest>) -> Result<Generation, ApiError> {
        let driver = &self.shared.driver;
        if self.fault == Some(InjectedFault::AbortEmpty) {
            return Ok(driver.aborted(requests.len()));
        }
        driver.begin(requests).map_err(ApiError::refused)
    }
}

fn check_length(request: &GenerationRequest, max_model_len: usize) -> Result<(), ApiError> {
    let output = match request.limit {
        Some((name, value)) if value > max_model_len as i64 => {
            let message = format!(
                "{name}={value} cannot be greater than max_model_len={max_model_len}. \
                 Please request fewer output tokens."
            );
            return Err(ApiError::invalid(&message, name, &value.to_string()));
        }
        Some((_, value)) => usize::try_from(value).unwrap_or(0),
        None => 0,
    };
    let room = max_model_len - output;
    if request.prompt.len() > room {
        // vLLM stops tokenizing a text one token beyond the limit.
        let known = if request.exact { request.prompt.len() } else { room + 1 };
        return Err(ApiError::too_long(known, known == room + 1, max_model_len));
    }
    Ok(())
}

// === impl GenerationRequest ===

impl GenerationRequest {
    /// Reads the sampling fields that OpenAI's APIs share. `limits` are the fields that may limit the
    /// output; the first one present counts.
    pub(super) fn read(input: &mut Input, limits: &[&'static str]) -> Self {
        let mut request = Self { n: 1, use_cache: true, ..Self::default() };
        for name in limits {
            let value = input.integer(name);
            request.limit = request.limit.or(value.map(|value| (*name, value)));
        }
        request.sampling.max_tokens = request.limit.and_then(|(_, value)| usize::try_from(value).ok());
        request.n = usize::try_from(input.integer("n").unwrap_or(1)).unwrap_or(0);
        request.cache_salt = input.string("cache_salt");
        for name in ["temperature", "top_p", "presence_penalty", "frequency_penalty"] {
            input.float(name);
        }
        request.sampling.stop = match input.get("stop") {
            Some(Value::String(stop)) => vec![stop.clone()],
            Some(Value::Array(stops)) => stops.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => Vec::new(),
        };
        request.use_cache = input.get("prompt_logprobs").is_none();
        request
    }

    /// Checks the rules of vLLM's sampling parameters, after the model's name.
    pub(super) fn check(&self, input: &mut Input) -> Result<(), ApiError> {
        if let Some(value) = input.float("temperature") {
            let shown = python_float(value);
            if value < 0.0 {
                let message = format!("temperature must be non-negative, got {shown}.");
                return Err(ApiError::invalid(&message, "temperature", &shown));
            }
            if value > 2.0 {
                let message = format!("temperature must be in [0, 2], got {shown}.");
                return Err(ApiError::invalid(&message, "temperature", &shown));
            }
        }
        if let Some(value) =
            input.float("top_p").filter(|value| !(0.0..=1.0).contains(value) || *value == 0.0)
        {
            let shown = python_float(value);
            let message = format!("top_p must be in (0, 1], got {shown}.");
            return Err(ApiError::invalid(&message, "top_p", &shown));
        }
        if let Some((_, value)) = self.limit.filter(|(_, value)| *value < 1) {
            let message = format!("max_tokens must be at least 1, got {value}.");
            return Err(ApiError::invalid(&message, "max_tokens", &value.to_string()));
        }
        match input.integer("n") {
            Some(n) if n < 1 => Err(ApiError::bad_request(format!("n must be at least 1, got {n}."))),
            Some(n) if n > MAX_CHOICES => {
                Err(ApiError::bad_request(format!("n must be at most {MAX_CHOICES}, got {n}.")))
            }
            _ => Ok(()),
        }
    }
}

fn python_float(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.1}") } else { value.to_string() }
}

/// Returns vLLM's name for the end of a choice.
pub(super) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// Returns the log probability of a token: invented, but always the same.
pub fn logprob(id: u32) -> f64 {
    -((xxh3_64(&id.to_le_bytes()) % 7_000) as f64 + 10.0) / 1_000.0
}

/// Returns token, log probability and bytes, in the form of chats.
pub(super) fn chat_logprob(id: u32, top: usize) -> Value {
    let entry = |id: u32, logprob: f64| {
        let bytes = token::bytes_of(id);
        json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
    };
    let own = logprob(id);
    // The alternatives are neighbours in the vocabulary, each a little less likely.
    let tops = (0..top as u32).map(|rank| entry(id.saturating_add(rank), own - f64::from(rank) * 0.5));
    let tops: Vec<Value> = tops.collect();
    let mut value = entry(id, own);
    value["top_logprobs"] = Value::Array(tops);
    value
}
