//! The index and the cost formula together, over simple engines: prompts are prefilled one after the other,
//! and decoding takes a fixed time.

use super::*;
use crate::config::types::Balance;
use crate::pick::forecast::terms::ForecastTerms;
use crate::pick::{Candidate, DrawSeed, pick};
use crate::prompt::chain::thinning::last_stored;

/// The tokens of a block of 512 bytes.
const BLOCK_TOKENS: f64 = 128.0;
/// The tokens that an engine prefills in a second.
const PREFILL_PACE: f64 = 8000.0;
/// The seconds from the first byte to the last.
const DECODE_SECONDS: f64 = 4.0;
/// The knob of shared blocks.
const SHARE: f64 = 2.0;
/// A time after all earlier requests have ended.
const LATER: f64 = 1000.0;

struct BurstRequest {
    at: usize,
    uncached: u64,
    tokens: u64,
    first_byte: f64,
    end: f64,
}

struct BurstFleet {
    index: Index,
    at: Vec<Slot>,
    /// When each engine has prefilled all its prompts.
    free: Vec<f64>,
    flights: Vec<BurstRequest>,
    /// The blocks in the cache of each engine.
    caches: Vec<BTreeSet<u64>>,
    hits: Hits,
    share: f64,
    random: u64,
}

// === impl BurstFleet ===

impl BurstFleet {
    fn new(engines: usize, share: f64, seed: u64) -> Self {
        let index = Index::new(1_000_000, seed);
        let at = slots(&index, engines);
        let free = vec![0.0; engines];
        let (flights, caches) = (Vec::new(), vec![BTreeSet::new(); engines]);
        BurstFleet { index, at, free, flights, caches, hits: Hits::default(), share, random: seed }
    }

    fn candidate(&self, engine: usize, now: f64) -> Candidate {
        let here = || self.flights.iter().filter(|flight| flight.at == engine && flight.end > now);
        let tokens = (self.hits.length() as f64 * BLOCK_TOKENS) as u64;
        let mut candidate = Candidate {
            index: engine,
            backlog: here().filter(|flight| flight.first_byte > now).map(|flight| flight.uncached).sum(),
            missing: tokens,
            active: here().count() as u64,
            context: here().map(|flight| flight.tokens).sum(),
            weight: 1.0,
            session_penalty: 0,
            cold: tokens,
            hit: 0,
            uncached: tokens,
            own_backlog: 0,
            head_millis: 0,
            terms: ForecastTerms::default(),
        };
        let prompt = PromptSize { tokens, block_tokens: BLOCK_TOKENS };
        self.hits.weigh(Some(self.at[engine]), &self.hits.terms(prompt), &mut candidate);
        candidate
    }

    /// Sends a request to the engine that the formula chooses, and returns the engine.
    fn send(&mut self, chain: &[u64], end: Option<u64>, now: f64) -> usize {
        self.index.lookup(chain, &mut self.hits);
        self.hits.charge(self.share, self.at.len());
        let all: Vec<Candidate> = (0..self.at.len()).map(|engine| self.candidate(engine, now)).collect();
        self.random = self.random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        let seed = DrawSeed { random: self.random, ..DrawSeed::default() };
        let at = pick(&all, &Balance::default(), seed).expect("there are engines").index;
        self.put(chain, end, at, now);
        at
    }

    fn put(&mut self, chain: &[u64], end: Option<u64>, at: usize, now: f64) {
        self.index.learn(chain, end, self.at[at]);
        let cached = chain.iter().take_while(|block| self.caches[at].contains(*block)).count();
        self.caches[at].extend(chain);
        let uncached = ((chain.len() - cached) as f64 * BLOCK_TOKENS) as u64;
        let first_byte = self.free[at].max(now) + uncached as f64 / PREFILL_PACE;
        self.free[at] = first_byte;
        let tokens = (chain.len() as f64 * BLOCK_TOKENS) as u64;
        self.flights.push(BurstRequest {
            at,
            uncached,
            tokens,
            first_byte,
            end: first_byte + DECODE_SECONDS,
        });
    }
}

/// Returns a prompt of `common` blocks that all prompts of a kind share, and `own` blocks of its own.
fn prompt(kind: u64, common: u64, own: u64, number: u64) -> Vec<u64> {
    let common = (1..=common).map(|block| kind << 48 | block);
    common.chain((1..=own).map(|block| kind << 48 | (number + 1) << 20 | block)).collect()
}

/// Runs sixteen engines, the first warm with one prompt of 10,000 tokens from `warm` conversations, then six
/// times a hundred new conversations at `rate` a second. Returns how many of each hundred each engine got.
fn hundreds(share: f64, warm: u64, rate: f64, own: u64) -> Vec<[u64; 16]> {
    let mut fleet = BurstFleet::new(16, share, 7);
    // A conversation without a block of its own is distinguished by its opening.
    let end = |number: u64| (own == 0).then_some(1 << 60 | number);
    for number in 0..warm {
        fleet.put(&prompt(1, 78, own, number), end(number), 0, 0.0);
    }
    let hundred = |hundred: u64| {
        let mut got = [0; 16];
        for number in hundred * 100..hundred * 100 + 100 {
            let chain = prompt(1, 78, own, warm + number);
            got[fleet.send(&chain, end(warm + number), LATER + number as f64 / rate)] += 1;
        }
        got
    };
    (0..6).map(hundred).collect()
}

fn most(got: &[u64]) -> u64 {
    got.iter().copied().max().unwrap_or(0)
}

/// Twice the fair share of one of sixteen engines in a hundred, which is 6.25.
const TWICE_ITS_SHARE: u64 = 12;

#[test]
fn spreads_conversations_with_one_system_prompt_beyond_the_warm_engine() {
    for warm in [1, 200] {
        for (rate, own) in [(1.0, 4), (3.0, 4), (3.0, 0), (10.0, 4), (20.0, 0)] {
            for got in hundreds(SHARE, warm, rate, own) {
                assert!(most(&got) <= TWICE_ITS_SHARE, "{warm} before, {rate} a second: {got:?}");
            }
        }
    }
}

/// When a hundred requests arrive before the other engines have prefilled the prompt, the warm engine
/// finishes sooner and gets more of them, and fewer of the next hundred.
#[test]
fn prefers_the_warm_engine_in_a_rush_until_others_are_warm() {
    for (warm, rate, own) in [(1, 50.0, 4), (200, 50.0, 0), (1, 1e6, 4), (200, 1e6, 0)] {
        for pair in hundreds(SHARE, warm, rate, own).chunks(2) {
            let got: Vec<u64> = pair[0].iter().zip(&pair[1]).map(|(one, other)| one + other).collect();
            assert!(most(&got) <= 2 * TWICE_ITS_SHARE, "{pair:?}");
        }
    }
}

#[test]
fn without_a_discount_a_system_prompt_leaves_engines_idle() {
    let got = hundreds(f64::MAX, 200, 10.0, 4)[0];
    let idle = got.iter().filter(|got| **got == 0).count();
    assert!(idle >= 7 && most(&got) > TWICE_ITS_SHARE, "{got:?}");
}

/// Thirty-two requests at once, before any first byte. Each used engine prefills the prefix once.
#[test]
fn spreads_a_burst_by_the_cost_of_another_prefill() {
    // Common blocks, own blocks, earlier other conversations; the engines that prefill the common blocks,
    // and the largest number of requests on one.
    let table = [
        (16, 1, 300, 8, 4),
        (125, 1, 300, 8, 12),
        (500, 1, 300, 6, 17),
        // The only prompt so far: every engine in use will need it.
        (16, 1, 0, 8, 4),
        (125, 1, 0, 8, 4),
        (500, 1, 0, 8, 4),
        // Samples of one prompt are one conversation, and no evidence of others.
        (16, 0, 0, 7, 5),
        (125, 0, 0, 3, 13),
        (500, 0, 0, 2, 18),
    ];
    for (common, own, before, prefills, longest) in table {
        let mut fleet = BurstFleet::new(8, SHARE, 7);
        (0..before).for_each(|number| fleet.put(&prompt(4, 0, 3, number), None, number as usize % 8, 0.0));
        let mut got = [0; 8];
        for number in 0..32 {
            let chain = prompt(2, common, own, number);
            // The opening is the whole prompt.
            let end =
                chain.last().map(|last| last | 1 << 62).filter(|_| last_stored(chain.len()) < chain.len());
            got[fleet.send(&chain, end, LATER)] += 1;
        }
        let used = got.iter().filter(|got| **got > 0).count();
        assert_eq!(
            (used, most(&got)),
            (prefills, longest),
            "{common} blocks in common, {own} of each, {before} before: {got:?}"
        );
    }
}

/// Ten conversations side by side, ten turns each, with one system prompt, on four engines.
#[test]
fn keeps_conversations_on_their_engines_and_uses_all_engines() {
    let mut fleet = BurstFleet::new(4, SHARE, 7);
    let mut turns = vec![Vec::new(); 10];
    for turn in 0..10 {
        for (number, at) in (0..).zip(&mut turns) {
            let chain = prompt(3, 20, 8 + 8 * turn, number);
            at.push(fleet.send(&chain, None, turn as f64 * 10.0));
        }
    }
    assert!(turns.iter().all(|at| at.iter().all(|engine| *engine == at[0])), "{turns:?}");
    let on = |engine: usize| turns.iter().filter(|at| at[0] == engine).count();
    assert!((0..4).all(|engine| (2..=3).contains(&on(engine))), "{turns:?}");
}
