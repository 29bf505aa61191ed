//! What a route says of the members of an object, written down once: a request finds the texts ready that
//! are put into its body.
//!
//! Never: look at a request, write a value while one waits.

use serde_json::{Map, Value};

use crate::route::json::{self, Object};
use crate::route::splice::{ObjectEdit, Splices, member, write};

/// What becomes of the members of one object.
#[derive(Debug)]
pub struct Rules {
    list: Vec<Rule>,
    removed: Vec<String>,
}

/// What becomes of one key.
#[derive(Debug)]
struct Rule {
    key: String,
    /// Takes the place of what the client says; without it, that stays.
    value: Option<Vec<u8>>,
    /// Key and value, for an object that has no such key.
    member: Vec<u8>,
    /// Where both sides are objects, their members are put together.
    inner: Option<Rules>,
}

// === impl Rules ===

impl Rules {
    /// `below`: what is said where the client says nothing. `above`: what is said in any case. `removed`
    /// goes, unless it is said in any case.
    pub fn new(below: &Map<String, Value>, above: &Map<String, Value>, removed: &[String]) -> Self {
        let is_null = |key: &str| above.get(key).is_some_and(Value::is_null);
        let nulls = above.keys().filter(|key| is_null(key));
        let overrides = above.iter().filter(|(key, _)| !is_null(key));
        let overrides = overrides.map(|(key, above)| Rule::above(key, below.get(key), above));
        let defaults = below.iter().filter(|(key, _)| !above.contains_key(*key) && !removed.contains(key));
        let defaults = defaults.map(|(key, below)| Rule::below(key, below));
        Rules {
            list: overrides.chain(defaults).collect(),
            removed: removed.iter().filter(|key| !above.contains_key(*key)).chain(nulls).cloned().collect(),
        }
    }

    /// `said`: the object has under another name what this key would say by default.
    pub fn apply<'t>(
        &'t self,
        bytes: &[u8],
        object: &Object<'_>,
        said: &dyn Fn(&str) -> bool,
        out: &mut Splices<'t>,
    ) {
        let mut edit = ObjectEdit::new(bytes, object);
        for key in &self.removed {
            edit.remove(key);
        }
        for rule in &self.list {
            rule.apply(bytes, &mut edit, said, out);
        }
        edit.finish(out);
    }
}

// === impl Rule ===

impl Rule {
    fn below(key: &str, value: &Value) -> Self {
        let inner = value.as_object().map(|value| Rules::new(value, &Map::new(), &[]));
        Rule { key: key.to_owned(), value: None, member: member(key, &write(value)), inner }
    }

    fn above(key: &str, below: Option<&Value>, value: &Value) -> Self {
        let nothing = Map::new();
        let default = below.and_then(Value::as_object).unwrap_or(&nothing);
        let inner = value.as_object().map(|value| Rules::new(default, value, &[]));
        let patched = |mut target: Value| {
            patch(&mut target, value);
            write(&target)
        };
        let alone = patched(below.cloned().unwrap_or(Value::Null));
        Rule { key: key.to_owned(), value: Some(patched(Value::Null)), member: member(key, &alone), inner }
    }

    fn apply<'t>(
        &'t self,
        bytes: &[u8],
        edit: &mut ObjectEdit<'_, '_>,
        said: &dyn Fn(&str) -> bool,
        out: &mut Splices<'t>,
    ) {
        let Some(span) = edit.object.get(&self.key) else {
            if self.value.is_some() || !said(&self.key) {
                edit.add(&self.member);
            }
            return;
        };
        let inner = self.inner.as_ref().zip(json::object(bytes, span.start));
        match (inner, &self.value) {
            (Some((rules, object)), _) => rules.apply(bytes, &object, &|_| false, out),
            (None, Some(value)) if bytes[span.clone()] != **value => out.replace(span, value.as_slice()),
            (None, _) => {}
        }
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
