//! The languages that requests for the same thing are written in, and which field belongs to which.
//!
//! A route has one set of defaults for all of them. What two languages have under two names is translated,
//! what a language does not have is left out; names that stand in no table are everybody's.

use serde_json::{Map, Value, json};

use super::paths::Api;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Chat,
    Completions,
    Responses,
    Messages,
    /// JSON that asks for no generation, or in a way of its own.
    Other,
}

/// All of them, in the order of [`Dialect::index`].
pub const ALL: [Dialect; 5] =
    [Dialect::Chat, Dialect::Completions, Dialect::Responses, Dialect::Messages, Dialect::Other];

/// The names that the limit of an answer's length has.
const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

/// Fields that not every language has, and the letters of those that do: chat, completions (`t`ext),
/// responses, messages.
const FIELDS: &[(&str, &str)] = &[
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

impl Dialect {
    pub fn of(api: Api) -> Self {
        match api {
            Api::Chat | Api::ChatBatch => Dialect::Chat,
            Api::Completions => Dialect::Completions,
            Api::Responses => Dialect::Responses,
            Api::Messages | Api::MessagesRender => Dialect::Messages,
            _ => Dialect::Other,
        }
    }

    pub fn index(self) -> usize {
        self as usize
    }

    fn letter(self) -> Option<char> {
        match self {
            Dialect::Chat => Some('c'),
            Dialect::Completions => Some('t'),
            Dialect::Responses => Some('r'),
            Dialect::Messages => Some('m'),
            Dialect::Other => None,
        }
    }

    fn has(self, field: &str) -> bool {
        let Some((_, letters)) = FIELDS.iter().find(|(name, _)| *name == field) else { return true };
        self.letter().is_some_and(|letter| letters.contains(letter))
    }

    /// Other names by which a request of this language may have said what `field` says.
    pub fn same_as(self, field: &str) -> impl Iterator<Item = &'static str> {
        let is_limit = LIMITS.contains(&field);
        LIMITS.into_iter().filter(move |name| is_limit && *name != field && self.has(name))
    }

    /// Defaults as this language says them. A default that is null says nothing and is not sent: for vLLM
    /// `truncation: null` is another word for auto.
    pub fn defaults(self, written: &Map<String, Value>) -> Map<String, Value> {
        let mut said = Map::new();
        for (field, value) in written.iter().filter(|(_, value)| !value.is_null()) {
            if self.has(field) {
                said.insert(field.clone(), value.clone());
            }
        }
        for (field, value) in written.iter().filter(|(field, value)| !value.is_null() && !self.has(field)) {
            let Some((name, value)) = self.translate(field, value) else { continue };
            // What is written in the language itself goes before what is translated into it.
            match said.get_mut(name) {
                None => drop(said.insert(name.into(), value)),
                Some(own) => fill(own, value),
            }
        }
        said
    }

    fn translate(self, field: &str, value: &Value) -> Option<(&'static str, Value)> {
        let limit = match self {
            Dialect::Chat => Some("max_completion_tokens"),
            Dialect::Completions | Dialect::Messages => Some("max_tokens"),
            Dialect::Responses => Some("max_output_tokens"),
            Dialect::Other => None,
        };
        match (field, self) {
            (field, _) if LIMITS.contains(&field) => Some((limit?, value.clone())),
            ("reasoning_effort", Dialect::Responses) => Some(("reasoning", json!({"effort": value}))),
            ("reasoning", Dialect::Chat) => Some(("reasoning_effort", value.get("effort")?.clone())),
            _ => None,
        }
    }
}

/// Adds the keys of an object that another lacks.
fn fill(own: &mut Value, more: Value) {
    if let (Value::Object(own), Value::Object(more)) = (own, more) {
        for (key, value) in more {
            own.entry(key).or_insert(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_language_gets_its_own_words() {
        let table = [
            (
                json!({"max_tokens": 9}),
                [r#"{"max_tokens":9}"#; 2],
                r#"{"max_output_tokens":9}"#,
                r#"{"max_tokens":9}"#,
            ),
            (
                json!({"max_output_tokens": 9}),
                [r#"{"max_completion_tokens":9}"#, r#"{"max_tokens":9}"#],
                r#"{"max_output_tokens":9}"#,
                r#"{"max_tokens":9}"#,
            ),
            (
                json!({"max_completion_tokens": 9, "max_output_tokens": 8}),
                [r#"{"max_completion_tokens":9}"#, r#"{"max_tokens":9}"#],
                r#"{"max_output_tokens":8}"#,
                r#"{"max_tokens":9}"#,
            ),
            (
                json!({"reasoning_effort": "low"}),
                [r#"{"reasoning_effort":"low"}"#, "{}"],
                r#"{"reasoning":{"effort":"low"}}"#,
                "{}",
            ),
            (
                json!({"reasoning": {"effort": "low", "summary": "auto"}}),
                [r#"{"reasoning_effort":"low"}"#, "{}"],
                r#"{"reasoning":{"effort":"low","summary":"auto"}}"#,
                "{}",
            ),
            (
                json!({"reasoning": {"summary": "auto"}, "reasoning_effort": "low"}),
                [r#"{"reasoning_effort":"low"}"#, "{}"],
                r#"{"reasoning":{"summary":"auto","effort":"low"}}"#,
                "{}",
            ),
            (json!({"truncation": null, "top_k": null}), ["{}"; 2], "{}", "{}"),
            (json!({"truncation": "disabled"}), ["{}"; 2], r#"{"truncation":"disabled"}"#, "{}"),
            (json!({"n": 2, "stop": "x"}), [r#"{"n":2,"stop":"x"}"#; 2], r#"{"stop":"x"}"#, "{}"),
            (
                json!({"chat_template_kwargs": {"a": null}, "of_a_plugin": 1}),
                [r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#; 2],
                r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#,
                r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#,
            ),
        ];
        for (written, [chat, completions], responses, messages) in table {
            let said =
                |dialect: Dialect| Value::Object(dialect.defaults(written.as_object().unwrap())).to_string();
            let all = [said(ALL[0]), said(ALL[1]), said(ALL[2]), said(ALL[3])];
            assert_eq!(all, [chat, completions, responses, messages], "{written}");
        }
        let other = Dialect::Other.defaults(json!({"temperature": 1, "x": 2}).as_object().unwrap());
        assert_eq!(Value::Object(other), json!({"x": 2}));
    }

    #[test]
    fn a_limit_is_one_field_with_many_names() {
        let same = |dialect: Dialect, field| dialect.same_as(field).collect::<Vec<_>>();
        assert_eq!(same(Dialect::Chat, "max_tokens"), ["max_completion_tokens"]);
        assert_eq!(same(Dialect::Responses, "max_output_tokens"), Vec::<&str>::new());
        assert_eq!(same(Dialect::Chat, "seed"), Vec::<&str>::new());
        for (index, dialect) in ALL.into_iter().enumerate() {
            assert_eq!(dialect.index(), index);
        }
    }
}
