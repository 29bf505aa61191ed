//! Edits the JSON of a request: what a route says is put into the body, every other byte stays.
//!
//! In the order in which one thing goes before another: the served name, `overrides`, what the client said,
//! `metadata_overrides`, `defaults`. `remove` takes out what client and defaults say. Of equal keys the last
//! one counts, as for Python: it is the one that is edited, and all of them are removed.
//!
//! The same body gives the same bytes at every attempt. A body that is no JSON object goes on as it is: the
//! upstream refuses it in its own words.
//!
//! Never: a tree of the body, a change to what no rule names.

mod history;
mod rules;

use serde_json::{Map, Value, json};

use self::rules::{Rules, patch};
use super::dialect::Dialect;
use super::json::Object;
pub use super::json::is_wide;
use super::splice::{Splices, write};
use crate::config::types::{BodyEdits, RouteConfig};
use crate::prompt::multipart::FormScanner;

/// What a route changes in bodies of one language.
#[derive(Debug)]
pub struct Edits {
    dialect: Dialect,
    rules: Rules,
    /// As it was written, to be put together with the defaults that requests have in their `metadata`.
    written: Option<BodyEdits>,
    /// The field in which messages are changed, if they are.
    history: Option<&'static str>,
    /// From and to, the latter as it stands in a body.
    roles: Vec<(String, Vec<u8>)>,
    think_tags: bool,
    token_ids: bool,
    to: Option<String>,
    /// There is more to change than a name.
    more: bool,
    leaves_usage: bool,
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
        let mut body = route.body.clone();
        if route.token_ids && is_chat {
            body.overrides.insert("logprobs".into(), json!(true));
            body.overrides.insert("return_token_ids".into(), json!(true));
        }
        if let Some(to) = &route.to {
            body.overrides.insert("model".into(), json!(to));
        }
        let overridden = body.overrides.len() > usize::from(route.to.is_some());
        let (overrides, gone) = dialect.overrides(&body.overrides);
        body.overrides = overrides;
        body.remove.extend(gone);
        let defaults = dialect.defaults(&body.defaults);
        let think_tags = route.think_tags && is_chat;
        let field = if dialect == Dialect::Responses { "input" } else { "messages" };
        let is_removed = |field: &str| body.remove.iter().any(|key| key == field);
        let is_taken = |field: &str| body.overrides.contains_key(field) || is_removed(field);
        let changes = (think_tags || !body.roles.is_empty()) && !is_taken(field);
        let talks = dialect != Dialect::Completions && changes;
        let fields = !defaults.is_empty() || route.metadata_overrides || !body.remove.is_empty();
        let written = |role: &String| write(&Value::from(role.as_str()));
        Edits {
            dialect,
            rules: Rules::new(&defaults, &body.overrides, &body.remove),
            history: changes.then_some(field),
            roles: body.roles.iter().map(|(from, to)| (from.clone(), written(to))).collect(),
            think_tags,
            token_ids: route.token_ids && is_chat,
            to: route.to.clone(),
            more: overridden || talks || fields,
            leaves_usage: !is_taken("stream_options") && !defaults.contains_key("stream_options"),
            written: route.metadata_overrides.then_some(body),
        }
    }

    /// Whether a body for this model may have to be changed, so that it is held until it is whole.
    pub fn may_change(&self, model: Option<&str>) -> bool {
        self.more || self.renames(model)
    }

    /// Whether the upstreams know this model by another name. Of a form nothing else is changed.
    pub fn renames(&self, model: Option<&str>) -> bool {
        self.to.is_some() && self.to.as_deref() != model
    }

    /// A form, as audio comes in, with the served name in it, behind all else where it names no model.
    /// `None`: it goes on as it is.
    pub fn edit_form(&self, content_type: &str, body: &[u8]) -> Option<Vec<u8>> {
        let to = self.to.as_ref()?.as_bytes();
        let mut scanner = FormScanner::new(content_type)?;
        scanner.scan(body);
        let end = scanner.end()?;
        let mut out = Splices::default();
        match scanner.model_span() {
            Some(span) if &body[span.clone()] == to => return None,
            Some(span) => out.replace(span, to.to_vec()),
            None => {
                let head = b"\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n";
                let part = [&body[end.clone()], head, to, b"\r\n"].concat();
                out.replace(end.start..end.start, part);
            }
        }
        Some(out.apply(body))
    }

    /// The body as it is sent.
    pub fn edit(&self, body: &[u8]) -> Edited {
        self.edit_known(body, &|_| None)
    }

    /// As `edit`, of a body of which somebody may know where the value that begins at a byte ends.
    pub fn edit_known(&self, body: &[u8], end_of: &dyn Fn(usize) -> Option<usize>) -> Edited {
        let Some((object, history)) = self.read(body, end_of) else { return Edited::default() };
        let asked = Asked {
            logprobs: self.token_ids && !object.is(body, "logprobs", "true"),
            token_ids: self.token_ids && !object.is(body, "return_token_ids", "true"),
        };
        let own = self.rules_of_request(body, &object);
        let said = |key: &str| self.dialect.same_as(key).any(|name| object.get(name).is_some());
        let mut out = history;
        own.as_ref().unwrap_or(&self.rules).apply(body, &object, &said, &mut out);
        let body = (!out.is_empty()).then(|| out.apply(body));
        Edited { body, asked }
    }

    /// The rules of a request that has defaults in its `metadata`, which go before those of the route.
    fn rules_of_request(&self, body: &[u8], object: &Object<'_>) -> Option<Rules> {
        let written = self.written.as_ref()?;
        let metadata = object.object(body, "metadata")?;
        let given = |key: &str| {
            let text = metadata.text(body, key)?;
            serde_json::from_str::<Map<String, Value>>(&text).ok()
        };
        let mut all = Value::Object(written.defaults.clone());
        if let Some(extra) = given("extra_body") {
            patch(&mut all, &Value::Object(extra));
        }
        if let Some(kwargs) = given("chat_template_kwargs") {
            patch(&mut all, &json!({ "chat_template_kwargs": kwargs }));
        }
        let Value::Object(mut all) = all else { return None };
        // What the route keeps in its own hand, a client does not get by another way.
        all.retain(|key, _| key != "model" && !written.remove.contains(key));
        Some(Rules::new(&self.dialect.defaults(&all), &written.overrides, &written.remove))
    }

    /// Whether a stream may be asked for its usage, which is not done against what the route says of it.
    pub fn leaves_usage(&self) -> bool {
        self.leaves_usage
    }
}

#[cfg(test)]
mod tests;
