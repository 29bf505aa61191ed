//! Records as rows of `traces`, and back: of what its parent's row has, a row holds the extent only.
//!
//! Never: I/O.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::link::{SqlRow, SqlValue};
use super::parents::{RowDelta, SharedEnds};
use crate::traces::record::*;
use crate::traces::store::contents::{StoreError, StoredTrace};

/// A record with the texts of its row.
pub(super) struct EncodedRow {
    record: Arc<TraceRecord>,
    delta: RowDelta,
    turns: String,
    prompt_token_ids: String,
    first: Option<ChoiceTexts>,
    more_choices: Option<String>,
    request: Option<String>,
    request_gaps: Option<String>,
    response_gaps: Option<String>,
}

/// The lists of a choice as JSON; of an empty one there is none.
struct ChoiceTexts {
    token_ids: Option<String>,
    logprobs: Option<String>,
    token_texts: Option<String>,
}

/// A choice after the first one, as an object of `more_choices`.
#[derive(Serialize, Deserialize)]
struct ChoiceObject {
    index: u32,
    message: String,
    finish_reason: Option<String>,
    token_ids: Vec<u32>,
    logprobs: Vec<LogprobNumber>,
    token_texts: Vec<Box<str>>,
    routed_experts: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    extra: Option<String>,
}

/// A log-probability as JSON: a number, or the name of one that JSON does not have.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(untagged)]
enum LogprobNumber {
    Finite(f64),
    Named(LogprobName),
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum LogprobName {
    Infinity,
    #[serde(rename = "-Infinity")]
    NegativeInfinity,
    NaN,
}

/// Rebuilds records from rows, each of which comes after its parent's.
#[derive(Default)]
pub(super) struct RowDecoder {
    rebuilt: HashMap<String, Arc<TraceRecord>>,
}

// === impl EncodedRow ===

impl EncodedRow {
    pub(super) fn new(record: &Arc<TraceRecord>, delta: RowDelta) -> Self {
        let first = record.choices.first().map(ChoiceTexts::new);
        let more: Vec<_> = record.choices.iter().skip(1).map(ChoiceObject::new).collect();
        let request = record.request.as_ref();
        let own_part = |document: &CutDocument| {
            document.text[delta.request.lead..document.text.len() - delta.request.tail].to_string()
        };
        EncodedRow {
            turns: turns_text(&record.turns[delta.turns..]),
            prompt_token_ids: json(&record.prompt_token_ids[delta.prompt_ids..]),
            first,
            more_choices: (!more.is_empty()).then(|| json(&more)),
            request: request.map(own_part),
            request_gaps: request.and_then(gaps_text),
            response_gaps: record.response.as_ref().and_then(gaps_text),
            delta,
            record: record.clone(),
        }
    }

    pub(super) fn record(&self) -> &Arc<TraceRecord> {
        &self.record
    }

    /// Whether the row needs the row of another trace.
    pub(super) fn has_parent(&self) -> bool {
        self.delta.parent.is_some()
    }

    /// The values of the row, in the order of the columns.
    pub(super) fn values<'a>(&'a self, session: &'a str, created_at: f64) -> Vec<SqlValue<'a>> {
        let record = &*self.record;
        let facts = &record.facts;
        let millis = |duration: Duration| duration.as_nanos() as f64 / 1e6;
        let number =
            |count: Option<u64>| SqlValue::Integer(count.map(|n| i64::try_from(n).unwrap_or(i64::MAX)));
        let text = |text: &'a Option<String>| SqlValue::optional_text(text.as_deref());
        let first = record.choices.first();
        let list = |list: fn(&ChoiceTexts) -> &Option<String>| {
            SqlValue::optional_text(self.first.as_ref().and_then(|first| list(first).as_deref()))
        };
        // The SQL functions for texts count characters.
        let parent_text = record.request.as_ref().map_or("", |document| &document.text);
        let ends = self.delta.request;
        vec![
            SqlValue::text(&facts.trace_id),
            SqlValue::text(session),
            SqlValue::real(created_at),
            SqlValue::real(facts.arrived),
            SqlValue::text(facts.api.name()),
            SqlValue::text(&record.model),
            text(&facts.client_model),
            SqlValue::text(&facts.request_id),
            text(&facts.upstream),
            SqlValue::integer(facts.attempts),
            SqlValue::integer(facts.status),
            SqlValue::optional_text(facts.error.map(TraceError::name)),
            SqlValue::Flag(facts.stream),
            SqlValue::Flag(facts.partial),
            text(&facts.cumulative),
            SqlValue::optional_text(first.and_then(|first| first.finish_reason.as_deref())),
            SqlValue::Integer(facts.weight_version),
            SqlValue::real(millis(facts.latency)),
            SqlValue::Real(facts.first_token.map(millis)),
            SqlValue::Real(facts.queued.map(millis)),
            number(record.tokens.prompt),
            number(record.tokens.completion),
            number(record.tokens.cached),
            number(record.tokens.reasoning),
            SqlValue::optional_text(self.delta.parent.as_deref()),
            SqlValue::integer(self.delta.turns),
            SqlValue::text(&self.turns),
            SqlValue::integer(self.delta.prompt_ids),
            SqlValue::text(&self.prompt_token_ids),
            SqlValue::Integer(first.map(|first| i64::from(first.index))),
            SqlValue::optional_text(first.map(|first| &*first.message)),
            list(|first| &first.token_ids),
            list(|first| &first.logprobs),
            list(|first| &first.token_texts),
            SqlValue::optional_text(first.and_then(|first| first.routed_experts.as_deref())),
            text(&self.more_choices),
            SqlValue::optional_text(first.and_then(|first| first.extra.as_deref())),
            SqlValue::integer(parent_text[..ends.lead].chars().count()),
            SqlValue::integer(parent_text[parent_text.len() - ends.tail..].chars().count()),
            text(&self.request),
            text(&self.request_gaps),
            SqlValue::optional_text(record.response.as_ref().map(|document| &*document.text)),
            text(&self.response_gaps),
        ]
    }
}

impl ChoiceTexts {
    fn new(choice: &ChoiceRecord) -> Self {
        let logprobs: Vec<_> = choice.logprobs.iter().map(|number| LogprobNumber::new(*number)).collect();
        ChoiceTexts {
            token_ids: (!choice.token_ids.is_empty()).then(|| json(&choice.token_ids)),
            logprobs: (!logprobs.is_empty()).then(|| json(&logprobs)),
            token_texts: (!choice.token_texts.is_empty()).then(|| json(&choice.token_texts)),
        }
    }
}

impl ChoiceObject {
    fn new(choice: &ChoiceRecord) -> Self {
        ChoiceObject {
            index: choice.index,
            message: choice.message.to_string(),
            finish_reason: choice.finish_reason.clone(),
            token_ids: choice.token_ids.clone(),
            logprobs: choice.logprobs.iter().map(|number| LogprobNumber::new(*number)).collect(),
            token_texts: choice.token_texts.clone(),
            routed_experts: choice.routed_experts.as_ref().map(ToString::to_string),
            extra: choice.extra.as_ref().map(ToString::to_string),
        }
    }

    fn into_record(self) -> ChoiceRecord {
        ChoiceRecord {
            index: self.index,
            message: self.message.into(),
            token_ids: self.token_ids,
            logprobs: self.logprobs.into_iter().map(LogprobNumber::number).collect(),
            token_texts: self.token_texts,
            finish_reason: self.finish_reason,
            routed_experts: self.routed_experts.map(Into::into),
            extra: self.extra.map(Into::into),
        }
    }
}

impl LogprobNumber {
    fn new(number: f64) -> Self {
        match number {
            f64::INFINITY => LogprobNumber::Named(LogprobName::Infinity),
            f64::NEG_INFINITY => LogprobNumber::Named(LogprobName::NegativeInfinity),
            number if number.is_nan() => LogprobNumber::Named(LogprobName::NaN),
            number => LogprobNumber::Finite(number),
        }
    }

    fn number(self) -> f64 {
        match self {
            LogprobNumber::Finite(number) => number,
            LogprobNumber::Named(LogprobName::Infinity) => f64::INFINITY,
            LogprobNumber::Named(LogprobName::NegativeInfinity) => f64::NEG_INFINITY,
            LogprobNumber::Named(LogprobName::NaN) => f64::NAN,
        }
    }
}

/// Lists of numbers and texts cannot fail to be JSON.
fn json(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "null".into())
}

/// Turns as a JSON array. One that is no JSON stands there as a text.
fn turns_text(turns: &[Arc<str>]) -> String {
    let mut text = String::with_capacity(turns.iter().map(|turn| turn.len() + 1).sum::<usize>() + 2);
    text.push('[');
    for (place, turn) in turns.iter().enumerate() {
        if place > 0 {
            text.push(',');
        }
        match serde_json::from_str::<&RawValue>(turn) {
            Ok(_) => text.push_str(turn),
            Err(_) => text.push_str(&json(turn.as_ref())),
        }
    }
    text.push(']');
    text
}

/// The gaps of a document as `[[offset, part], …]`, with the place of a choice as third.
fn gaps_text(document: &CutDocument) -> Option<String> {
    let encoded = |gap: &DocumentGap| match gap.part {
        CutPart::Turns => format!("[{},\"turns\"]", gap.at),
        CutPart::PromptIds => format!("[{},\"prompt_ids\"]", gap.at),
        CutPart::ChoiceIds(place) => format!("[{},\"choice_ids\",{place}]", gap.at),
        CutPart::ChoiceLogprobs(place) => format!("[{},\"choice_logprobs\",{place}]", gap.at),
    };
    let gaps: Vec<String> = document.gaps.iter().map(encoded).collect();
    (!gaps.is_empty()).then(|| format!("[{}]", gaps.join(",")))
}

// === impl RowDecoder ===

impl RowDecoder {
    /// Frees a trace that no further row needs.
    pub(super) fn forget(&mut self, trace_id: &str) {
        self.rebuilt.remove(trace_id);
    }

    /// The trace of a row.
    pub(super) fn decode(&mut self, mut row: SqlRow) -> Result<StoredTrace, StoreError> {
        let trace_id = row.text()?;
        let decoded = self.decode_rest(&trace_id, &mut row);
        let (record, created_at) = decoded.map_err(|reason| match reason {
            StoreError::Damaged { reason, .. } => StoreError::Damaged { trace_id: trace_id.clone(), reason },
            other => other,
        })?;
        let record = Arc::new(record);
        self.rebuilt.insert(trace_id, record.clone());
        Ok(StoredTrace { record, created_at })
    }

    fn decode_rest(&self, trace_id: &str, row: &mut SqlRow) -> Result<(TraceRecord, f64), StoreError> {
        let session_id = row.text()?;
        let created_at = row.real()?;
        let arrived = row.real()?;
        let api = TraceApi::parse(&row.text()?).ok_or_else(|| damaged("unknown api"))?;
        let model = row.text()?;
        let mut facts = CallFacts {
            trace_id: trace_id.into(),
            session_id,
            api,
            arrived,
            client_model: row.optional_text()?,
            request_id: row.text()?,
            upstream: row.optional_text()?,
            attempts: u32::try_from(row.count()?).unwrap_or(u32::MAX),
            status: u16::try_from(row.count()?).unwrap_or(u16::MAX),
            error: row.optional_text()?.as_deref().and_then(TraceError::parse),
            stream: row.flag()?,
            partial: row.flag()?,
            cumulative: row.optional_text()?,
            weight_version: None,
            latency: Duration::ZERO,
            first_token: None,
            queued: None,
        };
        let finish_reason = row.optional_text()?;
        facts.weight_version = row.optional_integer()?;
        facts.latency = duration(row.real()?);
        facts.first_token = row.optional_real()?.map(duration);
        facts.queued = row.optional_real()?.map(duration);
        let mut count = || Ok::<_, StoreError>(row.optional_integer()?.and_then(|n| u64::try_from(n).ok()));
        let tokens =
            TraceTokens { prompt: count()?, completion: count()?, cached: count()?, reasoning: count()? };
        let parent_id = row.optional_text()?;
        let parent = match &parent_id {
            Some(id) => Some(self.rebuilt.get(id).ok_or_else(|| damaged("the parent's row is missing"))?),
            None => None,
        };
        let turns = decode_turns(row, parent.map(|parent| &**parent))?;
        let prompt_token_ids = decode_ids(row, parent.map(|parent| &**parent))?;
        let choices = decode_choices(row, finish_reason)?;
        let parent_request = parent.and_then(|parent| parent.request.as_ref()).map(|document| &document.text);
        let request = decode_request(row, parent_request)?;
        let response = match (row.optional_text()?, row.optional_text()?) {
            (Some(text), gaps) => Some(CutDocument { text: text.into(), gaps: decode_gaps(gaps)? }),
            (None, _) => None,
        };
        let record =
            TraceRecord { facts, model, turns, request, prompt_token_ids, choices, tokens, response };
        Ok((record, created_at))
    }
}

fn damaged(reason: impl Into<String>) -> StoreError {
    StoreError::Damaged { trace_id: String::new(), reason: reason.into() }
}

fn parsed<'a, T: Deserialize<'a>>(text: &'a str, column: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| damaged(format!("{column}: {error}")))
}

/// Milliseconds, exact to the nanosecond below 13 days.
fn duration(millis: f64) -> Duration {
    Duration::from_nanos((millis * 1e6).round() as u64)
}

fn decode_turns(row: &mut SqlRow, parent: Option<&TraceRecord>) -> Result<Vec<Arc<str>>, StoreError> {
    let (shared, text) = (row.count()? as usize, row.text()?);
    let held = parent.map_or(&[][..], |parent| &parent.turns);
    let mut turns = held.get(..shared).ok_or_else(|| damaged("the parent has too few turns"))?.to_vec();
    let own: Vec<&RawValue> = parsed(&text, "turns")?;
    turns.extend(own.iter().map(|turn| Arc::from(turn.get())));
    Ok(turns)
}

fn decode_ids(row: &mut SqlRow, parent: Option<&TraceRecord>) -> Result<Vec<u32>, StoreError> {
    let (shared, text) = (row.count()? as usize, row.text()?);
    let prompt = parent.map_or(&[][..], |parent| &parent.prompt_token_ids);
    let answer = parent.and_then(|parent| parent.choices.first()).map_or(&[][..], |choice| &choice.token_ids);
    let own: Vec<u32> = parsed(&text, "prompt_token_ids")?;
    let mut ids = Vec::with_capacity(shared.min(prompt.len() + answer.len()) + own.len());
    ids.extend_from_slice(&prompt[..shared.min(prompt.len())]);
    let of_answer = answer.get(..shared - ids.len());
    ids.extend_from_slice(of_answer.ok_or_else(|| damaged("the parent has too few token ids"))?);
    ids.extend(own);
    Ok(ids)
}

fn decode_choices(row: &mut SqlRow, finish_reason: Option<String>) -> Result<Vec<ChoiceRecord>, StoreError> {
    let index = row.optional_integer()?;
    let message = row.optional_text()?;
    let (ids, logprobs, texts) = (row.optional_text()?, row.optional_text()?, row.optional_text()?);
    let routed_experts = row.optional_text()?.map(Into::into);
    let (more, extra) = (row.optional_text()?, row.optional_text()?.map(Into::into));
    let list = |text: &Option<String>| text.clone().unwrap_or_else(|| "[]".into());
    let Some(index) = index else { return Ok(Vec::new()) };
    let logprobs: Vec<LogprobNumber> = parsed(&list(&logprobs), "logprobs")?;
    let mut choices = vec![ChoiceRecord {
        index: u32::try_from(index).unwrap_or(u32::MAX),
        message: message.unwrap_or_default().into(),
        token_ids: parsed(&list(&ids), "completion_token_ids")?,
        logprobs: logprobs.into_iter().map(LogprobNumber::number).collect(),
        token_texts: parsed(&list(&texts), "token_texts")?,
        finish_reason,
        routed_experts,
        extra,
    }];
    let more: Vec<ChoiceObject> = parsed(&list(&more), "more_choices")?;
    choices.extend(more.into_iter().map(ChoiceObject::into_record));
    Ok(choices)
}

fn decode_request(row: &mut SqlRow, parent: Option<&Arc<str>>) -> Result<Option<CutDocument>, StoreError> {
    let (lead, tail) = (row.count()? as usize, row.count()? as usize);
    let (own, gaps) = (row.optional_text()?, row.optional_text()?);
    let Some(own) = own else { return Ok(None) };
    let gaps = decode_gaps(gaps)?;
    if lead == 0 && tail == 0 {
        return Ok(Some(CutDocument { text: own.into(), gaps }));
    }
    let parent = parent.ok_or_else(|| damaged("the parent has no request"))?;
    let ends =
        character_ends(parent, lead, tail).ok_or_else(|| damaged("the parent's request is too short"))?;
    let text = match own.is_empty() && ends.lead + ends.tail == parent.len() {
        // Equal texts are one in memory, too.
        true => parent.clone(),
        false => [&parent[..ends.lead], &own, &parent[parent.len() - ends.tail..]].concat().into(),
    };
    Ok(Some(CutDocument { text, gaps }))
}

/// The bytes of the first and the last characters of a text.
fn character_ends(text: &str, lead: usize, tail: usize) -> Option<SharedEnds> {
    let starts = || text.char_indices().map(|(at, _)| at);
    let lead = starts().chain([text.len()]).nth(lead)?;
    let tail = match tail {
        0 => 0,
        tail => text.len() - starts().nth_back(tail - 1)?,
    };
    Some(SharedEnds { lead, tail })
}

fn decode_gaps(text: Option<String>) -> Result<Vec<DocumentGap>, StoreError> {
    let Some(text) = text else { return Ok(Vec::new()) };
    let gaps: Vec<Vec<serde_json::Value>> = parsed(&text, "gaps")?;
    let gap = |gap: &[serde_json::Value]| {
        let at = gap.first()?.as_u64()? as usize;
        let place = || Some(gap.get(2)?.as_u64()? as usize);
        let part = match gap.get(1)?.as_str()? {
            "turns" => CutPart::Turns,
            "prompt_ids" => CutPart::PromptIds,
            "choice_ids" => CutPart::ChoiceIds(place()?),
            "choice_logprobs" => CutPart::ChoiceLogprobs(place()?),
            _ => return None,
        };
        Some(DocumentGap { at, part })
    };
    gaps.iter().map(|one| gap(one).ok_or_else(|| damaged("unknown gap"))).collect()
}
