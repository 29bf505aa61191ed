//! How an upstream is chosen: the weights, their presets, and the size of the prefix index.

use crate::config::setting::NamedChoice;

/// The weights of the formula in `pick`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    pub preset: Preset,
    pub backlog: f64,
    pub missing: f64,
    /// Added to `missing` for each request in flight, whose answer pauses while the prompt is read.
    pub stall: f64,
    /// The conversations per candidate from which on a block that they share costs less; see
    /// `state::prefix_index`.
    pub share: f64,
    pub active: f64,
    pub context: f64,
    /// The share by which predicted cached tokens may be wrong; see `fleet::sight`.
    pub sight_error: f64,
}

impl Default for Balance {
    fn default() -> Self {
        Preset::Work.balance()
    }
}

/// A named set of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    Work,
    Prefix,
    LeastRequests,
    RoundRobin,
}

impl NamedChoice for Preset {
    const NAMES: &'static [&'static str] = &["work", "prefix", "least-requests", "round-robin"];
    const VALUES: &'static [Self] =
        &[Preset::Work, Preset::Prefix, Preset::LeastRequests, Preset::RoundRobin];
}

impl Preset {
    /// The weights of the preset.
    pub fn balance(self) -> Balance {
        let zero = Balance {
            preset: self,
            backlog: 0.0,
            missing: 0.0,
            stall: 0.0,
            share: 2.0,
            active: 0.0,
            context: 0.0,
            sight_error: 0.5,
        };
        let prefix = Balance { missing: 2.0, stall: 0.1, active: 400.0, context: 0.05, ..zero };
        match self {
            Preset::Work => Balance { backlog: 1.0, ..prefix },
            Preset::Prefix => prefix,
            Preset::LeastRequests => Balance { active: 1.0, ..zero },
            Preset::RoundRobin => zero,
        }
    }
}

/// What becomes of a request when no upstream's forecast meets its `x-slo-ttft-ms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SloRule {
    /// The header is not read.
    #[default]
    Ignore,
    /// The request waits in the queue until a forecast meets it.
    Queue,
    /// The request is rejected.
    Reject,
}

impl NamedChoice for SloRule {
    const NAMES: &'static [&'static str] = &["ignore", "queue", "reject"];
    const VALUES: &'static [Self] = &[SloRule::Ignore, SloRule::Queue, SloRule::Reject];
}

/// The size of the index of the prompts that were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixIndex {
    /// The most blocks, counted once for each upstream that holds them; 0 turns the index off. `None`: by the
    /// caches of the engines.
    pub blocks: Option<usize>,
    /// Bytes of decoded text in a block.
    pub block_bytes: usize,
}

impl Default for PrefixIndex {
    fn default() -> Self {
        PrefixIndex { blocks: None, block_bytes: 512 }
    }
}
