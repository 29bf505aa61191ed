//! The end of a stream that cannot continue: a last event that reports an error, in the form of the stream's
//! interface.
//!
//! The client's library raises an error for such an event; a connection that closes without one may look
//! like a complete answer.

use serde_json::{Value, json};

pub(crate) use crate::sse::StreamTail;

/// The form of a stream's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorEventForm {
    /// Chat, completions and the like: `data` lines, `[DONE]` last.
    Data,
    /// Responses: named events with a sequence number.
    Responses,
    /// Anthropic's messages: named events.
    Messages,
}

/// The last events of a stream of `form`. `apart`: the stream may have been cut in the middle of an event, so
/// that the end of that event is written first.
pub(crate) fn error_events(form: ErrorEventForm, message: &str, code: u16, apart: bool) -> String {
    let start = if apart { "\n\n" } else { "" };
    let error = error_of(message, code);
    match form {
        ErrorEventForm::Data => format!("{start}data: {}\n\ndata: [DONE]\n\n", json!({ "error": error })),
        ErrorEventForm::Responses => format!("{start}{}", response_error(error, None)),
        ErrorEventForm::Messages => {
            let event = json!({"type": "error", "error": {"type": "api_error", "message": message}});
            format!("{start}event: error\ndata: {event}\n\n")
        }
    }
}

/// An error in the form of vLLM's.
pub(crate) fn error_of(message: &str, code: u16) -> Value {
    let kind = if code == 504 { "Gateway Timeout" } else { "InternalServerError" };
    json!({"message": message, "type": kind, "param": Value::Null, "code": code})
}

/// The last event of a Responses stream, from an error in the form of vLLM's. `number`: its sequence number,
/// known only if every event was read; libraries ignore it here.
pub(crate) fn response_error(error: Value, number: Option<u64>) -> String {
    // The nested error is what makes OpenAI's libraries raise at once.
    let mut event = json!({
        "type": "error",
        "code": "server_error",
        "message": error["message"],
        "param": error["param"],
        "error": error,
    });
    if let Some(number) = number {
        event["sequence_number"] = number.into();
    }
    format!("event: error\ndata: {event}\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_every_form_with_an_error_that_clients_read() {
        let data = error_events(ErrorEventForm::Data, "gone \"x\"\n", 502, false);
        let (first, rest) = data.split_once("\n\n").unwrap();
        let error: Value = serde_json::from_str(first.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["message"], "gone \"x\"\n");
        assert_eq!(error["error"]["code"], 502);
        assert_eq!(rest, "data: [DONE]\n\n");
        for form in [ErrorEventForm::Responses, ErrorEventForm::Messages] {
            let text = error_events(form, "gone", 504, true);
            let event = text.strip_prefix("\n\nevent: error\ndata: ").unwrap().strip_suffix("\n\n").unwrap();
            let event: Value = serde_json::from_str(event).unwrap();
            assert_eq!(event["type"], "error");
            assert_eq!(event["error"]["message"], "gone");
        }
    }
}
