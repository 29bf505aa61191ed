//! Synthetic loads: shapes of traffic that public traces do not have.
//!
//! All but the agents last ten minutes and suit about eight engines of the default pace; `--rate` scales
//! them.

use super::load::{ConversationTurn, ReplayConversation, Workload};
use crate::engine::dice::{Dice, mix};

/// The tokens of a block.
const BLOCK_TOKENS: usize = 512;

/// The seconds for which new conversations arrive.
const ARRIVAL_SECONDS: f64 = 600.0;

/// A generated workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 160 sessions of 20 to 60 turns that begin within two minutes, with one prompt of 10,000 tokens in
    /// common; 1,000 to 3,000 new tokens a turn, and 4 to 20 s between an answer and the next turn.
    Agents,
    /// 8 to 20 questions to one new document of 8,000 to 32,000 tokens within 3 s.
    Rag,
    /// 16 samples of one prompt at the same moment.
    Rollouts,
    /// Thirty applications, some asked much more than others, with a prompt of 4,000 tokens each.
    Apps,
    /// Short prompts, and answers of thousands of tokens.
    Reasoning,
}

impl Shape {
    /// All shapes, in the order of the report.
    pub const ALL: [Shape; 5] = [Shape::Agents, Shape::Rag, Shape::Rollouts, Shape::Apps, Shape::Reasoning];

    /// The name on the command line and in the report.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Agents => "agents",
            Shape::Rag => "rag",
            Shape::Rollouts => "rollouts",
            Shape::Apps => "apps",
            Shape::Reasoning => "reasoning",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shape| shape.name() == name)
    }

    /// Generates the load, always the same for a seed.
    pub fn load(self, seed: u64) -> Workload {
        let mut maker = WorkloadBuilder { dice: Dice::of(seed, 1), sessions: Vec::new() };
        match self {
            Shape::Agents => maker.agents(),
            Shape::Rag => maker.rag(),
            Shape::Rollouts => maker.rollouts(),
            Shape::Apps => maker.apps(),
            Shape::Reasoning => maker.reasoning(),
        }
        Workload { block: BLOCK_TOKENS, sessions: maker.sessions }
    }
}

struct WorkloadBuilder {
    dice: Dice,
    sessions: Vec<ReplayConversation>,
}

/// The tokens that all conversations of a kind begin with.
#[derive(Clone, Copy)]
struct Common {
    kind: u64,
    tokens: usize,
}

impl WorkloadBuilder {
    fn agents(&mut self) {
        let common = Common { kind: 0, tokens: 10_000 };
        for _ in 0..160 {
            let start = self.dice.unit() * 120.0;
            let mut turns = Vec::new();
            let mut published = common.tokens;
            for turn in 0..self.dice.between(20, 60) {
                let (more, output) = (self.dice.between(1000, 3000), self.dice.between(100, 500));
                let wait = if turn == 0 { 0.0 } else { 4.0 + 16.0 * self.dice.unit() };
                // The new part of a turn is the previous answer and the results of tools.
                published += more;
                turns.push(ConversationTurn { wait, prompt: published, output });
            }
            self.session(start, common, turns);
        }
    }

    fn rag(&mut self) {
        for (document, start) in self.arrivals(1.0) {
            let common = Common { kind: document, tokens: self.dice.between(8000, 32_000) };
            for _ in 0..self.dice.between(8, 20) {
                let turn = self.turn(common, (30, 200), (100, 400));
                let start = start + self.dice.unit() * 3.0;
                self.session(start, common, vec![turn]);
            }
        }
    }

    fn rollouts(&mut self) {
        for (prompt, start) in self.arrivals(0.7) {
            let common = Common { kind: prompt, tokens: self.dice.between(1000, 8000) };
            for _ in 0..16 {
                let turn = self.turn(common, (0, 0), (500, 4000));
                self.session(start, common, vec![turn]);
                // Samples of one prompt are one conversation.
                if let Some(sample) = self.sessions.last_mut() {
                    sample.opening = Some(mix(!prompt));
                }
            }
        }
    }

    fn apps(&mut self) {
        const APPS: usize = 30;
        // The frequency is one over the rank.
        let weights: Vec<f64> = (1..=APPS).map(|rank| 1.0 / rank as f64).collect();
        let total: f64 = weights.iter().sum();
        for (_, start) in self.arrivals(20.0) {
            let mut draw = self.dice.unit() * total;
            let app = weights.iter().position(|weight| {
                draw -= weight;
                draw < 0.0
            });
            let common = Common { kind: app.unwrap_or(0) as u64, tokens: 4000 };
            let turn = self.turn(common, (50, 1000), (50, 400));
            self.session(start, common, vec![turn]);
        }
    }

    fn reasoning(&mut self) {
        let common = Common { kind: 0, tokens: 0 };
        for (_, start) in self.arrivals(4.0) {
            let turn = self.turn(common, (100, 800), (2000, 8000));
            self.session(start, common, vec![turn]);
        }
    }

    /// Returns random arrival times at `rate` a second, with their numbers.
    fn arrivals(&mut self, rate: f64) -> Vec<(u64, f64)> {
        let mut at = 0.0;
        let gaps = std::iter::repeat_with(|| {
            at += self.dice.gap(rate);
            at
        });
        (0..).zip(gaps.take_while(|at| *at < ARRIVAL_SECONDS)).collect()
    }

    fn turn(&mut self, common: Common, own: (usize, usize), output: (usize, usize)) -> ConversationTurn {
        let prompt = common.tokens + self.dice.between(own.0, own.1);
        ConversationTurn { wait: 0.0, prompt, output: self.dice.between(output.0, output.1) }
    }

    fn session(&mut self, start: f64, common: Common, turns: Vec<ConversationTurn>) {
        let number = self.sessions.len() as u64;
        let published = turns.last().map_or(0, |last| last.prompt + last.output);
        let shared = common.tokens / BLOCK_TOKENS;
        let name = |block: usize| {
            // Separate bits for blocks that a kind shares and for blocks of one conversation.
            let owner = if block < shared { common.kind << 1 } else { number << 1 | 1 };
            mix(owner << 20 | (block as u64 + 1))
        };
        let chain = (0..published / BLOCK_TOKENS).map(name).collect();
        let (opening, rewrites) = (Some(mix(!number)), Vec::new());
        self.sessions.push(ReplayConversation { start, chain, opening, turns, rewrites });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn generates_one_load_for_a_seed_and_parses_names() {
        for shape in Shape::ALL {
            assert_eq!(Shape::parse(shape.name()), Some(shape));
            assert_eq!(shape.load(3), shape.load(3));
            assert_ne!(shape.load(3), shape.load(4));
        }
        assert_eq!(Shape::parse("Agents"), None);
    }

    #[test]
    fn gives_every_block_one_predecessor() {
        for shape in Shape::ALL {
            let mut before = BTreeMap::new();
            for session in shape.load(1).sessions {
                let heads = std::iter::once(0).chain(session.chain.iter().copied());
                for (parent, block) in heads.zip(&session.chain) {
                    assert_eq!(*before.entry(*block).or_insert(parent), parent, "{shape:?}");
                }
            }
        }
    }

    #[test]
    fn generates_agents_as_described() {
        let load = Shape::Agents.load(1);
        assert_eq!(load.sessions.len(), 160);
        let common: BTreeSet<&[u64]> = load.sessions.iter().map(|session| &session.chain[..19]).collect();
        assert_eq!(common.len(), 1);
        for session in &load.sessions {
            assert!((20..=60).contains(&session.turns.len()));
            for pair in session.turns.windows(2) {
                assert!((1000..=3000).contains(&(pair[1].prompt - pair[0].prompt)));
                assert!((4.0..20.0).contains(&pair[1].wait));
                assert!(pair[0].prompt + pair[0].output <= pair[1].prompt);
            }
            let last = session.turns.last().expect("a turn");
            assert_eq!(session.chain.len(), (last.prompt + last.output) / BLOCK_TOKENS);
        }
    }

    #[test]
    fn generates_other_shapes_as_described() {
        let heads = |shape: Shape| {
            let mut heads: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
            for session in shape.load(1).sessions {
                assert_eq!(session.turns.len(), 1);
                heads.entry(session.chain[0]).or_default().push(session.start);
            }
            heads
        };
        for starts in heads(Shape::Rag).values() {
            let (first, last) = (starts.iter().copied().fold(f64::MAX, f64::min), starts.iter().copied());
            assert!((8..=20).contains(&starts.len()) && last.fold(0.0, f64::max) - first < 3.0);
        }
        for starts in heads(Shape::Rollouts).values() {
            assert!(starts.len() == 16 && starts.iter().all(|start| *start == starts[0]));
        }
        assert_eq!(heads(Shape::Apps).len(), 30);
        let reasoning = Shape::Reasoning.load(1);
        assert!(reasoning.sessions.iter().all(|session| session.turns[0].output >= 2000));
        assert!((2000..2800).contains(&reasoning.requests()), "{}", reasoning.requests());
    }
}
