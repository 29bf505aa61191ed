//! Edits the JSON of a request: what a route says is put into the body, every other byte stays.
//!
//! In the order in which one thing goes before another: the served name, `overrides`, what the client said,
//! `metadata_overrides`, `defaults`. `remove` takes a field out whoever said it. Of equal keys the last one
//! counts, as for Python: it is the one that is edited, and all of them are removed.
//!
//! The same body gives the same bytes at every attempt. A body that is no JSON object goes on as it is: the
//! upstream refuses it in its own words.
//!
//! Never: a tree of the body, a change to what no rule names.

mod history;

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::dialect::Dialect;
use super::json::Object;
pub use super::json::is_wide;
use super::splice::{ObjectEdit, Splices, write};
use crate::config::types::RouteConfig;
use crate::prompt::multipart::FormScanner;
use crate::prompt::scan::Progress;

/// What a route changes in bodies of one language.
#[derive(Debug)]
pub struct Edits {
    dialect: Dialect,
    defaults: Map<String, Value>,
    /// As they were written, to be put together with those of `metadata`.
    written: Option<Map<String, Value>>,
    overrides: Map<String, Value>,
    remove: Vec<String>,
    roles: Vec<(String, String)>,
    think_tags: bool,
    token_ids: bool,
    to: Option<String>,
}

/// What became of a body.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Edited {
    /// `None`: it goes on as it is.
    pub body: Option<Vec<u8>>,
    pub asked: Asked,
}

/// What is in the answer only because we asked for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub logprobs: bool,
    pub token_ids: bool,
}

impl Edits {
    pub fn new(route: &RouteConfig, dialect: Dialect) -> Self {
        let is_chat = dialect == Dialect::Chat;
        let mut overrides = route.body.overrides.clone();
        if route.token_ids && is_chat {
            overrides.insert("logprobs".into(), json!(true));
            overrides.insert("return_token_ids".into(), json!(true));
        }
        if let Some(to) = &route.to {
            overrides.insert("model".into(), json!(to));
        }
        Edits {
            dialect,
            defaults: dialect.defaults(&route.body.defaults),
            written: route.metadata_overrides.then(|| route.body.defaults.clone()),
            overrides,
            remove: route.body.remove.clone(),
            roles: route.body.roles.clone(),
            think_tags: route.think_tags && is_chat,
            token_ids: route.token_ids && is_chat,
            to: route.to.clone(),
        }
    }

    /// Whether a body for this model may have to be changed, so that it is held until it is whole.
    pub fn may_change(&self, model: Option<&str>) -> bool {
        let renamed = self.renames(model);
        let overridden = self.overrides.len() > usize::from(self.to.is_some());
        let talks = self.dialect != Dialect::Completions && (self.think_tags || !self.roles.is_empty());
        let fields = !self.defaults.is_empty() || self.written.is_some() || !self.remove.is_empty();
        renamed || overridden || talks || fields
    }

    /// Whether the upstreams know this model by another name. Of a form nothing else is changed.
    pub fn renames(&self, model: Option<&str>) -> bool {
        self.to.is_some() && self.to.as_deref() != model
    }

    /// A form, as audio comes in, with the served name in it. `None`: it goes on as it is, and so does one
    /// that names no model.
    pub fn edit_form(&self, content_type: &str, body: &[u8]) -> Option<Vec<u8>> {
        let to = self.to.as_ref()?;
        let mut scanner = FormScanner::new(content_type)?;
        scanner.scan(body);
        let whole = scanner.facts(body).state == Progress::Complete;
        let span = scanner.model_span().filter(|span| whole && &body[span.clone()] != to.as_bytes())?;
        let mut out = Splices::default();
        out.replace(span, to.clone().into_bytes());
        Some(out.apply(body))
    }

    /// The body as it is sent.
    pub fn edit(&self, body: &[u8]) -> Edited {
        self.edit_known(body, &|_| None)
    }

    /// As `edit`, of a body of which somebody may know where the value that begins at a byte ends.
    pub fn edit_known(&self, body: &[u8], end_of: &dyn Fn(usize) -> Option<usize>) -> Edited {
        let Some((object, messages)) = self.read(body, end_of) else { return Edited::default() };
        let mut out = Splices::default();
        let asked = Asked {
            logprobs: self.token_ids && !object.is(body, "logprobs", "true"),
            token_ids: self.token_ids && !object.is(body, "return_token_ids", "true"),
        };
        let defaults = self.defaults_for(body, &object);
        let mut edit = ObjectEdit::new(body, &object);
        for key in &self.remove {
            edit.remove(key);
        }
        let said = |key: &str| self.dialect.same_as(key).any(|name| object.get(name).is_some());
        merge(body, &mut edit, (&defaults, &self.overrides), &said, &mut out);
        self.history(body, &messages, &mut out);
        edit.finish(&mut out);
        let body = (!out.is_empty()).then(|| out.apply(body));
        Edited { body, asked }
    }

    /// The defaults of the route, with those that the request has in its `metadata` before them.
    fn defaults_for(&self, body: &[u8], object: &Object<'_>) -> Cow<'_, Map<String, Value>> {
        let Some(written) = &self.written else { return Cow::Borrowed(&self.defaults) };
        let Some(metadata) = object.object(body, "metadata") else { return Cow::Borrowed(&self.defaults) };
        let given = |key: &str| {
            let text = metadata.text(body, key)?;
            serde_json::from_str::<Map<String, Value>>(&text).ok()
        };
        let mut all = Value::Object(written.clone());
        if let Some(extra) = given("extra_body") {
            patch(&mut all, &Value::Object(extra));
        }
        if let Some(kwargs) = given("chat_template_kwargs") {
            patch(&mut all, &json!({ "chat_template_kwargs": kwargs }));
        }
        let Value::Object(mut all) = all else { return Cow::Borrowed(&self.defaults) };
        // What the route keeps in its own hand, a client does not get by another way.
        all.retain(|key, _| key != "model" && !self.remove.contains(key));
        Cow::Owned(self.dialect.defaults(&all))
    }

    /// Whether a stream may be asked for its usage, which is not done against what the route says of it.
    pub fn leaves_usage(&self) -> bool {
        const FIELD: &str = "stream_options";
        let removed = self.remove.iter().any(|gone| gone == FIELD);
        !removed && !self.defaults.contains_key(FIELD) && !self.overrides.contains_key(FIELD)
    }
}

/// Merges defaults (below what is there) and overrides (above it) into an object. `said`: the default of
/// this key is in the object under another name.
fn merge(
    bytes: &[u8],
    edit: &mut ObjectEdit<'_, '_>,
    (defaults, overrides): (&Map<String, Value>, &Map<String, Value>),
    said: &dyn Fn(&str) -> bool,
    out: &mut Splices,
) {
    let nothing = Map::new();
    let inner = |value: &Value, key: &str| match value {
        Value::Object(_) => edit.object.object(bytes, key),
        _ => None,
    };
    let mut deeper = |object: Object<'_>, below: &Map<String, Value>, above: &Map<String, Value>| {
        let mut edit = ObjectEdit::new(bytes, &object);
        merge(bytes, &mut edit, (below, above), &|_| false, out);
        edit.finish(out);
    };
    let mut set: Vec<(&str, Vec<u8>)> = Vec::new();
    let mut removed = Vec::new();
    for (key, above) in overrides {
        let default = defaults.get(key).filter(|_| !said(key));
        match (above, inner(above, key)) {
            (Value::Null, _) => removed.push(key),
            (Value::Object(above), Some(object)) => {
                deeper(object, default.and_then(Value::as_object).unwrap_or(&nothing), above);
            }
            (above, _) => {
                let absent = edit.object.get(key).is_none();
                let mut value = default.filter(|_| absent).cloned().unwrap_or(Value::Null);
                patch(&mut value, above);
                set.push((key, write(&value)));
            }
        }
    }
    for (key, default) in defaults.iter().filter(|(key, _)| !overrides.contains_key(*key)) {
        match (default, inner(default, key)) {
            (Value::Object(below), Some(object)) => deeper(object, below, &nothing),
            _ if edit.object.get(key).is_some() || said(key) => {}
            (default, _) => set.push((key, write(default))),
        }
    }
    for (key, written) in set {
        edit.set(key, written, out);
    }
    for key in removed {
        edit.remove(key);
    }
}

/// A merge patch as RFC 7396 has it.
fn patch(target: &mut Value, with: &Value) {
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

#[cfg(test)]
mod tests;
