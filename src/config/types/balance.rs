//! How an upstream is chosen: the weights, the sets of them, and what is remembered to choose by.

/// Weights of the formula in `pick`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    pub preset: Preset,
    pub backlog: f64,
    pub missing: f64,
    /// Of what is missing, for each request that is answered meanwhile.
    pub stall: f64,
    /// A block of the prompt costs whole until so many conversations for each candidate went through it, or
    /// fewer hold it than its part of all conversations needs; see `state::prefix_index`.
    pub share: f64,
    pub active: f64,
    pub context: f64,
}

impl Default for Balance {
    fn default() -> Self {
        Preset::Work.balance()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    Work,
    Prefix,
    LeastRequests,
    RoundRobin,
}

impl Preset {
    /// The names that a configuration may use, for messages.
    pub const NAMES: [&'static str; 4] = ["work", "prefix", "least-requests", "round-robin"];

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "work" => Some(Preset::Work),
            "prefix" => Some(Preset::Prefix),
            "least-requests" => Some(Preset::LeastRequests),
            "round-robin" => Some(Preset::RoundRobin),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Preset::Work => "work",
            Preset::Prefix => "prefix",
            Preset::LeastRequests => "least-requests",
            Preset::RoundRobin => "round-robin",
        }
    }

    /// The weights that the preset stands for.
    pub fn balance(self) -> Balance {
        let zero = Balance {
            preset: self,
            backlog: 0.0,
            missing: 0.0,
            stall: 0.0,
            share: 2.0,
            active: 0.0,
            context: 0.0,
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

/// What is remembered of the prompts that were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixIndex {
    /// The most blocks, counted for each upstream that holds them; 0 remembers nothing.
    pub blocks: usize,
    /// Bytes of decoded text in a block.
    pub block_bytes: usize,
}

impl Default for PrefixIndex {
    fn default() -> Self {
        PrefixIndex { blocks: 4_000_000, block_bytes: 512 }
    }
}
