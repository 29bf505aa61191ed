//! The record of one call: the contract between the assembler, the stores and the admin API.
//!
//! Large texts are shared: a turn of a session repeats the messages of the turn before it, and a store that
//! recognises them keeps one copy.
//!
//! Never: I/O, a clock.

use std::sync::Arc;
use std::time::Duration;

/// The session of calls that name none.
pub const UNNAMED_SESSION: &str = "unnamed";

/// The interface of a recorded call, as the upstream was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceApi {
    Chat,
    Completions,
    Responses,
    Messages,
}

/// Why a call has no whole answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceError {
    /// 408 and 504, and the deadlines of the balancer.
    Timeout,
    RateLimit,
    Auth,
    NotFound,
    ClientError,
    UpstreamError,
    /// No upstream could be reached.
    Connection,
    ClientGone,
    /// The upstream's answer broke off.
    Incomplete,
    /// The answer was larger than what is captured, and the record is partial; or the prompt did not fit, and
    /// the client got an answer that ends with `length`.
    Overflow,
}

/// The facts of a call beside its request and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct CallFacts {
    /// A UUID in its text form.
    pub trace_id: String,
    pub session_id: String,
    pub api: TraceApi,
    /// The answer came as a stream of events.
    pub stream: bool,
    /// The client's name for the model.
    pub client_model: Option<String>,
    pub request_id: String,
    /// The weight version at arrival; the answer's own goes before it.
    pub weight_version: Option<i64>,
    /// The arrival, in seconds since 1970.
    pub arrived: f64,
    pub latency: Duration,
    /// The time to the first piece of the answer's body.
    pub first_token: Option<Duration>,
    /// The time before the first attempt.
    pub queued: Option<Duration>,
    pub upstream: Option<String>,
    pub attempts: u32,
    /// 0: no answer.
    pub status: u16,
    pub error: Option<TraceError>,
    /// The answer is not whole.
    pub partial: bool,
    /// How the cumulative token mode served the call; `None`: it is off.
    pub cumulative: Option<String>,
}

/// A JSON text from which parts were taken out that stand elsewhere in the record.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutDocument {
    /// The rest; what was taken out is missing at each gap.
    pub text: Arc<str>,
    /// Where something is missing, in the order of `text`.
    pub gaps: Vec<DocumentGap>,
}

/// One part that was taken out of a [`CutDocument`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DocumentGap {
    /// The offset in `text`.
    pub at: usize,
    pub part: CutPart,
}

/// What a gap stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutPart {
    /// The list of the record's turns.
    Turns,
    /// The list of the prompt's token ids.
    PromptIds,
    /// The list of a choice's token ids, by the choice's place in the record.
    ChoiceIds(usize),
    /// The chat log-probabilities of a choice: `{"content":[…]}`.
    ChoiceLogprobs(usize),
}

/// One choice of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChoiceRecord {
    pub index: u32,
    /// The message as JSON; of completions `{"role":"assistant","content":text}`. For Responses and Messages
    /// the assistant's turn as the interface's next request would carry it.
    pub message: Arc<str>,
    pub token_ids: Vec<u32>,
    /// One of each token; empty where the answer has none.
    pub logprobs: Vec<f64>,
    /// The tokens' texts, where a document is rebuilt from them.
    pub token_texts: Vec<Box<str>>,
    pub finish_reason: Option<String>,
    /// Of mixture-of-experts models, as JSON.
    pub routed_experts: Option<Arc<str>>,
    /// Further members, as they stand between the braces of a JSON object: `stop_reason` unless it is null,
    /// `prompt_logprobs` of a stream, and the `prompt_token_ids` of a prompt that is not the record's.
    pub extra: Option<Arc<str>>,
}

/// The tokens that an answer reported; what it did not report is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceTokens {
    pub prompt: Option<u64>,
    pub completion: Option<u64>,
    pub cached: Option<u64>,
    pub reasoning: Option<u64>,
}

/// One recorded call.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceRecord {
    pub facts: CallFacts,
    /// The request's model, else the answer's.
    pub model: String,
    /// Each message or input item of the request, as JSON.
    pub turns: Vec<Arc<str>>,
    /// The request as it went to the upstream; `None`: it was no JSON object.
    pub request: Option<CutDocument>,
    pub prompt_token_ids: Vec<u32>,
    pub choices: Vec<ChoiceRecord>,
    pub tokens: TraceTokens,
    /// An answer that was not a stream.
    pub response: Option<CutDocument>,
}

/// A session as the stores list it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionSummary {
    pub session_id: String,
    pub trace_count: u64,
    /// When it was made, else the time of its first trace, in seconds since 1970.
    pub created_at: f64,
    /// Its metadata, as JSON of an object.
    pub metadata: String,
}

/// What an operator has said of a session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionSettings {
    pub session_id: String,
    pub created_at: f64,
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Fields that replace those of each request of the session.
    pub sampling_params: serde_json::Map<String, serde_json::Value>,
    /// The model of all its requests.
    pub model: Option<String>,
}

// === impl TraceApi ===

impl TraceApi {
    /// The name in records.
    pub fn name(self) -> &'static str {
        match self {
            TraceApi::Chat => "chat",
            TraceApi::Completions => "completions",
            TraceApi::Responses => "responses",
            TraceApi::Messages => "messages",
        }
    }

    /// Parses a name in records.
    pub fn parse(name: &str) -> Option<Self> {
        [TraceApi::Chat, TraceApi::Completions, TraceApi::Responses, TraceApi::Messages]
            .into_iter()
            .find(|api| api.name() == name)
    }
}

// === impl SessionSettings ===

impl SessionSettings {
    /// What its edits are as JSON, in bytes, about.
    pub fn written_bytes(&self) -> usize {
        let params = serde_json::to_string(&self.sampling_params).map_or(0, |text| text.len());
        params + self.model.as_ref().map_or(0, String::len)
    }
}

// === impl TraceError ===

impl TraceError {
    const ALL: [TraceError; 10] = [
        TraceError::Timeout,
        TraceError::RateLimit,
        TraceError::Auth,
        TraceError::NotFound,
        TraceError::ClientError,
        TraceError::UpstreamError,
        TraceError::Connection,
        TraceError::ClientGone,
        TraceError::Incomplete,
        TraceError::Overflow,
    ];

    /// The category of an answer's status; `None`: no error.
    pub fn of_status(status: u16) -> Option<Self> {
        match status {
            ..400 => None,
            408 | 504 => Some(TraceError::Timeout),
            429 => Some(TraceError::RateLimit),
            401 | 403 => Some(TraceError::Auth),
            404 => Some(TraceError::NotFound),
            400..500 => Some(TraceError::ClientError),
            500.. => Some(TraceError::UpstreamError),
        }
    }

    /// The name in records.
    pub fn name(self) -> &'static str {
        match self {
            TraceError::Timeout => "timeout",
            TraceError::RateLimit => "rate_limit",
            TraceError::Auth => "auth",
            TraceError::NotFound => "not_found",
            TraceError::ClientError => "client_error",
            TraceError::UpstreamError => "upstream_error",
            TraceError::Connection => "connection",
            TraceError::ClientGone => "client_gone",
            TraceError::Incomplete => "incomplete",
            TraceError::Overflow => "overflow",
        }
    }

    /// Parses a name in records.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|error| error.name() == name)
    }
}
