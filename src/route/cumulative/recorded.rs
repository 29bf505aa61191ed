//! The last turn of a session, and the prompt of a chat that continues from it.

use serde::Deserialize;
use serde_json::Value;

use super::chat::{ChatFields, ChatTurn, settings_of};
use super::fallback::FallbackReason;
use super::fingerprint;

/// The largest distance from the end of an answer to its last token in the template's text: spaces may
/// precede that token.
const MAX_BEFORE_END: usize = 4;

/// A chat that was recorded.
#[derive(Debug, Default)]
pub struct RecordedChat<'a> {
    pub model: &'a str,
    pub upstream: Option<&'a str>,
    /// The body; its messages are ignored.
    pub fields: ChatFields,
    /// Each message, as JSON.
    pub messages: Vec<&'a str>,
    pub prompt: &'a [u32],
    pub replies: Vec<RecordedReply<'a>>,
}

/// One choice of its answer.
#[derive(Clone, Copy, Debug)]
pub struct RecordedReply<'a> {
    /// As JSON.
    pub message: &'a str,
    pub ids: &'a [u32],
    pub finish_reason: Option<&'a str>,
}

/// The part of a recorded chat that the next turn of its session needs.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedTurn {
    pub upstream: Option<String>,
    model: String,
    settings: u128,
    messages: Vec<u128>,
    replies: Vec<ReplyTokens>,
    prompt: Vec<u32>,
}

/// One choice of the answer of a recorded turn.
#[derive(Clone, Debug, PartialEq)]
struct ReplyTokens {
    fingerprint: u128,
    ids: Vec<u32>,
    /// Whether more than text was parsed out of the choice.
    parsed: Option<FallbackReason>,
    /// Whether the choice ended by its last token, not by a limit or a stop text.
    ends_by_token: bool,
}

/// A chat that continues from a recorded turn.
#[derive(Debug)]
pub struct Continuation<'t> {
    recorded: &'t RecordedTurn,
    reply: &'t ReplyTokens,
    chat: &'t ChatTurn,
}

#[derive(Deserialize)]
struct TokenizeAnswer {
    tokens: Vec<u32>,
}

/// The token ids in an answer to a request for the tokens of a chat.
pub(crate) fn parse_tokens(answer: &[u8]) -> Option<Vec<u32>> {
    serde_json::from_slice::<TokenizeAnswer>(answer).ok().map(|answer| answer.tokens)
}

// === impl RecordedTurn ===

impl RecordedTurn {
    /// `None`: a message is no JSON.
    pub fn new(chat: &RecordedChat<'_>) -> Option<Self> {
        let messages = chat.messages.iter().map(|text| serde_json::from_str(text).ok());
        let messages: Option<Vec<Value>> = messages.collect();
        let stop = chat.fields.get("stop");
        let has_stop = stop.is_some_and(|stop| {
            !stop.is_null() && stop != "" && stop.as_array().is_none_or(|stops| !stops.is_empty())
        });
        let replies = chat.replies.iter().map(|reply| ReplyTokens::new(reply, has_stop));
        Some(RecordedTurn {
            upstream: chat.upstream.map(str::to_string),
            model: chat.model.to_string(),
            settings: settings_of(&chat.fields),
            messages: messages?.iter().map(fingerprint::of_message).collect(),
            replies: replies.collect::<Option<_>>()?,
            prompt: chat.prompt.to_vec(),
        })
    }

    /// The approximate memory of this turn.
    pub fn bytes(&self) -> usize {
        let replies: usize = self.replies.iter().map(|reply| 64 + 4 * reply.ids.len()).sum();
        let names = self.model.len() + self.upstream.as_ref().map_or(0, String::len);
        size_of::<Self>() + names + 16 * self.messages.len() + 4 * self.prompt.len() + replies
    }

    /// The continuation of this turn by a chat.
    pub fn continued_by<'t>(&'t self, chat: &'t ChatTurn) -> Result<Continuation<'t>, FallbackReason> {
        let (at, messages) = (self.messages.len(), chat.messages());
        if chat.fingerprints.get(..at) != Some(&self.messages) {
            return Err(FallbackReason::History);
        }
        let [said, new @ ..] = &messages[at..] else { return Err(FallbackReason::History) };
        if new.is_empty() || new.iter().any(|message| message["role"] == "assistant") {
            return Err(FallbackReason::History);
        }
        let said = fingerprint::of_reply(said);
        let reply = self.replies.iter().find(|reply| reply.fingerprint == said);
        let reply = reply.ok_or(FallbackReason::History)?;
        if let Some(reason) = reply.parsed {
            return Err(reason);
        }
        if self.model != chat.model() || self.settings != chat.settings() {
            return Err(FallbackReason::Settings);
        }
        if self.prompt.is_empty() || reply.ids.is_empty() {
            return Err(FallbackReason::Ids);
        }
        Ok(Continuation { recorded: self, reply, chat })
    }
}

// === impl ReplyTokens ===

impl ReplyTokens {
    fn new(reply: &RecordedReply<'_>, has_stop: bool) -> Option<Self> {
        let message: Value = serde_json::from_str(reply.message).ok()?;
        let has = |key: &str| {
            let value = &message[key];
            !value.is_null() && value != "" && value.as_array().is_none_or(|list| !list.is_empty())
        };
        let parsed = if has("tool_calls") || has("function_call") {
            Some(FallbackReason::Tools)
        } else if fingerprint::REASONING_MEMBERS.iter().any(|key| has(key)) {
            Some(FallbackReason::Reasoning)
        } else if has("audio") {
            Some(FallbackReason::Media)
        } else {
            None
        };
        Some(ReplyTokens {
            fingerprint: fingerprint::of_reply(&message),
            ids: reply.ids.to_vec(),
            parsed,
            ends_by_token: reply.finish_reason == Some("stop") && !has_stop,
        })
    }
}

// === impl Continuation ===

impl Continuation<'_> {
    /// The requests for the tokens of the chat, and of the chat with another answer in its history.
    pub fn tokenize_bodies(&self) -> [Vec<u8>; 2] {
        let at = self.recorded.messages.len();
        let said = &self.chat.messages()[at]["content"];
        let text = said.as_str().or_else(|| said.as_array()?.last()?["text"].as_str()).unwrap_or_default();
        // A different last character, even if the template trims the text: the two texts share no last token.
        let other = if text.trim_end().ends_with('0') { "1" } else { "0" };
        [self.chat.tokenize_body(None), self.chat.tokenize_body(Some((at, other)))]
    }

    /// The token ids of the prompt. `tokens`, `probe`: the token ids from the two requests.
    pub fn prompt(&self, tokens: &[u32], probe: &[u32]) -> Result<Vec<u32>, FallbackReason> {
        let behind = common_end(tokens, probe).ok_or(FallbackReason::Template)?;
        let reply = &self.reply.ids;
        // An answer ends with or without the token that the template puts after it.
        let most = if self.reply.ends_by_token { MAX_BEFORE_END } else { 1 };
        let end = behind.iter().take(most).position(|id| reply.last() == Some(id));
        let behind = &behind[end.map_or(0, |end| end + 1)..];
        Ok([&self.recorded.prompt[..], reply, behind].concat())
    }
}

/// The common end of both; `None` when it is empty, or all of one of them.
fn common_end<'a>(one: &'a [u32], other: &[u32]) -> Option<&'a [u32]> {
    let same = one.iter().rev().zip(other.iter().rev()).take_while(|(one, other)| one == other).count();
    (same > 0 && same < one.len() && same < other.len()).then(|| &one[one.len() - same..])
}
