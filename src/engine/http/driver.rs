//! Drives the pure engine on the real clock and reports progress to each request.
//!
//! One task ends the steps at their times. A request receives its progress through a `watch`: the number of
//! tokens rather than the tokens, so that memory is bounded with a slow reader. A `Generation` is a request
//! in the engine; dropping it before its end aborts the request.
//!
//! The lock is never held across an await.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant, sleep_until};

use super::latency::Latencies;
use crate::engine::batch::{
    Counters, EngineEventKind, EngineLimits, EngineRefusal, EngineRequest, SimulatedEngine, Timing,
};

/// Runs the batches of an engine in real time.
pub(super) struct Driver {
    inner: Mutex<DriverInner>,
    wake: Notify,
    clock: Instant,
    limits: EngineLimits,
}

struct DriverInner {
    engine: SimulatedEngine,
    sinks: HashMap<u64, ProgressSink>,
    next_id: u64,
    latencies: Latencies,
    /// The configured pace, without a fault.
    timing: Timing,
}

/// Where the progress of one engine request is reported.
struct ProgressSink {
    progress: Arc<watch::Sender<GenerationProgress>>,
    choice: usize,
}

/// The progress of a generation, by choice.
#[derive(Debug, Clone, Default)]
struct GenerationProgress {
    cached_tokens: usize,
    choices: Vec<ChoiceProgress>,
}

#[derive(Debug, Clone, Default)]
struct ChoiceProgress {
    tokens: usize,
    ended: bool,
    aborted: bool,
}

/// The state of the engine in numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct EngineGauges {
    pub running: usize,
    pub waiting: usize,
    pub kv_usage: f64,
    pub blocks: usize,
    pub counters: Counters,
}

/// One request with its `n` choices in the engine. Dropping it aborts the choices that have not ended.
pub(super) struct Generation {
    driver: Arc<Driver>,
    ids: Vec<u64>,
    progress: watch::Receiver<GenerationProgress>,
    /// The progress that `next` has reported, by choice.
    reported: Vec<ChoiceProgress>,
    /// The number of tokens of each choice.
    lengths: Vec<usize>,
    begun: bool,
}

/// One step of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The prefill is done.
    Begun {
        cached_tokens: usize,
    },
    Token {
        choice: usize,
        index: usize,
        last: bool,
    },
    /// The engine aborted the choice.
    Aborted {
        choice: usize,
    },
    End,
}

// === impl Driver ===

impl Driver {
    pub(super) fn new(limits: EngineLimits, timing: Timing) -> Self {
        let inner = DriverInner {
            engine: SimulatedEngine::new(limits.clone(), timing),
            sinks: HashMap::new(),
            next_id: 0,
            latencies: Latencies::default(),
            timing,
        };
        Self { inner: Mutex::new(inner), wake: Notify::new(), clock: Instant::now(), limits }
    }

    /// Ends the steps at their times, until dropped.
    pub(super) async fn run(&self) {
        loop {
            let next = self.advance();
            // Steps may take no time at all; other tasks must still run.
            tokio::task::yield_now().await;
            match next {
                Some(at) => {
                    let due = self.clock + Duration::from_secs_f64(at);
                    tokio::select! {
                        () = sleep_until(due) => {}
                        () = self.wake.notified() => {}
                    }
                }
                None => self.wake.notified().await,
            }
        }
    }

    /// Submits `requests`, the choices of one answer, to the engine, and assigns their ids.
    pub(super) fn begin(self: &Arc<Self>, requests: Vec<EngineRequest>) -> Result<Generation, EngineRefusal> {
        let choices = vec![ChoiceProgress::default(); requests.len()];
        let (sender, progress) =
            watch::channel(GenerationProgress { cached_tokens: 0, choices: choices.clone() });
        let sender = Arc::new(sender);
        let lengths = requests.iter().map(|request| request.output_tokens).collect();
        let mut generation = Generation {
            driver: Arc::clone(self),
            ids: Vec::new(),
            progress,
            reported: choices,
            lengths,
            begun: false,
        };
        for (choice, mut request) in requests.into_iter().enumerate() {
            let mut inner = self.lock();
            // Read under the lock, so that the engine's time never decreases.
            let now = self.now();
            inner.next_id += 1;
            request.id = inner.next_id;
            inner.engine.submit(now, request.clone())?;
            inner.sinks.insert(request.id, ProgressSink { progress: Arc::clone(&sender), choice });
            generation.ids.push(request.id);
        }
        self.wake.notify_one();
        Ok(generation)
    }

    /// Returns a generation that is aborted at once, as by a draining engine.
    pub(super) fn aborted(self: &Arc<Self>, choices: usize) -> Generation {
        let aborted = ChoiceProgress { aborted: true, ..ChoiceProgress::default() };
        let (_, progress) =
            watch::channel(GenerationProgress { cached_tokens: 0, choices: vec![aborted; choices] });
        Generation {
            driver: Arc::clone(self),
            ids: Vec::new(),
            progress,
            reported: vec![ChoiceProgress::default(); choices],
            lengths: vec![0; choices],
            begun: false,
        }
    }

    /// The load and the counters of the engine.
    pub(super) fn gauges(&self) -> EngineGauges {
        let inner = self.lock();
        EngineGauges {
            running: inner.engine.running(),
            waiting: inner.engine.waiting(),
            kv_usage: inner.engine.kv_usage(),
            blocks: inner.engine.capacity_blocks(),
            counters: *inner.engine.counters(),
        }
    }

    pub(super) fn latencies(&self) -> Latencies {
        self.lock().latencies.clone()
    }

    /// Resets the engine, as a new process.
    pub(super) fn restart(&self) {
        let mut inner = self.lock();
        inner.engine = SimulatedEngine::new(self.limits.clone(), inner.timing);
        inner.sinks.clear();
        inner.latencies = Latencies::default();
    }

    /// Aborts every request, as a sleeping or dying engine does.
    pub(super) fn abort_all(&self) {
        let mut inner = self.lock();
        for (id, sink) in std::mem::take(&mut inner.sinks) {
            inner.engine.abort(id);
            inner.latencies.forget(id);
            sink.progress.send_modify(|progress| progress.choices[sink.choice].aborted = true);
        }
    }

    /// Sets the pace to `1/factor` of the configured speed.
    pub(super) fn slow_down(&self, factor: f64) {
        let mut inner = self.lock();
        let timing = Timing { speed: inner.timing.speed / factor, ..inner.timing };
        inner.engine.set_timing(timing);
    }

    pub(super) fn pause(&self) {
        self.lock().engine.pause();
    }

    /// Resumes the steps after a pause.
    pub(super) fn resume(&self) {
        let mut inner = self.lock();
        inner.engine.resume(self.now());
        drop(inner);
        self.wake.notify_one();
    }

    pub(super) fn paused(&self) -> bool {
        self.lock().engine.paused()
    }

    pub(super) fn clear_cache(&self) -> bool {
        self.lock().engine.clear_cache()
    }

    fn now(&self) -> f64 {
        self.clock.elapsed().as_secs_f64()
    }

    fn advance(&self) -> Option<f64> {
        let mut inner = self.lock();
        let now = self.now();
        let events = inner.engine.advance(now);
        for event in events {
            let DriverInner { sinks, latencies, .. } = &mut *inner;
            latencies.record(&event);
            let Some(ProgressSink { progress, choice }) = sinks.get(&event.id) else { continue };
            progress.send_modify(|progress| {
                match event.kind {
                    EngineEventKind::FirstToken { cached_tokens } => {
                        // Later choices hit the prompt of the first one, which is no hit of the client.
                        if *choice == 0 {
                            progress.cached_tokens = cached_tokens;
                        }
                        progress.choices[*choice].tokens += 1;
                    }
                    EngineEventKind::Token => progress.choices[*choice].tokens += 1,
                    EngineEventKind::Finished(_) => progress.choices[*choice].ended = true,
                }
            });
            if matches!(event.kind, EngineEventKind::Finished(_)) {
                sinks.remove(&event.id);
            }
        }
        inner.engine.next_event_time()
    }

    fn abort(&self, ids: &[u64]) {
        let mut inner = self.lock();
        for id in ids {
            if inner.sinks.remove(id).is_some() {
                inner.engine.abort(*id);
                inner.latencies.forget(*id);
            }
        }
        drop(inner);
        // Waiting requests may start.
        self.wake.notify_one();
    }

    /// Locks the state. After a panic elsewhere the numbers are still consistent.
    fn lock(&self) -> MutexGuard<'_, DriverInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Generation ===

impl Generation {
    /// Waits for the next step; returns `End` again after `End`.
    pub(super) async fn next(&mut self) -> Step {
        loop {
            if let Some(step) = self.ready() {
                return step;
            }
            if self.progress.changed().await.is_err() {
                // The engine was restarted; the connection is being closed.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for the end; returns the number of cached prompt tokens.
    pub(super) async fn finish(&mut self) -> usize {
        let mut cached = 0;
        loop {
            match self.next().await {
                Step::Begun { cached_tokens } => cached = cached_tokens,
                Step::End => return cached,
                Step::Token { .. } | Step::Aborted { .. } => {}
            }
        }
    }

    /// Returns the reported tokens of a choice, and whether the engine aborted it.
    pub(super) fn reported(&self, choice: usize) -> (usize, bool) {
        (self.reported[choice].tokens, self.reported[choice].aborted)
    }

    fn ready(&mut self) -> Option<Step> {
        let progress = self.progress.borrow_and_update();
        let began = progress.choices.iter().any(|choice| choice.tokens > 0 || choice.ended || choice.aborted);
        if !self.begun && began {
            self.begun = true;
            return Some(Step::Begun { cached_tokens: progress.cached_tokens });
        }
        for (choice, (reported, now)) in self.reported.iter_mut().zip(&progress.choices).enumerate() {
            if reported.tokens < now.tokens {
                let index = reported.tokens;
                reported.tokens += 1;
                return Some(Step::Token { choice, index, last: reported.tokens == self.lengths[choice] });
            }
            if now.aborted && !reported.aborted {
                reported.aborted = true;
                return Some(Step::Aborted { choice });
            }
            reported.ended = now.ended;
        }
        self.reported.iter().all(|choice| choice.ended || choice.aborted).then_some(Step::End)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.driver.abort(&self.ids);
    }
}
