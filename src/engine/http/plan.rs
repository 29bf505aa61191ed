//! Plans the answer of a simulated engine in full before the first token, from the prompt alone.
//!
//! The same request to two engines gets the same text, independent of their load, so that an answer through
//! a balancer can be compared with a direct one. Lengths are predictable too: with `max_tokens` the answer
//! has that many tokens (finish `length`), without it `DEFAULT_TOKENS` (finish `stop`). Tool calls and JSON
//! end when they are complete.
//!
//! Plans do not depend on time, load, sampling seeds or random numbers.

use serde_json::{Map, Value, json};

use super::token;
use crate::engine::batch::Finish;
use crate::engine::dice::Dice;

/// The number of tokens of an answer without a requested length.
pub(super) const DEFAULT_TOKENS: usize = 16;

/// The largest depth of an example value; a schema may refer to itself, and deeper values are left out.
const MAX_SCHEMA_DEPTH: usize = 8;

/// The fields of a request that shape the answer.
#[derive(Debug, Clone, Default)]
pub(super) struct SamplingOptions {
    pub max_tokens: Option<usize>,
    pub stop: Vec<String>,
    /// The tool to call, and the schema of its arguments.
    pub call: Option<(String, Value)>,
    /// The schema of the text.
    pub schema: Option<Value>,
    pub reasoning: bool,
    /// An answer that ends by itself has an end-of-turn token.
    pub end_token: bool,
    /// A word is two tokens.
    pub split_words: bool,
}

/// The part of an answer that a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AnswerPart {
    Reasoning,
    Text,
    Arguments,
}

/// One token of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AnswerToken {
    pub part: AnswerPart,
    pub id: u32,
    /// Shorter than the token where a stop string cuts it.
    pub text: String,
}

/// The tokens of an answer, planned before its first step.
#[derive(Debug, Clone)]
pub(super) struct PlannedAnswer {
    pub pieces: Vec<AnswerToken>,
    pub finish: Finish,
    /// The stop string that ended the answer.
    pub stop_reason: Option<String>,
    /// The name of the called tool.
    pub tool: Option<String>,
}

/// The source of the words.
struct WordSource(Dice);

// === impl PlannedAnswer ===

impl PlannedAnswer {
    /// Plans the answer to the prompt with the hash `seed`.
    pub(super) fn new(sampling: &SamplingOptions, seed: u64) -> Self {
        let mut words = WordSource(Dice::new(seed));
        let structured = sampling.call.as_ref().map(|(_, schema)| schema).or(sampling.schema.as_ref());
        let length = sampling.max_tokens.unwrap_or(DEFAULT_TOKENS).max(1);
        let mut pieces = Vec::new();
        if sampling.reasoning {
            let thoughts = words.text((length / 2).clamp(1, 8));
            pieces.extend(cut(&thoughts, AnswerPart::Reasoning));
        }
        let mut finish = Finish::Stop;
        match structured {
            Some(schema) => {
                let part = if sampling.call.is_some() { AnswerPart::Arguments } else { AnswerPart::Text };
                let value = example(schema, schema, &mut words, MAX_SCHEMA_DEPTH).unwrap_or(json!({}));
                pieces.extend(cut(&value.to_string(), part));
            }
            None => {
                let text = words.text(length.saturating_sub(pieces.len()));
                let words = cut(&text, AnswerPart::Text);
                pieces.extend(if sampling.split_words { halves(words) } else { words });
                if sampling.max_tokens.is_some() {
                    finish = Finish::Length;
                } else if sampling.end_token {
                    pieces.push(AnswerToken {
                        part: AnswerPart::Text,
                        id: token::END_MARKER,
                        text: String::new(),
                    });
                }
            }
        }
        if let Some(limit) = sampling.max_tokens
            && pieces.len() > limit
        {
            pieces.truncate(limit.max(1));
            finish = Finish::Length;
        }
        let tool = sampling.call.as_ref().map(|(name, _)| name.clone());
        let mut answer = Self { pieces, finish, stop_reason: None, tool };
        answer.stop_at(&sampling.stop);
        answer
    }

    /// Returns the text of the first `tokens` tokens that belong to `part`.
    pub(super) fn text(&self, part: AnswerPart, tokens: usize) -> String {
        let reported = self.pieces.iter().take(tokens);
        reported.filter(|piece| piece.part == part).map(|piece| piece.text.as_str()).collect()
    }

    pub(super) fn ids(&self, tokens: usize) -> Vec<u32> {
        self.pieces.iter().take(tokens).map(|piece| piece.id).collect()
    }

    /// Ends the answer before the first occurrence of one of `stops` in its text.
    fn stop_at(&mut self, stops: &[String]) {
        let mut text = String::new();
        for at in 0..self.pieces.len() {
            if self.pieces[at].part != AnswerPart::Text {
                continue;
            }
            text.push_str(&self.pieces[at].text);
            let found = stops.iter().filter(|stop| !stop.is_empty());
            let found = found.filter_map(|stop| Some((text.find(stop.as_str())?, stop))).min();
            let Some((keep, stop)) = found else { continue };
            self.stop_reason = Some(stop.clone());
            self.finish = Finish::Stop;
            self.pieces.truncate(at + 1);
            let mut left = keep;
            for piece in self.pieces.iter_mut().filter(|piece| piece.part == AnswerPart::Text) {
                piece.text.truncate(left);
                left -= piece.text.len();
            }
            return;
        }
    }
}

fn cut(text: &str, part: AnswerPart) -> Vec<AnswerToken> {
    let ids = token::encode(text);
    ids.into_iter().map(|id| AnswerToken { part, id, text: token::decode(&[id]) }).collect()
}

/// Splits each word into two tokens.
fn halves(words: Vec<AnswerToken>) -> Vec<AnswerToken> {
    let each = words.into_iter().flat_map(|word| {
        let (first, second) = word.text.split_at(word.text.len() / 2);
        [cut(first, word.part), cut(second, word.part)].concat()
    });
    each.collect()
}

// === impl WordSource ===

impl WordSource {
    /// Returns a word of two or three letters, so that it is exactly one token with its space.
    fn word(&mut self) -> String {
        const CONSONANTS: &[u8] = b"bcdfghjklmnprstvwz";
        const VOWELS: &[u8] = b"aeiou";
        let mut pick = |letters: &[u8]| char::from(letters[(self.0.roll() % letters.len() as u64) as usize]);
        let mut word = String::from_iter([pick(CONSONANTS), pick(VOWELS)]);
        if self.0.roll() & 1 == 1 {
            word.push(char::from(CONSONANTS[(self.0.roll() % CONSONANTS.len() as u64) as usize]));
        }
        word
    }

    fn text(&mut self, words: usize) -> String {
        let words: Vec<String> = (0..words).map(|_| self.word()).collect();
        words.join(" ")
    }
}

/// Returns a value that fits a simple schema: the required members, with small values of the right type.
fn example(schema: &Value, root: &Value, words: &mut WordSource, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    if let Some(name) = schema["$ref"].as_str() {
        return example(root.pointer(name.strip_prefix('#')?)?, root, words, depth);
    }
    for fixed in ["const", "default"] {
        if let Some(value) = schema.get(fixed) {
            return Some(value.clone());
        }
    }
    for choices in ["enum", "examples"] {
        if let Some(value) = schema[choices].as_array().and_then(|values| values.first()) {
            return Some(value.clone());
        }
    }
    for variants in ["anyOf", "oneOf", "allOf"] {
        if let Some(variant) = schema[variants].as_array().and_then(|variants| variants.first()) {
            return example(variant, root, words, depth);
        }
    }
    let kind = match &schema["type"] {
        Value::String(kind) => kind.as_str(),
        Value::Array(kinds) => kinds.first().and_then(Value::as_str).unwrap_or("object"),
        _ if schema.get("properties").is_some() => "object",
        _ => "string",
    };
    Some(match kind {
        "null" => Value::Null,
        "boolean" => Value::Bool(words.0.roll() & 1 == 1),
        "integer" => json!(schema["minimum"].as_i64().unwrap_or(1)),
        "number" => json!(schema["minimum"].as_f64().unwrap_or(1.5)),
        "array" => {
            let least = schema["minItems"].as_u64().unwrap_or(0).min(16);
            (0..least).filter_map(|_| example(&schema["items"], root, words, depth)).collect()
        }
        "object" => Value::Object(example_object(schema, root, words, depth)),
        _ => Value::String(words.word()),
    })
}

fn example_object(schema: &Value, root: &Value, words: &mut WordSource, depth: usize) -> Map<String, Value> {
    let mut object = Map::new();
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required {
        if let Some(value) = example(&schema["properties"][name], root, words, depth) {
            object.insert(name.to_owned(), value);
        }
    }
    object
}

#[cfg(test)]
mod tests;
