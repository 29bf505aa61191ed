//! Requests the log-probability of each token, and the token ids, in a body that does not decide on them.
//!
//! A field is added only if its key is absent: an explicit `false` or `null` stays. Nothing is added where it
//! would change more of vLLM's answer than the fields that [`AnswerCleanup`](super::AnswerCleanup) restores:
//!
//! - With `top_logprobs`, `logprobs` makes valid what vLLM refuses. With `top_logprobs: null`, some versions
//!   fail. `logprob_token_ids` needs `logprobs` too, and decides what it holds.
//! - With `use_beam_search`, no token is sampled, and `logprobs` is not sure to be accepted.
//! - A completion with `echo` has the log-probabilities of its prompt computed if `logprobs` is set, without
//!   the prefix cache, and loses the text of its prompt if `return_token_ids` is set.
//!
//! Responses are not asked: vLLM has no `return_token_ids` for them, and its log-probabilities would stand in
//! every event and again in the last. Messages have neither field.
//!
//! For a completion, `logprobs: 0` is the log-probability of each token, without alternatives.

use crate::json::{self, JsonObject};
use crate::prompt::scan::Scanner;
use crate::route::dialect::BodyDialect;
use crate::route::rewrite::AddedAnswerFields;

/// What is added to a body, and what is therefore in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CaptureQuestion {
    /// Where the text is inserted: in front of the brace that closes the body. Behind it there is white space
    /// at most, so that the place is as far from the end in a body to which other fields were added.
    pub at: usize,
    /// Members, each with the comma before it.
    pub text: &'static [u8],
    /// The fields that the answer has because of it.
    pub added_fields: AddedAnswerFields,
}

impl CaptureQuestion {
    /// The body that asks.
    pub fn apply(&self, body: &[u8]) -> Vec<u8> {
        [&body[..self.at], self.text, &body[self.at..]].concat()
    }
}

/// What is added to a body of this dialect. `None`: nothing, or the body cannot be followed.
///
/// `scanner` may have read the body; what it has found is not walked again.
pub fn capture_question(
    body: &[u8],
    scanner: Option<&Scanner>,
    dialect: BodyDialect,
) -> Option<CaptureQuestion> {
    if !matches!(dialect, BodyDialect::Chat | BodyDialect::Completions) {
        return None;
    }
    let end_of = |at| scanner.and_then(|scanner| scanner.end_of(at)).or_else(|| json::value_end(body, at));
    let object = json::document_with(body, |_, at| end_of(at).ok_or(json::ReadFault::Syntax)).ok()?;
    let added_fields = fields_to_add(body, &object, dialect);
    let text: &'static [u8] = match (added_fields.logprobs, added_fields.token_ids, dialect) {
        (true, true, BodyDialect::Completions) => br#","logprobs":0,"return_token_ids":true"#,
        (true, true, _) => br#","logprobs":true,"return_token_ids":true"#,
        (true, false, BodyDialect::Completions) => br#","logprobs":0"#,
        (true, false, _) => br#","logprobs":true"#,
        (false, true, _) => br#","return_token_ids":true"#,
        (false, false, _) => return None,
    };
    // Without a member before it, the text would have a comma too many; vLLM refuses such a body anyway.
    (!object.members.is_empty()).then_some(CaptureQuestion { at: object.span.end - 1, text, added_fields })
}

fn fields_to_add(body: &[u8], object: &JsonObject<'_>, dialect: BodyDialect) -> AddedAnswerFields {
    let is_absent = |key| object.get(key).is_none();
    let is_off = |key| object.get(key).is_none_or(|span| matches!(&body[span], b"false" | b"null"));
    if dialect == BodyDialect::Completions && !is_off("echo") {
        return AddedAnswerFields::default();
    }
    let has_no_alternatives = is_absent("top_logprobs") || object.is(body, "top_logprobs", "0");
    AddedAnswerFields {
        logprobs: is_absent("logprobs")
            && has_no_alternatives
            && is_off("logprob_token_ids")
            && is_off("use_beam_search"),
        token_ids: is_absent("return_token_ids"),
    }
}
