//! The request's side of a record, and the record itself.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::answer::AssembledAnswer;
use super::document::{Cuts, cut_document};
use super::ids::parse_ids;
use super::wire::{is_within_limits, parse_object, readable, span_in, string};
use crate::traces::json::push_ids;
use crate::traces::record::{CallFacts, CutDocument, CutPart, DocumentGap, TraceApi, TraceRecord};

/// What a record takes from a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestParts {
    pub model: Option<String>,
    /// Each message or input item, as JSON.
    pub turns: Vec<Arc<str>>,
    /// The body without the lists that stand elsewhere; `None`: it is no JSON object, or
    /// one that some readers of JSON do not take.
    pub document: Option<CutDocument>,
    /// The prompt of a completion that is a list of token ids.
    pub prompt_token_ids: Vec<u32>,
}

/// The most messages that are taken apart: each takes an allocation of its own, so that a list of millions of
/// tiny ones would take a multiple of the body. A longer list stays in the document.
const MAX_TURNS: usize = 65_536;

/// A list of at most [`MAX_TURNS`] values; more of them are an error before they take memory.
struct TurnList<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for TurnList<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct TurnVisitor;
        impl<'de> Visitor<'de> for TurnVisitor {
            type Value = TurnList<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, "at most {MAX_TURNS} values")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut turns = Vec::new();
                while let Some(turn) = list.next_element()? {
                    if turns.len() == MAX_TURNS {
                        return Err(A::Error::invalid_length(MAX_TURNS + 1, &self));
                    }
                    turns.push(turn);
                }
                Ok(TurnList(turns))
            }
        }
        from.deserialize_seq(TurnVisitor)
    }
}

#[derive(serde::Deserialize)]
struct RecordedRequest<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
}

/// As [`RecordedRequest`], of a chat whose messages are a list: it is taken apart on the way.
#[derive(serde::Deserialize)]
struct ListedChat<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<TurnList<'a>>,
    #[serde(borrow, rename = "input")]
    _input: Option<&'a RawValue>,
    #[serde(borrow, rename = "prompt")]
    _prompt: Option<&'a RawValue>,
}

/// Reads a chat as most of them are; `None`: another one, or none.
fn read_chat(text: &str) -> Option<RequestParts> {
    let read = parse_object::<ListedChat<'_>>(text)?;
    let TurnList(list) = read.messages?;
    let span = list_span(text, &list)?;
    Some(RequestParts {
        model: read.model.and_then(string).map(Cow::into_owned),
        turns: list.into_iter().map(|turn| turn.get().into()).collect(),
        document: Some(cut_document(text, vec![(span, CutPart::Turns)])),
        prompt_token_ids: Vec::new(),
    })
}

/// Where in `text` the list of these values stands, its brackets included.
fn list_span(text: &str, list: &[&RawValue]) -> Option<Range<usize>> {
    let (first, last) = (span_in(text, list.first()?)?, span_in(text, list.last()?)?);
    let before = text[..first.start].trim_ascii_end();
    let behind = text[last.end..].trim_ascii_start();
    (before.ends_with('[') && behind.starts_with(']'))
        .then(|| before.len() - 1..text.len() - behind.len() + 1)
}

/// Reads a request's body as it went to the upstream.
pub fn read_request(api: TraceApi, body: &[u8]) -> RequestParts {
    let text = readable(body);
    let text = text.trim_ascii();
    let mut parts = RequestParts::default();
    if !is_within_limits(text) {
        return parts;
    }
    if matches!(api, TraceApi::Chat | TraceApi::Messages)
        && let Some(chat) = read_chat(text)
    {
        return chat;
    }
    let Some(read) = parse_object::<RecordedRequest<'_>>(text) else { return parts };
    let mut cuts = Cuts::new();
    parts.model = read.model.and_then(string).map(Cow::into_owned);
    let turns = match api {
        TraceApi::Chat | TraceApi::Messages => read.messages,
        TraceApi::Responses => read.input,
        TraceApi::Completions => None,
    };
    if let Some(turns) = turns {
        match (serde_json::from_str::<TurnList<'_>>(turns.get()), span_in(text, turns)) {
            (Ok(TurnList(list)), Some(span)) => {
                parts.turns = list.into_iter().map(|turn| turn.get().into()).collect();
                cuts.push((span, CutPart::Turns));
            }
            _ if api == TraceApi::Responses && !turns.get().starts_with('[') => {
                parts.turns.push(format!("{{\"role\":\"user\",\"content\":{}}}", turns.get()).into());
            }
            _ => {}
        }
    }
    if api == TraceApi::Completions
        && let Some(prompt) = read.prompt
        && let (Some(ids), Some(span)) = (parse_ids(prompt), span_in(text, prompt))
    {
        parts.prompt_token_ids = ids;
        cuts.push((span, CutPart::PromptIds));
    }
    parts.document = Some(cut_document(text, cuts));
    parts
}

/// Puts a record together. `None`: there is no answer.
pub fn record(facts: CallFacts, request: RequestParts, answer: Option<AssembledAnswer>) -> TraceRecord {
    let mut facts = facts;
    let answer = match answer {
        Some(answer) => {
            facts.error = facts.error.or(answer.error);
            facts.partial |= answer.partial;
            facts.weight_version = answer.weight_version.or(facts.weight_version);
            answer
        }
        None => AssembledAnswer::default(),
    };
    let RequestParts { model, turns, mut document, prompt_token_ids: asked } = request;
    let prompt_token_ids =
        if answer.prompt_token_ids.is_empty() { asked.clone() } else { answer.prompt_token_ids };
    if prompt_token_ids != asked {
        document = document.map(|document| with_prompt(&document, &asked));
    }
    TraceRecord {
        facts,
        model: model.or(answer.model).unwrap_or_default(),
        turns,
        request: document,
        prompt_token_ids,
        choices: answer.choices,
        tokens: answer.tokens,
        response: answer.response,
    }
}

/// The request with its prompt put back: the engine read another one, so that the record has it nowhere else.
fn with_prompt(document: &CutDocument, ids: &[u32]) -> CutDocument {
    let Some(gap) = document.gaps.iter().find(|gap| gap.part == CutPart::PromptIds) else {
        return document.clone();
    };
    let (before, behind) = document.text.split_at_checked(gap.at).unwrap_or((&document.text, ""));
    let mut text = before.to_owned();
    push_ids(&mut text, ids);
    let added = text.len() - before.len();
    text.push_str(behind);
    let others = document.gaps.iter().filter(|gap| gap.part != CutPart::PromptIds);
    let gaps = others.map(|other| DocumentGap {
        at: if other.at > gap.at { other.at + added } else { other.at },
        part: other.part,
    });
    CutDocument { gaps: gaps.collect(), text: text.into() }
}
