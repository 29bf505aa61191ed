//! Reads captured calls as a load: the JSON lines of `GET /sessions/{id}/traces?format=jsonl` and of
//! `vllm-lb traces export`, one call a line.
//!
//! ```text
//! {"session_id": "s", "timestamp": 1760000000.25, "latency_ms": 812.5, "prompt_token_ids": [1, 2], …}
//! ```
//!
//! Successive calls of a session are the turns of a conversation, with the recorded waits between an answer
//! and the next turn. Overlapping calls of a session are separate conversations. A prompt without token ids
//! counts as its text, at four bytes a token. Calls without an answer or without a recorded prompt are left
//! out.
//!
//! Of each call only numbers and the hashes of its blocks are kept: about a twelfth of the size of its token
//! ids as JSON.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::load::{ChainRewrite, ConversationTurn, ReplayConversation, Workload};

/// The tokens of a block, as in the caches of engines.
pub(super) const BLOCK_TOKENS: usize = 16;

/// The bytes of a token id, and about the bytes of a token's text.
const TOKEN_BYTES: usize = 4;

/// The largest number of tokens of a call.
const MAX_TOKENS: u64 = 1 << 32;

/// The largest number of a session's latest conversations that its next call may continue.
const MAX_OPEN_CONVERSATIONS: usize = 64;

/// The session of calls without one, which continue no conversation.
const UNNAMED: &str = "unnamed";

/// The tolerance for rounded times: a call may begin this much before the answer that it follows has ended.
const ROUNDING_SECONDS: f64 = 0.001;

#[derive(Deserialize)]
struct CapturedLine<'a> {
    session_id: String,
    timestamp: f64,
    latency_ms: Option<f64>,
    status: Option<u16>,
    prompt_token_ids: Option<Vec<u32>>,
    completion_token_ids: Option<Vec<u32>>,
    token_counts: Option<TokenCounts>,
    #[serde(borrow)]
    messages: Option<Vec<&'a RawValue>>,
    #[serde(borrow)]
    response_message: Option<&'a RawValue>,
    #[serde(borrow)]
    raw_request: Option<CapturedRequest<'a>>,
}

#[derive(Deserialize)]
struct TokenCounts {
    completion: Option<u64>,
}

/// The parts of a request's prompt other than the messages.
#[derive(Deserialize)]
struct CapturedRequest<'a> {
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    #[serde(borrow)]
    system: Option<&'a RawValue>,
    #[serde(borrow)]
    instructions: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
}

struct CapturedCall {
    session: usize,
    /// Seconds since 1970.
    begun: f64,
    ended: f64,
    prompt: usize,
    output: usize,
    /// The full blocks of the prompt, and of the answer if it has token ids.
    chain: Vec<u64>,
}

/// Collects captured calls; see the module.
#[derive(Default)]
pub(super) struct CapturedCalls {
    calls: Vec<CapturedCall>,
    sessions: HashMap<String, usize>,
    /// The number of sessions, including those without a name.
    session_count: usize,
    left_out: usize,
}

/// A conversation that the next call of its session may continue.
struct OpenConversation {
    number: usize,
    ended: f64,
}

/// Computes the chained hashes of the full blocks of its input.
#[derive(Default)]
struct BlockHasher {
    chain: Vec<u64>,
    rest: Vec<u8>,
    bytes: usize,
}

/// Returns the text of an error without "at line 1 column 7": the caller reports the line of the file.
pub(super) fn without_place(error: serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_owned()
}

// === impl CapturedCalls ===

impl CapturedCalls {
    /// Adds the call of a line.
    pub(super) fn add(&mut self, text: &str) -> Result<(), String> {
        let line: CapturedLine<'_> = serde_json::from_str(text).map_err(without_place)?;
        let latency = line.latency_ms.unwrap_or(0.0) / 1000.0;
        if !line.timestamp.is_finite() || line.timestamp < 0.0 {
            return Err(format!("timestamp {} is no time", line.timestamp));
        }
        if !latency.is_finite() || latency < 0.0 {
            return Err("latency_ms must not be below 0".into());
        }
        let (Some(output), Some((prompt, chain))) = (line.output()?, line.prompt()?) else {
            self.left_out += 1;
            return Ok(());
        };
        let session = self.session(line.session_id);
        let (begun, ended) = (line.timestamp, line.timestamp + latency);
        self.calls.push(CapturedCall { session, begun, ended, prompt, output, chain });
        Ok(())
    }

    /// Returns the number of calls without an answer or without a recorded prompt.
    pub(super) fn left_out(&self) -> usize {
        self.left_out
    }

    /// The workload of all read calls, in the order of time.
    pub(super) fn load(mut self) -> Workload {
        self.calls.sort_by(|one, other| one.begun.total_cmp(&other.begun));
        let first = self.calls.first().map_or(0.0, |call| call.begun);
        let mut conversations: Vec<ReplayConversation> = Vec::new();
        let mut open: Vec<Vec<OpenConversation>> = Vec::new();
        open.resize_with(self.session_count, Vec::new);
        for call in self.calls {
            let open = &mut open[call.session];
            let shared = |one: &OpenConversation| {
                let chain = conversations[one.number].last_chain();
                chain.iter().zip(&call.chain).take_while(|(one, other)| one == other).count()
            };
            let followed = (0..open.len())
                .filter(|at| open[*at].ended <= call.begun + ROUNDING_SECONDS)
                .max_by(|one, other| {
                    let by_end = open[*one].ended.total_cmp(&open[*other].ended);
                    shared(&open[*one]).cmp(&shared(&open[*other])).then(by_end)
                });
            let turn = |wait| ConversationTurn { wait, prompt: call.prompt, output: call.output };
            if let Some(at) = followed {
                let OpenConversation { number, ended } = open.remove(at);
                conversations[number].add_turn(turn((call.begun - ended).max(0.0)), call.chain);
                open.push(OpenConversation { number, ended: call.ended });
                continue;
            }
            if open.len() == MAX_OPEN_CONVERSATIONS {
                open.remove(0);
            }
            open.push(OpenConversation { number: conversations.len(), ended: call.ended });
            let (start, turns) = (call.begun - first, vec![turn(0.0)]);
            conversations.push(ReplayConversation {
                start,
                chain: call.chain,
                opening: None,
                turns,
                rewrites: Vec::new(),
            });
        }
        Workload { block: BLOCK_TOKENS, sessions: conversations }
    }

    fn session(&mut self, name: String) -> usize {
        let next = self.session_count;
        let number = if name == UNNAMED { next } else { *self.sessions.entry(name).or_insert(next) };
        self.session_count += usize::from(number == next);
        number
    }
}

// === impl CapturedLine ===

impl CapturedLine<'_> {
    /// Returns the tokens of the answer; `None` when there was none.
    fn output(&self) -> Result<Option<usize>, String> {
        if self.status.is_some_and(|status| status >= 400) {
            return Ok(None);
        }
        let ids = self.completion_token_ids.as_ref().map_or(0, Vec::len);
        let counted = self.token_counts.as_ref().and_then(|counts| counts.completion);
        if counted.is_some_and(|counted| counted > MAX_TOKENS) {
            return Err("token_counts.completion is out of range".into());
        }
        let message = self.response_message.map_or(0, |message| message.get().len());
        // A message may be empty braces.
        let estimated = if message > 2 { message.div_ceil(TOKEN_BYTES) } else { 0 };
        let output = [ids, counted.unwrap_or(0) as usize, estimated].into_iter().find(|tokens| *tokens > 0);
        Ok(output)
    }

    /// Returns the tokens of the prompt, and the blocks of prompt and answer; `None` when no prompt was
    /// recorded.
    fn prompt(&self) -> Result<Option<(usize, Vec<u64>)>, String> {
        let mut hasher = BlockHasher::default();
        let ids = self.prompt_token_ids.as_deref().unwrap_or_default();
        if !ids.is_empty() {
            hasher.feed_ids(ids);
            hasher.feed_ids(self.completion_token_ids.as_deref().unwrap_or_default());
            return Ok(Some((ids.len(), hasher.chain)));
        }
        let texts =
            self.raw_request.as_ref().map(|raw| [raw.tools, raw.system, raw.instructions, raw.prompt]);
        let messages = self.messages.iter().flatten().copied();
        for text in texts.into_iter().flatten().flatten().chain(messages) {
            hasher.feed(text.get().as_bytes());
        }
        match hasher.bytes.div_ceil(TOKEN_BYTES) {
            0 if self.prompt_token_ids.is_none() && self.messages.is_none() => {
                Err("neither prompt_token_ids nor messages are in it".into())
            }
            0 => Ok(None),
            tokens => Ok(Some((tokens, hasher.chain))),
        }
    }
}

// === impl BlockHasher ===

impl BlockHasher {
    fn feed_ids(&mut self, ids: &[u32]) {
        ids.iter().for_each(|id| self.feed(&id.to_le_bytes()));
    }

    fn feed(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len();
        while !bytes.is_empty() {
            let (piece, behind) =
                bytes.split_at(bytes.len().min(BLOCK_TOKENS * TOKEN_BYTES - self.rest.len()));
            self.rest.extend_from_slice(piece);
            bytes = behind;
            if self.rest.len() == BLOCK_TOKENS * TOKEN_BYTES {
                let parent = self.chain.last().copied().unwrap_or(0);
                self.chain.push(xxh3_64_with_seed(&self.rest, parent));
                self.rest.clear();
            }
        }
    }
}

// === impl ReplayConversation ===

impl ReplayConversation {
    /// Adds a turn whose prompt and answer have these blocks.
    fn add_turn(&mut self, turn: ConversationTurn, chain: Vec<u64>) {
        let from = self.turns.len();
        self.turns.push(turn);
        if self.last_chain().starts_with(&chain) {
            return;
        }
        let extends = chain.starts_with(self.last_chain());
        match self.rewrites.last_mut() {
            Some(last) if extends => last.chain = chain,
            None if extends => self.chain = chain,
            _ => self.rewrites.push(ChainRewrite { from, chain }),
        }
    }
}

#[cfg(test)]
mod tests;
