//! Edits the messages of a request: roles, and the reasoning that a client keeps inside the content.
//!
//! Never: a list of messages or of parts, of which a body may have millions.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::json::{self, JsonObject, JsonResult, MAX_KEY_BYTES, ReadFault, Span};
use crate::route::splice::{ObjectEdit, Splices, write_text};

const OPEN_TAG: &str = "<think>";
const CLOSE_TAG: &str = "</think>";

/// The largest number of edits in a request's messages.
pub(super) const MAX_CHANGES: usize = 100_000;

/// The text in every tag, whether its brackets are escaped or not.
static TAG_NAME: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"think"));

/// The changes of a route to the messages of a request.
#[derive(Debug)]
pub(super) struct MessageEdits {
    /// The field whose messages are changed, if any.
    pub field: Option<&'static str>,
    /// The old and the new role, the latter as a JSON string.
    pub roles: Vec<(String, Vec<u8>)>,
    pub think_tags: bool,
}

/// The texts between the tags of one message, one a line.
#[derive(Default)]
struct MessageReasoning {
    text: String,
    is_any: bool,
}

// === impl MessageEdits ===

impl MessageEdits {
    /// The body, and the changes to its messages.
    pub(super) fn read<'a>(
        &self,
        bytes: &'a [u8],
        end_of: &dyn Fn(usize) -> Option<usize>,
    ) -> JsonResult<(JsonObject<'a>, Splices<'_>)> {
        let mut changes = Splices::default();
        let object = json::document_with(bytes, |key, at| {
            if self.field != Some(key) {
                return end_of(at).map_or_else(|| json::read_value(bytes, at), Ok);
            }
            // Of equal keys the last counts, and a list that cannot be parsed stays unchanged.
            changes.clear();
            match self.messages(bytes, at, &mut changes) {
                Err(ReadFault::Syntax) => {
                    changes.clear();
                    json::read_value(bytes, at)
                }
                read => read,
            }
        })?;
        Ok((object, changes))
    }

    /// Edits the messages of a list, or of the lists in it (a batch of chats), to its end.
    fn messages<'t>(&'t self, bytes: &[u8], start: usize, out: &mut Splices<'t>) -> JsonResult<usize> {
        let mut one = |at: usize| match self.message(bytes, at, out) {
            Err(ReadFault::Syntax) => json::read_value(bytes, at),
            read => read,
        };
        json::each(bytes, start, |at| match bytes.get(at) {
            Some(b'[') => json::each(bytes, at, &mut one),
            _ => one(at),
        })
    }

    /// Edits the message that begins at `at`. Returns its end.
    fn message<'t>(&'t self, bytes: &[u8], at: usize, out: &mut Splices<'t>) -> JsonResult<usize> {
        let [mut role, mut content] = [None, None];
        let message_end = json::walk(bytes, at, |key, _, at| {
            let end = json::read_value(bytes, at)?;
            match &*key {
                "role" => role = Some(at..end),
                "content" => content = Some(at..end),
                _ => {}
            }
            Ok(end)
        })?;
        let Some(role) = role.filter(|role| role.len() <= MAX_KEY_BYTES) else { return Ok(message_end) };
        let Some(name) = json::text(&bytes[role.clone()]) else { return Ok(message_end) };
        if let Some(content) = content.filter(|_| self.think_tags && name == "assistant") {
            think(bytes, at, content, out)?;
        }
        if let Some((_, to)) = self.roles.iter().find(|(from, _)| *from == name) {
            out.replace(role, to.as_slice());
        }
        if out.len() > MAX_CHANGES { Err(ReadFault::ManyChanges) } else { Ok(message_end) }
    }
}

/// Moves the text between the tags from the content to the reasoning of the message that begins at `at`.
fn think(bytes: &[u8], at: usize, content: Span, out: &mut Splices<'_>) -> JsonResult<()> {
    if !may_have_tags(&bytes[content.clone()]) {
        return Ok(());
    }
    let (before, mut thoughts) = (out.len(), MessageReasoning::default());
    match bytes[content.start] {
        b'"' => thoughts.take(bytes, content, out)?,
        b'[' => {
            let read = json::each(bytes, content.start, |at| {
                if let Some(text) = text_of_part(bytes, at)? {
                    thoughts.take(bytes, text, out)?;
                }
                json::read_value(bytes, at)
            });
            match read {
                Ok(_) => {}
                Err(ReadFault::Syntax) => {
                    out.truncate(before);
                    return Ok(());
                }
                Err(fault) => return Err(fault),
            }
        }
        _ => return Ok(()),
    }
    if !thoughts.is_any {
        return Ok(());
    }
    let message = json::read_object(bytes, at)?;
    let reasoning = write_text(&thoughts.text);
    drop(thoughts);
    let mut edit = ObjectEdit::new(bytes, &message);
    // vLLM reads the first field; versions before 0.16 read the second.
    edit.set("reasoning", reasoning.clone(), out);
    edit.set("reasoning_content", reasoning, out);
    edit.finish(out);
    Ok(())
}

/// The text of the part that begins at `at`, if it is a text part.
fn text_of_part(bytes: &[u8], at: usize) -> JsonResult<Option<Span>> {
    let (mut is_text, mut text) = (false, None);
    let read = json::walk(bytes, at, |key, _, at| {
        let end = json::read_value(bytes, at)?;
        match &*key {
            "type" => is_text = &bytes[at..end] == b"\"text\"",
            "text" => text = Some(at..end).filter(|_| bytes[at] == b'"'),
            _ => {}
        }
        Ok(end)
    });
    match read {
        Ok(_) => Ok(text.filter(|_| is_text)),
        Err(ReadFault::Syntax) => Ok(None),
        Err(fault) => Err(fault),
    }
}

// === impl MessageReasoning ===

impl MessageReasoning {
    /// Removes the text between tags from a text. A text with lone surrogates, which Python accepts, stays
    /// unchanged, since it could not be written again.
    fn take(&mut self, bytes: &[u8], span: Span, out: &mut Splices<'_>) -> JsonResult<()> {
        let written = &bytes[span.clone()];
        let text = if may_have_tags(written) { serde_json::from_slice::<String>(written).ok() } else { None };
        let Some(text) = text else { return Ok(()) };
        let Some((first, _)) = tagged(&text) else { return Ok(()) };
        let mut rest = String::with_capacity(text.len());
        rest.push_str(first);
        let mut left = &text[first.len()..];
        while let Some((before, inside)) = tagged(left) {
            rest.push_str(before);
            if self.is_any {
                self.text.push('\n');
            }
            self.text.push_str(inside);
            self.is_any = true;
            left = &left[before.len() + OPEN_TAG.len() + inside.len() + CLOSE_TAG.len()..];
        }
        rest.push_str(left);
        drop(text);
        out.replace(span, write_text(&rest));
        if out.len() > MAX_CHANGES { Err(ReadFault::ManyChanges) } else { Ok(()) }
    }
}

/// The text before the first tags, and the text between them.
fn tagged(text: &str) -> Option<(&str, &str)> {
    let (before, behind) = text.split_once(OPEN_TAG)?;
    Some((before, behind.split_once(CLOSE_TAG)?.0))
}

/// Whether a text may have tags: a cheap test that rules out most texts.
fn may_have_tags(written: &[u8]) -> bool {
    TAG_NAME.find_iter(written).any(|at| matches!(written.get(at + 5), Some(b'>' | b'\\')))
}
