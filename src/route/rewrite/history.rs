//! Edits the messages of a request: roles, and the reasoning that a client keeps inside the content.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde_json::Value;

use super::Edits;
use crate::route::json::{self, Object, Span};
use crate::route::splice::{ObjectEdit, Splices, write};

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// What every tag has in it, brackets written as they are or escaped.
static TAG: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"think"));

impl Edits {
    /// The body, and what is changed in its messages.
    pub(super) fn read<'a>(
        &self,
        bytes: &'a [u8],
        end_of: &dyn Fn(usize) -> Option<usize>,
    ) -> Option<(Object<'a>, Splices<'_>)> {
        let mut changes = Splices::default();
        let object = json::document_with(bytes, |key, at| {
            if self.history != Some(key) {
                return end_of(at).or_else(|| json::value_end(bytes, at));
            }
            // Of equal keys the last counts, and in a list that cannot be followed nothing is changed.
            changes.clear();
            self.messages(bytes, at, &mut changes).or_else(|| {
                changes.clear();
                json::value_end(bytes, at)
            })
        })?;
        Some((object, changes))
    }

    /// Goes through the messages of a list, or of the lists in it, as in a batch of chats, to its end.
    fn messages<'t>(&'t self, bytes: &[u8], start: usize, out: &mut Splices<'t>) -> Option<usize> {
        let mut one = |at: usize| match json::object(bytes, at) {
            Some(message) => {
                self.message(bytes, &message, out);
                Some(message.span.end)
            }
            None => json::value_end(bytes, at),
        };
        json::each(bytes, start, |at| match bytes.get(at) {
            Some(b'[') => json::each(bytes, at, &mut one),
            _ => one(at),
        })
    }

    fn message<'t>(&'t self, bytes: &[u8], message: &Object<'_>, out: &mut Splices<'t>) {
        let Some(span) = message.get("role") else { return };
        let Some(role) = json::text(&bytes[span.clone()]) else { return };
        if self.think_tags && role == "assistant" {
            thoughts(bytes, message, out);
        }
        if let Some((_, to)) = self.roles.iter().find(|(from, _)| *from == role) {
            out.replace(span, to.as_slice());
        }
    }
}

/// Takes what stands between the tags out of the content, and gives it as the reasoning of the message.
fn thoughts(bytes: &[u8], message: &Object<'_>, out: &mut Splices<'_>) {
    let content = message.get("content").filter(|span| may_have_tags(&bytes[span.clone()]));
    let Some(content) = content else { return };
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

/// A text without what stands between tags, and that; `None` where there are no tags, and for a text that
/// could not be written again as it is: Python takes halves of characters.
fn split(written: &[u8]) -> Option<(String, Vec<String>)> {
    if !may_have_tags(written) {
        return None;
    }
    let text: String = serde_json::from_slice(written).ok()?;
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
