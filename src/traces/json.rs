//! The wire form of a record: one JSON object, rllm's fields first.
//!
//! Numbers are written so that they parse to the same bits. Parts that were cut out of a document are
//! inserted again.
//!
//! Never: I/O, a panic on a record whose gaps do not fit its text.

use std::fmt::Write;

use serde::Deserialize;
use serde_json::Number;
use serde_json::value::RawValue;

use super::record::{CallFacts, ChoiceRecord, CutDocument, CutPart, TraceApi, TraceRecord, TraceTokens};

/// The members of a message that the wire form repeats.
#[derive(Deserialize)]
struct MessageText<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

/// The record as one JSON object.
pub(crate) fn to_json(record: &TraceRecord) -> String {
    let facts = &record.facts;
    let first = record.choices.first();
    let mut out = String::with_capacity(capacity(record));
    out.push_str("{\"trace_id\":");
    push_string(&mut out, &facts.trace_id);
    out.push_str(",\"session_id\":");
    push_string(&mut out, &facts.session_id);
    out.push_str(",\"model\":");
    push_string(&mut out, &record.model);
    out.push_str(",\"messages\":");
    push_list(&mut out, &record.turns, |out, turn| out.push_str(turn));
    out.push_str(",\"prompt_token_ids\":");
    push_ids(&mut out, &record.prompt_token_ids);
    out.push_str(",\"response_message\":");
    out.push_str(first.map_or("{}", |choice| message(choice)));
    out.push_str(",\"completion_token_ids\":");
    push_ids(&mut out, first.map_or(&[], |choice| &choice.token_ids));
    out.push_str(",\"logprobs\":");
    push_logprobs(&mut out, first.map_or(&[], |choice| &choice.logprobs));
    out.push_str(",\"routing_matrices\":");
    push_routing(&mut out, first);
    out.push_str(",\"finish_reason\":");
    push_optional(&mut out, first.and_then(|choice| choice.finish_reason.as_deref()));
    push_times(&mut out, facts, &record.tokens);
    out.push_str(",\"metadata\":{},\"raw_request\":");
    push_document(&mut out, record.request.as_ref(), record);
    out.push_str(",\"raw_response\":");
    push_document(&mut out, record.response.as_ref(), record);
    push_facts(&mut out, record);
    out.push('}');
    out
}

/// The document with the parts that were cut out of it.
#[cfg(test)]
pub(crate) fn restored(document: &CutDocument, record: &TraceRecord) -> String {
    let mut out = String::with_capacity(document.text.len());
    push_document(&mut out, Some(document), record);
    out
}

/// Writes a JSON string.
pub(super) fn push_string(out: &mut String, text: &str) {
    out.push('"');
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        if !matches!(byte, b'"' | b'\\' | ..0x20) {
            continue;
        }
        out.push_str(&text[plain..at]);
        plain = at + 1;
        match byte {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            _ => push_fmt(out, format_args!("\\u{byte:04x}")),
        }
    }
    out.push_str(&text[plain..]);
    out.push('"');
}

/// Writes a list of the token ids.
pub(super) fn push_ids(out: &mut String, ids: &[u32]) {
    push_list(out, ids, |out, id| {
        let (mut digits, mut at, mut rest) = ([0; 10], 10, *id);
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        digits[at..].iter().for_each(|digit| out.push(char::from(*digit)));
    });
}

fn push_list<T>(out: &mut String, items: &[T], mut push: impl FnMut(&mut String, &T)) {
    out.push('[');
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        push(out, item);
    }
    out.push(']');
}

/// Writes a number that parses to the same bits; `null` where JSON has none.
fn push_float(out: &mut String, number: f64) {
    match Number::from_f64(number) {
        Some(number) => push_fmt(out, format_args!("{number}")),
        None => out.push_str("null"),
    }
}

/// Writing to a string cannot fail.
fn push_fmt(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn push_optional(out: &mut String, text: Option<&str>) {
    match text {
        Some(text) => push_string(out, text),
        None => out.push_str("null"),
    }
}

fn push_logprobs(out: &mut String, logprobs: &[f64]) {
    if logprobs.is_empty() {
        out.push_str("null");
    } else {
        push_list(out, logprobs, |out, logprob| push_float(out, *logprob));
    }
}

/// Writes a list of strings: the engine's own, else its one value as a text.
fn push_routing(out: &mut String, choice: Option<&ChoiceRecord>) {
    let Some(experts) = choice.and_then(|choice| choice.routed_experts.as_deref()) else {
        return out.push_str("null");
    };
    if serde_json::from_str::<Vec<std::borrow::Cow<'_, str>>>(experts).is_ok() {
        out.push_str(experts);
    } else if experts.starts_with('"') {
        push_fmt(out, format_args!("[{experts}]"));
    } else {
        out.push('[');
        push_string(out, experts);
        out.push(']');
    }
}

fn push_times(out: &mut String, facts: &CallFacts, tokens: &TraceTokens) {
    out.push_str(",\"weight_version\":");
    match facts.weight_version {
        Some(version) => push_fmt(out, format_args!("{version}")),
        None => out.push_str("null"),
    }
    out.push_str(",\"latency_ms\":");
    push_float(out, facts.latency.as_secs_f64() * 1e3);
    out.push_str(",\"token_counts\":{");
    let counts = [
        ("prompt", tokens.prompt),
        ("completion", tokens.completion),
        ("cached", tokens.cached),
        ("reasoning", tokens.reasoning),
    ];
    let mut comma = "";
    for (name, count) in counts {
        if let Some(count) = count {
            push_fmt(out, format_args!("{comma}\"{name}\":{count}"));
            comma = ",";
        }
    }
    out.push_str("},\"timestamp\":");
    push_float(out, facts.arrived);
}

/// Writes the members that rllm's records do not have.
fn push_facts(out: &mut String, record: &TraceRecord) {
    let facts = &record.facts;
    push_fmt(
        out,
        format_args!(
            ",\"api\":\"{}\",\"stream\":{},\"status\":{},\"error\":",
            facts.api.name(),
            facts.stream,
            facts.status
        ),
    );
    push_optional(out, facts.error.map(|error| error.name()));
    push_fmt(out, format_args!(",\"partial\":{},\"choices\":", facts.partial));
    push_list(out, &record.choices, |out, choice| push_choice(out, choice, facts.api));
    for (name, time) in [("ttft_ms", facts.first_token), ("queue_ms", facts.queued)] {
        push_fmt(out, format_args!(",\"{name}\":"));
        match time {
            Some(time) => push_float(out, time.as_secs_f64() * 1e3),
            None => out.push_str("null"),
        }
    }
    out.push_str(",\"upstream\":");
    push_optional(out, facts.upstream.as_deref());
    push_fmt(out, format_args!(",\"attempts\":{},\"request_id\":", facts.attempts));
    push_string(out, &facts.request_id);
    out.push_str(",\"client_model\":");
    push_optional(out, facts.client_model.as_deref());
    out.push_str(",\"cumulative\":");
    push_optional(out, facts.cumulative.as_deref());
}

fn push_choice(out: &mut String, choice: &ChoiceRecord, api: TraceApi) {
    push_fmt(out, format_args!("{{\"index\":{},\"message\":", choice.index));
    out.push_str(message(choice));
    if api == TraceApi::Completions
        && let Ok(MessageText { content: Some(text) }) = serde_json::from_str(&choice.message)
    {
        push_fmt(out, format_args!(",\"text\":{}", text.get()));
    }
    out.push_str(",\"completion_token_ids\":");
    push_ids(out, &choice.token_ids);
    out.push_str(",\"logprobs\":");
    push_logprobs(out, &choice.logprobs);
    out.push_str(",\"finish_reason\":");
    push_optional(out, choice.finish_reason.as_deref());
    if choice.routed_experts.is_some() {
        out.push_str(",\"routing_matrices\":");
        push_routing(out, Some(choice));
    }
    if let Some(extra) = &choice.extra {
        out.push(',');
        out.push_str(extra);
    }
    out.push('}');
}

/// The choice's message; a record without one has the empty object.
fn message(choice: &ChoiceRecord) -> &str {
    if choice.message.is_empty() { "{}" } else { &choice.message }
}

fn push_document(out: &mut String, document: Option<&CutDocument>, record: &TraceRecord) {
    let Some(document) = document else { return out.push_str("null") };
    let mut written = 0;
    for gap in &document.gaps {
        out.push_str(document.text.get(written..gap.at).unwrap_or_default());
        written = gap.at;
        push_part(out, gap.part, record);
    }
    out.push_str(document.text.get(written..).unwrap_or_default());
}

fn push_part(out: &mut String, part: CutPart, record: &TraceRecord) {
    let choice = |place: usize| record.choices.get(place);
    match part {
        CutPart::Turns => push_list(out, &record.turns, |out, turn| out.push_str(turn)),
        CutPart::PromptIds => push_ids(out, &record.prompt_token_ids),
        CutPart::ChoiceIds(place) => push_ids(out, choice(place).map_or(&[], |choice| &choice.token_ids)),
        CutPart::ChoiceLogprobs(place) => match choice(place) {
            Some(choice) => push_chat_logprobs(out, choice),
            None => out.push_str("null"),
        },
    }
}

/// Writes the log-probabilities as a chat's choice has them without alternatives.
fn push_chat_logprobs(out: &mut String, choice: &ChoiceRecord) {
    out.push_str("{\"content\":[");
    for (at, (text, logprob)) in choice.token_texts.iter().zip(&choice.logprobs).enumerate() {
        out.push_str(if at > 0 { ",{\"token\":" } else { "{\"token\":" });
        push_string(out, text);
        out.push_str(",\"logprob\":");
        push_float(out, *logprob);
        out.push_str(",\"bytes\":");
        push_list(out, text.as_bytes(), |out, byte| push_fmt(out, format_args!("{byte}")));
        out.push_str(",\"top_logprobs\":[]}");
    }
    out.push_str("]}");
}

/// About how long the record's wire form is.
fn capacity(record: &TraceRecord) -> usize {
    let documents = [&record.request, &record.response];
    let texts = documents.into_iter().flatten().map(|document| document.text.len()).sum::<usize>();
    let turns = record.turns.iter().map(|turn| turn.len() + 1).sum::<usize>();
    let choice = |choice: &ChoiceRecord| 128 + 2 * choice.message.len() + 80 * choice.token_ids.len();
    let choices = record.choices.iter().map(choice).sum::<usize>();
    1024 + texts + 2 * turns + 12 * record.prompt_token_ids.len() + choices
}

#[cfg(test)]
mod tests;
