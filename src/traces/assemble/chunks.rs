//! The streams of chats and of completions: chunks that each carry a piece of one or more choices.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::answer::{AnswerParts, completion_message};
use super::ids::{append_ids, parse_ids};
use super::merge::{MergedList, MergedObject};
use super::wire::{
    AnswerBody, AnswerChoice, ChoiceLogprobs, RawMembers, is_null, parse_object, read_tokens, readable,
    string,
};
use crate::reply::token_event::{TokenEvent, read_token_event};
use crate::sse::RepeatedHead;
use crate::traces::json::push_ids;
use crate::traces::record::{ChoiceRecord, TraceApi};

/// The memory of a choice, or a tool call, beside its texts and lists, for the bound of memory.
const ENTRY_BYTES: usize = 512;

/// Merges chunks into one answer.
#[derive(Debug)]
pub(super) struct ChunkStream {
    api: TraceApi,
    parts: AnswerParts,
    choices: BTreeMap<u32, GrowingChoice>,
    /// The index of the choice that the prompt's ids came with; `None`: with the chunk.
    prompt_of: Option<u32>,
    /// The last usage, as it stands.
    usage: String,
    /// What the events begin with.
    head: RepeatedHead,
}

#[derive(Debug, Default)]
struct GrowingChoice {
    message: MergedObject,
    tool_calls: BTreeMap<u64, GrowingToolCall>,
    function_call: MergedObject,
    text: String,
    token_ids: Vec<u32>,
    logprobs: Vec<f64>,
    finish_reason: Option<String>,
    routed_experts: MergedList,
    extra: MergedObject,
}

#[derive(Debug, Default)]
struct GrowingToolCall {
    call: MergedObject,
    function: MergedObject,
}

// === impl ChunkStream ===

impl ChunkStream {
    pub(super) fn new(api: TraceApi) -> Self {
        ChunkStream {
            api,
            parts: AnswerParts::default(),
            choices: BTreeMap::new(),
            prompt_of: None,
            usage: String::new(),
            head: RepeatedHead::default(),
        }
    }

    /// Reads the data of one event, of which a byte may change. Returns the growth of the held memory.
    pub(super) fn event(&mut self, data: &mut [u8]) -> usize {
        if let Some(comma) = self.head.comma_in(data) {
            if let Some((token, _)) = read_token_event(&data[self.head.bytes()..]) {
                return self.token(&token);
            }
            // The members before the choices were read with an earlier event; what follows is an object.
            data[comma] = b'{';
            let rest = readable(&data[comma..]);
            if let Some(chunk) = parse_object::<AnswerBody<'_>>(&rest) {
                return self.chunk(chunk);
            }
            drop(rest);
            data[comma] = b',';
        }
        let text = readable(data);
        if text.trim_ascii() == "[DONE]" {
            self.parts.is_complete = true;
            return 0;
        }
        let Some(chunk) = parse_object::<AnswerBody<'_>>(&text) else {
            self.parts.is_damaged = true;
            return 0;
        };
        self.head.remember(data);
        self.chunk(chunk)
    }

    /// Reads an event of one token. Returns the growth of the held memory.
    pub(super) fn token(&mut self, token: &TokenEvent<'_>) -> usize {
        if let Some(usage) = token.usage {
            self.usage.clear();
            self.usage.push_str(usage);
        }
        let (choice, mut held) = self.growing(token.index);
        held += choice.message.append(token.key, token.text);
        choice.token_ids.extend(token.token_id);
        choice.logprobs.extend(token.logprob);
        held + size_of::<u32>() * usize::from(token.token_id.is_some())
            + size_of::<f64>() * usize::from(token.logprob.is_some())
    }

    /// The choice of this index, and the memory that it takes if it is new.
    fn growing(&mut self, index: u32) -> (&mut GrowingChoice, usize) {
        let mut held = 0;
        let choice = self.choices.entry(index).or_insert_with(|| {
            held = ENTRY_BYTES;
            GrowingChoice::default()
        });
        (choice, held)
    }

    fn chunk(&mut self, chunk: AnswerBody<'_>) -> usize {
        if self.parts.model.is_none() {
            self.parts.model = chunk.model.and_then(string).map(|model| model.into_owned());
        }
        self.parts.read_common(&chunk);
        if let Some(usage) = chunk.usage {
            self.usage.clear();
            self.usage.push_str(usage.get());
        }
        let mut held = 0;
        if let Some(list) = chunk.prompt_token_ids
            && self.parts.prompt_token_ids.is_empty()
        {
            held += self.prompt_ids(list, None);
        }
        for choice in chunk.choices.into_iter().flatten() {
            held += self.choice(choice);
        }
        held
    }

    /// The parts of the answer, at the end of the stream or where it broke off.
    pub(super) fn finish(mut self) -> AnswerParts {
        read_tokens(self.api, &self.usage, &mut self.parts.tokens);
        let api = self.api;
        self.parts.choices =
            self.choices.into_iter().map(|(index, choice)| choice.finish(api, index)).collect();
        self.parts
    }

    fn prompt_ids(&mut self, list: &RawValue, of: Option<u32>) -> usize {
        let Some(ids) = parse_ids(list) else {
            self.parts.is_damaged |= !is_null(list);
            return 0;
        };
        self.prompt_of = of;
        self.parts.prompt_token_ids = ids;
        size_of::<u32>() * self.parts.prompt_token_ids.len()
    }

    /// Takes the ids of a prompt that comes before the one whose ids came first.
    fn first_prompt_ids(&mut self, list: &RawValue, index: u32) -> usize {
        let (of, later) = (self.prompt_of, std::mem::take(&mut self.parts.prompt_token_ids));
        let held = self.prompt_ids(list, Some(index));
        if self.parts.prompt_token_ids.is_empty() {
            (self.prompt_of, self.parts.prompt_token_ids) = (of, later);
        } else if !later.is_empty()
            && later != self.parts.prompt_token_ids
            && let Some(choice) = of.and_then(|of| self.choices.get_mut(&of))
        {
            let mut ids = String::new();
            push_ids(&mut ids, &later);
            choice.extra.set_json("prompt_token_ids", ids);
        }
        held
    }

    fn choice(&mut self, chunk: AnswerChoice<'_>) -> usize {
        let index = u32::try_from(chunk.index.0.unwrap_or(0)).unwrap_or(u32::MAX);
        let mut held = 0;
        let mut other_prompt = chunk.prompt_token_ids.filter(|list| !is_null(list));
        if let Some(list) = chunk.prompt_token_ids
            && (self.parts.prompt_token_ids.is_empty() || self.prompt_of.is_some_and(|of| of > index))
        {
            held += self.first_prompt_ids(list, index);
            other_prompt = None;
        }
        // Several choices of one prompt have the same ids.
        let is_other =
            |list: &RawValue| parse_ids(list).is_some_and(|ids| ids != self.parts.prompt_token_ids);
        let other_prompt = other_prompt.filter(|list| is_other(list));
        let (state, new) = self.growing(index);
        held += new;
        let mut is_damaged = false;
        held += state.lists(&chunk, &mut is_damaged);
        if let Some(text) = chunk.text.and_then(string) {
            state.text.push_str(&text);
            held += text.len();
        }
        if let Some(reason) = chunk.finish_reason.and_then(string) {
            state.finish_reason = Some(reason.into_owned());
        }
        let extra = [
            ("stop_reason", chunk.stop_reason),
            ("prompt_logprobs", chunk.prompt_logprobs),
            ("prompt_token_ids", other_prompt),
        ];
        for (key, value) in extra {
            held += value.map_or(0, |value| state.extra.set(key, value));
        }
        for (key, value) in chunk.delta.into_iter().flat_map(|delta| delta.0) {
            held += state.member(&key, value);
        }
        self.parts.is_damaged |= is_damaged;
        held
    }
}

// === impl GrowingChoice ===

impl GrowingChoice {
    fn lists(&mut self, chunk: &AnswerChoice<'_>, is_damaged: &mut bool) -> usize {
        let before = (self.token_ids.len(), self.logprobs.len());
        if let Some(list) = chunk.token_ids {
            *is_damaged |= !append_ids(list, &mut self.token_ids);
        }
        if let Some(logprobs) = chunk.logprobs {
            *is_damaged |= !ChoiceLogprobs::append(logprobs, &mut self.logprobs);
        }
        let experts = chunk.routing_matrices.or(chunk.routed_experts);
        experts.map_or(0, |experts| self.routed_experts.merge(experts))
            + size_of::<u32>() * (self.token_ids.len() - before.0)
            + size_of::<f64>() * (self.logprobs.len() - before.1)
    }

    fn member(&mut self, key: &str, value: &RawValue) -> usize {
        match key {
            "role" => self.message.set(key, value),
            "function_call" => {
                let Some(call) = RawMembers::parse(value.get()) else { return 0 };
                call.0.iter().map(|(key, value)| self.function_call.merge(key, value)).sum()
            }
            "tool_calls" => {
                let calls: Vec<&RawValue> = serde_json::from_str(value.get()).unwrap_or_default();
                let calls = calls.into_iter().filter_map(|call| RawMembers::parse(call.get()));
                calls.map(|call| self.tool_call(&call)).sum()
            }
            _ => self.message.merge(key, value),
        }
    }

    fn tool_call(&mut self, delta: &RawMembers<'_>) -> usize {
        let index = delta.get("index").and_then(|index| index.get().parse().ok());
        let index = index.unwrap_or_else(|| self.unnamed_call(delta));
        let mut held = 0;
        let state = self.tool_calls.entry(index).or_insert_with(|| {
            held += ENTRY_BYTES;
            GrowingToolCall::default()
        });
        for (key, value) in &delta.0 {
            held += match &**key {
                "index" => 0,
                "id" | "type" if string(value).is_some_and(|text| text.is_empty()) => 0,
                "id" | "type" => state.call.set(key, value),
                "function" => {
                    let function = RawMembers::parse(value.get());
                    let members = function.iter().flat_map(|function| &function.0);
                    members.map(|(key, value)| state.function.merge(key, value)).sum()
                }
                _ => state.call.merge(key, value),
            };
        }
        held
    }

    /// The index of a piece without one: a new index for a new id, else the last one.
    fn unnamed_call(&self, delta: &RawMembers<'_>) -> u64 {
        let Some((last, state)) = self.tool_calls.last_key_value() else { return 0 };
        let is_other = |id: &str| !id.is_empty() && state.call.text("id").is_some_and(|before| before != id);
        let is_new = delta.get("id").and_then(string).is_some_and(|id| is_other(&id));
        if is_new { last.saturating_add(1) } else { *last }
    }

    fn finish(self, api: TraceApi, index: u32) -> ChoiceRecord {
        let message = if api == TraceApi::Completions && self.message.is_empty() {
            completion_message(&self.text)
        } else {
            chat_message(self.message, self.tool_calls, self.function_call)
        };
        ChoiceRecord {
            index,
            message: message.into(),
            token_ids: shrunk(self.token_ids),
            logprobs: shrunk(self.logprobs),
            token_texts: Vec::new(),
            finish_reason: self.finish_reason,
            routed_experts: self.routed_experts.into_json().map(Into::into),
            extra: self.extra.into_members().map(Into::into),
        }
    }
}

/// The message that the whole answer would have: without nulls, but for its content.
fn chat_message(
    mut message: MergedObject,
    tool_calls: BTreeMap<u64, GrowingToolCall>,
    function_call: MergedObject,
) -> String {
    message.drop_empty(&["role", "content"]);
    if message.text("role").is_none() {
        message.put_first("role", "assistant");
    }
    let has_more = !tool_calls.is_empty()
        || !function_call.is_empty()
        || ["reasoning", "reasoning_content"].iter().any(|key| message.text(key).is_some());
    let is_without_content = match message.text("content") {
        Some(content) => content.is_empty() && has_more,
        None => message.json("content").is_none(),
    };
    if is_without_content {
        message.set_json("content", "null".to_owned());
    }
    if !function_call.is_empty() {
        message.set_json("function_call", function_call.to_json());
    }
    if !tool_calls.is_empty() {
        let mut list = String::from("[");
        for mut call in tool_calls.into_values() {
            if list.len() > 1 {
                list.push(',');
            }
            if !call.function.is_empty() {
                call.call.set_json("function", call.function.to_json());
            }
            call.call.write(&mut list);
        }
        list.push(']');
        message.set_json("tool_calls", list);
    }
    message.to_json()
}

fn shrunk<T>(mut list: Vec<T>) -> Vec<T> {
    list.shrink_to_fit();
    list
}
