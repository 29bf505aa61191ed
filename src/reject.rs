//! Every rejection by the balancer itself: its status, its body in the form that a client of the route
//! expects, its metric label, and whether the client should retry.
//!
//! Errors of an upstream reach the client as the upstream sent them. The texts follow vLLM where vLLM has
//! the same case, so that the balancer's errors look like vLLM's.

use std::borrow::Cow;
use std::time::Duration;

use crate::names::{MAX_MODEL_BYTES, cut};

/// The form in which a route's clients expect an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorShape {
    /// `{"error":{"message","type","param","code"}}`
    #[default]
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`
    Anthropic,
}

/// Why a request is not forwarded, or got no answer from an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reject {
    /// No such path, in the framework's own form.
    Path,
    /// The path exists with other methods.
    Method { allow: &'static str },
    /// The path exists without its trailing slash.
    Redirect { location: String },
    /// No upstream serves the model; the names that would be served.
    Model { model: String, aliases: Vec<String> },
    /// The model may be known, but no upstream that serves it is ready.
    NotReady { model: Option<String> },
    /// All upstreams that serve the model are full, and the queue is full or the wait is over; when to retry.
    Full { retry_after: u64 },
    /// No upstream's forecast meets the client's limit of the time to the first token; when to retry.
    Slo { limit: Duration, retry_after: u64 },
    /// The body is larger than `peek.max_body`.
    TooLarge { limit: u64 },
    /// `peek.memory` is used up.
    Memory,
    /// The client took too long to send the head, or the part of the body that must be read before the
    /// choice.
    Slow,
    /// The request is not valid HTTP.
    Malformed { why: &'static str },
    /// A field of the body that cannot be translated for the upstreams of its route.
    Field { param: String, message: String },
    /// The head is larger than `limits.header_bytes`.
    HeadTooLarge { limit: u64 },
    /// A stored response that no upstream holds.
    Response { id: String },
    /// The upstream could not be reached, or ended without an answer; `name`: if clients may know it.
    Upstream { name: Option<String> },
    /// The upstream did not answer in time; `name`: if clients may know it.
    Timeout { name: Option<String> },
    /// The upstream's answer cannot be translated: it is above this limit.
    LargeAnswer { limit: String },
    /// The model calls a tool with arguments that are no JSON object, which the client's API cannot express.
    ToolInput,
    /// The answer lacks the token ids that its route requested.
    TokenIds { message: String },
    /// The request has passed this balancer before: an upstream leads back to it.
    Loop,
    /// The request's own deadline passed before an upstream had room.
    NoTime,
    /// An admin call without the token.
    Token,
    /// A fault of our own.
    Internal,
}

/// The answer of a rejection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectAnswer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: String,
}

impl Reject {
    /// The HTTP status of the answer.
    pub fn status(&self) -> u16 {
        match self {
            Reject::Path | Reject::Model { .. } | Reject::Response { .. } => 404,
            Reject::Method { .. } => 405,
            Reject::Redirect { .. } => 307,
            Reject::NotReady { .. } | Reject::Memory => 503,
            Reject::Full { .. } | Reject::Slo { .. } => 429,
            Reject::TooLarge { .. } => 413,
            Reject::Slow => 408,
            Reject::Malformed { .. } | Reject::Field { .. } => 400,
            Reject::HeadTooLarge { .. } => 431,
            Reject::Upstream { .. } | Reject::LargeAnswer { .. } | Reject::ToolInput => 502,
            Reject::Timeout { .. } | Reject::NoTime => 504,
            Reject::Loop => 508,
            Reject::Token => 401,
            Reject::Internal | Reject::TokenIds { .. } => 500,
        }
    }

    /// The value of the metric's `reason` label.
    pub fn label(&self) -> &'static str {
        match self {
            Reject::Path => "path",
            Reject::Method { .. } => "method",
            Reject::Redirect { .. } => "redirect",
            Reject::Model { .. } => "model",
            Reject::NotReady { .. } => "not_ready",
            Reject::Full { .. } => "full",
            Reject::Slo { .. } => "slo",
            Reject::TooLarge { .. } => "too_large",
            Reject::Memory => "memory",
            Reject::Slow => "slow",
            Reject::Malformed { .. } => "malformed",
            Reject::Field { .. } => "field",
            Reject::HeadTooLarge { .. } => "head_too_large",
            Reject::Response { .. } => "response",
            Reject::Upstream { .. } => "upstream",
            Reject::Timeout { .. } => "timeout",
            Reject::NoTime => "no_time",
            Reject::LargeAnswer { .. } => "large_answer",
            Reject::ToolInput => "tool_input",
            Reject::TokenIds { .. } => "token_ids",
            Reject::Loop => "loop",
            Reject::Token => "token",
            Reject::Internal => "internal",
        }
    }

    /// Whether the connection must end, since the rest of the request is invalid or may never arrive.
    pub fn closes(&self) -> bool {
        matches!(self, Reject::Slow | Reject::Malformed { .. } | Reject::HeadTooLarge { .. })
    }

    /// The answer to the client in the form of its interface.
    pub fn answer(&self, style: ErrorShape) -> RejectAnswer {
        let headers = match self {
            Reject::Method { allow } => vec![("allow", (*allow).to_string())],
            Reject::Redirect { location } => vec![("location", location.clone())],
            Reject::NotReady { .. } | Reject::Memory => vec![("retry-after", "1".into())],
            Reject::Full { retry_after } | Reject::Slo { retry_after, .. } => {
                vec![("retry-after", retry_after.to_string())]
            }
            // The balancer has tried the other upstreams, or another answer would be no better: the client's
            // retries would only add load.
            Reject::Upstream { .. }
            | Reject::Timeout { .. }
            | Reject::LargeAnswer { .. }
            | Reject::TokenIds { .. }
            | Reject::Loop => vec![("x-should-retry", "false".into())],
            _ => Vec::new(),
        };
        RejectAnswer { status: self.status(), headers, body: self.body(style) }
    }

    fn body(&self, style: ErrorShape) -> String {
        match (self, style) {
            (Reject::Path, _) => r#"{"detail":"Not Found"}"#.into(),
            (Reject::Method { .. }, _) => r#"{"detail":"Method Not Allowed"}"#.into(),
            (Reject::Redirect { .. }, _) => String::new(),
            (Reject::Token, _) => r#"{"error":"Unauthorized"}"#.into(),
            (_, ErrorShape::OpenAi) => format!(
                r#"{{"error":{{"message":{},"type":{},"param":{},"code":{}}}}}"#,
                json(&self.message()),
                json(self.openai_type()),
                self.param().map_or("null".into(), json),
                self.status(),
            ),
            (_, ErrorShape::Anthropic) => format!(
                r#"{{"type":"error","error":{{"type":{},"message":{}}}}}"#,
                json(self.anthropic_type()),
                json(&self.message()),
            ),
        }
    }

    fn message(&self) -> Cow<'static, str> {
        match self {
            Reject::Path => "Not Found".into(),
            Reject::Method { .. } => "Method Not Allowed".into(),
            Reject::Redirect { .. } => "Temporary Redirect".into(),
            Reject::Model { model, aliases } => {
                let [name, cut] = cut(model, MAX_MODEL_BYTES);
                format!("The model `{name}{cut}` does not exist. Valid aliases: {}.", aliases.join(", "))
                    .into()
            }
            Reject::NotReady { model: Some(model) } => {
                let [name, cut] = cut(model, MAX_MODEL_BYTES);
                format!("No ready upstream serves the model `{name}{cut}`. Please try again later.").into()
            }
            Reject::NotReady { model: None } => "No upstream is ready. Please try again later.".into(),
            Reject::Full { .. } => {
                "All upstreams that serve the model are busy. Please try again later.".into()
            }
            Reject::Slo { limit, .. } => format!(
                "No upstream is expected to begin the answer within {} ms. Please try again later.",
                limit.as_micros() as f64 / 1e3
            )
            .into(),
            Reject::TooLarge { limit } => {
                format!("The request body is larger than the limit of {limit} bytes.").into()
            }
            Reject::Memory => "Too many large bodies are held at once. Please try again later.".into(),
            Reject::Slow => "The request did not arrive in time.".into(),
            Reject::Malformed { why } => format!("The request is malformed: {why}.").into(),
            Reject::Field { message, .. } | Reject::TokenIds { message } => message.clone().into(),
            Reject::HeadTooLarge { limit } => {
                format!("The request head is larger than the limit of {limit} bytes.").into()
            }
            Reject::Response { id } => {
                let [id, cut] = cut(id, MAX_MODEL_BYTES);
                format!("Response with id '{id}{cut}' not found.").into()
            }
            Reject::Upstream { name } => of_upstream(name.as_deref(), "did not answer.").into(),
            Reject::Timeout { name } => of_upstream(name.as_deref(), "did not answer in time.").into(),
            Reject::NoTime => "No upstream had room for the request in its time.".into(),
            Reject::LargeAnswer { limit } => {
                format!("The upstream's answer has more than the {limit} that can be translated.").into()
            }
            Reject::ToolInput => "The model called a tool with arguments that are no JSON object.".into(),
            Reject::Loop => "The request came back: an upstream leads to its own balancer.".into(),
            Reject::Token => "Unauthorized".into(),
            Reject::Internal => "Internal server error".into(),
        }
    }

    fn openai_type(&self) -> &'static str {
        match self.status() {
            _ if matches!(self, Reject::Response { .. } | Reject::Field { .. }) => "invalid_request_error",
            404 => "NotFoundError",
            400 | 408 | 413 | 431 => "BadRequestError",
            429 => "RateLimitError",
            502 => "Bad Gateway",
            503 => "ServiceUnavailableError",
            504 => "Gateway Timeout",
            _ => "InternalServerError",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.status() {
            // vLLM rejects a model itself, with the same type on Anthropic's routes.
            404 if matches!(self, Reject::Model { .. }) => self.openai_type(),
            404 => "not_found_error",
            413 => "request_too_large",
            400 | 408 | 431 => "invalid_request_error",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            _ => "api_error",
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Reject::Field { param, .. } => Some(param),
            Reject::Model { .. } => Some("model"),
            Reject::Response { .. } => Some("response_id"),
            _ => None,
        }
    }
}

/// Returns the status and the text of the error that ends a broken stream. `late`: because a deadline passed.
/// `upstream`: its name, if clients may know it.
pub fn broken_stream(late: bool, upstream: Option<&str>) -> (u16, String) {
    if late {
        (504, of_upstream(upstream, "did not go on with the answer in time."))
    } else {
        (502, of_upstream(upstream, "ended before the answer was whole."))
    }
}

/// Returns the text of the error for a control call that an upstream did not answer. `error`: its name and
/// the failure, if clients may know them.
pub fn unanswered_call(error: Option<(&str, &str)>) -> String {
    match error {
        Some((name, error)) => format!("The upstream {name} did not answer: {error}."),
        None => of_upstream(None, "did not answer."),
    }
}

fn of_upstream(name: Option<&str>, what: &str) -> String {
    match name {
        Some(name) => format!("The upstream {name} {what}"),
        None => format!("The upstream {what}"),
    }
}

/// Formats a JSON string with its quotes.
fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
