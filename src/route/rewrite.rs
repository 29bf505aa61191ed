//! Edits the JSON of a request: applies a route's edits to the body and keeps every other byte.
//!
//! In order of precedence: the served name, `overrides`, the client's value, `metadata_overrides`,
//! `defaults`. `remove` removes the client's values and the defaults. Of equal keys the last
//! one counts, as for Python: it is the one that is edited, and all of them are removed.
//!
//! The same body gives the same bytes at every attempt. A body other than a JSON object is forwarded
//! unchanged: the upstream's error explains it. A body too large for its edit is rejected: the memory of an
//! edit is known in advance, and bounded.
//!
//! Never: a tree of the body, a change to a member without a rule.

mod history;
mod removed;
mod rules;

use serde_json::{Map, Value, json};

use self::history::{MAX_CHANGES, MessageEdits};
use self::removed::RemovedFields;
use self::rules::{MemberRules, patch};
use super::dialect::BodyDialect;
use super::splice::{Splices, write};
use crate::config::types::{BodyEdits, RouteConfig};
pub use crate::json::is_wide;
use crate::json::{self, JsonMember, JsonObject, JsonResult, MAX_KEY_BYTES, MAX_MEMBERS, ReadFault};
use crate::prompt::multipart::FormScanner;
use crate::reject::Reject;

/// The longest text in a request's `metadata` that is read as fields, in bytes.
pub const MAX_METADATA_BYTES: usize = 16 << 10;

/// The memory for one byte of such texts as a tree and as rules.
const METADATA_FACTOR: usize = 512;

/// The memory for one member of an object, and for one change; the list of them is copied as it grows.
const MEMBER_BYTES: usize = 3 * size_of::<JsonMember<'_>>() + 192;
const CHANGE_BYTES: usize = 256;

/// The memory for one byte of messages while tags are searched and reasoning is written.
const TAGS_FACTOR: usize = 10;

/// The shortest member, and the shortest message that is changed, in bytes.
const MIN_MEMBER_BYTES: usize = 5;
const MIN_MESSAGE_BYTES: usize = 12;

/// The changes of a route to bodies of one dialect.
#[derive(Debug)]
pub struct BodyRewrite {
    dialect: BodyDialect,
    rules: MemberRules,
    /// The configured edits, to be merged with the defaults in the `metadata` of requests.
    written: Option<BodyEdits>,
    history: MessageEdits,
    token_ids: bool,
    to: Option<String>,
    /// Whether there are edits other than the model's name.
    changes_more: bool,
    leaves_usage: bool,
}

/// The result of rewriting a body.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RewrittenBody {
    /// The edited body; `None`: the body is forwarded unchanged.
    pub body: Option<Vec<u8>>,
    pub added_fields: AddedAnswerFields,
}

/// The fields of the answer that the route requested and the client did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AddedAnswerFields {
    pub logprobs: bool,
    pub token_ids: bool,
}

impl BodyRewrite {
    pub fn new(route: &RouteConfig, dialect: BodyDialect) -> Self {
        let is_chat = dialect == BodyDialect::Chat;
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
        let field = if dialect == BodyDialect::Responses { "input" } else { "messages" };
        // Also by a path into it.
        let is_removed = |field: &str| body.remove.iter().any(|path| path.split('.').next() == Some(field));
        let is_taken = |field: &str| body.overrides.contains_key(field) || is_removed(field);
        let changes = (think_tags || !body.roles.is_empty()) && !is_taken(field);
        let talks = dialect != BodyDialect::Completions && changes;
        let fields = !defaults.is_empty() || route.metadata_overrides || !body.remove.is_empty();
        let written = |role: &String| write(&Value::from(role.as_str()));
        BodyRewrite {
            dialect,
            rules: MemberRules::new(&defaults, &body.overrides, &RemovedFields::parse(&body.remove)),
            history: MessageEdits {
                field: changes.then_some(field),
                roles: body.roles.iter().map(|(from, to)| (from.clone(), written(to))).collect(),
                think_tags,
            },
            token_ids: route.token_ids && is_chat,
            to: route.to.clone(),
            changes_more: overridden || talks || fields,
            leaves_usage: !is_taken("stream_options") && !defaults.contains_key("stream_options"),
            written: route.metadata_overrides.then_some(body),
        }
    }

    /// Whether a body for this model may be changed, so that it must be held until it is whole.
    pub fn may_change(&self, model: Option<&str>) -> bool {
        self.changes_more || self.renames(model)
    }

    /// Whether the upstreams serve this model by another name. In a form only this name is changed.
    pub fn renames(&self, model: Option<&str>) -> bool {
        self.to.is_some() && self.to.as_deref() != model
    }

    /// Edits a form, the body of audio requests: replaces the model's name, or appends it if the form has
    /// none.
    /// `None`: the form is forwarded unchanged.
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

    /// The most memory that the edit of a body of `body_len` bytes takes beside the body: the new body, and
    /// the work space for it.
    pub fn memory_needed(&self, body_len: usize) -> u64 {
        let depth = 3 + self.rules.depth() + usize::from(self.written.is_some());
        let members = (body_len / MIN_MEMBER_BYTES + 1).min(depth * MAX_MEMBERS);
        // Unescaping may turn one byte into three, in a buffer of twice the size.
        let keys = 6 * body_len.min(members * MAX_KEY_BYTES);
        let messages = (body_len / MIN_MESSAGE_BYTES + 1).min(MAX_CHANGES);
        let messages = if self.history.field.is_some() { messages } else { 0 };
        let items = if self.rules.reads_items() { body_len / MIN_MEMBER_BYTES + 1 } else { 0 };
        let items = items.min(MAX_CHANGES + MAX_MEMBERS);
        let longest_role = self.history.roles.iter().map(|(_, to)| to.len()).max().unwrap_or_default();
        let tags = if self.history.think_tags { TAGS_FACTOR * body_len } else { 0 };
        let metadata = body_len.min(2 * MAX_METADATA_BYTES) * METADATA_FACTOR;
        let metadata = if self.written.is_some() { metadata } else { 0 };
        let to = self.to.as_ref().map_or(0, |to| 4 * to.len() + 128);
        let out = body_len + 4 * self.rules.bytes() + messages * longest_role + to;
        let all = out + members * MEMBER_BYTES + keys + (messages + items) * CHANGE_BYTES + tags + metadata;
        all as u64
    }

    /// Edits a body. `Err`: it is too large to be edited.
    pub fn edit(&self, body: &[u8]) -> Result<RewrittenBody, Reject> {
        self.edit_known(body, &|_| None)
    }

    /// As `edit`, for a body whose values' ends may be known by their begins.
    pub fn edit_known(
        &self,
        body: &[u8],
        end_of: &dyn Fn(usize) -> Option<usize>,
    ) -> Result<RewrittenBody, Reject> {
        match self.edit_read(body, end_of) {
            Err(ReadFault::Syntax) => Ok(RewrittenBody::default()),
            Err(fault) => Err(too_large(fault, "route")),
            Ok(edited) => edited,
        }
    }

    fn edit_read(
        &self,
        body: &[u8],
        end_of: &dyn Fn(usize) -> Option<usize>,
    ) -> JsonResult<Result<RewrittenBody, Reject>> {
        let (object, history) = self.history.read(body, end_of)?;
        let added_fields = AddedAnswerFields {
            logprobs: self.token_ids && !object.is(body, "logprobs", "true"),
            token_ids: self.token_ids && !object.is(body, "return_token_ids", "true"),
        };
        let own = match self.rules_of_request(body, &object)? {
            Ok(own) => own,
            Err(reject) => return Ok(Err(reject)),
        };
        let said = |key: &str| self.dialect.same_as(key).any(|name| object.get(name).is_some());
        let mut out = history;
        own.as_ref().unwrap_or(&self.rules).apply(body, &object, &said, &mut out)?;
        let body = (!out.is_empty()).then(|| out.apply(body));
        Ok(Ok(RewrittenBody { body, added_fields }))
    }

    /// The rules of a request with defaults in its `metadata`, which take precedence over those of the route.
    fn rules_of_request(
        &self,
        body: &[u8],
        object: &JsonObject<'_>,
    ) -> JsonResult<Result<Option<MemberRules>, Reject>> {
        let metadata = self.written.as_ref().zip(object.get("metadata"));
        let Some((written, span)) = metadata else { return Ok(Ok(None)) };
        let metadata = match json::read_object(body, span.start) {
            Ok(metadata) => metadata,
            Err(ReadFault::Syntax) => return Ok(Ok(None)),
            Err(fault) => return Err(fault),
        };
        let mut all = Value::Object(written.defaults.clone());
        for key in ["extra_body", "chat_template_kwargs"] {
            if metadata.get(key).is_some_and(|span| span.len() > MAX_METADATA_BYTES) {
                return Ok(Err(large_metadata(key)));
            }
            let given = metadata.text(body, key);
            let Some(given) = given.and_then(|text| serde_json::from_str::<Map<_, _>>(&text).ok()) else {
                continue;
            };
            let given = Value::Object(given);
            let given = if key == "extra_body" { given } else { json!({ key: given }) };
            patch(&mut all, &given);
        }
        let Value::Object(mut all) = all else { return Ok(Ok(None)) };
        // Fields that the route overrides or removes cannot be set through `metadata`.
        all.retain(|key, _| key != "model" && !written.remove.contains(key));
        let defaults = self.dialect.defaults(&all);
        let removed = RemovedFields::parse(&written.remove);
        Ok(Ok(Some(MemberRules::new(&defaults, &written.overrides, &removed))))
    }

    /// Whether an edit reads more than the top-level members of a body.
    pub fn reads_all(&self) -> bool {
        self.history.field.is_some() || self.written.is_some() || self.rules.reads_items()
    }

    /// Whether the usage of a stream may be requested: the route has no edits of `stream_options`.
    pub fn leaves_usage(&self) -> bool {
        self.leaves_usage
    }
}

/// The reject of a body that is too large to be edited; `rule` names the rule that requires the edit.
pub(super) fn too_large(fault: ReadFault, rule: &str) -> Reject {
    let why = match fault {
        ReadFault::ManyMembers => format!("an object in it has more than {MAX_MEMBERS} members"),
        ReadFault::LongKey => format!("an object in it has a key of more than {MAX_KEY_BYTES} bytes"),
        ReadFault::ManyChanges => format!("more than {MAX_CHANGES} places in its lists are to be edited"),
        ReadFault::Syntax => "it cannot be followed".into(),
    };
    Reject::Field {
        param: "body".into(),
        message: format!("The body cannot be edited as its {rule} says: {why}."),
    }
}

fn large_metadata(key: &str) -> Reject {
    let message = format!("The text is longer than the limit of {MAX_METADATA_BYTES} bytes.");
    Reject::Field { param: format!("metadata.{key}"), message }
}

#[cfg(test)]
mod tests;
