//! THE table of vLLM's routes, as data: version 0.32, and what a balancer does with each.
//!
//! Rows of one path stand together, in the order in which vLLM registers them: the first one gives the
//! `allow` header of a 405.

use super::api::Api;
use super::{Aggregate, Answer};

/// The methods of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    Post,
    Delete,
    /// Routes of Starlette's own, where FastAPI's take GET only.
    GetHead,
    /// A mounted application.
    Any,
}

impl Verb {
    pub(super) fn allows(self, method: &str) -> bool {
        match self {
            Verb::Get => method == "GET",
            Verb::Post => method == "POST",
            Verb::Delete => method == "DELETE",
            Verb::GetHead => method == "GET" || method == "HEAD",
            Verb::Any => true,
        }
    }

    /// The `allow` header of a 405.
    pub(super) fn allow(self) -> &'static str {
        match self {
            Verb::Get => "GET",
            Verb::Post => "POST",
            Verb::Delete => "DELETE",
            Verb::GetHead => "GET, HEAD",
            Verb::Any => "*",
        }
    }
}

/// A policy before a request gave it its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// By model; what an upstream has cached of the prompt matters.
    Prefix,
    /// By model; only the load matters.
    Least,
    Sticky,
    Aggregate(Aggregate),
    FanOut,
    Answer(Answer),
    Deny,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) verb: Verb,
    /// `{name}` stands for one segment, at the end `{name:path}` for any rest.
    pub(super) path: &'static str,
    pub(super) api: Api,
    pub(super) rule: Rule,
}

const fn get(path: &'static str, api: Api, rule: Rule) -> Row {
    Row { verb: Verb::Get, path, api, rule }
}

const fn post(path: &'static str, api: Api, rule: Rule) -> Row {
    Row { verb: Verb::Post, path, api, rule }
}

const fn page(path: &'static str) -> Row {
    Row { verb: Verb::GetHead, path, api: Api::Docs, rule: Rule::Least }
}

const fn deny(verb: Verb, path: &'static str) -> Row {
    Row { verb, path, api: Api::Control, rule: Rule::Deny }
}

pub(super) const ROWS: &[Row] = &[
    // Inference.
    post("/v1/chat/completions", Api::Chat, Rule::Prefix),
    post("/v1/chat/completions/batch", Api::ChatBatch, Rule::Prefix),
    post("/v1/completions", Api::Completions, Rule::Prefix),
    post("/v1/responses", Api::Responses, Rule::Prefix),
    get("/v1/responses/{response_id}", Api::ResponseById, Rule::Sticky),
    post("/v1/responses/{response_id}/cancel", Api::ResponseCancel, Rule::Sticky),
    post("/v1/messages", Api::Messages, Rule::Prefix),
    post("/v1/messages/count_tokens", Api::CountTokens, Rule::Least),
    post("/cohere/v2/chat", Api::CohereChat, Rule::Prefix),
    post("/generative_scoring", Api::GenerativeScoring, Rule::Prefix),
    post("/v1/systemone", Api::SystemOne, Rule::Prefix),
    post("/v1/embeddings", Api::Embeddings, Rule::Least),
    post("/v2/embed", Api::CohereEmbed, Rule::Least),
    post("/pooling", Api::Pooling, Rule::Least),
    post("/classify", Api::Classify, Rule::Least),
    post("/score", Api::Score, Rule::Least),
    post("/v1/score", Api::Score, Rule::Least),
    post("/rerank", Api::Rerank, Rule::Least),
    post("/v1/rerank", Api::Rerank, Rule::Least),
    post("/v2/rerank", Api::Rerank, Rule::Least),
    post("/v1/audio/transcriptions", Api::Transcriptions, Rule::Least),
    post("/v1/audio/translations", Api::Translations, Rule::Least),
    get("/v1/realtime", Api::Realtime, Rule::Least),
    post("/tokenize", Api::Tokenize, Rule::Least),
    post("/detokenize", Api::Detokenize, Rule::Least),
    post("/invocations", Api::Invocations, Rule::Prefix),
    // Scale-out: an upstream without the flag answers 403 itself.
    post("/v1/chat/completions/render", Api::Render, Rule::Least),
    post("/v1/completions/render", Api::Render, Rule::Least),
    post("/v1/messages/render", Api::MessagesRender, Rule::Least),
    post("/v1/responses/render", Api::Render, Rule::Least),
    post("/cohere/v2/chat/render", Api::Render, Rule::Least),
    post("/v1/chat/completions/derender", Api::Derender, Rule::Least),
    post("/v1/completions/derender", Api::Derender, Rule::Least),
    post("/inference/v1/generate", Api::Generate, Rule::Prefix),
    // An id that an upstream does not know is no error there.
    post("/inference/v1/abort_requests", Api::AbortRequests, Rule::FanOut),
    // About all upstreams.
    get("/v1/models", Api::Models, Rule::Aggregate(Aggregate::Models)),
    get("/health", Api::Health, Rule::Answer(Answer::Health)),
    get("/ping", Api::Health, Rule::Answer(Answer::Health)),
    post("/ping", Api::Health, Rule::Answer(Answer::Health)),
    get("/version", Api::Version, Rule::Aggregate(Aggregate::Version)),
    get("/load", Api::Load, Rule::Aggregate(Aggregate::Load)),
    // vLLM mounts an application there, on whatever begins so.
    Row {
        verb: Verb::Any,
        path: "/metrics{rest:path}",
        api: Api::Metrics,
        rule: Rule::Aggregate(Aggregate::Metrics),
    },
    page("/openapi.json"),
    page("/docs"),
    page("/docs/oauth2-redirect"),
    page("/redoc"),
    page("/static/{path:path}"),
    // Control and development: 404 unless `passthrough` names them.
    deny(Verb::Get, "/tokenizer_info"),
    deny(Verb::Post, "/abort_requests"),
    deny(Verb::Post, "/adapters"),
    deny(Verb::Delete, "/adapters/{adapter_name}"),
    deny(Verb::Get, "/kv_event_sources"),
    deny(Verb::Post, "/v1/load_lora_adapter"),
    deny(Verb::Post, "/v1/unload_lora_adapter"),
    deny(Verb::Post, "/start_profile"),
    deny(Verb::Post, "/stop_profile"),
    deny(Verb::Post, "/reset_prefix_cache"),
    deny(Verb::Post, "/reset_mm_cache"),
    deny(Verb::Post, "/reset_encoder_cache"),
    deny(Verb::Post, "/sleep"),
    deny(Verb::Post, "/wake_up"),
    deny(Verb::Post, "/release_kv_cache_memory"),
    deny(Verb::Get, "/is_sleeping"),
    deny(Verb::Post, "/pause"),
    deny(Verb::Post, "/resume"),
    deny(Verb::Get, "/is_paused"),
    deny(Verb::Post, "/init_weight_transfer_engine"),
    deny(Verb::Post, "/shutdown_weight_transfer_engine"),
    deny(Verb::Post, "/start_weight_update"),
    deny(Verb::Post, "/start_draft_weight_update"),
    deny(Verb::Post, "/update_weights"),
    deny(Verb::Post, "/finish_weight_update"),
    deny(Verb::Post, "/update_weight_version"),
    deny(Verb::Post, "/weight_checker"),
    deny(Verb::Get, "/weight_info"),
    deny(Verb::Get, "/get_world_size"),
    deny(Verb::Post, "/collective_rpc"),
    deny(Verb::Get, "/server_info"),
    deny(Verb::Post, "/scale_elastic_ep"),
    deny(Verb::Post, "/is_scaling_elastic_ep"),
    deny(Verb::Post, "/fault_tolerance/apply"),
    deny(Verb::Get, "/fault_tolerance/status"),
];

/// Whether a path fits a pattern; gives what the placeholder stands for, `""` without one.
pub(super) fn fit<'p>(pattern: &str, path: &'p str) -> Option<&'p str> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return (pattern == path).then_some("");
    };
    let (name, after) = rest.split_once('}')?;
    let inside = path.strip_prefix(before)?.strip_suffix(after)?;
    let any = name.ends_with(":path");
    (any || (!inside.is_empty() && !inside.contains('/'))).then_some(inside)
}
