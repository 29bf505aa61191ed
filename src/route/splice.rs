//! Replaces spans of a text and keeps every byte outside of them.

use std::borrow::Cow;

use serde_json::Value;

use crate::json::{JsonObject, Span};

/// Changes to one text, out of texts that live for `'t`. They may come in any order and must not overlap.
#[derive(Debug, Default)]
pub(super) struct Splices<'t> {
    list: Vec<(Span, Cow<'t, [u8]>)>,
}

/// Changes to the members of one object.
pub(super) struct ObjectEdit<'a, 'o> {
    pub object: &'o JsonObject<'a>,
    bytes: &'a [u8],
    /// Whether each member is removed; empty while none is.
    removed: Vec<bool>,
    added: Vec<u8>,
}

// === impl Splices ===

impl<'t> Splices<'t> {
    pub(super) fn replace(&mut self, span: Span, with: impl Into<Cow<'t, [u8]>>) {
        self.list.push((span, with.into()));
    }

    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Discards all changes but the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The text with all changes made.
    pub(super) fn apply(mut self, text: &[u8]) -> Vec<u8> {
        self.list.sort_by_key(|(span, _)| span.start);
        let added: usize = self.list.iter().map(|(_, with)| with.len()).sum();
        let mut changed = Vec::with_capacity(text.len() + added);
        let mut at = 0;
        // A span that begins inside another would be a bug of the caller; it is skipped, so that the text
        // stays valid.
        for (span, with) in self.list.iter().filter(|(span, _)| span.start <= span.end) {
            if span.start < at {
                continue;
            }
            changed.extend_from_slice(&text[at..span.start]);
            changed.extend_from_slice(with);
            at = span.end;
        }
        changed.extend_from_slice(&text[at..]);
        changed
    }
}

// === impl ObjectEdit ===

impl<'a, 'o> ObjectEdit<'a, 'o> {
    pub(super) fn new(bytes: &'a [u8], object: &'o JsonObject<'a>) -> Self {
        ObjectEdit { object, bytes, removed: Vec::new(), added: Vec::new() }
    }

    /// Removes every member of this name: a remaining one would count.
    pub(super) fn remove(&mut self, key: &str) {
        let object = self.object;
        for (index, _) in object.members.iter().enumerate().filter(|(_, member)| member.key == key) {
            self.remove_at(index);
        }
    }

    /// Removes the member at this index.
    pub(super) fn remove_at(&mut self, index: usize) {
        self.removed.resize(self.object.members.len(), false);
        self.removed[index] = true;
    }

    /// Sets a key to a serialized value: replaces the value that counts, or appends the member.
    pub(super) fn set<'t>(&mut self, key: &str, written: impl Into<Cow<'t, [u8]>>, out: &mut Splices<'t>) {
        let written = written.into();
        match self.object.get(key) {
            Some(span) if self.bytes[span.clone()] == *written => {}
            Some(span) => out.replace(span, written),
            None => self.add(&member(key, &written)),
        }
    }

    /// Appends a member that [`member`] has made.
    pub(super) fn add(&mut self, member: &[u8]) {
        self.added.extend_from_slice(member);
    }

    /// Adds the removals and additions to `out`.
    pub(super) fn finish(mut self, out: &mut Splices<'_>) {
        let members = &self.object.members;
        let is_kept = |index: &usize| !self.removed.get(*index).is_some_and(|removed| *removed);
        let kept = (0..members.len()).rfind(is_kept);
        // A removed member before the last remaining one goes with the comma after it.
        for index in (0..kept.unwrap_or(0)).filter(|index| !is_kept(index)) {
            out.replace(members[index].start..members[index + 1].start, Vec::new());
        }
        // After the last remaining member, new members replace the whole rest.
        let inner = self.object.span.start + 1;
        let start = match (kept, members.first()) {
            (Some(index), _) => members[index].value.end,
            (None, Some(first)) => first.start,
            (None, None) => inner,
        };
        let end = members.last().map_or(inner, |last| last.value.end);
        if kept.is_none() && !self.added.is_empty() {
            self.added.remove(0);
        }
        if start != end || !self.added.is_empty() {
            out.replace(start..end, self.added);
        }
    }
}

/// A key and its value, written to follow another member.
pub(super) fn member(key: &str, written: &[u8]) -> Vec<u8> {
    [b",", write(&Value::from(key)).as_slice(), b":", written].concat()
}

/// A JSON string of the text, in one allocation unless much of it is escaped.
pub(super) fn write_text(text: &str) -> Vec<u8> {
    let mut written = Vec::with_capacity(text.len() + text.len() / 16 + 2);
    // Writing to memory does not fail.
    drop(serde_json::to_writer(&mut written, text));
    written
}

/// JSON without white space.
pub(super) fn write(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::document;

    fn edited(body: &str, remove: &[&str], set: &[(&str, &str)]) -> String {
        let object = document(body.as_bytes()).unwrap();
        let (mut edit, mut out) = (ObjectEdit::new(body.as_bytes(), &object), Splices::default());
        for key in remove {
            edit.remove(key);
        }
        for (key, value) in set {
            edit.set(key, value.as_bytes().to_vec(), &mut out);
        }
        edit.finish(&mut out);
        String::from_utf8(out.apply(body.as_bytes())).unwrap()
    }

    #[test]
    fn removes_members_with_their_commas() {
        for (body, remove, set, wanted) in [
            ("{}", &["a"][..], &[][..], "{}"),
            ("{}", &[], &[("a", "1"), ("b", "2")], r#"{"a":1,"b":2}"#),
            (r#"{ "a" : 1 , "b" : 2 , "c" : 3 }"#, &["a"], &[], r#"{ "b" : 2 , "c" : 3 }"#),
            (r#"{ "a" : 1 , "b" : 2 , "c" : 3 }"#, &["b"], &[], r#"{ "a" : 1 , "c" : 3 }"#),
            (r#"{ "a" : 1 , "b" : 2 , "c" : 3 }"#, &["c"], &[], r#"{ "a" : 1 , "b" : 2 }"#),
            (r#"{ "a" : 1 , "b" : 2 , "c" : 3 }"#, &["b", "c"], &[("d", "4")], r#"{ "a" : 1,"d":4 }"#),
            (r#"{ "a" : 1 , "b" : 2 , "c" : 3 }"#, &["a", "b"], &[("d", "4")], r#"{ "c" : 3,"d":4 }"#),
            (r#"{ "a" : 1 , "b" : 2 }"#, &["a", "b"], &[], "{  }"),
            (r#"{ "a" : 1 , "b" : 2 }"#, &["a", "b"], &[("c", "3")], r#"{ "c":3 }"#),
            (r#"{"a":1,"b":2,"a":3}"#, &["a"], &[], r#"{"b":2}"#),
            (r#"{"a":1,"b":2,"a":3}"#, &[], &[("a", "4")], r#"{"a":1,"b":2,"a":4}"#),
            (r#"{"a":1}"#, &[], &[("a", "1")], r#"{"a":1}"#),
            (r#"{"a\n":1}"#, &["a\n"], &[("b\"", "2")], r#"{"b\"":2}"#),
        ] {
            assert_eq!(edited(body, remove, set), wanted, "{body} -{remove:?} +{set:?}");
        }
    }
}
