//! Edits an upstream's answer on its way to the client, piece by piece, however it is cut.
//!
//! - The client's name of the model stands in it again: in JSON, in every event of a stream, in errors, and
//!   in the header that describes an answer of plain bytes.
//! - With `think_tags`, a chat's reasoning stands in its content.
//! - With `token_ids`, a chat's token ids and log-probabilities stand on its messages.
//!   One that lacks them is refused: whole, or by the last event of a stream.
//! - Fields that the route requested and the client did not are removed (usage is left to `usage`).
//!
//! A stream is edited line by line: a line of `data` is held until it is whole, which is how engines write
//! it. JSON in which only names change flows through; a chat that is edited further, and an error, are held
//! until they are whole. Above [`MAX_EVENT_BYTES`] or [`MAX_WHOLE_ANSWER_BYTES`], only names are changed.
//!
//! The edited answer has another length than the upstream's: a `content-length` must not go with it.
//!
//! Never: hold more than one event of a stream, parse what it need not change, fail.

mod chat;
pub mod overflow;
mod rename;

use serde_json::Value;

use self::chat::OpenReasoning;
use self::rename::ModelRenamer;
use super::dialect::BodyDialect;
use super::rewrite::AddedAnswerFields;
use super::splice::{Splices, write};
use super::table::RoutePlan;
use super::token_ids::{MissingTokens, SeenTokens};
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
    /// The name that the client gave.
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
        /// A line that is too long has its names changed as it goes by.
        long: Option<ModelRenamer>,
    },
    /// All that has come is held.
    Whole(Vec<u8>),
    Flowing(ModelRenamer),
}

#[derive(Debug)]
struct AnswerEdit {
    names: Option<ModelRename>,
    /// The messages of a chat are looked at.
    chat: bool,
    think_tags: bool,
    token_ids: bool,
    added_fields: AddedAnswerFields,
    thoughts: OpenReasoning,
    /// What has been seen of the tokens, and what was found missing.
    seen: SeenTokens,
    missing: Option<MissingTokens>,
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

// === impl Answer ===

impl AnswerEditor {
    /// `None`: the answer goes on as it comes, and keeps its length.
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
            chat: is_chat && (route.think_tags || route.token_ids),
            think_tags: route.think_tags,
            token_ids: route.token_ids,
            added_fields: asker.added_fields,
            thoughts: OpenReasoning::default(),
            seen: SeenTokens::default(),
            missing: None,
        };
        let kind = content_type.unwrap_or_default().trim_start().to_ascii_lowercase();
        let way = if kind.starts_with("text/event-stream") {
            AnswerEditMode::Events { lines: LineSplitter::new(MAX_EVENT_BYTES), long: None }
        } else if !kind.starts_with("application/json") {
            return None;
        } else if edit.chat || !good {
            AnswerEditMode::Whole(Vec::new())
        } else {
            AnswerEditMode::Flowing(ModelRenamer::new(edit.client_name()))
        };
        let edits = edit.names.is_some() || edit.chat;
        edits.then_some(AnswerEditor { edit, way })
    }

    /// What an answer that is no stream lacks, once it is whole: the client must not get it.
    pub fn refusal(&self) -> Option<MissingTokens> {
        self.edit.missing.filter(|_| matches!(self.way, AnswerEditMode::Whole(_)))
    }

    /// Takes the next piece of the body, and gives what can go on; `end`: it is the last.
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
                    if self.edit.missing.is_some() {
                        out.clear();
                    }
                }
            }
            AnswerEditMode::Events { lines, long } => {
                let mut rest = piece;
                while self.edit.missing.is_none()
                    && let Some(piece) = lines.next(&mut rest)
                {
                    match piece {
                        SsePiece::Line(line) => self.edit.line(&line, &mut out),
                        SsePiece::LineFeed => out.extend_from_slice(piece.raw()),
                        SsePiece::Long { part, begins, ends } => {
                            let data = if begins { part.data().map(|data| data.start) } else { None };
                            let (head, rest) = part.raw().split_at(data.unwrap_or(0));
                            out.extend_from_slice(head);
                            // A line of something else stays as it is.
                            let name = || data.and_then(|_| self.edit.client_name());
                            let renamer = long.get_or_insert_with(|| ModelRenamer::new(name()));
                            renamer.feed(rest, &mut out);
                            if ends {
                                *long = None;
                            }
                        }
                    }
                }
                if self.edit.missing.is_none()
                    && let Some(line) = end.then(|| lines.finish()).flatten()
                {
                    self.edit.line(&line, &mut out);
                }
            }
        }
        out
    }
}

/// What describes an answer of plain bytes, as embeddings may be asked for: the document in its header
/// `metadata`. `None`: it stays as it is.
pub fn metadata(plan: &RoutePlan, model: Option<&str>, header: &[u8]) -> Option<String> {
    let names = ModelRename::of(model, plan.route.to.as_deref())?;
    let renamed = String::from_utf8(names.document(header)).ok()?;
    let mut ascii = String::with_capacity(renamed.len());
    for character in renamed.chars() {
        match character {
            ' '..='~' => ascii.push(character),
            // As vLLM writes it: a header has no place for other characters.
            _ => {
                ascii.extend(character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")))
            }
        }
    }
    (ascii.as_bytes() != header).then_some(ascii)
}

// === impl Edit ===

impl AnswerEdit {
    fn client_name(&self) -> Option<Vec<u8>> {
        self.names.as_ref().map(|names| names.client.clone())
    }

    /// An answer that is no stream.
    fn whole(&mut self, body: &[u8], out: &mut Vec<u8>) {
        match self.document(body, "message") {
            EditedDocument::Other(edited) => out.extend_from_slice(&edited),
            // A list, or what only begins with a space.
            EditedDocument::Same => ModelRenamer::new(self.client_name()).feed(body, out),
        }
    }

    /// A line of a stream.
    fn line(&mut self, line: &SseLine<'_>, out: &mut Vec<u8>) {
        let raw = line.raw();
        let data = line.data().unwrap_or(raw.len()..raw.len());
        let start = data.start + json::skip_space(&raw[data.clone()], 0);
        let end = start + json::trim_end(&raw[start..data.end]).len();
        let edited = self.document(&raw[start..end], "delta");
        if let Some(missing) = self.missing {
            // The last event of the stream.
            let error = error_events(ErrorEventForm::Data, &missing.message(), MissingTokens::STATUS, false);
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

    /// One document: an answer, or the data of an event. A choice has its message in `message`.
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
        if self.chat {
            self.choices(bytes, &object, message, &mut out);
        }
        if out.is_empty() { EditedDocument::Same } else { EditedDocument::Other(out.apply(bytes)) }
    }
}

// === impl Names ===

impl ModelRename {
    /// `None`: the client has named the model as it is served.
    pub(super) fn of(client: Option<&str>, served: Option<&str>) -> Option<Self> {
        let (client, served) = client.zip(served).filter(|(client, served)| client != served)?;
        let quoted = |name: &str| write(&Value::from(name));
        Some(ModelRename { client: quoted(client), served: quoted(served) })
    }

    /// A document with the client's name in it.
    pub(super) fn document(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Splices::default();
        if let Some(object) = json::document(bytes) {
            self.restore(bytes, &object, &mut out);
        }
        out.apply(bytes)
    }

    /// In the document itself, in the `response` or `message` that an event carries, and in errors.
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

    /// In a sentence, a name is what stands between marks.
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
