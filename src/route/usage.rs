//! Requests the usage of a stream that its client did not request, and removes it from the answer again.
//!
//! A stream of chat or completions reports its usage only if `stream_options.include_usage` is set. It is
//! set in every body that requests a stream and does not mention usage; no other byte changes, and
//! the body is the same at every attempt. The stream then differs in two things from the one that the client
//! asked for, and [`UsageFilter`] undoes both:
//!
//! - a chunk without choices carries the usage, right before `[DONE]`: it is taken out;
//! - `system_fingerprint`, which otherwise stands on the chunk that ends the choice, stands on that one: the
//!   chunk that ends the choice is held until the next, which follows at once, and gets it back. A stream
//!   that breaks off between the two ends before them.
//!
//! The result equals the stream without the request, byte by byte. For that reason usage is not requested
//! for several choices (`n`, a list of prompts): each choice ends with a chunk of its own, long before the
//! others, and that chunk would have to wait for the fingerprint. vLLM changes nothing else in the stream; a
//! `"usage":null` in an engine's chunks carries no information, and stays. A refusal stays, too: where it
//! counts the fields of the body, it counts `stream_options`.
//!
//! Limitation: an engine that runs with `--enable-force-include-usage` sends the chunk to every client;
//! through a balancer only clients that request it receive it.
//!
//! Never: parse a body twice, delay a byte beyond the end of its line or the next event.

mod filter;

pub use filter::UsageFilter;

use super::dialect::BodyDialect;
use super::splice::{ObjectEdit, Splices};
use crate::json::{self, Span};
use crate::prompt::scan::{BodyField, ScanProgress, Scanner};

/// The options that are inserted into a body without any.
const INCLUDE_USAGE: &[u8] = br#"{"include_usage":true}"#;

/// The same behind another field, under its name.
const STREAM_OPTIONS_MEMBER: &[u8] = br#","stream_options":{"include_usage":true}"#;

/// The change of a body that requests its stream's usage.
#[derive(Debug, PartialEq, Eq)]
pub enum UsageRequest {
    /// By a field of its own, which is put in here.
    Insert { at: usize, text: &'static [u8] },
    /// By a changed field: the whole body.
    Body(Vec<u8>),
}

impl UsageRequest {
    /// The whole body with the request.
    pub fn apply(self, body: &[u8]) -> Vec<u8> {
        match self {
            UsageRequest::Insert { at, text } => [&body[..at], text, &body[at..]].concat(),
            UsageRequest::Body(body) => body,
        }
    }
}

/// The most memory of the request for a body of `body_len` bytes that has options: the new body, and the
/// parsed options.
pub fn memory_needed(body_len: usize) -> u64 {
    let members = (body_len / 5 + 1).min(json::MAX_MEMBERS);
    (body_len + members * 4 * size_of::<json::JsonMember<'_>>() + 4096 + STREAM_OPTIONS_MEMBER.len()) as u64
}

/// The change that requests the stream's usage; `None`: the answer has none, or the client decides itself.
///
/// `scanner` has read all of the body.
pub fn usage_request(body: &[u8], scanner: &Scanner, dialect: BodyDialect) -> Option<UsageRequest> {
    let tells = matches!(dialect, BodyDialect::Chat | BodyDialect::Completions);
    // Without `stream` the options would be refused.
    if !tells || scanner.progress() != ScanProgress::Complete || !scanner.facts(body).stream {
        return None;
    }
    if several(body, scanner) {
        return None;
    }
    let mut out = Splices::default();
    match scanner.span(BodyField::StreamOptions) {
        None => {
            let end = json::trim_end(body).len().checked_sub(1).filter(|end| body[*end] == b'}')?;
            return Some(UsageRequest::Insert { at: end, text: STREAM_OPTIONS_MEMBER });
        }
        Some(span) if &body[span.clone()] == b"null" => out.replace(span, INCLUDE_USAGE),
        Some(span) => {
            let options = json::object(body, span.start)?;
            // The client has chosen: its own setting stays.
            if ["include_usage", "continuous_usage_stats"].iter().any(|key| options.get(key).is_some()) {
                return None;
            }
            let mut edit = ObjectEdit::new(body, &options);
            edit.set("include_usage", &b"true"[..], &mut out);
            edit.finish(&mut out);
        }
    }
    Some(UsageRequest::Body(out.apply(body)))
}

/// Whether the answer may have more choices than one. Embeddings are prompts before the others.
fn several(body: &[u8], scanner: &Scanner) -> bool {
    let prompt = scanner.span(BodyField::Prompt);
    let one = scanner.span(BodyField::N).is_none_or(|span| matches!(&body[span], b"1" | b"null"));
    let embeds = scanner.span(BodyField::PromptEmbeds).is_some_and(|span| &body[span] != b"null");
    !one || embeds || prompt.is_some_and(|span| several_prompts(body, span))
}

/// A list of numbers is one prompt.
fn several_prompts(body: &[u8], span: Span) -> bool {
    if body.get(span.start) != Some(&b'[') {
        return false;
    }
    let first = json::skip_space(body, span.start + 1);
    if !matches!(body.get(first), Some(b'"' | b'[')) {
        return false;
    }
    let end = json::value_end(body, first).map(|end| json::skip_space(body, end));
    end.is_none_or(|end| body.get(end) != Some(&b']'))
}

#[cfg(test)]
mod tests;
