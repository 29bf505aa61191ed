//! Edits the messages of a request: roles, and the reasoning that a client keeps inside the content.

use serde_json::Value;

use super::Edits;
use crate::route::dialect::Dialect;
use crate::route::json::{self, Object, Span};
use crate::route::splice::{ObjectEdit, Splices, write};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

impl Edits {
    /// Goes through the messages, where they are a list.
    pub(super) fn history(&self, bytes: &[u8], object: &Object<'_>, out: &mut Splices) {
        let field = if self.dialect == Dialect::Responses { "input" } else { "messages" };
        let taken = self.overrides.contains_key(field) || self.remove.iter().any(|key| key == field);
        let Some(span) = object.get(field).filter(|_| !taken) else { return };
        // Of a list that cannot be followed to its end nothing is changed.
        let messages = json::items(bytes, span.start, |at| match json::object(bytes, at) {
            Some(message) => {
                let end = message.span.end;
                Some((Some(message), end))
            }
            None => Some((None, json::value_end(bytes, at)?)),
        });
        for message in messages.into_iter().flatten().flatten() {
            self.message(bytes, &message, out);
        }
    }

    fn message(&self, bytes: &[u8], message: &Object<'_>, out: &mut Splices) {
        let Some(role) = message.text(bytes, "role") else { return };
        if self.think_tags && role == "assistant" {
            thoughts(bytes, message, out);
        }
        let becomes = self.roles.iter().find(|(from, _)| *from == role);
        if let (Some((_, to)), Some(span)) = (becomes, message.get("role")) {
            out.replace(span, write(&Value::from(to.as_str())));
        }
    }
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
    let parts = json::items(bytes, start, |at| Some((json::object(bytes, at), json::value_end(bytes, at)?)))?;
    let text = |part: Object<'_>| {
        let span = part.get("text").filter(|_| part.is(bytes, "type", "\"text\""))?;
        (bytes[span.start] == b'"').then_some(span)
    };
    Some(parts.into_iter().flatten().filter_map(text).collect())
}

/// A text without what stands between tags, and that; `None` where there are no tags.
fn split(written: &[u8]) -> Option<(String, Vec<String>)> {
    // Some clients escape the brackets.
    let may_have = memchr::memmem::find(written, OPEN.as_bytes()).is_some()
        || memchr::memmem::find(written, b"\\u003").is_some();
    let text = json::text(written).filter(|_| may_have)?;
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
