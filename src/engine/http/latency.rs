//! vLLM's histograms, filled from the engine's events. Runs under the engine's lock, so that a token may
//! only cost the search for its bucket.

use std::collections::HashMap;

use crate::engine::batch::{EngineEvent, EngineEventKind};

const SECONDS_FIRST: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const SECONDS_BETWEEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const SECONDS_WHOLE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const TOKEN_BUCKETS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0,
    50_000.0,
];

/// A histogram of seconds, in the buckets of vLLM's metrics.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    pub bounds: &'static [f64],
    /// The observations of each bucket, not cumulated; the last bucket is above all bounds.
    pub counts: Vec<u64>,
    pub sum: f64,
}

/// The histograms of latencies that vLLM reports.
#[derive(Debug, Clone)]
pub(super) struct Latencies {
    pub time_to_first_token: Histogram,
    pub inter_token: Histogram,
    pub e2e: Histogram,
    pub queue: Histogram,
    pub inference: Histogram,
    pub prefill: Histogram,
    pub decode: Histogram,
    pub prompt_tokens: Histogram,
    pub generation_tokens: Histogram,
    /// The time of the latest token of each running request.
    latest: HashMap<u64, f64>,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            time_to_first_token: Histogram::new(SECONDS_FIRST),
            inter_token: Histogram::new(SECONDS_BETWEEN),
            e2e: Histogram::new(SECONDS_WHOLE),
            queue: Histogram::new(SECONDS_WHOLE),
            inference: Histogram::new(SECONDS_WHOLE),
            prefill: Histogram::new(SECONDS_WHOLE),
            decode: Histogram::new(SECONDS_WHOLE),
            prompt_tokens: Histogram::new(TOKEN_BUCKETS),
            generation_tokens: Histogram::new(TOKEN_BUCKETS),
            latest: HashMap::new(),
        }
    }
}

impl Latencies {
    /// Records the latencies that end with an event.
    pub(super) fn record(&mut self, event: &EngineEvent) {
        match event.kind {
            EngineEventKind::FirstToken { .. } => {
                self.latest.insert(event.id, event.at);
            }
            EngineEventKind::Token => {
                if let Some(before) = self.latest.insert(event.id, event.at) {
                    self.inter_token.observe(event.at - before);
                }
            }
            EngineEventKind::Finished(life) => {
                self.latest.remove(&event.id);
                self.time_to_first_token.observe(life.first_token - life.arrived);
                self.e2e.observe(event.at - life.arrived);
                self.queue.observe(life.started - life.arrived);
                self.inference.observe(event.at - life.started);
                self.prefill.observe(life.first_token - life.started);
                self.decode.observe(event.at - life.first_token);
                self.prompt_tokens.observe(life.prompt_tokens as f64);
                self.generation_tokens.observe(life.output_tokens as f64);
            }
        }
    }

    /// Forgets a request that will not finish.
    pub(super) fn forget(&mut self, id: u64) {
        self.latest.remove(&id);
    }
}
