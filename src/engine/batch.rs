//! The pace of a simulated vLLM: continuous batching, chunked prefill and a prefix cache, on any clock.
//!
//! The engine works in steps. A step computes one token of every decoding sequence and spends the rest of its
//! budget on prefill, first of running sequences, then of waiting ones in order of arrival. A step lasts
//!
//! ```text
//! (per_step + prefill tokens * per_prefill_token + decoding * per_sequence
//!           + their context tokens * per_context_token) / speed
//! ```
//!
//! and its tokens are reported at its end. Leading blocks of a prompt that the cache holds are not computed
//! again, except the last token's block, as in vLLM. A request starts only when the cache has room for it;
//! real engines preempt instead. Pure: `now` is seconds on any clock, and must never decrease.

use std::collections::VecDeque;

use super::cache::{BlockHash, Cache};

/// The duration of work, in seconds, and the factor by which the engine runs faster.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    pub per_step: f64,
    pub per_prefill_token: f64,
    pub per_sequence: f64,
    pub per_context_token: f64,
    pub speed: f64,
}

/// The sizes of the engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineLimits {
    /// The tokens of a block.
    pub block_size: usize,
    /// The tokens that the cache can hold.
    pub cache_tokens: usize,
    /// The largest number of sequences in a batch.
    pub max_running: usize,
    /// The largest number of waiting requests; more are rejected. `None`: no limit.
    pub max_waiting: Option<usize>,
    /// The largest number of tokens that a step computes.
    pub step_tokens: usize,
    /// Whether every token is reported; otherwise only the first and the end, which is enough for a replay.
    pub report_tokens: bool,
}

/// One sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRequest {
    /// The caller's id of the request, unique among those in flight.
    pub id: u64,
    pub prompt_tokens: usize,
    /// The number of tokens to generate; 0 ends the request with its prefill, as for an embedding.
    pub output_tokens: usize,
    /// The hashes of the full blocks of prompt and answer, as far as the caller knows them.
    pub chain: Vec<BlockHash>,
    /// Why the request will end, if it is not aborted.
    pub finish: Finish,
    /// Whether cached blocks may be used; false when the client requests logprobs of the prompt.
    pub use_cache: bool,
}

/// Why a sequence ended without being aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
}

/// Why a request was rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineRefusal {
    /// The largest number of requests wait already.
    QueueFull,
    /// The request would not fit into the cache, even alone.
    TooLarge,
}

/// An event of the request `id`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineEvent {
    pub at: f64,
    pub id: u64,
    pub kind: EngineEventKind,
}

/// What happened to a request in a step of the engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EngineEventKind {
    FirstToken { cached_tokens: usize },
    Token,
    Finished(GenerationSummary),
}

/// The counts and times of a finished request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerationSummary {
    pub reason: Finish,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub output_tokens: usize,
    /// When the request arrived, was first scheduled, and had its first token.
    pub arrived: f64,
    pub started: f64,
    pub first_token: f64,
}

/// Totals since the engine started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens that were looked up in the cache, and those that were found.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    pub finished_stop: u64,
    pub finished_length: u64,
    pub aborted: u64,
    pub refused: u64,
    pub steps: u64,
}

/// One simulated engine.
#[derive(Debug)]
pub struct SimulatedEngine {
    limits: EngineLimits,
    timing: Timing,
    cache: Cache,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// Blocks that are reserved for running sequences and not yet pinned.
    reserved: usize,
    /// When the present step ends.
    step_ends: Option<f64>,
    paused: bool,
    counters: Counters,
}

#[derive(Debug)]
struct Sequence {
    request: EngineRequest,
    arrived: f64,
    started: f64,
    first_token: f64,
    cached: usize,
    /// The computed prompt tokens, including cached ones.
    computed: usize,
    /// The tokens that the present step computes for the sequence.
    planned: usize,
    generated: usize,
    /// The number of pinned leading blocks, and the number of blocks needed at most.
    pins: usize,
    blocks: usize,
}

// === impl Timing ===

impl Default for Timing {
    /// About one H100 with a model of middle size: 8,000 prefill tokens a second, 12 ms a step.
    fn default() -> Self {
        Self {
            per_step: 0.010,
            per_prefill_token: 1.0 / 8_000.0,
            per_sequence: 0.000_1,
            per_context_token: 2e-8,
            speed: 1.0,
        }
    }
}

impl Timing {
    /// Zero durations, for tests of answers rather than times.
    pub fn instant() -> Self {
        Self { per_step: 0.0, per_prefill_token: 0.0, per_sequence: 0.0, per_context_token: 0.0, speed: 1.0 }
    }

    /// The default pace, `speed` times faster.
    pub fn faster(speed: f64) -> Self {
        Self { speed, ..Self::default() }
    }

    /// Returns the duration of a step.
    pub fn step(&self, prefill_tokens: usize, decoding: usize, context_tokens: usize) -> f64 {
        let seconds = self.per_step
            + prefill_tokens as f64 * self.per_prefill_token
            + decoding as f64 * self.per_sequence
            + context_tokens as f64 * self.per_context_token;
        seconds / self.speed
    }
}

// === impl EngineLimits ===

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            block_size: 16,
            cache_tokens: 262_144,
            max_running: 256,
            max_waiting: None,
            step_tokens: 8_192,
            report_tokens: true,
        }
    }
}

// === impl SimulatedEngine ===

impl SimulatedEngine {
    pub fn new(limits: EngineLimits, timing: Timing) -> Self {
        let cache = Cache::new(limits.cache_tokens / limits.block_size);
        Self {
            limits,
            timing,
            cache,
            waiting: VecDeque::new(),
            running: Vec::new(),
            reserved: 0,
            step_ends: None,
            paused: false,
            counters: Counters::default(),
        }
    }

    pub fn limits(&self) -> &EngineLimits {
        &self.limits
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Returns the number of blocks that the cache has room for.
    pub fn capacity_blocks(&self) -> usize {
        self.cache.capacity()
    }

    /// Returns the share of the cache that running sequences use, 0 to 1, without blocks that are only
    /// cached.
    pub fn kv_usage(&self) -> f64 {
        let begun = |seq: &Sequence| {
            (seq.computed + seq.generated).div_ceil(self.limits.block_size).saturating_sub(seq.pins)
        };
        let used = self.cache.pinned() + self.running.iter().map(begun).sum::<usize>();
        used as f64 / self.cache.capacity().max(1) as f64
    }

    /// Returns the number of leading blocks of `chain` that the cache holds.
    pub fn held(&self, chain: &[BlockHash]) -> usize {
        self.cache.held(chain)
    }

    /// Returns the requests with an incomplete prefill in order, and the tokens left; `None`: not yet
    /// started.
    pub fn prefills(&self) -> impl Iterator<Item = (u64, Option<usize>)> {
        let left = |seq: &Sequence| (seq.request.id, Some(seq.request.prompt_tokens - seq.computed));
        let begun = self.running.iter().filter(|seq| !seq.is_decoding()).map(left);
        begun.chain(self.waiting.iter().map(|seq| (seq.request.id, None)))
    }

    /// Adds a request, which starts at once when no step is running.
    pub fn submit(&mut self, now: f64, request: EngineRequest) -> Result<(), EngineRefusal> {
        let blocks = (request.prompt_tokens + request.output_tokens).div_ceil(self.limits.block_size);
        if blocks > self.cache.capacity() {
            self.counters.refused += 1;
            return Err(EngineRefusal::TooLarge);
        }
        if self.limits.max_waiting.is_some_and(|limit| self.waiting.len() >= limit) {
            self.counters.refused += 1;
            return Err(EngineRefusal::QueueFull);
        }
        self.waiting.push_back(Sequence {
            request,
            arrived: now,
            started: now,
            first_token: now,
            cached: 0,
            computed: 0,
            planned: 0,
            generated: 0,
            pins: 0,
            blocks,
        });
        self.begin_if_idle(now);
        Ok(())
    }

    /// Drops a waiting or running request and frees its blocks. Returns `false` when there is no such
    /// request.
    pub fn abort(&mut self, id: u64) -> bool {
        if let Some(at) = self.waiting.iter().position(|seq| seq.request.id == id) {
            self.waiting.remove(at);
        } else if let Some(at) = self.running.iter().position(|seq| seq.request.id == id) {
            let seq = self.running.remove(at);
            self.cache.release(&seq.request.chain[..seq.pins]);
            self.reserved -= seq.blocks - seq.pins;
        } else {
            return false;
        }
        self.counters.aborted += 1;
        if self.running.is_empty() && self.waiting.is_empty() {
            self.step_ends = None;
        }
        true
    }

    /// Returns when the present step ends.
    pub fn next_event_time(&self) -> Option<f64> {
        self.step_ends
    }

    /// Ends every step that is over at `now`, and returns the events in order.
    pub fn advance(&mut self, now: f64) -> Vec<EngineEvent> {
        let mut events = Vec::new();
        while let Some(ends) = self.step_ends.filter(|&ends| ends <= now) {
            self.step_ends = None;
            self.end_step(ends, &mut events);
            self.begin_if_idle(ends);
        }
        events
    }

    /// Sets the pace from the next step on.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// Stops after the present step; requests wait until `resume`.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Resumes the steps after a pause.
    pub fn resume(&mut self, now: f64) {
        self.paused = false;
        self.begin_if_idle(now);
    }

    pub fn paused(&self) -> bool {
        self.paused
    }

    /// Empties the cache; returns `false` while requests hold blocks.
    pub fn clear_cache(&mut self) -> bool {
        self.cache.clear()
    }

    fn begin_if_idle(&mut self, now: f64) {
        if self.step_ends.is_some() || self.paused {
            return;
        }
        let mut budget = self.limits.step_tokens;
        let (mut prefill, mut decoding, mut context) = (0, 0, 0);
        for seq in &mut self.running {
            seq.planned = seq.needed().min(budget);
            budget -= seq.planned;
            if seq.is_decoding() {
                decoding += seq.planned;
                context += seq.computed + seq.generated;
            } else {
                prefill += seq.planned;
            }
        }
        while budget > 0 && self.running.len() < self.limits.max_running {
            let Some(mut seq) = self.admit(now) else { break };
            seq.planned = seq.needed().min(budget);
            budget -= seq.planned;
            prefill += seq.planned;
            self.running.push(seq);
        }
        if !self.running.is_empty() {
            self.counters.steps += 1;
            self.step_ends = Some(now + self.timing.step(prefill, decoding, context));
        }
    }

    /// Admits the request that waits longest, if the cache has room for all its blocks.
    fn admit(&mut self, now: f64) -> Option<Sequence> {
        let request = &self.waiting.front()?.request;
        // The last token is always computed, so the block that it completes is not a hit.
        let usable = request.prompt_tokens.saturating_sub(1) / self.limits.block_size;
        let usable = if request.use_cache { usable.min(request.chain.len()) } else { 0 };
        let hits = self.cache.held(&request.chain[..usable]);
        let more = self.cache.free_among(&request.chain[..hits]) + self.waiting.front()?.blocks - hits;
        if self.cache.pinned() + self.reserved + more > self.cache.capacity() {
            return None;
        }
        let mut seq = self.waiting.pop_front()?;
        for &hash in &seq.request.chain[..hits] {
            self.cache.pin(hash);
        }
        seq.pins = hits;
        self.reserved += seq.blocks - hits;
        seq.started = now;
        seq.cached = hits * self.limits.block_size;
        seq.computed = seq.cached;
        if seq.request.use_cache {
            self.counters.prefix_queries += seq.request.prompt_tokens as u64;
            self.counters.prefix_hits += seq.cached as u64;
        }
        Some(seq)
    }

    fn end_step(&mut self, now: f64, events: &mut Vec<EngineEvent>) {
        let mut running = std::mem::take(&mut self.running);
        running.retain_mut(|seq| {
            if seq.planned == 0 {
                return true;
            }
            if let Some(kind) = self.work(seq, now)
                && (self.limits.report_tokens || kind != EngineEventKind::Token)
            {
                events.push(EngineEvent { at: now, id: seq.request.id, kind });
            }
            self.pin_computed(seq);
            let done = seq.is_decoding() && seq.generated >= seq.request.output_tokens;
            if done {
                let kind = EngineEventKind::Finished(seq.summary());
                events.push(EngineEvent { at: now, id: seq.request.id, kind });
                self.retire(seq);
            }
            !done
        });
        self.running = running;
    }

    /// Applies the step to one sequence.
    fn work(&mut self, seq: &mut Sequence, now: f64) -> Option<EngineEventKind> {
        let was_decoding = seq.is_decoding();
        if !was_decoding {
            seq.computed += seq.planned;
            if !seq.is_decoding() {
                return None;
            }
            self.counters.prompt_tokens += seq.request.prompt_tokens as u64;
            seq.first_token = now;
        }
        if seq.generated >= seq.request.output_tokens {
            return None;
        }
        seq.generated += 1;
        self.counters.generation_tokens += 1;
        let first = EngineEventKind::FirstToken { cached_tokens: seq.cached };
        Some(if was_decoding { EngineEventKind::Token } else { first })
    }

    /// Pins the blocks that became full. The newest token enters the cache with the next step.
    fn pin_computed(&mut self, seq: &mut Sequence) {
        let tokens = seq.computed + seq.generated.saturating_sub(1);
        let full = (tokens / self.limits.block_size).min(seq.request.chain.len()).min(seq.blocks);
        while seq.pins < full && self.cache.pin(seq.request.chain[seq.pins]) {
            seq.pins += 1;
            self.reserved -= 1;
        }
    }

    fn retire(&mut self, seq: &Sequence) {
        self.cache.release(&seq.request.chain[..seq.pins]);
        self.reserved -= seq.blocks - seq.pins;
        match seq.request.finish {
            Finish::Stop => self.counters.finished_stop += 1,
            Finish::Length => self.counters.finished_length += 1,
        }
    }
}

// === impl Sequence ===

impl Sequence {
    fn is_decoding(&self) -> bool {
        self.computed >= self.request.prompt_tokens
    }

    /// Returns the tokens that the next step should compute for the sequence.
    fn needed(&self) -> usize {
        if self.is_decoding() { 1 } else { self.request.prompt_tokens - self.computed }
    }

    fn summary(&self) -> GenerationSummary {
        GenerationSummary {
            reason: self.request.finish,
            prompt_tokens: self.request.prompt_tokens,
            cached_tokens: self.cached,
            output_tokens: self.generated,
            arrived: self.arrived,
            started: self.started,
            first_token: self.first_token,
        }
    }
}

#[cfg(test)]
mod tests;
