//! Embeddings, pooling, classification, scores and ranks: numbers that depend on the text alone.

use base64::engine::{Engine, general_purpose};
use http::StatusCode;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::clock;
use super::error::ApiError;
use super::input::Input;
use super::render;
use super::reply::{self, Reply};
use super::run::EngineCall;
use super::token;

/// The length of a vector, unless the client requests another.
const DEFAULT_DIMENSIONS: usize = 8;
/// The longest vector that a client may request.
const MAX_DIMENSIONS: usize = 4_096;

/// A checked request with its inputs as tokens, after their prefill.
struct Pooled {
    input: Input,
    model: String,
    texts: Vec<Vec<u32>>,
}

impl Pooled {
    /// Reads the inputs of `field` (or a chat), checks the model and runs the prefill.
    async fn run(call: &EngineCall, mut input: Input, texts: Vec<Vec<u32>>) -> Result<Self, ApiError> {
        let model = input.string("model");
        let input = input.checked()?;
        let (model, lora) = call.model(model.as_deref())?;
        let limit = call.shared.options.max_model_len;
        if let Some(text) = texts.iter().find(|text| text.len() > limit) {
            return Err(ApiError::too_long(text.len().min(limit + 1), true, limit));
        }
        let _ = call.prefill(&texts, lora.as_deref())?.finish().await;
        Ok(Self { input, model, texts })
    }

    fn tokens(&self) -> usize {
        self.texts.iter().map(Vec::len).sum()
    }

    fn usage(&self) -> Value {
        let tokens = self.tokens();
        json!({
            "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
            "prompt_tokens_details": null, "completion_tokens_details": null,
        })
    }

    fn list(&self, call: &EngineCall, prefix: &str, data: Vec<Value>) -> Reply {
        reply::ok(&json!({
            "id": call.id(prefix, &self.input),
            "object": "list",
            "created": clock::created(),
            "model": self.model,
            "data": data,
            "usage": self.usage(),
        }))
    }

    /// Returns the vectors concatenated, with a header of their places.
    fn bytes(&self, call: &EngineCall, prefix: &str, vectors: &[Vec<u8>]) -> Reply {
        let place = |(index, vector): (usize, &Vec<u8>)| {
            let (start, shape) = (index * vector.len(), [vector.len() / 4]);
            json!({
                "index": index, "embed_dtype": "float32", "endianness": "native",
                "start": start, "end": start + vector.len(), "shape": shape,
            })
        };
        let metadata = json!({
            "id": call.id(prefix, &self.input),
            "created": clock::created(),
            "model": self.model,
            "data": vectors.iter().enumerate().map(place).collect::<Vec<_>>(),
            "usage": self.usage(),
        });
        let headers = [("metadata", &*metadata.to_string())];
        reply::with(StatusCode::OK, &headers, Some("application/octet-stream"), vectors.concat().into())
    }
}

/// Derives numbers between -1 and 1 from the tokens of a text.
fn vector(text: &[u32], dimensions: usize) -> Vec<f32> {
    let bytes: Vec<u8> = text.iter().flat_map(|id| id.to_le_bytes()).collect();
    let place = |at: usize| {
        let hash = xxh3_64_with_seed(&bytes, at as u64);
        (hash % 2_000) as f32 / 1_000.0 - 1.0
    };
    (0..dimensions).map(place).collect()
}

/// Returns a score between 0 and 1 of two texts.
fn affinity(one: &[u32], other: &[u32]) -> f64 {
    let both: Vec<u32> = one.iter().chain(other).copied().collect();
    f64::from(vector(&both, 1)[0]) / 2.0 + 0.5
}

/// Reads the inputs of a field: one text, several, token ids, or several lists of them.
fn inputs(value: &Value) -> Vec<Vec<u32>> {
    let ids = |items: &[Value]| items.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect();
    match value {
        Value::String(text) => vec![token::encode(text)],
        Value::Array(items) if items.first().is_some_and(Value::is_number) => vec![ids(items)],
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => token::encode(text),
                Value::Array(items) => ids(items),
                other => token::encode(&document(other)),
            })
            .collect(),
        other => vec![token::encode(&document(other))],
    }
}

/// Returns the text of a document, which may be an object with a `text`.
fn document(value: &Value) -> String {
    value.as_str().or(value["text"].as_str()).map_or_else(|| value.to_string(), str::to_owned)
}

/// Reads `input` or `messages` and prefills it.
async fn pooled(call: &EngineCall) -> Result<Pooled, ApiError> {
    let mut input = call.input()?;
    if input.get("messages").is_some() {
        let texts = vec![render::chat(&input.body)];
        return Pooled::run(call, input, texts).await;
    }
    input.require("input");
    let texts = inputs(&input.body["input"]);
    Pooled::run(call, input, texts).await
}

/// Answers `POST /v1/embeddings`.
pub(super) async fn embeddings(call: &EngineCall) -> Result<Reply, ApiError> {
    let pooled = pooled(call).await?;
    let body = &pooled.input.body;
    let dimensions =
        body["dimensions"].as_u64().map_or(DEFAULT_DIMENSIONS, |wanted| wanted as usize).min(MAX_DIMENSIONS);
    let packed = body["encoding_format"] == "base64";
    let packing = |text: &Vec<u32>| -> Vec<u8> {
        vector(text, dimensions).iter().flat_map(|number| number.to_le_bytes()).collect()
    };
    if body["encoding_format"] == "bytes" {
        let vectors: Vec<Vec<u8>> = pooled.texts.iter().map(packing).collect();
        return Ok(pooled.bytes(call, "embd", &vectors));
    }
    let data = pooled.texts.iter().enumerate().map(|(index, text)| {
        let embedding = if packed {
            json!(general_purpose::STANDARD.encode(packing(text)))
        } else {
            json!(vector(text, dimensions))
        };
        json!({"index": index, "object": "embedding", "embedding": embedding})
    });
    Ok(pooled.list(call, "embd", data.collect()))
}

/// Answers `POST /pooling`.
pub(super) async fn pooling(call: &EngineCall) -> Result<Reply, ApiError> {
    let pooled = pooled(call).await?;
    let data = pooled.texts.iter().enumerate();
    let data = data.map(|(index, text)| {
        let vector = vector(text, DEFAULT_DIMENSIONS);
        json!({"index": index, "object": "pooling", "data": vector})
    });
    Ok(pooled.list(call, "pooling", data.collect()))
}

/// Answers `POST /classify`.
pub(super) async fn classify(call: &EngineCall) -> Result<Reply, ApiError> {
    let pooled = pooled(call).await?;
    let data = pooled.texts.iter().enumerate().map(|(index, text)| {
        let likely = affinity(text, &[]);
        let label = if likely >= 0.5 { "LABEL_0" } else { "LABEL_1" };
        json!({"index": index, "label": label, "probs": [likely, 1.0 - likely], "num_classes": 2})
    });
    Ok(pooled.list(call, "classify", data.collect()))
}

/// Scores one text against each of several; the fields have had several names.
pub(super) async fn score(call: &EngineCall) -> Result<Reply, ApiError> {
    let input = call.input()?;
    let field = |names: &[&str]| names.iter().find_map(|name| input.get(name)).cloned();
    let ones = inputs(&field(&["queries", "data_1", "text_1"]).unwrap_or_default());
    let others = inputs(&field(&["documents", "items", "data_2", "text_2"]).unwrap_or_default());
    if ones.len() != 1 && ones.len() != others.len() {
        return Err(ApiError::bad_request("Input lengths must be either 1:1, 1:N or N:N"));
    }
    let pairs: Vec<Vec<u32>> = others
        .iter()
        .enumerate()
        .map(|(at, other)| ones[at.min(ones.len() - 1)].iter().chain(other).copied().collect())
        .collect();
    let pooled = Pooled::run(call, input, pairs).await?;
    let data = pooled.texts.iter().enumerate();
    let data =
        data.map(|(index, pair)| json!({"index": index, "object": "score", "score": affinity(pair, &[])}));
    Ok(pooled.list(call, "score", data.collect()))
}

/// Answers the routes of reranking.
pub(super) async fn rerank(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    for name in ["query", "documents"] {
        input.require(name);
    }
    let query = token::encode(&document(&input.body["query"]));
    let documents = match &input.body["documents"] {
        Value::Array(documents) => documents.iter().map(document).collect(),
        other => vec![document(other)],
    };
    let pairs = documents.iter().map(|text| query.iter().copied().chain(token::encode(text)).collect());
    let pairs = pairs.collect();
    let pooled = Pooled::run(call, input, pairs).await?;
    let mut ranked: Vec<(usize, f64)> =
        pooled.texts.iter().map(|pair| affinity(pair, &[])).enumerate().collect();
    ranked.sort_by(|one, other| other.1.total_cmp(&one.1));
    if let Some(top) = pooled.input.body["top_n"].as_u64().filter(|top| *top > 0) {
        ranked.truncate(top as usize);
    }
    let results = ranked.into_iter().map(|(index, score)| {
        let document = json!({"text": documents[index], "multi_modal": null});
        json!({"index": index, "document": document, "relevance_score": score})
    });
    let results: Vec<Value> = results.collect();
    Ok(reply::ok(&json!({
        "id": call.id("score", &pooled.input),
        "model": pooled.model,
        "usage": {"prompt_tokens": pooled.tokens(), "total_tokens": pooled.tokens()},
        "results": results,
    })))
}
