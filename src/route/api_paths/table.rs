//! The table of vLLM's API routes (version 0.32), with the balancer's policy for each.
//!
//! Rows of one path stand together, in the order in which vLLM registers them: the first one gives the
//! `allow` header of a 405.

use super::api::Api;

/// Answers that the balancer merges from those of all upstreams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AggregateKind {
    Models,
    Load,
    Version,
    Metrics,
}

/// Answers that the balancer gives without an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnAnswer {
    /// 200 with an empty body when an upstream is ready, else 503.
    Health,
}

/// The methods of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AllowedMethods {
    Get,
    Post,
    Delete,
    /// GET and HEAD: Starlette's own routes, unlike FastAPI's, accept HEAD.
    GetHead,
    /// A mounted application.
    Any,
}

impl AllowedMethods {
    /// Whether the method is one of these.
    pub(super) fn allows(self, method: &str) -> bool {
        match self {
            AllowedMethods::Get => method == "GET",
            AllowedMethods::Post => method == "POST",
            AllowedMethods::Delete => method == "DELETE",
            AllowedMethods::GetHead => method == "GET" || method == "HEAD",
            AllowedMethods::Any => true,
        }
    }

    /// The `allow` header of a 405.
    pub(super) fn allow(self) -> &'static str {
        match self {
            AllowedMethods::Get => "GET",
            AllowedMethods::Post => "POST",
            AllowedMethods::Delete => "DELETE",
            AllowedMethods::GetHead => "GET, HEAD",
            AllowedMethods::Any => "*",
        }
    }
}

/// A policy without the details that come from a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PolicyRule {
    /// By model and by the cached blocks of the prompt.
    Prefix,
    /// By model and load.
    Least,
    Sticky,
    Aggregate(AggregateKind),
    FanOut,
    Answer(OwnAnswer),
    Deny,
}

/// One API route of vLLM and what the balancer does with it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ApiRouteRow {
    pub(super) verb: AllowedMethods,
    /// `{name}` matches one segment, `{name:path}` at the end any rest.
    pub(super) path: &'static str,
    pub(super) api: Api,
    pub(super) rule: PolicyRule,
}

const fn get(path: &'static str, api: Api, rule: PolicyRule) -> ApiRouteRow {
    ApiRouteRow { verb: AllowedMethods::Get, path, api, rule }
}

const fn post(path: &'static str, api: Api, rule: PolicyRule) -> ApiRouteRow {
    ApiRouteRow { verb: AllowedMethods::Post, path, api, rule }
}

const fn page(path: &'static str) -> ApiRouteRow {
    ApiRouteRow { verb: AllowedMethods::GetHead, path, api: Api::Docs, rule: PolicyRule::Least }
}

const fn deny(verb: AllowedMethods, path: &'static str) -> ApiRouteRow {
    ApiRouteRow { verb, path, api: Api::Control, rule: PolicyRule::Deny }
}

/// The API routes of vLLM 0.32.
pub(super) const API_ROUTES: &[ApiRouteRow] = &[
    // Inference.
    post("/v1/chat/completions", Api::Chat, PolicyRule::Prefix),
    post("/v1/chat/completions/batch", Api::ChatBatch, PolicyRule::Prefix),
    post("/v1/completions", Api::Completions, PolicyRule::Prefix),
    post("/v1/responses", Api::Responses, PolicyRule::Prefix),
    get("/v1/responses/{response_id}", Api::ResponseById, PolicyRule::Sticky),
    post("/v1/responses/{response_id}/cancel", Api::ResponseCancel, PolicyRule::Sticky),
    post("/v1/messages", Api::Messages, PolicyRule::Prefix),
    post("/v1/messages/count_tokens", Api::CountTokens, PolicyRule::Least),
    post("/cohere/v2/chat", Api::CohereChat, PolicyRule::Prefix),
    post("/generative_scoring", Api::GenerativeScoring, PolicyRule::Prefix),
    post("/v1/systemone", Api::SystemOne, PolicyRule::Prefix),
    post("/v1/embeddings", Api::Embeddings, PolicyRule::Least),
    post("/v2/embed", Api::CohereEmbed, PolicyRule::Least),
    post("/pooling", Api::Pooling, PolicyRule::Least),
    post("/classify", Api::Classify, PolicyRule::Least),
    post("/score", Api::Score, PolicyRule::Least),
    post("/v1/score", Api::Score, PolicyRule::Least),
    post("/rerank", Api::Rerank, PolicyRule::Least),
    post("/v1/rerank", Api::Rerank, PolicyRule::Least),
    post("/v2/rerank", Api::Rerank, PolicyRule::Least),
    post("/v1/audio/transcriptions", Api::Transcriptions, PolicyRule::Least),
    post("/v1/audio/translations", Api::Translations, PolicyRule::Least),
    get("/v1/realtime", Api::Realtime, PolicyRule::Least),
    post("/tokenize", Api::Tokenize, PolicyRule::Least),
    post("/detokenize", Api::Detokenize, PolicyRule::Least),
    post("/invocations", Api::Invocations, PolicyRule::Prefix),
    // Scale-out: an upstream without the flag answers 403 itself.
    post("/v1/chat/completions/render", Api::Render, PolicyRule::Least),
    post("/v1/completions/render", Api::Render, PolicyRule::Least),
    post("/v1/messages/render", Api::MessagesRender, PolicyRule::Least),
    post("/v1/responses/render", Api::Render, PolicyRule::Least),
    post("/cohere/v2/chat/render", Api::Render, PolicyRule::Least),
    post("/v1/chat/completions/derender", Api::Derender, PolicyRule::Least),
    post("/v1/completions/derender", Api::Derender, PolicyRule::Least),
    post("/inference/v1/generate", Api::Generate, PolicyRule::Prefix),
    // An unknown id is not an error at an upstream.
    post("/inference/v1/abort_requests", Api::AbortRequests, PolicyRule::FanOut),
    // About all upstreams.
    get("/v1/models", Api::Models, PolicyRule::Aggregate(AggregateKind::Models)),
    get("/health", Api::Health, PolicyRule::Answer(OwnAnswer::Health)),
    get("/ping", Api::Health, PolicyRule::Answer(OwnAnswer::Health)),
    post("/ping", Api::Health, PolicyRule::Answer(OwnAnswer::Health)),
    get("/version", Api::Version, PolicyRule::Aggregate(AggregateKind::Version)),
    get("/load", Api::Load, PolicyRule::Aggregate(AggregateKind::Load)),
    // vLLM mounts an application on every path with this prefix.
    ApiRouteRow {
        verb: AllowedMethods::Any,
        path: "/metrics{rest:path}",
        api: Api::Metrics,
        rule: PolicyRule::Aggregate(AggregateKind::Metrics),
    },
    page("/openapi.json"),
    page("/docs"),
    page("/docs/oauth2-redirect"),
    page("/redoc"),
    page("/static/{path:path}"),
    // Control and development: 404 unless `passthrough` names them.
    deny(AllowedMethods::Get, "/tokenizer_info"),
    deny(AllowedMethods::Post, "/abort_requests"),
    deny(AllowedMethods::Post, "/adapters"),
    deny(AllowedMethods::Delete, "/adapters/{adapter_name}"),
    deny(AllowedMethods::Get, "/kv_event_sources"),
    deny(AllowedMethods::Post, "/v1/load_lora_adapter"),
    deny(AllowedMethods::Post, "/v1/unload_lora_adapter"),
    deny(AllowedMethods::Post, "/start_profile"),
    deny(AllowedMethods::Post, "/stop_profile"),
    deny(AllowedMethods::Post, "/reset_prefix_cache"),
    deny(AllowedMethods::Post, "/reset_mm_cache"),
    deny(AllowedMethods::Post, "/reset_encoder_cache"),
    deny(AllowedMethods::Post, "/sleep"),
    deny(AllowedMethods::Post, "/wake_up"),
    deny(AllowedMethods::Post, "/release_kv_cache_memory"),
    deny(AllowedMethods::Get, "/is_sleeping"),
    deny(AllowedMethods::Post, "/pause"),
    deny(AllowedMethods::Post, "/resume"),
    deny(AllowedMethods::Get, "/is_paused"),
    deny(AllowedMethods::Post, "/init_weight_transfer_engine"),
    deny(AllowedMethods::Post, "/shutdown_weight_transfer_engine"),
    deny(AllowedMethods::Post, "/start_weight_update"),
    deny(AllowedMethods::Post, "/start_draft_weight_update"),
    deny(AllowedMethods::Post, "/update_weights"),
    deny(AllowedMethods::Post, "/finish_weight_update"),
    deny(AllowedMethods::Post, "/update_weight_version"),
    deny(AllowedMethods::Post, "/weight_checker"),
    deny(AllowedMethods::Get, "/weight_info"),
    deny(AllowedMethods::Get, "/get_world_size"),
    deny(AllowedMethods::Post, "/collective_rpc"),
    deny(AllowedMethods::Get, "/server_info"),
    deny(AllowedMethods::Post, "/scale_elastic_ep"),
    deny(AllowedMethods::Post, "/is_scaling_elastic_ep"),
    deny(AllowedMethods::Post, "/fault_tolerance/apply"),
    deny(AllowedMethods::Get, "/fault_tolerance/status"),
];

/// Matches a path with a pattern. Returns the text of the placeholder, `""` without one.
pub(super) fn fit<'p>(pattern: &str, path: &'p str) -> Option<&'p str> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return (pattern == path).then_some("");
    };
    let (name, after) = rest.split_once('}')?;
    let inside = path.strip_prefix(before)?.strip_suffix(after)?;
    let any = name.ends_with(":path");
    (any || (!inside.is_empty() && !inside.contains('/'))).then_some(inside)
}
