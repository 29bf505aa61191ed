//! What a trainer reads of an answer: its token ids, log-probabilities and experts, wherever the engine has
//! them, and those of earlier answers that come back with a request.

use serde_json::{Map, Value, json};

use crate::route::token_ids::{MissingTokens, SeenTokens};

/// What trainers keep of an earlier answer: the engine that made it can go on from exactly these tokens.
const TOKEN_FIELDS: [&str; 4] =
    ["prompt_token_ids", "generation_token_ids", "generation_log_probs", "routed_experts"];

/// What a trainer reads of an answer, as it comes: token ids, log-probabilities and each token's experts.
#[derive(Debug, Default)]
pub(super) struct AnswerTokens {
    prompt: Value,
    ids: Option<Vec<Value>>,
    logprobs: Option<Vec<Value>>,
    experts: Value,
}

/// The tokens that an item of a history says it was made of, which are taken out of it.
pub(super) fn take_tokens(item: &mut Map<String, Value>) -> Option<Map<String, Value>> {
    let fields = TOKEN_FIELDS.iter().filter_map(|key| item.shift_remove_entry(*key));
    let tokens: Map<String, Value> = fields.filter(|(_, value)| !value.is_null()).collect();
    let has_prompt =
        tokens.get("prompt_token_ids").and_then(Value::as_array).is_some_and(|ids| !ids.is_empty());
    has_prompt.then_some(tokens)
}

// === impl Tokens ===

impl AnswerTokens {
    /// Takes what an answer, or one chunk of it, says of its tokens. Engines of trainers have all of it on
    /// the message; vLLM has it beside the message.
    pub(super) fn collect(&mut self, chat: &mut Value, choice: &mut Value) {
        let place = if choice["message"].is_object() { "message" } else { "delta" };
        // A delta need not be an object: an upstream may send anything.
        let mut on_message = |key: &str| choice[place].get_mut(key).map(Value::take).unwrap_or_default();
        let (prompt, ids) = (on_message("prompt_token_ids"), on_message("generation_token_ids"));
        let (logprobs, experts) = (on_message("generation_log_probs"), on_message("routed_experts"));
        if let prompt @ Value::Array(_) = first_present(prompt, &mut chat["prompt_token_ids"]) {
            self.prompt = prompt;
        }
        if let Value::Array(ids) = first_present(ids, &mut choice["token_ids"]) {
            self.ids.get_or_insert_default().extend(ids);
        }
        if let Value::Array(numbers) = logprobs {
            self.logprobs.get_or_insert_default().extend(numbers);
        } else if let Some(logprobs) = choice["logprobs"]["content"].as_array() {
            let numbers = logprobs.iter().map(|token| token["logprob"].clone());
            self.logprobs.get_or_insert_default().extend(numbers);
        }
        match (&mut self.experts, first_present(experts, &mut choice["routed_experts"])) {
            (_, Value::Null) => {}
            // A stream may have them piece by piece, as it has the tokens.
            (Value::Array(all), Value::Array(more)) => all.extend(more),
            (all, experts) => *all = experts,
        }
    }

    /// What the answer, or the stream so far, lacks. `has_text`: its message is made of tokens.
    pub(super) fn missing(&self, has_text: bool) -> Option<MissingTokens> {
        let has_ids = self.ids.as_ref().is_some_and(|ids| !ids.is_empty());
        let seen = SeenTokens {
            prompt: self.prompt.is_array(),
            ids: self.ids.is_some(),
            logprobs: self.logprobs.is_some(),
        };
        if has_ids || has_text { seen.missing() } else { None }
    }

    /// Puts all of it on an item, as NeMo Gym's clients read it there: if there is any, with a list for each.
    pub(super) fn put_on(self, item: &mut Value) {
        if !self.prompt.is_array() && self.ids.is_none() {
            return;
        }
        item["prompt_token_ids"] = if self.prompt.is_array() { self.prompt } else { json!([]) };
        item["generation_token_ids"] = self.ids.unwrap_or_default().into();
        item["generation_log_probs"] = self.logprobs.unwrap_or_default().into();
        if !self.experts.is_null() {
            item["routed_experts"] = self.experts;
        }
    }
}

/// The first of two values that is there.
fn first_present(on_message: Value, beside: &mut Value) -> Value {
    if on_message.is_null() { beside.take() } else { on_message }
}
