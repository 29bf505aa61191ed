//! Records for the tests of the stores: sessions as agents and their subagents make them.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use crate::traces::record::*;

/// A record of a chat call with these turns and ids, and fixed values for the rest.
pub(crate) fn record(
    session: &str,
    trace: &str,
    turns: &[&str],
    prompt: &[u32],
    answer: &[u32],
) -> TraceRecord {
    TraceRecord {
        facts: facts(session, trace),
        model: "m".into(),
        turns: turns.iter().map(|turn| Arc::from(*turn)).collect(),
        request: Some(CutDocument {
            text: r#"{"model":"m","messages":,"max_tokens":9}"#.into(),
            gaps: vec![DocumentGap { at: 24, part: CutPart::Turns }],
        }),
        prompt_token_ids: prompt.to_vec(),
        choices: vec![ChoiceRecord {
            index: 0,
            message: r#"{"role":"assistant","content":"a"}"#.into(),
            token_ids: answer.to_vec(),
            logprobs: answer.iter().map(|id| -f64::from(*id) / 7.0).collect(),
            token_texts: answer.iter().map(|id| id.to_string().into()).collect(),
            finish_reason: Some("stop".into()),
            routed_experts: None,
            extra: None,
        }],
        tokens: TraceTokens {
            prompt: Some(prompt.len() as u64),
            completion: Some(answer.len() as u64),
            cached: None,
            reasoning: Some(0),
        },
        response: None,
    }
}

fn facts(session: &str, trace: &str) -> CallFacts {
    CallFacts {
        trace_id: trace.into(),
        session_id: session.into(),
        api: TraceApi::Chat,
        stream: true,
        client_model: Some("m".into()),
        request_id: "r".into(),
        weight_version: Some(3),
        arrived: 1_700_000_000.25,
        latency: Duration::from_nanos(1_234_567_891),
        first_token: Some(Duration::from_nanos(123_456_789)),
        queued: None,
        upstream: Some("http://u:1".into()),
        attempts: 1,
        status: 200,
        error: None,
        partial: false,
        cumulative: None,
    }
}

/// A session of `turns` turns: each prompt is the one before it, its answer and a new message, from a first
/// prompt of `first_ids` ids.
pub(crate) fn conversation(session: &str, turns: usize, first_ids: u32, answer_ids: u32) -> Vec<TraceRecord> {
    let mut messages = vec![message("system", first_ids as usize * 4)];
    let mut prompt: Vec<u32> = (0..first_ids).map(|id| id * 7 % 150_000).collect();
    (0..turns as u32)
        .map(|turn| {
            let answer: Vec<u32> = (0..answer_ids).map(|id| 90_000 + id * 11 + turn).collect();
            let texts: Vec<&str> = messages.iter().map(|text| &**text).collect();
            let trace = format!("{session}/{turn}");
            let record = record(session, &trace, &texts, &prompt, &answer);
            messages.push(message("assistant", answer_ids as usize * 4));
            messages.push(message("user", 200));
            prompt.extend(&answer);
            prompt.extend((0..50).map(|id| 40_000 + id + turn));
            record
        })
        .collect()
}

fn message(role: &str, bytes: usize) -> Arc<str> {
    format!(r#"{{"role":"{role}","content":"{}"}}"#, "lorem ".repeat(bytes / 6 + 1)).into()
}

/// What a step of a random session does: it goes on with the prompt of an earlier step, cut and extended.
#[derive(Clone, Debug)]
pub(crate) struct SampleStep {
    pub session: u8,
    earlier: prop::sample::Index,
    kept_turns: prop::sample::Index,
    kept_ids: prop::sample::Index,
    new_turns: Vec<String>,
    new_ids: Vec<u32>,
    values: SampleValues,
}

/// What a random record has beside its prompt.
#[derive(Clone, Debug)]
struct SampleValues {
    choices: Vec<SampleChoice>,
    request: Option<String>,
    response: Option<String>,
    text: Option<String>,
    number: Option<u32>,
    weight: Option<i64>,
    nanos: u64,
    kind: usize,
    flag: bool,
}

#[derive(Clone, Debug)]
struct SampleChoice {
    ids: Vec<u32>,
    logprobs: Vec<f64>,
    texts: Vec<String>,
    experts: Option<String>,
}

/// Random steps of three sessions.
pub(crate) fn steps() -> impl Strategy<Value = Vec<SampleStep>> {
    prop::collection::vec(step(), 1..24)
}

fn step() -> impl Strategy<Value = SampleStep> {
    let ids = prop::collection::vec(0..4_u32, 0..6);
    let turns = prop::collection::vec("[a-cé\"\\\\\u{2028}]{0,4}", 0..3);
    let index = any::<prop::sample::Index>;
    (0..3_u8, index(), index(), index(), turns, ids, values()).prop_map(
        |(session, earlier, kept_turns, kept_ids, new_turns, new_ids, values)| SampleStep {
            session,
            earlier,
            kept_turns,
            kept_ids,
            new_turns,
            new_ids,
            values,
        },
    )
}

fn values() -> impl Strategy<Value = SampleValues> {
    let logprob = prop_oneof![any::<f64>().prop_filter("finite", |x| x.is_finite()), Just(f64::NEG_INFINITY)];
    let choice = (
        prop::collection::vec(0..4_u32, 0..5),
        prop::collection::vec(logprob, 0..4),
        prop::collection::vec("\\PC{0,3}", 0..4),
        prop::option::of("[a-z]{0,4}"),
    );
    let choice =
        choice.prop_map(|(ids, logprobs, texts, experts)| SampleChoice { ids, logprobs, texts, experts });
    let text = || prop::option::of("[abé\u{1F600}]{0,6}");
    (
        prop::collection::vec(choice, 0..3),
        (text(), text(), text()),
        any::<Option<u32>>(),
        any::<Option<i64>>(),
        0..u64::from(u32::MAX) * 100,
        0..11_usize,
        any::<bool>(),
    )
        .prop_map(|(choices, (request, response, text), number, weight, nanos, kind, flag)| {
            SampleValues { choices, request, response, text, number, weight, nanos, kind, flag }
        })
}

/// The records of random steps, in their order.
pub(crate) fn records(steps: &[SampleStep]) -> Vec<Arc<TraceRecord>> {
    let mut records: Vec<Arc<TraceRecord>> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let session = format!("session/{}:x", step.session);
        let earlier: Vec<_> = records.iter().filter(|record| record.facts.session_id == session).collect();
        let (mut turns, mut ids) = match earlier.is_empty() {
            true => (Vec::new(), Vec::new()),
            false => {
                let parent = step.earlier.get(&earlier);
                let answer =
                    parent.choices.first().map(|choice| choice.token_ids.clone()).unwrap_or_default();
                (parent.turns.clone(), [parent.prompt_token_ids.clone(), answer].concat())
            }
        };
        turns.truncate(step.kept_turns.index(turns.len() + 1));
        ids.truncate(step.kept_ids.index(ids.len() + 1));
        let encoded = |text: &String| Arc::from(serde_json::to_string(text).expect("a text is JSON"));
        turns.extend(step.new_turns.iter().map(encoded));
        ids.extend(&step.new_ids);
        records.push(Arc::new(step.values.record(session, number, turns, ids)));
    }
    records
}

impl SampleValues {
    fn record(&self, session: String, number: usize, turns: Vec<Arc<str>>, ids: Vec<u32>) -> TraceRecord {
        let gaps = |text: &str| match self.kind % 3 {
            0 => Vec::new(),
            1 => vec![DocumentGap { at: text.len(), part: CutPart::Turns }],
            _ => vec![
                DocumentGap { at: 0, part: CutPart::PromptIds },
                DocumentGap { at: 0, part: CutPart::ChoiceIds(self.kind) },
                DocumentGap { at: text.len(), part: CutPart::ChoiceLogprobs(1) },
            ],
        };
        let document = |text: &String| CutDocument { text: text.as_str().into(), gaps: gaps(text) };
        let errors = ["timeout", "rate_limit", "auth", "overflow", "incomplete", "client_gone"];
        TraceRecord {
            facts: CallFacts {
                api: [TraceApi::Chat, TraceApi::Completions, TraceApi::Responses, TraceApi::Messages]
                    [self.kind % 4],
                stream: self.flag,
                client_model: self.text.clone(),
                weight_version: self.weight,
                arrived: 1_700_000_000.0 + self.nanos as f64 / 3e9,
                latency: Duration::from_nanos(self.nanos),
                first_token: self.number.map(|number| Duration::from_nanos(u64::from(number))),
                queued: self.number.map(|number| Duration::from_micros(u64::from(number))),
                upstream: self.text.clone(),
                attempts: self.kind as u32,
                status: if self.flag { 200 } else { 0 },
                error: errors.get(self.kind).and_then(|name| TraceError::parse(name)),
                partial: !self.flag,
                cumulative: self.text.clone(),
                ..facts(&session, &format!("trace-{number}"))
            },
            model: self.text.clone().unwrap_or_default(),
            turns,
            request: self.request.as_ref().map(document),
            prompt_token_ids: ids,
            choices: self
                .choices
                .iter()
                .enumerate()
                .map(|(place, choice)| choice.record(place as u32))
                .collect(),
            tokens: TraceTokens { prompt: self.number.map(u64::from), ..TraceTokens::default() },
            response: self.response.as_ref().map(document),
        }
    }
}

impl SampleChoice {
    fn record(&self, index: u32) -> ChoiceRecord {
        ChoiceRecord {
            index: index + 1,
            message: r#"{"role":"assistant","content":"x"}"#.into(),
            token_ids: self.ids.clone(),
            logprobs: self.logprobs.clone(),
            token_texts: self.texts.iter().map(|text| text.as_str().into()).collect(),
            finish_reason: self.experts.clone(),
            routed_experts: self.experts.as_ref().map(|text| format!("\"{text}\"").into()),
            extra: self.experts.as_ref().map(|text| format!("\"stop_reason\":\"{text}\"").into()),
        }
    }
}
