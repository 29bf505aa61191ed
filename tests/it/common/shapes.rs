//! Requests of all kinds, and what a single engine answers to each: answers of the simulated engine are
//! decided from the prompt alone, so that one which came through trouble can be held against it.

use bytes::Bytes;
use serde_json::json;

use super::body::{events, normal};
use super::dice::Dice;
use super::wire::{Answer, Wire, post};
use super::{EngineServer, direct};

pub const CHAT: &str = "/v1/chat/completions";
pub const COMPLETIONS: &str = "/v1/completions";
pub const RESPONSES: &str = "/v1/responses";
pub const MESSAGES: &str = "/v1/messages";

/// One request, and its only right answer.
pub struct Shape {
    pub path: &'static str,
    pub stream: bool,
    pub body: Bytes,
    /// One entry an event; a whole answer is one entry.
    expected: Vec<String>,
}

/// What a client got.
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    Whole,
    /// A stream that ends with an error event, and is right up to it.
    Broken,
    Wrong(String),
}

// === impl Shape ===

impl Shape {
    /// Requests of all interfaces, small and large, with the answers that `engine` gives to them.
    pub async fn all(engine: &EngineServer, dice: &mut Dice) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for number in 0..10 {
            // Bodies of every fifth kind do not fit into the socket's buffers, and some not into the peek.
            let padding =
                if number % 5 == 4 { dice.between(100 << 10, 3 << 20) } else { dice.between(0, 2000) };
            for path in [CHAT, COMPLETIONS, RESPONSES, MESSAGES] {
                for stream in [true, false] {
                    let tokens = if number % 5 == 0 { dice.between(60, 200) } else { dice.between(1, 40) };
                    let body = body(path, stream, tokens, padding as usize, dice);
                    let answer =
                        Wire::connect(&direct(engine)).await.ask(post(path, &body)).await.expect(200);
                    let expected = pieces(stream, &answer.body);
                    shapes.push(Shape { path, stream, body, expected });
                }
            }
        }
        shapes
    }

    /// Judges an answer by its content.
    pub fn judge(&self, answer: &Answer) -> Got {
        let wrong = |why: &str| {
            let body = String::from_utf8_lossy(&answer.body);
            let last = body.char_indices().rev().nth(600).map_or(&*body, |(at, _)| &body[at..]);
            Got::Wrong(format!("{why}: {} whole {} ... {last}", answer.status, answer.whole))
        };
        if answer.status != 200 {
            return wrong("an error");
        }
        let got = pieces(self.stream, &answer.body);
        if got == self.expected {
            return if answer.whole {
                Got::Whole
            } else {
                wrong("all is there, and the framing does not end")
            };
        }
        if !self.stream {
            return wrong("another answer");
        }
        self.judge_broken(got).map_or_else(|why| wrong(&why), |()| Got::Broken)
    }

    /// A broken stream is a beginning of the right one, and then says that it is broken.
    fn judge_broken(&self, mut got: Vec<String>) -> Result<(), String> {
        let data = matches!(self.path, CHAT | COMPLETIONS);
        if data && got.pop().as_deref() != Some("data: [DONE]") {
            return Err("a broken stream does not end with [DONE]".into());
        }
        let error = got.pop().ok_or("a broken stream has no events")?;
        let named = if data { "data: {\"error\":" } else { "event: error\ndata: {" };
        if !error.starts_with(named) {
            return Err(format!("a broken stream does not end with an error, but with {error:?}"));
        }
        for (index, event) in got.iter().enumerate() {
            let expected = self.expected.get(index).map_or("", String::as_str);
            // The last one may have been cut in the middle; what is no document compares as it came.
            let cut = index + 1 == got.len() && !is_document(event);
            if event != expected && !cut {
                return Err(format!("event {index} of a broken stream is {event:?}, not {expected:?}"));
            }
        }
        Ok(())
    }
}

fn is_document(event: &str) -> bool {
    let data = event.lines().find_map(|line| line.strip_prefix("data: "));
    data.is_some_and(|data| serde_json::from_str::<serde_json::Value>(data).is_ok())
}

/// The parts that are equal for every engine: ids and times are not, nor cached tokens.
fn pieces(stream: bool, body: &[u8]) -> Vec<String> {
    let pieces = if stream { events(body) } else { vec![String::from_utf8_lossy(body).into_owned()] };
    pieces.iter().map(|piece| without_cached(&normal(piece.as_bytes()))).collect()
}

fn without_cached(text: &str) -> String {
    const KEY: &str = "\"cached_tokens\":";
    match text.split_once(KEY) {
        Some((before, after)) => {
            let rest = after.trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{before}{KEY}0{}", without_cached(rest))
        }
        None => text.to_string(),
    }
}

fn body(path: &str, stream: bool, tokens: u64, padding: usize, dice: &mut Dice) -> Bytes {
    let prompt: String = (0..dice.between(1, 300)).map(|_| format!("w{} ", dice.between(0, 999))).collect();
    let mut body = json!({ "model": "sim", "stream": stream });
    let (input, limit) = match path {
        COMPLETIONS => ("prompt", "max_tokens"),
        RESPONSES => ("input", "max_output_tokens"),
        _ => ("messages", "max_tokens"),
    };
    body[limit] = tokens.into();
    body[input] = match path {
        CHAT | MESSAGES => json!([{"role": "user", "content": prompt}]),
        _ => json!(prompt),
    };
    body["padding"] = "p".repeat(padding).into();
    Bytes::from(body.to_string())
}
