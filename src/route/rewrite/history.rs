//! Edits the messages of a request: roles, and the reasoning that a client keeps inside the content.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde_json::Value;

use super::Edits;
use crate::route::dialect::Dialect;
use crate::route::json::{self, Object, Span};
use crate::route::splice::{ObjectEdit, Splices, write};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What every tag has in it, brackets written as they are or escaped.
static TAG: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"think"));

impl Edits {
    /// The body, and its messages where something may be changed in them.
    pub(super) fn read<'a>(
        &self,
        bytes: &'a [u8],
        end_of: &dyn Fn(usize) -> Option<usize>,
    ) -> Option<(Object<'a>, Vec<Object<'a>>)> {
        let field = if self.dialect == Dialect::Responses { "input" } else { "messages" };
        let taken = self.overrides.contains_key(field) || self.remove.iter().any(|key| key == field);
        let untouched = taken || (self.roles.is_empty() && !self.think_tags);
        let mut found = Vec::new();
        let object = json::document_with(bytes, |key, at| {
            if untouched || key != field {
                return end_of(at).or_else(|| json::value_end(bytes, at));
            }
            // Of a list that cannot be followed to its end nothing is changed.
            let (messages, end) = messages(bytes, at).unwrap_or_default();
            found = messages;
            if end > at { Some(end) } else { json::value_end(bytes, at) }
        })?;
        Some((object, found))
    }

    /// Edits the messages that were found.
    pub(super) fn history(&self, bytes: &[u8], messages: &[Object<'_>], out: &mut Splices) {
        let (Some(first), Some(last)) = (messages.first(), messages.last()) else { return };
        let thinks = self.think_tags && may_have_tags(&bytes[first.span.start..last.span.end]);
        if thinks || !self.roles.is_empty() {
            messages.iter().for_each(|message| self.message(bytes, message, thinks, out));
        }
    }

    fn message(&self, bytes: &[u8], message: &Object<'_>, thinks: bool, out: &mut Splices) {
        let Some(role) = message.text(bytes, "role") else { return };
        if thinks && role == "assistant" {
            thoughts(bytes, message, out);
        }
        let becomes = self.roles.iter().find(|(from, _)| *from == role);
        if let (Some((_, to)), Some(span)) = (becomes, message.get("role")) {
            out.replace(span, write(&Value::from(to.as_str())));
        }
    }
}

/// The messages of a list, or of the lists in it, as in a batch of chats, and where that ends.
fn messages(bytes: &[u8], start: usize) -> Option<(Vec<Object<'_>>, usize)> {
    let one = |at: usize| match json::object(bytes, at) {
        Some(message) => {
            let end = message.span.end;
            Some((Some(message), end))
        }
        None => Some((None, json::value_end(bytes, at)?)),
    };
    let talk = |at: usize| match bytes.get(at) {
        Some(b'[') => json::items(bytes, at, one),
        _ => one(at).map(|(message, end)| (vec![message], end)),
    };
    let (talks, end) = json::items(bytes, start, talk)?;
    Some((talks.into_iter().flatten().flatten().collect(), end))
}

/// Takes what stands between the tags out of the content, and gives it as the reasoning of the message.
fn thoughts(bytes: &[u8], message: &Object<'_>, out: &mut Splices) {
    let Some(content) = message.get("content") else { return };
    let texts: Vec<Span> = match bytes[content.start] {
        b'"' => vec![content],
        b'[' => parts(bytes, content.start).unwrap_or_default(),
        _ => return,
    };
    let mut thoughts: Vec<String> = Vec::new();
    for span in texts {
        let Some((rest, found)) = split(&bytes[span.clone()]) else { continue };
        out.replace(span, write(&Value::from(rest)));
        thoughts.extend(found);
    }
    if thoughts.is_empty() {
        return;
    }
    let reasoning = write(&Value::from(thoughts.join("\n")));
    let mut edit = ObjectEdit::new(bytes, message);
    // vLLM reads the first, what is older than 0.16 the second.
    edit.set("reasoning", reasoning.clone(), out);
    edit.set("reasoning_content", reasoning, out);
    edit.finish(out);
}

/// The texts of a content that is a list of parts.
fn parts(bytes: &[u8], start: usize) -> Option<Vec<Span>> {
    let part = |at: usize| Some((json::object(bytes, at), json::value_end(bytes, at)?));
    let (parts, _) = json::items(bytes, start, part)?;
    let text = |part: Object<'_>| {
        let span = part.get("text").filter(|_| part.is(bytes, "type", "\"text\""))?;
        (bytes[span.start] == b'"').then_some(span)
    };
    Some(parts.into_iter().flatten().filter_map(text).collect())
}

/// A text without what stands between tags, and that; `None` where there are no tags.
fn split(written: &[u8]) -> Option<(String, Vec<String>)> {
    if !may_have_tags(written) {
        return None;
    }
    let text = json::text(written)?;
    let (mut rest, mut found) = (String::with_capacity(text.len()), Vec::new());
    let mut left: &str = &text;
    while let Some((before, inside, after)) = left.split_once(OPEN).and_then(|(before, behind)| {
        let (inside, after) = behind.split_once(CLOSE)?;
        Some((before, inside, after))
    }) {
        rest.push_str(before);
        found.push(inside.to_owned());
        left = after;
    }
    rest.push_str(left);
    (!found.is_empty()).then_some((rest, found))
}

/// Said of most texts without reading them twice; the word alone is no tag.
fn may_have_tags(written: &[u8]) -> bool {
    TAG.find_iter(written).any(|at| matches!(written.get(at + 5), Some(b'>' | b'\\')))
}
