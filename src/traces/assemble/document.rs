//! Whole answers: the record's parts, and the document without what is rebuilt from them.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::value::RawValue;

use super::answer::{AnswerParts, completion_message};
use super::ids::{KnownPrompt, find_ids, is_behind_key, parse_ids};
use super::merge::MergedList;
use super::wire::{
    AnswerBody, AnswerChoice, ChoiceLogprobs, RawMembers, is_null, is_within_limits, parse_object,
    read_tokens, readable, span_in, string,
};
use super::{messages, responses};
use crate::json::{string_end, unescape};
use crate::sse::count_work;
use crate::traces::json::push_string;
use crate::traces::record::{ChoiceRecord, CutDocument, CutPart, DocumentGap, TraceApi};

/// Where parts were found that the record has by itself.
pub(super) type Cuts = Vec<(Range<usize>, CutPart)>;

/// Reads an answer that was not a stream. One that is no JSON object, or that some readers of JSON do not
/// take, has no document. `known`: the prompt of the turn before, with which its own may begin.
pub(super) fn read_document(
    api: TraceApi,
    is_failure: bool,
    body: &[u8],
    known: &mut KnownPrompt,
) -> (AnswerParts, Option<CutDocument>) {
    count_work(body.len());
    if !is_failure && let Some((parts, document)) = read_without_prompt(api, body, known) {
        return (parts, Some(document));
    }
    let text = readable(body);
    let text = text.trim_ascii();
    match read_text(api, is_failure, text) {
        Some((parts, cuts)) => (parts, Some(cut_document(text, cuts))),
        None => (AnswerParts::default(), None),
    }
}

/// Reads an answer whose prompt's ids are a long list: the list is read first, and the rest without it, so
/// that it is not walked twice. `None`: it has no such list, or not where it belongs.
fn read_without_prompt(
    api: TraceApi,
    body: &[u8],
    known: &mut KnownPrompt,
) -> Option<(AnswerParts, CutDocument)> {
    let (list, ids) = find_ids(body, known)?;
    let rest = [&body[..list.start], b"[]", &body[list.end..]].concat();
    let text = readable(&rest);
    let text = text.trim_ascii();
    let (mut parts, cuts) = read_text(api, false, text)?;
    let is_prompt = |(span, part): &(Range<usize>, CutPart)| {
        *part == CutPart::PromptIds && is_behind_key(text, span.start)
    };
    if !cuts.iter().any(is_prompt) {
        return None;
    }
    parts.prompt_token_ids = ids;
    Some((parts, cut_document(text, cuts)))
}

/// The parts of an answer, and where they stand. `None`: it is no JSON object, or one that some readers of
/// JSON do not take.
fn read_text(api: TraceApi, is_failure: bool, text: &str) -> Option<(AnswerParts, Cuts)> {
    let mut parts = AnswerParts::default();
    let mut cuts = Cuts::new();
    if !is_within_limits(text) {
        return None;
    }
    if let Some(read) = parse_object::<AnswerBody<'_>>(text) {
        parts.is_complete = true;
        parts.model = read.model.and_then(string).map(Cow::into_owned);
        parts.read_common(&read);
        if let Some(usage) = read.usage {
            read_tokens(api, usage.get(), &mut parts.tokens);
        }
        if !is_failure {
            read_choices(api, text, read, &mut parts, &mut cuts);
        }
    } else if RawMembers::parse(text).is_some() {
        (parts.is_complete, parts.is_damaged) = (true, true);
    } else {
        return None;
    }
    Some((parts, cuts))
}

/// The text without the parts that were found.
pub(super) fn cut_document(text: &str, mut cuts: Cuts) -> CutDocument {
    cuts.sort_unstable_by_key(|(span, _)| span.start);
    let cut_bytes: usize = cuts.iter().map(|(span, _)| span.len()).sum();
    let mut rest = String::with_capacity(text.len().saturating_sub(cut_bytes));
    let (mut gaps, mut written) = (Vec::with_capacity(cuts.len()), 0);
    for (span, part) in cuts {
        let Some(before) = text.get(written..span.start) else { continue };
        rest.push_str(before);
        gaps.push(DocumentGap { at: rest.len(), part });
        written = span.end;
    }
    rest.push_str(text.get(written..).unwrap_or_default());
    CutDocument { text: rest.into(), gaps }
}

fn read_choices(api: TraceApi, text: &str, read: AnswerBody<'_>, parts: &mut AnswerParts, cuts: &mut Cuts) {
    match api {
        TraceApi::Responses => return responses::read_whole(&read, parts),
        TraceApi::Messages => return messages::read_whole(&read, parts),
        TraceApi::Chat | TraceApi::Completions => {}
    }
    let choices = read.choices.unwrap_or_default();
    let mut prompts: Vec<&RawValue> = read.prompt_token_ids.into_iter().collect();
    prompts.extend(choices.iter().filter_map(|choice| choice.prompt_token_ids));
    for (at, prompt) in prompts.into_iter().enumerate() {
        match (parse_ids(prompt), span_in(text, prompt)) {
            (Some(ids), Some(span)) if at == 0 || ids == parts.prompt_token_ids => {
                parts.prompt_token_ids = ids;
                cuts.push((span, CutPart::PromptIds));
            }
            (ids, _) => parts.is_damaged |= ids.is_none(),
        }
    }
    for (place, choice) in choices.into_iter().enumerate() {
        let choice = read_choice(api, text, place, &choice, cuts, &mut parts.is_damaged);
        parts.choices.push(choice);
    }
}

fn read_choice(
    api: TraceApi,
    text: &str,
    place: usize,
    choice: &AnswerChoice<'_>,
    cuts: &mut Cuts,
    is_damaged: &mut bool,
) -> ChoiceRecord {
    let mut record = ChoiceRecord {
        index: choice.index.0.and_then(|index| u32::try_from(index).ok()).unwrap_or(place as u32),
        finish_reason: choice.finish_reason.and_then(string).map(Cow::into_owned),
        ..ChoiceRecord::default()
    };
    record.message = match (api, choice.message, choice.text.and_then(string)) {
        (TraceApi::Completions, None, text) => completion_message(&text.unwrap_or_default()).into(),
        (_, message, _) => chat_message(message).into(),
    };
    if let Some(list) = choice.token_ids {
        match parse_ids(list) {
            Some(ids) => {
                record.token_ids = ids;
                cuts.extend(span_in(text, list).map(|span| (span, CutPart::ChoiceIds(place))));
            }
            None => *is_damaged = true,
        }
    }
    if let Some(raw) = choice.logprobs {
        match (plain_logprobs(raw), span_in(text, raw)) {
            (Some((texts, logprobs)), Some(span)) => {
                (record.token_texts, record.logprobs) = (texts, logprobs);
                cuts.push((span, CutPart::ChoiceLogprobs(place)));
            }
            _ => *is_damaged |= !ChoiceLogprobs::append(raw, &mut record.logprobs),
        }
    }
    let mut experts = MergedList::default();
    if let Some(value) = choice.routing_matrices.or(choice.routed_experts) {
        experts.merge(value);
    }
    record.routed_experts = experts.into_json().map(Into::into);
    let reason = choice.stop_reason.filter(|reason| !is_null(reason));
    record.extra = reason.map(|reason| format!("\"stop_reason\":{}", reason.get()).into());
    record
}

/// The texts and the numbers of log-probabilities that are rebuilt from them exactly; `None`: they have
/// another form than engines write without alternatives.
fn plain_logprobs(raw: &RawValue) -> Option<(Vec<Box<str>>, Vec<f64>)> {
    let mut rest = raw.get().strip_prefix("{\"content\":[")?;
    let (mut texts, mut logprobs) = (Vec::new(), Vec::new());
    while rest != "]}" {
        if !texts.is_empty() {
            rest = rest.strip_prefix(',')?;
        }
        rest = rest.strip_prefix("{\"token\":\"")?;
        let (token, behind) = rest.split_at(string_end(rest.as_bytes(), 0, 0)?);
        rest = behind.strip_prefix("\",\"logprob\":")?;
        let (logprob, behind) = rest.split_at(rest.find(',')?);
        let token = unescape(token.as_bytes());
        rest = without_bytes(behind.strip_prefix(",\"bytes\":[")?, token.as_bytes())?;
        rest = rest.strip_prefix("],\"top_logprobs\":[]}")?;
        logprobs.push(plain_float(logprob)?);
        texts.push(token.into());
    }
    Some((texts, logprobs))
}

/// The number of a JSON value; `None`: written without a fraction it is another value than a float.
fn plain_float(text: &str) -> Option<f64> {
    let is_float = text.bytes().any(|byte| matches!(byte, b'.' | b'e' | b'E'));
    text.parse().ok().filter(|number: &f64| is_float && number.is_finite())
}

/// What stands behind the list of these bytes.
fn without_bytes<'a>(list: &'a str, bytes: &[u8]) -> Option<&'a str> {
    let (mut rest, mut comma) = (list, "");
    for byte in bytes {
        rest = rest.strip_prefix(comma)?;
        let end = rest.bytes().position(|byte| !byte.is_ascii_digit())?;
        let (digits, behind) = rest.split_at(end);
        if digits.parse() != Ok(*byte) {
            return None;
        }
        (rest, comma) = (behind, ",");
    }
    Some(rest)
}

/// The message without its nulls, but for its content.
fn chat_message(message: Option<&RawValue>) -> String {
    let members = message.and_then(|message| RawMembers::parse(message.get()));
    let members = members.map_or_else(Vec::new, |members| members.0);
    let mut out = String::with_capacity(message.map_or(40, |message| message.get().len()));
    out.push('{');
    if !members.iter().any(|(key, value)| key == "role" && !is_null(value)) {
        out.push_str("\"role\":\"assistant\"");
    }
    for (key, value) in &members {
        if is_null(value) && key != "content" {
            continue;
        }
        if out.len() > 1 {
            out.push(',');
        }
        push_string(&mut out, key);
        out.push(':');
        out.push_str(value.get());
    }
    if !members.iter().any(|(key, _)| key == "content") {
        out.push_str(",\"content\":null");
    }
    out.push('}');
    out
}
