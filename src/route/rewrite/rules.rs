//! The rules of a route for the members of an object, prepared once: requests insert ready texts.
//!
//! Never: serialize a value while a request waits.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Map, Value};

use super::history::MAX_CHANGES;
use super::removed::RemovedFields;
use crate::json::{self, JsonObject, JsonResult, ReadFault, Span};
use crate::route::splice::{ObjectEdit, Splices, member, write};

/// The largest number of rules that are scanned for each member; above it a table is used.
const MAX_SCANNED_RULES: usize = 32;

/// The rules for the members of one object.
#[derive(Debug)]
pub(super) struct MemberRules {
    list: Vec<MemberRule>,
    removed: Vec<String>,
    /// Of all keys, where there are many.
    table: HashMap<String, MemberAction>,
}

/// The action on a member.
#[derive(Clone, Copy, Debug)]
enum MemberAction {
    Removed,
    /// By its place in the list.
    Rule(usize),
}

/// The rule for one key.
#[derive(Debug)]
struct MemberRule {
    key: String,
    /// The value that replaces the client's; `None`: the client's value stays.
    value: Option<Vec<u8>>,
    /// Key and value for an object without the key. `None`: nothing is added.
    member: Option<Vec<u8>>,
    /// The rules for merging, if both values are objects.
    inner: Option<MemberRules>,
    /// For each item of a list that the client sends.
    items: Option<Box<MemberRules>>,
}

// === impl MemberRules ===

impl MemberRules {
    /// `below`: defaults. `above`: overrides. `removed`: fields to remove, unless they are overridden.
    pub(super) fn new(
        below: &Map<String, Value>,
        above: &Map<String, Value>,
        fields: &RemovedFields,
    ) -> Self {
        let mut below = Cow::Borrowed(below);
        // A copy at each level of deep defaults would hold all of them at once.
        if !fields.inner.is_empty() {
            fields.strip_inside(below.to_mut());
        }
        let removed = &fields.names;
        let is_null = |key: &str| above.get(key).is_some_and(Value::is_null);
        let nulls = above.keys().filter(|key| is_null(key));
        let overrides = above.iter().filter(|(key, _)| !is_null(key));
        let overrides = overrides.map(|(key, above)| MemberRule::above(key, below.get(key), above, fields));
        let defaults = below.iter().filter(|(key, _)| !above.contains_key(*key) && !removed.contains(key));
        let defaults = defaults.map(|(key, below)| MemberRule::below(key, Some(below), fields));
        let mut list: Vec<MemberRule> = overrides.chain(defaults).collect();
        for key in fields.inner.iter().map(|inside| &inside.key) {
            let is_known = above.contains_key(key) || list.iter().any(|rule| rule.key == *key);
            if !is_known && !removed.contains(key) {
                list.push(MemberRule::below(key, None, fields));
            }
        }
        let removed = removed.iter().filter(|key| !above.contains_key(*key)).chain(nulls).cloned();
        let removed: Vec<String> = removed.collect();
        let mut table = HashMap::new();
        if list.len() + removed.len() > MAX_SCANNED_RULES {
            table.extend(removed.iter().map(|key| (key.clone(), MemberAction::Removed)));
            let rules = list.iter().enumerate();
            table.extend(rules.map(|(place, rule)| (rule.key.clone(), MemberAction::Rule(place))));
        }
        MemberRules { list, removed, table }
    }

    /// `said`: whether the object has the field of this key's default under another name.
    pub(super) fn apply<'t>(
        &'t self,
        bytes: &[u8],
        object: &JsonObject<'_>,
        said: &dyn Fn(&str) -> bool,
        out: &mut Splices<'t>,
    ) -> JsonResult<()> {
        let mut edit = ObjectEdit::new(bytes, object);
        // Of equal keys the last counts.
        let mut values: Vec<Option<&Span>> = vec![None; self.list.len()];
        for (index, member) in object.members.iter().enumerate() {
            match self.find(&member.key) {
                Some(MemberAction::Removed) => edit.remove_at(index),
                Some(MemberAction::Rule(place)) => values[place] = Some(&member.value),
                None => {}
            }
        }
        for (rule, value) in self.list.iter().zip(values) {
            rule.apply(bytes, value, &mut edit, said, out)?;
        }
        edit.finish(out);
        Ok(())
    }

    /// Applies the rules to each object of the list that begins at `start`. A list that cannot be parsed
    /// stays unchanged.
    fn apply_to_items<'t>(&'t self, bytes: &[u8], start: usize, out: &mut Splices<'t>) -> JsonResult<()> {
        let before = out.len();
        let end = json::each(bytes, start, |at| {
            let object = match json::read_object(bytes, at) {
                Ok(object) => object,
                Err(ReadFault::Syntax) => return json::read_value(bytes, at),
                Err(fault) => return Err(fault),
            };
            self.apply(bytes, &object, &|_| false, out)?;
            if out.len() > MAX_CHANGES { Err(ReadFault::ManyChanges) } else { Ok(object.span.end) }
        });
        match end {
            Ok(_) => Ok(()),
            Err(ReadFault::Syntax) => {
                out.truncate(before);
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }

    fn find(&self, key: &str) -> Option<MemberAction> {
        let looked_at = if self.table.is_empty() { self.list.len() + self.removed.len() } else { 1 };
        json::work::spend(looked_at);
        if !self.table.is_empty() {
            return self.table.get(key).copied();
        }
        if self.removed.iter().any(|removed| removed == key) {
            return Some(MemberAction::Removed);
        }
        self.list.iter().position(|rule| rule.key == key).map(MemberAction::Rule)
    }

    /// The bytes of all texts that may be inserted into a body.
    pub(super) fn bytes(&self) -> usize {
        let of_rule = |rule: &MemberRule| {
            let own = [&rule.value, &rule.member].into_iter().flatten().map(Vec::len).sum::<usize>();
            own + rule.inside().map(MemberRules::bytes).sum::<usize>()
        };
        self.list.iter().map(of_rule).sum()
    }

    /// The depth of nested objects that are read at once.
    pub(super) fn depth(&self) -> usize {
        let inner = self.list.iter().flat_map(MemberRule::inside);
        1 + inner.map(MemberRules::depth).max().unwrap_or_default()
    }

    /// Whether items of lists are read.
    pub(super) fn reads_items(&self) -> bool {
        let mut inner = self.list.iter().flat_map(MemberRule::inside);
        self.list.iter().any(|rule| rule.items.is_some()) || inner.any(MemberRules::reads_items)
    }
}

// === impl MemberRule ===

impl MemberRule {
    /// Creates the rule of a default. `None`: there is no default, and only inner fields are edited.
    fn below(key: &str, value: Option<&Value>, fields: &RemovedFields) -> Self {
        let (nothing, none) = (Map::new(), RemovedFields::default());
        let (removed, in_items) = (fields.inside(key, false), fields.inside(key, true));
        let default = value.and_then(Value::as_object);
        let inner = (default.is_some() || removed.is_some())
            .then(|| MemberRules::new(default.unwrap_or(&nothing), &nothing, removed.unwrap_or(&none)));
        let items = in_items.map(|fields| Box::new(MemberRules::new(&nothing, &nothing, fields)));
        let member = value.map(|value| member(key, &write(value)));
        MemberRule { key: key.to_owned(), value: None, member, inner, items }
    }

    /// The rules for inner members.
    fn inside(&self) -> impl Iterator<Item = &MemberRules> {
        self.inner.iter().chain(self.items.as_deref())
    }

    fn above(key: &str, below: Option<&Value>, value: &Value, fields: &RemovedFields) -> Self {
        let (nothing, none) = (Map::new(), RemovedFields::default());
        let default = below.and_then(Value::as_object).unwrap_or(&nothing);
        let removed = fields.inside(key, false).unwrap_or(&none);
        let inner = value.as_object().map(|value| MemberRules::new(default, value, removed));
        let patched = |mut target: Value| {
            patch(&mut target, value);
            write(&target)
        };
        let alone = patched(below.cloned().unwrap_or(Value::Null));
        MemberRule {
            key: key.to_owned(),
            value: Some(patched(Value::Null)),
            member: Some(member(key, &alone)),
            inner,
            items: None,
        }
    }

    /// Applies the rule. `value`: the value of the member that counts, if the object has one.
    fn apply<'t>(
        &'t self,
        bytes: &[u8],
        value: Option<&Span>,
        edit: &mut ObjectEdit<'_, '_>,
        said: &dyn Fn(&str) -> bool,
        out: &mut Splices<'t>,
    ) -> JsonResult<()> {
        let Some(span) = value else {
            let member = self.member.as_ref().filter(|_| self.value.is_some() || !said(&self.key));
            member.into_iter().for_each(|member| edit.add(member));
            return Ok(());
        };
        if let Some(rules) = self.items.as_ref().filter(|_| bytes[span.start] == b'[') {
            return rules.apply_to_items(bytes, span.start, out);
        }
        let object = match &self.inner {
            Some(rules) => match json::read_object(bytes, span.start) {
                Ok(object) => Some((rules, object)),
                Err(ReadFault::Syntax) => None,
                Err(fault) => return Err(fault),
            },
            None => None,
        };
        match (object, &self.value) {
            (Some((rules, object)), _) => rules.apply(bytes, &object, &|_| false, out)?,
            (None, Some(value)) if bytes[span.clone()] != **value => {
                out.replace(span.clone(), value.as_slice())
            }
            (None, _) => {}
        }
        Ok(())
    }
}

/// Applies a merge patch (RFC 7396).
pub(super) fn patch(target: &mut Value, with: &Value) {
    let Value::Object(with) = with else {
        *target = with.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in with {
        match value {
            Value::Null => drop(target.shift_remove(key)),
            value => patch(target.entry(key.as_str()).or_insert(Value::Null), value),
        }
    }
}
