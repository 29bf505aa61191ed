//! The rules of a route for the members of an object, prepared once: requests insert ready texts.
//!
//! Never: serialize a value while a request waits.

use std::collections::HashMap;

use serde_json::{Map, Value};

use crate::route::json::{self, JsonObject, JsonResult, ReadFault, Span};
use crate::route::splice::{ObjectEdit, Splices, member, write};

/// The most rules that are scanned for each member; more are found by a table.
const MAX_SCANNED_RULES: usize = 32;

/// The rules for the members of one object.
#[derive(Debug)]
pub struct MemberRules {
    list: Vec<MemberRule>,
    removed: Vec<String>,
    /// Of all keys, where there are many.
    table: HashMap<String, MemberAction>,
}

/// What is done to a member.
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
    /// Takes the place of what the client says; without it, that stays.
    value: Option<Vec<u8>>,
    /// Key and value, for an object that has no such key.
    member: Vec<u8>,
    /// Where both sides are objects, their members are put together.
    inner: Option<MemberRules>,
}

// === impl Rules ===

impl MemberRules {
    /// `below`: what is said where the client says nothing. `above`: what is said in any case. `removed`
    /// goes, unless it is said in any case.
    pub fn new(below: &Map<String, Value>, above: &Map<String, Value>, removed: &[String]) -> Self {
        let is_null = |key: &str| above.get(key).is_some_and(Value::is_null);
        let nulls = above.keys().filter(|key| is_null(key));
        let overrides = above.iter().filter(|(key, _)| !is_null(key));
        let overrides = overrides.map(|(key, above)| MemberRule::above(key, below.get(key), above));
        let defaults = below.iter().filter(|(key, _)| !above.contains_key(*key) && !removed.contains(key));
        let defaults = defaults.map(|(key, below)| MemberRule::below(key, below));
        let list: Vec<MemberRule> = overrides.chain(defaults).collect();
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

    /// `said`: the object has under another name what this key would say by default.
    pub fn apply<'t>(
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

    fn find(&self, key: &str) -> Option<MemberAction> {
        let looked_at = if self.table.is_empty() { self.list.len() + self.removed.len() } else { 1 };
        json::work::count(looked_at);
        if !self.table.is_empty() {
            return self.table.get(key).copied();
        }
        if self.removed.iter().any(|removed| removed == key) {
            return Some(MemberAction::Removed);
        }
        self.list.iter().position(|rule| rule.key == key).map(MemberAction::Rule)
    }

    /// The bytes of all that may be put into a body.
    pub fn bytes(&self) -> usize {
        let of_rule = |rule: &MemberRule| {
            let value = rule.value.as_ref().map_or(0, Vec::len);
            rule.member.len() + value + rule.inner.as_ref().map_or(0, MemberRules::bytes)
        };
        self.list.iter().map(of_rule).sum()
    }

    /// How many objects, one in another, are read at once.
    pub fn depth(&self) -> usize {
        let inner = self.list.iter().filter_map(|rule| rule.inner.as_ref());
        1 + inner.map(MemberRules::depth).max().unwrap_or_default()
    }
}

// === impl Rule ===

impl MemberRule {
    fn below(key: &str, value: &Value) -> Self {
        let inner = value.as_object().map(|value| MemberRules::new(value, &Map::new(), &[]));
        MemberRule { key: key.to_owned(), value: None, member: member(key, &write(value)), inner }
    }

    fn above(key: &str, below: Option<&Value>, value: &Value) -> Self {
        let nothing = Map::new();
        let default = below.and_then(Value::as_object).unwrap_or(&nothing);
        let inner = value.as_object().map(|value| MemberRules::new(default, value, &[]));
        let patched = |mut target: Value| {
            patch(&mut target, value);
            write(&target)
        };
        let alone = patched(below.cloned().unwrap_or(Value::Null));
        MemberRule {
            key: key.to_owned(),
            value: Some(patched(Value::Null)),
            member: member(key, &alone),
            inner,
        }
    }

    /// `value`: of the member that counts, if the object has one.
    fn apply<'t>(
        &'t self,
        bytes: &[u8],
        value: Option<&Span>,
        edit: &mut ObjectEdit<'_, '_>,
        said: &dyn Fn(&str) -> bool,
        out: &mut Splices<'t>,
    ) -> JsonResult<()> {
        let Some(span) = value else {
            if self.value.is_some() || !said(&self.key) {
                edit.add(&self.member);
            }
            return Ok(());
        };
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

/// A merge patch as RFC 7396 has it.
pub fn patch(target: &mut Value, with: &Value) {
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
