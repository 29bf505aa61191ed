//! The error answers of vLLM 0.32, word for word.

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};

use super::reply::{self, Reply};
use crate::engine::batch::EngineRefusal;

/// An error, independent of the API that reports it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub status: u16,
    pub kind: &'static str,
    pub message: String,
    pub param: Option<String>,
    /// Reported in OpenAI's form also on Anthropic's routes, as FastAPI's own errors are.
    pub framework: bool,
}

impl ApiError {
    fn new(status: u16, kind: &'static str, message: impl Into<String>, param: Option<&str>) -> Self {
        let param = param.map(str::to_owned);
        Self { status, kind, message: message.into(), param, framework: false }
    }

    /// The error of a model that the engine does not serve.
    pub(super) fn unknown_model(model: &str, aliases: &[String]) -> Self {
        let aliases = aliases.join(", ");
        let message = format!("The model `{model}` does not exist. Valid aliases: {aliases}.");
        Self::new(404, "NotFoundError", message, Some("model"))
    }

    /// Builds the error of a value that vLLM rejects; the message names parameter and value.
    pub(super) fn invalid(message: &str, param: &str, value: &str) -> Self {
        let message = format!("{message} (parameter={param}, value={value})");
        Self::new(400, "BadRequestError", message, Some(param))
    }

    pub(super) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequestError", message, None)
    }

    /// Builds the error of a prompt beyond the context; `open`: the prompt has at least `tokens`.
    pub(super) fn too_long(tokens: usize, open: bool, limit: usize) -> Self {
        let at_least = if open { "at least " } else { "" };
        let message = format!(
            "This model's maximum context length is {limit} tokens. However, your prompt contains \
             {at_least}{tokens} input tokens, which exceeds this limit even without any output tokens. \
             Please reduce the length of the input prompt."
        );
        Self::invalid(&message, "input_tokens", &tokens.to_string())
    }

    /// Builds the error of a request that violates the schema; `problems` are formatted already.
    pub(super) fn schema(problems: &[String], param: Option<&str>) -> Self {
        let many = if problems.len() == 1 { "error" } else { "errors" };
        let mut message = format!("{} validation {many}:", problems.len());
        for problem in problems.iter().take(10) {
            message.push_str(&format!("\n  {problem}"));
        }
        if problems.len() > 10 {
            message.push_str(&format!("\n  ...and {} more {many}", problems.len() - 10));
        }
        Self { framework: true, ..Self::new(400, "Bad Request", message, param) }
    }

    /// The error of a request that the engine refused.
    pub(super) fn refused(refused: EngineRefusal) -> Self {
        match refused {
            EngineRefusal::QueueFull => Self::new(
                503,
                "Service Unavailable",
                "The engine is currently busy and cannot accept new requests. \
                 Please try again later or on a different instance.",
                None,
            ),
            EngineRefusal::TooLarge => {
                Self::bad_request("The request does not fit into the KV cache, even alone.")
            }
        }
    }

    pub(super) fn responses(status: u16, message: String, param: &str) -> Self {
        Self::new(status, "invalid_request_error", message, Some(param))
    }

    pub(super) fn shutting_down() -> Self {
        Self::new(500, "InternalServerError", "cannot schedule new futures after shutdown", None)
    }

    /// Builds the error event of a failed generation.
    pub(super) fn generation(status: u16) -> Self {
        Self::new(status, "InternalServerError", "Internal server error", None)
    }

    /// The body of the error in OpenAI's form.
    pub(super) fn openai(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status,
        }})
    }

    pub(super) fn anthropic(&self) -> Value {
        json!({"type": "error", "error": {"type": self.kind, "message": self.message}})
    }

    /// Returns the answer; on `/v1/messages` in Anthropic's form.
    pub(super) fn reply(&self, anthropic: bool) -> Reply {
        let body = if anthropic && !self.framework { self.anthropic() } else { self.openai() };
        reply::json(self.status, &body)
    }
}

pub(super) fn not_found() -> Reply {
    reply::json(404, &json!({"detail": "Not Found"}))
}

pub(super) fn unauthorized() -> Reply {
    reply::json(401, &json!({"error": "Unauthorized"}))
}

/// Returns a 405 with the `allow` header first, as Starlette does.
pub(super) fn method_not_allowed(allow: &'static str) -> Reply {
    let body = Bytes::from_static(b"{\"detail\":\"Method Not Allowed\"}");
    reply::with(StatusCode::METHOD_NOT_ALLOWED, &[("allow", allow)], Some("application/json"), body)
}
