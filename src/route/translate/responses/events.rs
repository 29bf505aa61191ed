//! A chat's stream as the events of a response, told as each chunk goes by.
//!
//! The events, their order and their fields are those of vLLM's own Responses. What is held is the text so
//! far, which the last events say again.

use serde_json::{Value, json};

use super::response::{self, OutputItemKind, ResponseBuilder, ResponseStatus};
use crate::reply::ending::{error_of, response_error};
use crate::route::answer::MAX_WHOLE_ANSWER_BYTES;
use crate::route::translate::answer::{REASONING_FIELDS, text};
use crate::route::translate::stream::{ChatEnd, ChatEvents, StreamFault};
use crate::route::translate::tokens::AnswerTokens;

/// The response as far as it is told, and the events that tell more of it.
#[derive(Debug)]
pub(crate) struct ResponseEvents {
    form: ResponseBuilder,
    /// Number of the next event.
    number: u64,
    /// What the engine calls its model, once a chunk has come.
    served: Option<String>,
    /// The latest call, which may yet say more, and what is said beside it; the earlier one first.
    open: Vec<OpenItem>,
    /// The latest call's place among all calls.
    called: Option<u64>,
    /// Finished items, and null for unfinished ones.
    output: Vec<Value>,
    /// How many bytes of text they have.
    size: usize,
    usage: Value,
    /// Log-probabilities of tokens that make no text yet, as those of a character's first bytes.
    early: Vec<Value>,
    out: Vec<u8>,
}

/// An item that grows.
#[derive(Debug)]
struct OpenItem {
    kind: OutputItemKind,
    /// Its place in the output.
    at: usize,
    id: String,
    text: String,
    logprobs: Option<Vec<Value>>,
    call: FunctionCall,
}

/// Which call it is, and of what.
#[derive(Debug, Default)]
struct FunctionCall {
    id: String,
    name: String,
}

impl ResponseEvents {
    pub(crate) fn new(form: ResponseBuilder) -> Self {
        ResponseEvents {
            form,
            number: 0,
            served: None,
            open: Vec::new(),
            called: None,
            output: Vec::new(),
            size: 0,
            usage: Value::Null,
            early: Vec::new(),
            out: Vec::new(),
        }
    }
}

impl ChatEvents for ResponseEvents {
    fn begin(&mut self, chunk: &Value) {
        self.served = Some(chunk["model"].as_str().unwrap_or_default().to_owned());
        self.lifecycle("response.created", ResponseStatus::Running);
        self.lifecycle("response.in_progress", ResponseStatus::Running);
    }

    fn delta(&mut self, choice: &Value) -> Result<(), StreamFault> {
        let delta = &choice["delta"];
        if let Some(thought) = text(delta, &REASONING_FIELDS) {
            self.grow(OutputItemKind::Reasoning, thought, None)?;
        }
        let logprobs = choice["logprobs"]["content"].as_array().filter(|_| !self.form.asker.hides_logprobs);
        let said = text(delta, &["content", "refusal"]);
        let other = text(delta, &REASONING_FIELDS).is_some() || delta["tool_calls"].is_array();
        if let Some(logprobs) = logprobs.filter(|_| said.is_some() || !other) {
            self.early.extend(logprobs.iter().cloned());
        }
        if let Some(said) = said {
            let logprobs = std::mem::take(&mut self.early);
            self.grow(OutputItemKind::Message, said, Some(logprobs).filter(|all| !all.is_empty()))?;
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            self.call(call)?;
        }
        Ok(())
    }

    fn end(&mut self, end: ChatEnd) {
        self.usage = response::usage(&end.usage);
        if self.output.is_empty() {
            self.open(OutputItemKind::Message, FunctionCall::default());
        }
        let said = self.open.iter_mut().find(|open| open.kind == OutputItemKind::Message);
        if let Some(logprobs) = said.and_then(|said| said.logprobs.as_mut()) {
            // That of the end itself.
            logprobs.append(&mut self.early);
        }
        let open = std::mem::take(&mut self.open);
        self.close(open, Some(end.tokens));
        self.lifecycle("response.completed", ResponseStatus::of(&end.finish_reason));
    }

    fn error(&mut self, error: Value) {
        self.out.extend_from_slice(response_error(error, Some(self.number)).as_bytes());
    }

    fn fault(&mut self, message: &str, status: u16) {
        self.error(error_of(message, status));
    }

    fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }
}

impl ResponseEvents {
    fn call(&mut self, call: &Value) -> Result<(), StreamFault> {
        let index = call["index"].as_u64().unwrap_or(0);
        match self.called {
            Some(called) if called == index => {}
            // What is done cannot grow any more.
            Some(called) if called > index => return Err(StreamFault::UNREADABLE),
            _ => {
                let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (id, name) = (word(&call["id"]), word(&call["function"]["name"]));
                self.open(OutputItemKind::Call, FunctionCall { id, name });
                self.called = Some(index);
            }
        }
        match call["function"]["arguments"].as_str().filter(|arguments| !arguments.is_empty()) {
            Some(arguments) => self.grow(OutputItemKind::Call, arguments, None),
            None => Ok(()),
        }
    }

    /// The item of this kind says more.
    fn grow(
        &mut self,
        kind: OutputItemKind,
        said: &str,
        logprobs: Option<Vec<Value>>,
    ) -> Result<(), StreamFault> {
        self.size += said.len();
        if self.size > MAX_WHOLE_ANSWER_BYTES {
            return Err(StreamFault::TOO_LONG);
        }
        if !self.open.iter().any(|open| open.kind == kind) {
            self.open(kind, FunctionCall::default());
        }
        let Some(open) = self.open.iter_mut().find(|open| open.kind == kind) else { return Ok(()) };
        open.text.push_str(said);
        if let Some(logprobs) = &logprobs {
            open.logprobs.get_or_insert_default().extend(logprobs.iter().cloned());
        }
        let (id, at) = (open.id.clone(), open.at);
        let (name, event) = match kind {
            OutputItemKind::Message => (
                "response.output_text.delta",
                json!({
                    "content_index": 0, "delta": said, "item_id": id,
                    "logprobs": logprobs.unwrap_or_default(), "output_index": at,
                }),
            ),
            OutputItemKind::Reasoning => (
                "response.reasoning_text.delta",
                json!({"content_index": 0, "delta": said, "item_id": id, "output_index": at}),
            ),
            OutputItemKind::Call => (
                "response.function_call_arguments.delta",
                json!({"delta": said, "item_id": id, "output_index": at}),
            ),
        };
        self.emit(name, event);
        Ok(())
    }

    /// An item begins, and those before it are done, but for a call: its arguments may go on behind a word.
    fn open(&mut self, kind: OutputItemKind, mut call: FunctionCall) {
        let goes_on = |open: &OpenItem| kind != OutputItemKind::Call && open.kind == OutputItemKind::Call;
        let (open, done) = std::mem::take(&mut self.open).into_iter().partition(goes_on);
        self.open = open;
        self.close(done, None);
        let at = self.output.len();
        self.output.push(Value::Null);
        let id = self.form.item_id(kind, at);
        let item = match kind {
            OutputItemKind::Message => json!({
                "id": id, "content": [], "role": "assistant", "status": "in_progress", "type": "message",
                "phase": null,
            }),
            OutputItemKind::Reasoning => json!({
                "id": id, "summary": [], "type": "reasoning", "content": null, "encrypted_content": null,
                "status": "in_progress",
            }),
            OutputItemKind::Call => {
                if call.id.is_empty() {
                    call.id.clone_from(&id);
                }
                response::call(&id, (&call.id, &call.name), "", "in_progress")
            }
        };
        self.emit("response.output_item.added", json!({"item": item, "output_index": at}));
        let part = match kind {
            OutputItemKind::Message => {
                json!({"annotations": [], "text": "", "type": "output_text", "logprobs": []})
            }
            OutputItemKind::Reasoning => json!({"text": "", "type": "reasoning_text"}),
            OutputItemKind::Call => Value::Null,
        };
        if kind != OutputItemKind::Call {
            let event = json!({"content_index": 0, "item_id": id, "output_index": at, "part": part});
            self.emit("response.content_part.added", event);
        }
        self.open.push(OpenItem { kind, at, id, text: String::new(), logprobs: None, call });
    }

    /// Items are done. `tokens`: those of the answer, whose last items they are.
    fn close(&mut self, items: Vec<OpenItem>, mut tokens: Option<AnswerTokens>) {
        let last = self.output.len().saturating_sub(1);
        for item in items {
            let tokens = if item.at == last { tokens.take() } else { None };
            self.close_one(item, tokens);
        }
    }

    fn close_one(&mut self, item: OpenItem, tokens: Option<AnswerTokens>) {
        let OpenItem { kind, at, id, text, logprobs, call } = item;
        let mut item = match kind {
            OutputItemKind::Reasoning => response::reasoning(&id, &text),
            OutputItemKind::Message => response::message(&id, &text, json!(logprobs)),
            OutputItemKind::Call => response::call(&id, (&call.id, &call.name), &text, "completed"),
        };
        let part = item["content"][0].clone();
        let (name, event) = match kind {
            OutputItemKind::Message => (
                "response.output_text.done",
                json!({
                    "content_index": 0, "item_id": id, "logprobs": logprobs.unwrap_or_default(),
                    "output_index": at, "text": text,
                }),
            ),
            OutputItemKind::Reasoning => (
                "response.reasoning_text.done",
                json!({"content_index": 0, "item_id": id, "output_index": at, "text": text}),
            ),
            OutputItemKind::Call => (
                "response.function_call_arguments.done",
                json!({"arguments": text, "item_id": id, "name": call.name, "output_index": at}),
            ),
        };
        self.emit(name, event);
        if kind != OutputItemKind::Call {
            let event = json!({"content_index": 0, "item_id": id, "output_index": at, "part": part});
            self.emit("response.content_part.done", event);
        }
        if let Some(tokens) = tokens {
            tokens.put_on(&mut item);
        }
        self.emit("response.output_item.done", json!({"item": item, "output_index": at}));
        self.output[at] = item;
    }

    /// An event that has the response as it is.
    fn lifecycle(&mut self, name: &str, status: ResponseStatus) {
        let served = self.served.as_deref().unwrap_or_default();
        let response = self.form.response(served, status, &self.output, &self.usage);
        self.emit(name, json!({ "response": response }));
    }

    fn emit(&mut self, name: &str, mut event: Value) {
        event["sequence_number"] = json!(self.number);
        event["type"] = json!(name);
        self.number += 1;
        self.out.extend_from_slice(format!("event: {name}\ndata: {event}\n\n").as_bytes());
    }
}
