//! What is played: the load of `vllm-lb simulate`, cut to its first minutes, as texts.
//!
//! A block is a text of its own of 512 words, each a token of the simulated engines, so a prompt of so many
//! tokens is the first so many words of its conversation. The answer of a turn stands in the next prompt as
//! words that are made up as well: they are no cache hit, for any balancer.

use std::path::Path;

use clap::ValueEnum;
use serde_json::json;
use vllm_lb::engine::dice::{Dice, mix};
use vllm_lb::simulate::load::{ConversationTurn, ReplayConversation, Workload};
use vllm_lb::simulate::shapes::Shape;
use vllm_lb::simulate::trace;

/// The bytes of a word: a space and three letters.
const WORD_BYTES: usize = 4;

/// The tokens of an engine's cache, as `vllm-lb simulate` has them by default.
const CACHE_TOKENS: usize = 1_024_000;
const AGENTS_CACHE_TOKENS: usize = 768_000;

/// The seed of all chance.
const SEED: u64 = 1;

/// The kinds of traffic that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrafficKind {
    /// A trace of requests of conversations.
    Conversation,
    /// Coding agents that send their turns by the clock.
    Agents,
    /// Coding agents that send a turn when they have the answer to the one before.
    AgentsClosed,
    /// Bursts of questions to one document.
    Rag,
}

/// A conversation as text.
pub struct PlannedSession {
    /// Seconds from the beginning.
    pub start: f64,
    pub turns: Vec<ConversationTurn>,
    words: String,
}

// === impl TrafficKind ===

impl TrafficKind {
    pub fn is_closed(self) -> bool {
        self == TrafficKind::AgentsClosed
    }

    pub fn cache_tokens(self) -> usize {
        match self {
            TrafficKind::Conversation | TrafficKind::Rag => CACHE_TOKENS,
            TrafficKind::Agents | TrafficKind::AgentsClosed => AGENTS_CACHE_TOKENS,
        }
    }
}

// === impl PlannedSession ===

impl PlannedSession {
    fn new(number: usize, session: ReplayConversation, block: usize) -> Self {
        let tokens = session.turns.last().map_or(0, |turn| turn.prompt);
        let mut words = String::with_capacity(tokens * WORD_BYTES);
        for hash in session.chain.iter().take(tokens / block) {
            add_words(*hash, block, &mut words);
        }
        let rest = tokens - words.len() / WORD_BYTES;
        add_words(mix(!(number as u64)), rest, &mut words);
        PlannedSession { start: session.start, turns: session.turns, words }
    }

    /// The request of a turn.
    pub fn body(&self, turn: usize) -> String {
        let ConversationTurn { prompt, output, .. } = self.turns[turn];
        body(&self.words[..prompt * WORD_BYTES], output)
    }
}

fn body(prompt: &str, output: usize) -> String {
    json!({
        "model": "sim", "prompt": prompt, "max_tokens": output, "stream": true,
        "stream_options": {"include_usage": true},
    })
    .to_string()
}

fn add_words(seed: u64, words: usize, text: &mut String) {
    let mut dice = Dice::of(seed, 17);
    for _ in 0..words {
        let mut drawn = dice.roll();
        text.push(' ');
        for _ in 1..WORD_BYTES {
            text.push(char::from(b'a' + (drawn % 26) as u8));
            drawn /= 26;
        }
    }
}

/// A request that no other resembles.
pub fn short_request(number: u64) -> String {
    let mut prompt = String::new();
    add_words(u64::MAX - number, 4, &mut prompt);
    body(&prompt, 2)
}

/// The load of the first minutes.
pub fn load(kind: TrafficKind, path: Option<&Path>, minutes: f64, rate: f64) -> Result<Workload, String> {
    let load = match (kind, path) {
        (TrafficKind::Conversation, None) => return Err("conversations need --trace".into()),
        (TrafficKind::Conversation, Some(path)) => {
            let text =
                std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            trace::parse(&text, SEED)?
        }
        (TrafficKind::Agents | TrafficKind::AgentsClosed, _) => Shape::Agents.load(SEED),
        (TrafficKind::Rag, _) => Shape::Rag.load(SEED),
    };
    let mut load = load.faster(rate);
    load.sessions.iter_mut().for_each(|session| cut(session, minutes * 60.0));
    load.sessions.retain(|session| !session.turns.is_empty());
    load.sessions.sort_by(|one, other| one.start.total_cmp(&other.start));
    Ok(load)
}

/// Leaves the turns out that would come later by the clock.
fn cut(session: &mut ReplayConversation, seconds: f64) {
    let mut due = session.start;
    let early = session.turns.iter().take_while(|turn| {
        due += turn.wait;
        due < seconds
    });
    let kept = early.count();
    session.turns.truncate(kept);
}

/// The sessions of a load as texts.
pub fn sessions(load: &Workload) -> Vec<PlannedSession> {
    let session =
        |(number, of): (usize, &ReplayConversation)| PlannedSession::new(number, of.clone(), load.block);
    load.sessions.iter().enumerate().map(session).collect()
}
