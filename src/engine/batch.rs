//! The pace of a simulated vLLM: continuous batching, chunked prefill and a prefix cache, on any clock.
//!
//! The engine works in steps. A step takes one token from every sequence that is decoding and spends what is
//! left of its token budget on prefill, first of sequences already running, then of waiting ones, in order of
//! arrival. A step lasts
//!
//! ```text
//! (per_step + prefill tokens * per_prefill_token + decoding * per_sequence
//!           + their context tokens * per_context_token) / speed
//! ```
//!
//! and its tokens are reported at its end. Leading blocks of a prompt that the cache holds are not computed
//! again, except the last token's block, as in vLLM. A request starts only when the cache has room for its
//! prompt and answer; real engines preempt instead, here `num_preemptions` stays zero.
//!
//! Nothing here reads a clock: `now` is seconds on whatever axis the caller likes, so the same engine runs an
//! hour of a trace within seconds, or paces real sockets. Calls must come with a `now` that never goes back.

use std::collections::VecDeque;

use super::cache::{BlockHash, Cache};

/// How long work takes, in seconds, and how much faster than that to run.
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
    /// Tokens in a block.
    pub block_size: usize,
    /// Tokens the cache can hold.
    pub cache_tokens: usize,
    /// Sequences in a batch.
    pub max_running: usize,
    /// Requests that may wait; more are refused. `None`: no limit.
    pub max_waiting: Option<usize>,
    /// Tokens a step may compute.
    pub step_tokens: usize,
    /// Whether every token is reported; else only the first and the end, which is enough for a long replay.
    pub tell_tokens: bool,
}

/// One sequence to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineRequest {
    /// The caller's name for it, unique among those in flight.
    pub id: u64,
    pub prompt_tokens: usize,
    /// Tokens it will generate; 0 ends it with its prefill, as an embedding does.
    pub output_tokens: usize,
    /// Hashes of the full blocks of prompt and answer, as far as the caller knows them.
    pub chain: Vec<BlockHash>,
    /// Why it will end, if it is not aborted.
    pub finish: Finish,
    /// Whether held blocks may be used; not so when the client wants logprobs of the prompt.
    pub use_cache: bool,
}

/// Why a sequence ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    Stop,
    Length,
}

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineRefusal {
    /// As many requests wait as may.
    QueueFull,
    /// It would not fit into the cache, even alone.
    TooLarge,
}

/// Something that happened to the request `id`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineEvent {
    pub at: f64,
    pub id: u64,
    pub kind: EngineEventKind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EngineEventKind {
    FirstToken { cached_tokens: usize },
    Token,
    Finished(GenerationSummary),
}

/// The life of a finished request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GenerationSummary {
    pub reason: Finish,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub output_tokens: usize,
    /// When it came, was first scheduled, and had its first token.
    pub arrived: f64,
    pub started: f64,
    pub first_token: f64,
}

/// Totals since the engine began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Prompt tokens looked up in the cache, and found.
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
    /// Blocks promised to running sequences and not yet taken.
    reserved: usize,
    /// When the step under way ends.
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
    /// Prompt tokens whose computation is done, cached ones included.
    computed: usize,
    /// Tokens the step under way computes for it.
    planned: usize,
    generated: usize,
    /// Leading blocks of its chain that it pins, and all blocks it may come to need.
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
    /// Everything at once: for tests that ask what is answered, not when.
    pub fn instant() -> Self {
        Self { per_step: 0.0, per_prefill_token: 0.0, per_sequence: 0.0, per_context_token: 0.0, speed: 1.0 }
    }

    /// The default, so many times faster.
    pub fn faster(speed: f64) -> Self {
        Self { speed, ..Self::default() }
    }

    /// How long a step of this content takes.
    pub fn step(&self, prefill_tokens: usize, decoding: usize, context_tokens: usize) -> f64 {
        let seconds = self.per_step
            + prefill_tokens as f64 * self.per_prefill_token
            + decoding as f64 * self.per_sequence
            + context_tokens as f64 * self.per_context_token;
        seconds / self.speed
    }
}

// === impl Limits ===

impl Default for EngineLimits {
    fn default() -> Self {
        Self {
            block_size: 16,
            cache_tokens: 262_144,
            max_running: 256,
            max_waiting: None,
            step_tokens: 8_192,
            tell_tokens: true,
        }
    }
}

// === impl Engine ===

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

    /// Blocks the cache has room for.
    pub fn capacity_blocks(&self) -> usize {
        self.cache.capacity()
    }

    /// Share of the cache that running sequences use, 0 to 1; blocks kept for later do not count.
    pub fn kv_usage(&self) -> f64 {
        let begun = |seq: &Sequence| {
            (seq.computed + seq.generated).div_ceil(self.limits.block_size).saturating_sub(seq.pins)
        };
        let used = self.cache.pinned() + self.running.iter().map(begun).sum::<usize>();
        used as f64 / self.cache.capacity().max(1) as f64
    }

    /// Leading blocks of `chain` that the cache holds now.
    pub fn held(&self, chain: &[BlockHash]) -> usize {
        self.cache.held(chain)
    }

    /// Requests whose prompt is not computed yet, in order, and the tokens left; `None`: it has not begun.
    pub fn prefills(&self) -> impl Iterator<Item = (u64, Option<usize>)> {
        let left = |seq: &Sequence| (seq.request.id, Some(seq.request.prompt_tokens - seq.computed));
        let begun = self.running.iter().filter(|seq| !seq.is_decoding()).map(left);
        begun.chain(self.waiting.iter().map(|seq| (seq.request.id, None)))
    }

    /// Takes a request in. It begins at once when no step is under way.
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

    /// Drops a request that waits or runs, and frees what it held. `false`: there is none of this name.
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

    /// When `advance` will next have something to do, if nothing else comes.
    pub fn next_event_time(&self) -> Option<f64> {
        self.step_ends
    }

    /// Ends every step that is over by `now`, and tells what they produced, in order.
    pub fn advance(&mut self, now: f64) -> Vec<EngineEvent> {
        let mut events = Vec::new();
        while let Some(ends) = self.step_ends.filter(|&ends| ends <= now) {
            self.step_ends = None;
            self.end_step(ends, &mut events);
            self.begin_if_idle(ends);
        }
        events
    }

    /// Another pace, from the next step on.
    pub fn set_timing(&mut self, timing: Timing) {
        self.timing = timing;
    }

    /// Stops after the step under way; requests wait until `resume`.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    pub fn resume(&mut self, now: f64) {
        self.paused = false;
        self.begin_if_idle(now);
    }

    pub fn paused(&self) -> bool {
        self.paused
    }

    /// Empties the cache; `false` while requests hold blocks.
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
            seq.planned = seq.wants().min(budget);
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
            seq.planned = seq.wants().min(budget);
            budget -= seq.planned;
            prefill += seq.planned;
            self.running.push(seq);
        }
        if !self.running.is_empty() {
            self.counters.steps += 1;
            self.step_ends = Some(now + self.timing.step(prefill, decoding, context));
        }
    }

    /// Takes the request that waits longest, if the cache has room for all it may need.
    fn admit(&mut self, now: f64) -> Option<Sequence> {
        let request = &self.waiting.front()?.request;
        // The last token is always computed, so a block that it completes is no hit.
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
                && (self.limits.tell_tokens || kind != EngineEventKind::Token)
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

    /// Books what the step did for one sequence.
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

    /// Blocks that became full enter the cache. The newest token has no entry in it until the next step.
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

    /// Tokens the next step should compute for it.
    fn wants(&self) -> usize {
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
