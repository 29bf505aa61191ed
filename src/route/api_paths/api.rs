//! The properties of vLLM's interfaces: the location of the model, the form of errors.

/// One interface of vLLM. The set is closed and small, so that it can be a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Api {
    Chat,
    ChatBatch,
    Completions,
    Responses,
    ResponseById,
    ResponseCancel,
    Messages,
    CountTokens,
    MessagesRender,
    CohereChat,
    GenerativeScoring,
    SystemOne,
    Embeddings,
    CohereEmbed,
    Pooling,
    Classify,
    Score,
    Rerank,
    Transcriptions,
    Translations,
    Realtime,
    Tokenize,
    Detokenize,
    Render,
    Derender,
    Generate,
    AbortRequests,
    Invocations,
    Models,
    Health,
    Version,
    Load,
    Metrics,
    Docs,
    /// Development and control, and paths that the configuration passes through.
    Control,
}

/// The form of the balancer's own errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorStyle {
    /// `{"error":{"message":...,"type":...,"param":...,"code":...}}`
    OpenAi,
    /// `{"type":"error","error":{"type":...,"message":...}}`
    Anthropic,
    /// `{"detail":...}`
    Detail,
}

/// The location of the model's name in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelLocation {
    Json,
    /// The field `model` of a form.
    Multipart,
    /// `?model=`
    Query,
    Nowhere,
    /// In JSON whose other fields decide the interface.
    Sniff,
}

impl Api {
    /// The name for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Api::Chat => "chat",
            Api::ChatBatch => "chat_batch",
            Api::Completions => "completions",
            Api::Responses => "responses",
            Api::ResponseById => "response_by_id",
            Api::ResponseCancel => "response_cancel",
            Api::Messages => "messages",
            Api::CountTokens => "count_tokens",
            Api::MessagesRender => "messages_render",
            Api::CohereChat => "cohere_chat",
            Api::GenerativeScoring => "generative_scoring",
            Api::SystemOne => "systemone",
            Api::Embeddings => "embeddings",
            Api::CohereEmbed => "cohere_embed",
            Api::Pooling => "pooling",
            Api::Classify => "classify",
            Api::Score => "score",
            Api::Rerank => "rerank",
            Api::Transcriptions => "transcriptions",
            Api::Translations => "translations",
            Api::Realtime => "realtime",
            Api::Tokenize => "tokenize",
            Api::Detokenize => "detokenize",
            Api::Render => "render",
            Api::Derender => "derender",
            Api::Generate => "generate",
            Api::AbortRequests => "abort_requests",
            Api::Invocations => "invocations",
            Api::Models => "models",
            Api::Health => "health",
            Api::Version => "version",
            Api::Load => "load",
            Api::Metrics => "metrics",
            Api::Docs => "docs",
            Api::Control => "control",
        }
    }

    /// The form of this API's error bodies.
    pub fn error_style(self) -> ErrorStyle {
        match self {
            Api::Messages | Api::CountTokens | Api::MessagesRender => ErrorStyle::Anthropic,
            Api::Health | Api::Version | Api::Load | Api::Metrics | Api::Docs | Api::Control => {
                ErrorStyle::Detail
            }
            _ => ErrorStyle::OpenAi,
        }
    }

    /// The place of the model's name in a request.
    pub fn model_in(self) -> ModelLocation {
        match self {
            Api::Transcriptions | Api::Translations => ModelLocation::Multipart,
            Api::Realtime => ModelLocation::Query,
            Api::Invocations => ModelLocation::Sniff,
            Api::ResponseById | Api::ResponseCancel | Api::AbortRequests | Api::Models => {
                ModelLocation::Nowhere
            }
            Api::Health | Api::Version | Api::Load | Api::Metrics | Api::Docs | Api::Control => {
                ModelLocation::Nowhere
            }
            _ => ModelLocation::Json,
        }
    }

    /// Whether the tokens of an answer count. Other answers have none, or report an earlier answer again.
    pub fn counts_tokens(self) -> bool {
        !matches!(
            self,
            Api::ResponseById
                | Api::ResponseCancel
                | Api::CountTokens
                | Api::MessagesRender
                | Api::Realtime
                | Api::Tokenize
                | Api::Detokenize
                | Api::Render
                | Api::Derender
                | Api::AbortRequests
                | Api::Models
                | Api::Health
                | Api::Version
                | Api::Load
                | Api::Metrics
                | Api::Docs
                | Api::Control
        )
    }

    /// Whether the interface is a websocket; vLLM answers 404 to plain HTTP there.
    pub fn is_websocket(self) -> bool {
        self == Api::Realtime
    }
}
