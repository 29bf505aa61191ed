//! `vllm-lb simulate`: replays traffic through the routing code on a virtual clock.
//!
//! ```text
//! vllm-lb simulate --trace conversation_trace.jsonl --upstreams 16 --policies work,least-requests
//! vllm-lb simulate --shape agents --upstreams 12 --balancers 4 --interval 20ms
//! ```

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::values;
use crate::simulate::Setup;
use crate::simulate::policy::ReplayPolicy;
use crate::simulate::shapes::Shape;

/// The default size of the caches: 2,000 blocks of 512 tokens; smaller than the load for agents.
const CACHE_TOKENS: usize = 2000 * 512;
const CACHE_TOKENS_OF_AGENTS: usize = 1500 * 512;

const POLICIES: &str = "\
Policies:
  work, prefix, least-requests, round-robin   the presets of `balance`
  oracle             work, with sight of every engine's real cache and queue
  threshold-switch   warmest, or shortest queue when load is uneven (SGLang gateway, vllm-router)
  scorers            held share, queue and cache in use, by metrics of every second (llm-d)
  bounded-hash       consistent hashing of the prompt's start, load at most 1.25 of even (KubeAI)
  prefill-decode     blocks to prefill and blocks in use (Dynamo)
  active-hits        requests in flight, less the held share

Columns: share of prompt tokens that caches had; seconds to the first token (mean, median, 90th and
99th percentile); time between tokens; seconds to the end; requests on the engine with most of them
(1 is even); engines that had none; median error of the forecasts of the first token.

Examples:
  vllm-lb simulate --trace trace.jsonl --upstreams 16 --policies work,least-requests,oracle
  vllm-lb simulate --shape agents --upstreams 12
  vllm-lb simulate --trace trace.jsonl --balancers 4 --interval never

  vllm-lb traces export > calls.jsonl && vllm-lb simulate --trace calls.jsonl --policies work,prefix

A trace has one JSON object a line. Its form is that of Mooncake's traces: timestamp (ms), input_length,
output_length and hash_ids of blocks of 512 tokens; or that of captured calls, as `vllm-lb traces
export` and `GET /sessions/{id}/traces?format=jsonl` write them. Captured calls of a session wait for
the answers before them, as with --closed, and then for as long as they did when they were recorded.";

/// Replay traffic through the routing code on a virtual clock, one row a policy
#[derive(Clone, Debug, Args)]
#[command(after_help = POLICIES)]
pub struct SimulateArgs {
    /// File with the requests to replay: a trace of Mooncake's form, or captured calls
    #[arg(long, value_name = "FILE", required_unless_present = "shape", conflicts_with = "shape")]
    pub trace: Option<PathBuf>,
    /// Made-up traffic: agents, rag, rollouts, apps or reasoning
    #[arg(long, value_name = "NAME", value_parser = shape)]
    pub shape: Option<Shape>,
    /// Simulated upstreams
    #[arg(long, value_name = "N", default_value = "8", value_parser = upstreams)]
    pub upstreams: usize,
    /// Let each turn of a conversation wait for the answer before it, so that no engine can be flooded; by
    /// default turns come by the clock
    #[arg(long)]
    pub closed: bool,
    /// Balancers, each with a random share of the requests
    #[arg(long, value_name = "N", default_value = "1", value_parser = balancers)]
    pub balancers: usize,
    /// How often balancers tell each other what they know: a duration, or never
    #[arg(long, default_value = "20ms", value_parser = interval)]
    pub interval: Interval,
    /// Policies to compare, separated by commas [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = policy)]
    pub policies: Vec<ReplayPolicy>,
    /// Where all chance comes from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Tokens that each engine's cache holds [default: 1024000, of agents 768000]
    #[arg(long, value_name = "N", value_parser = cache_tokens)]
    pub cache_tokens: Option<usize>,
    /// How many times faster than about one H100 the engines are
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = factor)]
    pub speed: f64,
    /// How many times faster the requests come
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = factor)]
    pub rate: f64,
    /// Print one JSON object a policy instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Parses the interval between two messages of a balancer; `None`: no messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(pub Option<Duration>);

// === impl SimulateArgs ===

impl SimulateArgs {
    /// The setup of the replay, with the defaults of its shape.
    pub fn setup(&self) -> Setup {
        let agents = self.shape == Some(Shape::Agents);
        let cache = if agents { CACHE_TOKENS_OF_AGENTS } else { CACHE_TOKENS };
        Setup {
            upstreams: self.upstreams,
            balancers: self.balancers,
            open: !self.closed,
            interval: self.interval.0.map(|interval| interval.as_secs_f64()),
            cache_tokens: self.cache_tokens.unwrap_or(cache),
            speed: self.speed,
            seed: self.seed,
        }
    }

    pub fn policies(&self) -> &[ReplayPolicy] {
        if self.policies.is_empty() { &ReplayPolicy::ALL } else { &self.policies }
    }
}

fn shape(name: &str) -> Result<Shape, String> {
    Shape::parse(name).ok_or_else(|| format!("allowed are {}", Shape::ALL.map(Shape::name).join(", ")))
}

fn policy(name: &str) -> Result<ReplayPolicy, String> {
    ReplayPolicy::parse(name)
        .ok_or_else(|| format!("allowed are {}", ReplayPolicy::ALL.map(ReplayPolicy::name).join(", ")))
}

fn interval(text: &str) -> Result<Interval, String> {
    if text == "never" {
        return Ok(Interval(None));
    }
    let range = Duration::from_millis(1)..=Duration::from_secs(3600);
    values::duration_in(range)(text).map(|interval| Interval(Some(interval)))
}

fn upstreams(text: &str) -> Result<usize, String> {
    values::integer_in(1..=1024)(text)
}

fn balancers(text: &str) -> Result<usize, String> {
    values::integer_in(1..=64)(text)
}

fn cache_tokens(text: &str) -> Result<usize, String> {
    values::integer_in(512..=1 << 40)(text)
}

fn factor(text: &str) -> Result<f64, String> {
    values::number_in(0.001..=1000.0)(text)
}
