//! The honest end of a stream that cannot go on: a last event that says so, in the form of its interface.
//!
//! A client's library raises its own error for such an event, where a connection that merely closes may
//! look like an answer that is over.

use serde_json::{Value, json};

/// How a stream's events look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Chat, completions and the like: `data` lines, `[DONE]` last.
    Data,
    /// Responses: named events with a number.
    Responses,
    /// Anthropic's messages: named events.
    Messages,
}

/// The last events of a stream of `form`. `apart`: an event may have been cut in the middle, so that its
/// end has to be written first.
pub fn error_events(form: Form, message: &str, code: u16, apart: bool) -> String {
    let start = if apart { "\n\n" } else { "" };
    let error = error_of(message, code);
    match form {
        Form::Data => format!("{start}data: {}\n\ndata: [DONE]\n\n", json!({ "error": error })),
        Form::Responses => format!("{start}{}", response_error(error, None)),
        Form::Messages => {
            let event = json!({"type": "error", "error": {"type": "api_error", "message": message}});
            format!("{start}event: error\ndata: {event}\n\n")
        }
    }
}

/// An error as vLLM writes it.
pub fn error_of(message: &str, code: u16) -> Value {
    let kind = if code == 504 { "Gateway Timeout" } else { "InternalServerError" };
    json!({"message": message, "type": kind, "param": Value::Null, "code": code})
}

/// The last event of a Responses stream, from an error as vLLM writes it. `number`: its number, which is not
/// known without having read every event; libraries do not look at it here.
pub fn response_error(error: Value, number: Option<u64>) -> String {
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

/// Follows where a stream stands, so that an event of ours is not put into the middle of another: by the
/// last two bytes that are no carriage return.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    last: [u8; 2],
}

impl Default for Tail {
    fn default() -> Self {
        Tail { last: *b"\n\n" }
    }
}

impl Tail {
    pub fn feed(&mut self, piece: &[u8]) {
        let mut ends = piece.iter().rev().filter(|byte| **byte != b'\r');
        let (Some(last), before) = (ends.next(), ends.next()) else { return };
        self.last = [before.copied().unwrap_or(self.last[1]), *last];
    }

    /// Whether the last event has had its end.
    pub fn between_events(&self) -> bool {
        self.last == *b"\n\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_ends_with_an_error_its_clients_read() {
        let data = error_events(Form::Data, "gone \"x\"\n", 502, false);
        let (first, rest) = data.split_once("\n\n").unwrap();
        let error: Value = serde_json::from_str(first.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["message"], "gone \"x\"\n");
        assert_eq!(error["error"]["code"], 502);
        assert_eq!(rest, "data: [DONE]\n\n");
        for form in [Form::Responses, Form::Messages] {
            let text = error_events(form, "gone", 504, true);
            let event = text.strip_prefix("\n\nevent: error\ndata: ").unwrap().strip_suffix("\n\n").unwrap();
            let event: Value = serde_json::from_str(event).unwrap();
            assert_eq!(event["type"], "error");
            assert_eq!(event["error"]["message"], "gone");
        }
    }

    #[test]
    fn a_stream_stands_between_events_after_an_empty_line_only() {
        let mut tail = Tail::default();
        assert!(tail.between_events());
        for (piece, between) in [
            ("data: 1\n\n", true),
            ("data: 2\n", false),
            ("\n", true),
            ("data: 3\r\n\r\n", true),
            ("data", false),
            ("\n", false),
            ("\r", false),
            ("\n", true),
            ("", true),
        ] {
            tail.feed(piece.as_bytes());
            assert_eq!(tail.between_events(), between, "{piece:?}");
        }
    }
}
