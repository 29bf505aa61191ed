//! The dialects of requests for generation, and the fields of each dialect.
//!
//! A route has one set of defaults, and one of overrides, for all dialects. A field with different names in
//! two dialects is translated. A default that a dialect lacks is omitted; names outside of the table are
//! common to all dialects.

use serde_json::{Map, Value, json};

use super::api_paths::Api;

/// The form of a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyDialect {
    Chat,
    Completions,
    Responses,
    Messages,
    /// JSON of other interfaces: no generation, or a format of its own.
    Other,
}

/// All dialects, in the order of [`BodyDialect::index`].
pub const ALL_DIALECTS: [BodyDialect; 5] = [
    BodyDialect::Chat,
    BodyDialect::Completions,
    BodyDialect::Responses,
    BodyDialect::Messages,
    BodyDialect::Other,
];

/// The names of the limit of an answer's length.
const TOKEN_LIMIT_FIELDS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// Fields that not every dialect has, with the letters of the dialects that do: chat, completions (`t`ext),
/// responses, messages.
const DIALECT_FIELDS: &[(&str, &str)] = &[
    ("temperature", "ctrm"),
    ("top_p", "ctrm"),
    ("top_k", "ctrm"),
    ("max_tokens", "ctm"),
    ("max_completion_tokens", "c"),
    ("max_output_tokens", "r"),
    ("stop", "ctr"),
    ("seed", "ctr"),
    ("logit_bias", "ctr"),
    ("frequency_penalty", "ctr"),
    ("presence_penalty", "ctr"),
    ("repetition_penalty", "ctr"),
    ("structured_outputs", "ctr"),
    ("ignore_eos", "ctr"),
    ("skip_special_tokens", "ctr"),
    ("include_stop_str_in_output", "ctr"),
    ("n", "ct"),
    ("min_p", "ct"),
    ("min_tokens", "ct"),
    ("stop_token_ids", "ct"),
    ("bad_words", "ct"),
    ("allowed_token_ids", "ct"),
    ("logprobs", "ct"),
    ("prompt_logprobs", "ct"),
    ("response_format", "ct"),
    ("stream_options", "ct"),
    ("use_beam_search", "ct"),
    ("length_penalty", "ct"),
    ("truncate_prompt_tokens", "ct"),
    ("best_of", "t"),
    ("suffix", "t"),
    ("echo", "ct"),
    ("top_logprobs", "cr"),
    ("parallel_tool_calls", "cr"),
    ("tool_choice", "crm"),
    ("tools", "crm"),
    ("reasoning_effort", "c"),
    ("include_reasoning", "c"),
    ("thinking_token_budget", "c"),
    ("reasoning", "r"),
    ("background", "r"),
    ("include", "r"),
    ("instructions", "r"),
    ("max_tool_calls", "r"),
    ("store", "cr"),
    ("text", "r"),
    ("truncation", "r"),
    ("stop_sequences", "m"),
    ("system", "m"),
    ("thinking", "m"),
    ("output_config", "m"),
];

impl BodyDialect {
    /// The dialect of an API's requests.
    pub fn of(api: Api) -> Self {
        match api {
            Api::Chat | Api::ChatBatch => BodyDialect::Chat,
            Api::Completions => BodyDialect::Completions,
            Api::Responses => BodyDialect::Responses,
            Api::Messages | Api::MessagesRender => BodyDialect::Messages,
            _ => BodyDialect::Other,
        }
    }

    pub fn index(self) -> usize {
        self as usize
    }

    fn letter(self) -> Option<char> {
        match self {
            BodyDialect::Chat => Some('c'),
            BodyDialect::Completions => Some('t'),
            BodyDialect::Responses => Some('r'),
            BodyDialect::Messages => Some('m'),
            BodyDialect::Other => None,
        }
    }

    fn has(self, field: &str) -> bool {
        let Some((_, letters)) = DIALECT_FIELDS.iter().find(|(name, _)| *name == field) else { return true };
        self.letter().is_some_and(|letter| letters.contains(letter))
    }

    /// Other names of `field` in requests of this dialect.
    pub fn same_as(self, field: &str) -> impl Iterator<Item = &'static str> {
        let is_limit = TOKEN_LIMIT_FIELDS.contains(&field);
        TOKEN_LIMIT_FIELDS.into_iter().filter(move |name| is_limit && *name != field && self.has(name))
    }

    /// Defaults in this dialect. A default that is null is not sent: for vLLM `truncation: null` means auto.
    pub fn defaults(self, written: &Map<String, Value>) -> Map<String, Value> {
        let mut said = Map::new();
        for (field, value) in written.iter().filter(|(_, value)| !value.is_null()) {
            if self.has(field) {
                said.insert(field.clone(), value.clone());
            }
        }
        for (field, value) in written.iter().filter(|(field, value)| !value.is_null() && !self.has(field)) {
            let Some((name, value)) = self.translate(field, value) else { continue };
            // A field in the dialect itself takes precedence over one that is translated into it.
            match said.get_mut(name) {
                None => drop(said.insert(name.into(), value)),
                Some(own) => fill(own, value),
            }
        }
        said
    }

    /// Overrides in this dialect, and the other names of the same fields, which must be removed from the
    /// client's body. A field with a single name is overridden in every dialect.
    pub fn overrides(self, written: &Map<String, Value>) -> (Map<String, Value>, Vec<String>) {
        let (mut said, mut gone) = (written.clone(), Vec::new());
        let limits = TOKEN_LIMIT_FIELDS.iter().filter_map(|name| Some((*name, written.get(*name)?)));
        // For a body of several dialects, the name that most of them have fits best.
        let own_limit = self.limit().unwrap_or("max_tokens");
        // Of several names, the preferred one of the dialect.
        let limit = limits.min_by_key(|(name, _)| (own_limit != *name, !self.has(name)));
        if let Some((name, value)) = limit {
            let own = if self.has(name) { name } else { own_limit };
            said.retain(|key, _| !TOKEN_LIMIT_FIELDS.contains(&key.as_str()));
            said.insert(own.into(), value.clone());
            gone.extend(
                TOKEN_LIMIT_FIELDS.iter().filter(|other| **other != own).map(|other| (*other).to_owned()),
            );
        }
        let (own, other) = match self {
            BodyDialect::Chat => ("reasoning_effort", "reasoning"),
            BodyDialect::Responses => ("reasoning", "reasoning_effort"),
            BodyDialect::Completions | BodyDialect::Messages | BodyDialect::Other => return (said, gone),
        };
        if let Some((_, effort)) = written.get(other).and_then(|value| self.translate(other, value)) {
            said.shift_remove(other);
            match said.get_mut(own) {
                None => drop(said.insert(own.into(), effort)),
                Some(own) => fill(own, effort),
            }
        }
        let speaks_of_effort = said.get(own).is_some_and(|value| own != "reasoning" || has_effort(value));
        gone.extend((speaks_of_effort && !said.contains_key(other)).then(|| other.to_owned()));
        (said, gone)
    }

    /// The preferred name of the limit of an answer's length.
    fn limit(self) -> Option<&'static str> {
        match self {
            BodyDialect::Chat => Some("max_completion_tokens"),
            BodyDialect::Completions | BodyDialect::Messages => Some("max_tokens"),
            BodyDialect::Responses => Some("max_output_tokens"),
            BodyDialect::Other => None,
        }
    }

    fn translate(self, field: &str, value: &Value) -> Option<(&'static str, Value)> {
        match (field, self) {
            (field, _) if TOKEN_LIMIT_FIELDS.contains(&field) => Some((self.limit()?, value.clone())),
            ("reasoning_effort", BodyDialect::Responses) => Some(("reasoning", json!({"effort": value}))),
            ("reasoning", BodyDialect::Chat) if value.is_null() => Some(("reasoning_effort", Value::Null)),
            ("reasoning", BodyDialect::Chat) => Some(("reasoning_effort", value.get("effort")?.clone())),
            _ => None,
        }
    }
}

/// Whether an override of `reasoning` also overrides the effort.
fn has_effort(reasoning: &Value) -> bool {
    reasoning.as_object().is_none_or(|fields| fields.contains_key("effort"))
}

/// Adds the keys of `more` that `own` lacks.
fn fill(own: &mut Value, more: Value) {
    if let (Value::Object(own), Value::Object(more)) = (own, more) {
        for (key, value) in more {
            own.entry(key).or_insert(value);
        }
    }
}

#[cfg(test)]
mod tests;
