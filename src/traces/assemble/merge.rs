//! Objects that come in pieces: strings are appended to, other values are replaced.

use serde_json::value::RawValue;

use super::wire::{RawMembers, is_null, string};
use crate::traces::json::push_string;

/// The most members that one object collects; more of them are passed over.
const MAX_MEMBERS: usize = 64;

/// What a member takes beside its text, for the bound of memory.
const MEMBER_BYTES: usize = 64;

/// An object that grows, its members in the order of their first piece.
#[derive(Clone, Debug, Default)]
pub(super) struct MergedObject {
    members: Vec<(Box<str>, MergedMember)>,
}

#[derive(Clone, Debug)]
enum MergedMember {
    /// A string's text, without quotes and escapes.
    Text(String),
    /// Any other value, as it stands.
    Json(String),
}

/// A list that comes in pieces, or one value of another form.
#[derive(Clone, Debug, Default)]
pub(super) struct MergedList {
    /// What stands between the brackets, or the value.
    text: String,
    is_list: bool,
}

// === impl MergedObject ===

impl MergedObject {
    /// Appends a string to the member, or puts another value in its place; a null changes nothing.
    /// Returns how much more memory is held.
    pub(super) fn merge(&mut self, key: &str, value: &RawValue) -> usize {
        match string(value) {
            Some(text) => self.append(key, &text),
            None => self.set(key, value),
        }
    }

    /// Appends to the text of the member; a value of another form is replaced.
    pub(super) fn append(&mut self, key: &str, text: &str) -> usize {
        let mut held = text.len();
        match self.member(key, &mut held) {
            Some(MergedMember::Text(before)) => before.push_str(text),
            Some(member) => *member = MergedMember::Text(text.to_owned()),
            None => {}
        }
        held
    }

    /// Puts the value in the place of the member's; a null changes nothing.
    pub(super) fn set(&mut self, key: &str, value: &RawValue) -> usize {
        if is_null(value) {
            return 0;
        }
        let mut held = value.get().len();
        if let Some(member) = self.member(key, &mut held) {
            *member = match string(value) {
                Some(text) => MergedMember::Text(text.into_owned()),
                None => MergedMember::Json(value.get().to_owned()),
            };
        }
        held
    }

    /// As [`MergedObject::set`] with each member of the object.
    pub(super) fn set_all(&mut self, object: &RawMembers<'_>) -> usize {
        object.0.iter().map(|(key, value)| self.set(key, value)).sum()
    }

    /// Puts a string before all members.
    pub(super) fn put_first(&mut self, key: &str, text: &str) {
        self.members.retain(|(name, _)| &**name != key);
        self.members.insert(0, (key.into(), MergedMember::Text(text.to_owned())));
    }

    /// Puts a JSON text in the place of the member's value.
    pub(super) fn set_json(&mut self, key: &str, json: String) {
        match self.members.iter_mut().find(|(name, _)| &**name == key) {
            Some((_, member)) => *member = MergedMember::Json(json),
            None => self.members.push((key.into(), MergedMember::Json(json))),
        }
    }

    /// The text of a member that is a string.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.members.iter().find(|(name, _)| &**name == key).and_then(|(_, member)| match member {
            MergedMember::Text(text) => Some(text.as_str()),
            MergedMember::Json(_) => None,
        })
    }

    /// The JSON of a member that is no string.
    pub(super) fn json(&self, key: &str) -> Option<&str> {
        self.members.iter().find(|(name, _)| &**name == key).and_then(|(_, member)| match member {
            MergedMember::Text(_) => None,
            MergedMember::Json(json) => Some(json.as_str()),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The members between the braces; `None`: there are none.
    pub(super) fn into_members(self) -> Option<String> {
        let mut members = String::new();
        self.write_members(&mut members);
        (!members.is_empty()).then_some(members)
    }

    /// Drops the members that are empty strings, but for those named.
    pub(super) fn drop_empty(&mut self, but: &[&str]) {
        self.members.retain(|(key, member)| {
            but.contains(&&**key) || !matches!(member, MergedMember::Text(text) if text.is_empty())
        });
    }

    /// Writes the members without the brackets around them.
    pub(super) fn write_members(&self, out: &mut String) {
        for (at, (key, member)) in self.members.iter().enumerate() {
            if at > 0 {
                out.push(',');
            }
            push_string(out, key);
            out.push(':');
            match member {
                MergedMember::Text(text) => push_string(out, text),
                MergedMember::Json(json) => out.push_str(json),
            }
        }
    }

    /// Writes the object as JSON.
    pub(super) fn write(&self, out: &mut String) {
        out.push('{');
        self.write_members(out);
        out.push('}');
    }

    /// The object as JSON.
    pub(super) fn to_json(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    /// The member of this name, which is made when it is missing.
    fn member(&mut self, key: &str, held: &mut usize) -> Option<&mut MergedMember> {
        let found = self.members.iter().position(|(name, _)| &**name == key);
        if found.is_none() {
            if self.members.len() == MAX_MEMBERS {
                *held = 0;
                return None;
            }
            self.members.push((key.into(), MergedMember::Text(String::new())));
            *held += key.len() + MEMBER_BYTES;
        }
        let at = found.unwrap_or(self.members.len() - 1);
        self.members.get_mut(at).map(|(_, member)| member)
    }
}

// === impl MergedList ===

impl MergedList {
    /// Appends a list's items; another value takes the place of what there is. A null changes nothing.
    pub(super) fn merge(&mut self, value: &RawValue) -> usize {
        if is_null(value) {
            return 0;
        }
        let inner = value.get().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        match inner {
            Some(items) if self.is_list => {
                if !self.text.is_empty() && !items.trim_ascii().is_empty() {
                    self.text.push(',');
                }
                self.text.push_str(items.trim_ascii());
            }
            Some(items) => *self = MergedList { text: items.trim_ascii().to_owned(), is_list: true },
            None => *self = MergedList { text: value.get().to_owned(), is_list: false },
        }
        value.get().len()
    }

    /// The value as JSON; `None`: none came.
    pub(super) fn into_json(self) -> Option<String> {
        match (self.is_list, self.text.is_empty()) {
            (true, _) => Some(format!("[{}]", self.text)),
            (false, true) => None,
            (false, false) => Some(self.text),
        }
    }
}
