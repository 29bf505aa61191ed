//! The stream of a response: typed, numbered events without `[DONE]`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::driver::Step;
use super::error::ApiError;
use super::plan::AnswerPart;
use super::responses_form::{ResponseProgress, ResponsesReplyForm};
use super::shared::EngineShared;
use super::stream::{EventWriter, ReplyEvents};

/// Writes the events of a streamed response.
pub(super) struct ResponseWriter {
    form: ResponsesReplyForm,
    shared: Arc<EngineShared>,
    /// The number of the next event.
    sequence: u64,
    /// The open item, and its text so far.
    open: Option<(AnswerPart, String)>,
    /// The number of closed items.
    index: usize,
    reported: usize,
    cached: usize,
    aborted: bool,
}

impl ResponseWriter {
    pub(super) fn new(form: ResponsesReplyForm, shared: Arc<EngineShared>) -> Self {
        Self { form, shared, sequence: 0, open: None, index: 0, reported: 0, cached: 0, aborted: false }
    }

    /// Writes an event; its number and type come last, as vLLM orders the fields.
    fn emit(&mut self, kind: &str, mut fields: Value, events: &mut ReplyEvents) {
        let text = fields.as_object_mut().and_then(|fields| fields.shift_remove("text"));
        fields["sequence_number"] = json!(self.sequence);
        if let Some(text) = text {
            fields["text"] = text;
        }
        fields["type"] = json!(kind);
        self.sequence += 1;
        events.event(kind, &fields);
    }

    fn piece(&mut self, index: usize, events: &mut ReplyEvents) {
        let piece = self.form.answer.pieces[index].clone();
        if self.open.as_ref().is_none_or(|(part, _)| *part != piece.part) {
            self.close(events);
            self.open_item(piece.part, events);
        }
        if let Some((_, text)) = &mut self.open {
            text.push_str(&piece.text);
        }
        let id = self.form.item_id(piece.part);
        let (kind, fields) = match piece.part {
            AnswerPart::Text => (
                "response.output_text.delta",
                json!({
                    "content_index": 0, "delta": piece.text, "item_id": id, "logprobs": [],
                    "output_index": self.index,
                }),
            ),
            AnswerPart::Reasoning => (
                "response.reasoning_text.delta",
                json!({"content_index": 0, "delta": piece.text, "item_id": id, "output_index": self.index}),
            ),
            AnswerPart::Arguments => (
                "response.function_call_arguments.delta",
                json!({"delta": piece.text, "item_id": id, "output_index": self.index}),
            ),
        };
        self.emit(kind, fields, events);
    }

    fn open_item(&mut self, part: AnswerPart, events: &mut ReplyEvents) {
        self.open = Some((part, String::new()));
        let id = self.form.item_id(part);
        let item = match part {
            AnswerPart::Text => json!({
                "id": id, "content": [], "role": "assistant", "status": "in_progress", "type": "message",
                "phase": null,
            }),
            AnswerPart::Reasoning => json!({
                "id": id, "summary": [], "type": "reasoning", "content": null, "encrypted_content": null,
                "status": "in_progress",
            }),
            AnswerPart::Arguments => self.form.call_item("", "in_progress"),
        };
        let added = json!({"item": item, "output_index": self.index});
        self.emit("response.output_item.added", added, events);
        let part = match part {
            AnswerPart::Text => json!({"annotations": [], "text": "", "type": "output_text", "logprobs": []}),
            AnswerPart::Reasoning => json!({"text": "", "type": "reasoning_text"}),
            AnswerPart::Arguments => return,
        };
        let added = json!({"content_index": 0, "item_id": id, "output_index": self.index, "part": part});
        self.emit("response.content_part.added", added, events);
    }

    fn close(&mut self, events: &mut ReplyEvents) {
        let Some((part, text)) = self.open.take() else { return };
        let (id, index) = (self.form.item_id(part), self.index);
        let part_done = match part {
            AnswerPart::Text => {
                let done = json!({
                    "content_index": 0, "item_id": id, "logprobs": [], "output_index": index, "text": text,
                });
                self.emit("response.output_text.done", done, events);
                Some(json!({"annotations": [], "text": text, "type": "output_text", "logprobs": null}))
            }
            AnswerPart::Reasoning => {
                let done = json!({"content_index": 0, "item_id": id, "output_index": index, "text": text});
                self.emit("response.reasoning_text.done", done, events);
                Some(json!({"text": text, "type": "reasoning_text"}))
            }
            AnswerPart::Arguments => {
                let done = json!({
                    "arguments": text, "item_id": id, "name": self.form.answer.tool, "output_index": index,
                });
                self.emit("response.function_call_arguments.done", done, events);
                None
            }
        };
        if let Some(part) = part_done {
            let done = json!({"content_index": 0, "item_id": id, "output_index": index, "part": part});
            self.emit("response.content_part.done", done, events);
        }
        let done = json!({"item": self.form.item(part, &text), "output_index": index});
        self.emit("response.output_item.done", done, events);
        self.index += 1;
    }
}

impl EventWriter for ResponseWriter {
    fn open(&mut self, events: &mut ReplyEvents) {
        let response = self.form.response(ResponseProgress::Running);
        self.emit("response.created", json!({"response": response}), events);
        self.emit("response.in_progress", json!({"response": response}), events);
    }

    fn write(&mut self, step: Step, events: &mut ReplyEvents) {
        match step {
            Step::Begun { cached_tokens } => self.cached = cached_tokens,
            Step::Token { index, .. } => {
                self.reported = index + 1;
                self.piece(index, events);
            }
            Step::Aborted { .. } => self.aborted = true,
            Step::End => {
                self.close(events);
                let ended = ResponseProgress::Ended {
                    reported: self.reported,
                    cached: self.cached,
                    aborted: self.aborted,
                };
                let response = self.form.response(ended);
                self.form.store(&self.shared.store, &response);
                self.emit("response.completed", json!({"response": response}), events);
            }
        }
    }

    fn fail(&mut self, error: &ApiError, events: &mut ReplyEvents) {
        events.event("error", &error.openai());
    }
}
