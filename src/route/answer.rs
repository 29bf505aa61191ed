//! Edits an upstream's answer on its way to the client, in pieces that are cut anywhere.
//!
//! - The client's name of the model replaces the served one: in JSON, in every event of a stream, in errors,
//!   and in the header that describes an answer of plain bytes.
//! - With `think_tags`, a chat's reasoning moves into its content.
//! - With `token_ids`, a chat's token ids and log-probabilities move to its messages.
//!   An answer that lacks them is rejected: whole, or by the last event of a stream.
//! - Fields that the route requested and the client did not are removed (usage is left to `usage`).
//!
//! A stream is edited line by line: a line of `data` is held until it is whole; engines write whole lines.
//! JSON in which only names change flows through; a chat with further edits, and an error, are held until
//! they are whole. Above [`MAX_EVENT_BYTES`] or [`MAX_WHOLE_ANSWER_BYTES`], only names are changed.
//!
//! The edited answer differs in length from the upstream's, so its `content-length` must not be forwarded.
//!
//! Never: hold more than one event of a stream, parse a part without edits, fail.

mod chat;
pub mod overflow;
mod rename;

use serde_json::Value;

use self::chat::ChatEdit;
use self::rename::ModelRenamer;
use super::dialect::BodyDialect;
use super::rewrite::AddedAnswerFields;
use super::splice::{Splices, write};
use super::token_ids::MissingTokens;
use super::virtual_models::RoutePlan;
use crate::json::{self, JsonObject};
use crate::reply::ending::{ErrorEventForm, error_events};
use crate::sse::{LineSplitter, SseLine, SsePiece, count_work};

/// The longest line of a stream that is edited whole.
pub const MAX_EVENT_BYTES: usize = 16 << 20;

/// The longest answer, other than a stream, that is edited whole.
pub const MAX_WHOLE_ANSWER_BYTES: usize = 64 << 20;

/// The facts of a request that the edits of its answer need.
#[derive(Clone, Copy, Debug)]
pub struct AnswerContext<'a> {
    pub dialect: BodyDialect,
    /// The client's name of the model.
    pub model: Option<&'a str>,
    pub added_fields: AddedAnswerFields,
}

/// Edits one answer.
#[derive(Debug)]
pub struct AnswerEditor {
    edit: AnswerEdit,
    way: AnswerEditMode,
}

#[derive(Debug)]
enum AnswerEditMode {
    Events {
        lines: LineSplitter,
        /// A line above the limit, in which names are changed while it streams.
        long: Option<ModelRenamer>,
    },
    /// The whole answer so far is held.
    Whole(Vec<u8>),
    Flowing(ModelRenamer),
}

#[derive(Debug)]
struct AnswerEdit {
    names: Option<ModelRename>,
    /// The edits of a chat's messages, if there are any.
    chat: Option<ChatEdit>,
}

/// Replaces the served name by the client's; both as JSON strings, quotes included.
#[derive(Clone, Debug)]
pub(super) struct ModelRename {
    client: Vec<u8>,
    served: Vec<u8>,
}

enum EditedDocument {
    Same,
    Other(Vec<u8>),
}

// === impl AnswerEditor ===

impl AnswerEditor {
    /// Creates the editor of an answer. `None`: the answer is forwarded unchanged and keeps its length.
    pub fn new(
        plan: &RoutePlan,
        asker: AnswerContext<'_>,
        status: u16,
        content_type: Option<&str>,
    ) -> Option<Self> {
        let route = &plan.route;
        let good = (200..300).contains(&status);
        let is_chat = asker.dialect == BodyDialect::Chat && good;
        let edit = AnswerEdit {
            names: ModelRename::of(asker.model, route.to.as_deref()),
            chat: is_chat.then(|| ChatEdit::new(route, asker.added_fields)).flatten(),
        };
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let way = if kind.starts_with("text/event-stream") {
            AnswerEditMode::Events { lines: LineSplitter::new(MAX_EVENT_BYTES), long: None }
        } else if !kind.starts_with("application/json") {
            return None;
        } else if edit.chat.is_some() || !good {
            AnswerEditMode::Whole(Vec::new())
        } else {
            AnswerEditMode::Flowing(ModelRenamer::new(edit.client_name()))
        };
        let edits = edit.names.is_some() || edit.chat.is_some();
        edits.then_some(AnswerEditor { edit, way })
    }

    /// The tokens that a whole answer, other than a stream, lacks: such an answer must not reach the client.
    pub fn refusal(&self) -> Option<MissingTokens> {
        self.edit.missing().filter(|_| matches!(self.way, AnswerEditMode::Whole(_)))
    }

    /// Edits the next piece of the body and returns the bytes that can be forwarded; `end`: it is the last
    /// piece.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(piece.len());
        match &mut self.way {
            AnswerEditMode::Flowing(renamer) => renamer.feed(piece, &mut out),
            AnswerEditMode::Whole(held) => {
                held.extend_from_slice(piece);
                if held.len() > MAX_WHOLE_ANSWER_BYTES {
                    let mut renamer = ModelRenamer::new(self.edit.client_name());
                    renamer.feed(held, &mut out);
                    self.way = AnswerEditMode::Flowing(renamer);
                } else if end {
                    self.edit.whole(&std::mem::take(held), &mut out);
                    if self.edit.missing().is_some() {
                        out.clear();
                    }
                }
            }
            AnswerEditMode::Events { lines, long } => {
                let mut rest = piece;
                while self.edit.missing().is_none()
                    && let Some(piece) = lines.next(&mut rest)
                {
                    match piece {
                        SsePiece::Line(line) => self.edit.line(&line, &mut out),
                        SsePiece::LineFeed => out.extend_from_slice(piece.raw()),
                        SsePiece::Long { part, begins, ends } => {
                            let data = if begins { part.data().map(|data| data.start) } else { None };
                            let (head, rest) = part.raw().split_at(data.unwrap_or(0));
                            out.extend_from_slice(head);
                            // Other lines stay unchanged.
                            let name = || data.and_then(|_| self.edit.client_name());
                            let renamer = long.get_or_insert_with(|| ModelRenamer::new(name()));
                            renamer.feed(rest, &mut out);
                            if ends {
                                *long = None;
                            }
                        }
                    }
                }
                if self.edit.missing().is_none()
                    && let Some(line) = end.then(|| lines.finish()).flatten()
                {
                    self.edit.line(&line, &mut out);
                }
            }
        }
        out
    }
}

/// Edits the header `metadata`, a document that describes an answer of plain bytes such as embeddings.
/// `None`: the header stays unchanged.
pub fn metadata(plan: &RoutePlan, model: Option<&str>, header: &[u8]) -> Option<String> {
    let names = ModelRename::of(model, plan.route.to.as_deref())?;
    let renamed = String::from_utf8(names.document(header)).ok()?;
    let mut ascii = String::with_capacity(renamed.len());
    for character in renamed.chars() {
        match character {
            ' '..='~' => ascii.push(character),
            // Escaped like vLLM's: a header field must be ASCII.
            _ => {
                ascii.extend(character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")))
            }
        }
    }
    (ascii.as_bytes() != header).then_some(ascii)
}

// === impl AnswerEdit ===

impl AnswerEdit {
    fn client_name(&self) -> Option<Vec<u8>> {
        self.names.as_ref().map(|names| names.client.clone())
    }

    /// The requested tokens that the answer was found to lack.
    fn missing(&self) -> Option<MissingTokens> {
        self.chat.as_ref()?.missing
    }

    /// Edits an answer other than a stream.
    fn whole(&mut self, body: &[u8], out: &mut Vec<u8>) {
        match self.document(body, "message") {
            EditedDocument::Other(edited) => out.extend_from_slice(&edited),
            // A list, or bytes that merely begin with a space.
            EditedDocument::Same => ModelRenamer::new(self.client_name()).feed(body, out),
        }
    }

    /// Edits a line of a stream.
    fn line(&mut self, line: &SseLine<'_>, out: &mut Vec<u8>) {
        let raw = line.raw();
        let data = line.data().unwrap_or(raw.len()..raw.len());
        let start = data.start + json::skip_space(&raw[data.clone()], 0);
        let end = start + json::trim_end(&raw[start..data.end]).len();
        let edited = self.document(&raw[start..end], "delta");
        if let Some(missing) = self.missing() {
            // The last event of the stream.
            let error =
                error_events(ErrorEventForm::Data, &missing.message(), MissingTokens::REJECT_STATUS, false);
            out.extend_from_slice(error.as_bytes());
            return;
        }
        match edited {
            EditedDocument::Same => out.extend_from_slice(raw),
            EditedDocument::Other(edited) => {
                out.extend_from_slice(&raw[..start]);
                out.extend_from_slice(&edited);
                out.extend_from_slice(&raw[end..]);
            }
        }
    }

    /// Edits one document: an answer, or the data of an event. `message`: the key of a choice's message.
    fn document(&mut self, bytes: &[u8], message: &str) -> EditedDocument {
        count_work(bytes.len());
        // The end of a stream, and other data that is no object.
        if bytes.first() != Some(&b'{') {
            return EditedDocument::Same;
        }
        let Some(object) = json::document(bytes) else { return EditedDocument::Same };
        let mut out = Splices::default();
        if let Some(names) = &self.names {
            names.restore(bytes, &object, &mut out);
        }
        if let Some(chat) = &mut self.chat {
            chat.choices(bytes, &object, message, &mut out);
        }
        if out.is_empty() { EditedDocument::Same } else { EditedDocument::Other(out.apply(bytes)) }
    }
}

// === impl ModelRename ===

impl ModelRename {
    /// Creates the rename. `None`: the client requested the served name.
    pub(super) fn of(client: Option<&str>, served: Option<&str>) -> Option<Self> {
        let (client, served) = client.zip(served).filter(|(client, served)| client != served)?;
        let quoted = |name: &str| write(&Value::from(name));
        Some(ModelRename { client: quoted(client), served: quoted(served) })
    }

    /// Returns a document with the client's name in place of the served one.
    pub(super) fn document(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Splices::default();
        if let Some(object) = json::document(bytes) {
            self.restore(bytes, &object, &mut out);
        }
        out.apply(bytes)
    }

    /// Renames in the document itself, in the `response` or `message` of an event, and in errors.
    fn restore(&self, bytes: &[u8], object: &JsonObject<'_>, out: &mut Splices<'_>) {
        let inner = ["response", "message"].map(|key| object.object(bytes, key));
        let is_error = object.is(bytes, "type", "\"error\"");
        for object in std::iter::once(object).chain(inner.iter().flatten()) {
            if let Some(span) = object.get("model").filter(|span| bytes[span.start] == b'"') {
                out.replace(span, self.client.clone());
            }
            if let Some(error) = object.object(bytes, "error") {
                self.restore_in_text(bytes, error.get("message"), out);
            }
        }
        if is_error {
            self.restore_in_text(bytes, object.get("message"), out);
        }
    }

    /// Renames in a sentence, where a name stands between quotation marks.
    fn restore_in_text(&self, bytes: &[u8], sentence: Option<json::Span>, out: &mut Splices<'_>) {
        let Some(span) = sentence.filter(|span| bytes[span.start] == b'"') else { return };
        let (Some(client), Some(served)) = (json::inside(&self.client), json::inside(&self.served)) else {
            return;
        };
        for mark in [&b"`"[..], b"'", b"\\\""] {
            let marked = [mark, served, mark].concat();
            let mut at = span.start;
            while let Some(found) = memchr::memmem::find(&bytes[at..span.end], &marked) {
                let start = at + found + mark.len();
                out.replace(start..start + served.len(), client.to_vec());
                at = start + served.len();
            }
        }
    }
}

#[cfg(test)]
mod tests;
