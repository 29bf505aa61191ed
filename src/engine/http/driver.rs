//! Drives the pure engine on the real clock and reports progress to each request.
//!
//! One task ends the steps when their time has come. A request learns its progress through a `watch`: a
//! number of tokens, not the tokens, so a slow reader makes nothing pile up. A `Generation` is the request's
//! hold on the engine; dropped before its end, for whatever reason, it aborts.
//!
//! It must never hold its lock across an await.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::time::{Duration, Instant, sleep_until};

use super::latency::Latencies;
use crate::engine::batch::{
    Counters, EngineEventKind, EngineLimits, EngineRefusal, EngineRequest, SimulatedEngine, Timing,
};

pub struct Driver {
    inner: Mutex<DriverInner>,
    wake: Notify,
    clock: Instant,
    limits: EngineLimits,
}

struct DriverInner {
    engine: SimulatedEngine,
    seats: HashMap<u64, ProgressSink>,
    next_id: u64,
    latencies: Latencies,
    /// The pace when nothing slows it.
    timing: Timing,
}

/// Where the progress of one engine request is reported.
struct ProgressSink {
    progress: Arc<watch::Sender<GenerationProgress>>,
    choice: usize,
}

/// How far a generation is, one entry a choice.
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

/// The engine as numbers.
#[derive(Debug, Clone, Copy)]
pub struct EngineGauges {
    pub running: usize,
    pub waiting: usize,
    pub kv_usage: f64,
    pub blocks: usize,
    pub counters: Counters,
}

/// One request in flight, `n` choices of it. Dropping it aborts what has not ended.
pub struct Generation {
    driver: Arc<Driver>,
    ids: Vec<u64>,
    progress: watch::Receiver<GenerationProgress>,
    /// What `next` has told, one entry a choice.
    told: Vec<ChoiceProgress>,
    /// Tokens each choice will have.
    lengths: Vec<usize>,
    begun: bool,
}

/// What happens next in a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The prefill is done.
    Begun {
        cached_tokens: usize,
    },
    Token {
        choice: usize,
        index: usize,
        last: bool,
    },
    /// The engine ended the choice before its time.
    Aborted {
        choice: usize,
    },
    End,
}

// === impl Driver ===

impl Driver {
    pub fn new(limits: EngineLimits, timing: Timing) -> Self {
        let inner = DriverInner {
            engine: SimulatedEngine::new(limits.clone(), timing),
            seats: HashMap::new(),
            next_id: 0,
            latencies: Latencies::default(),
            timing,
        };
        Self { inner: Mutex::new(inner), wake: Notify::new(), clock: Instant::now(), limits }
    }

    /// Ends steps in time, until dropped.
    pub async fn run(&self) {
        loop {
            let next = self.advance();
            // Steps may take no time at all; the other tasks must come to their turn.
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

    /// Hands `requests`, the choices of one answer, to the engine; ids are given here.
    pub fn begin(self: &Arc<Self>, requests: Vec<EngineRequest>) -> Result<Generation, EngineRefusal> {
        let choices = vec![ChoiceProgress::default(); requests.len()];
        let (sender, progress) =
            watch::channel(GenerationProgress { cached_tokens: 0, choices: choices.clone() });
        let sender = Arc::new(sender);
        let lengths = requests.iter().map(|request| request.output_tokens).collect();
        let mut generation = Generation {
            driver: Arc::clone(self),
            ids: Vec::new(),
            progress,
            told: choices,
            lengths,
            begun: false,
        };
        for (choice, mut request) in requests.into_iter().enumerate() {
            let mut inner = self.lock();
            // Read under the lock, so that the engine's time never goes back.
            let now = self.now();
            inner.next_id += 1;
            request.id = inner.next_id;
            inner.engine.submit(now, request.clone())?;
            inner.seats.insert(request.id, ProgressSink { progress: Arc::clone(&sender), choice });
            generation.ids.push(request.id);
        }
        self.wake.notify_one();
        Ok(generation)
    }

    /// A generation that the engine turned away at once, as a draining one does.
    pub fn aborted(self: &Arc<Self>, choices: usize) -> Generation {
        let aborted = ChoiceProgress { aborted: true, ..ChoiceProgress::default() };
        let (_, progress) =
            watch::channel(GenerationProgress { cached_tokens: 0, choices: vec![aborted; choices] });
        Generation {
            driver: Arc::clone(self),
            ids: Vec::new(),
            progress,
            told: vec![ChoiceProgress::default(); choices],
            lengths: vec![0; choices],
            begun: false,
        }
    }

    pub fn gauges(&self) -> EngineGauges {
        let inner = self.lock();
        EngineGauges {
            running: inner.engine.running(),
            waiting: inner.engine.waiting(),
            kv_usage: inner.engine.kv_usage(),
            blocks: inner.engine.capacity_blocks(),
            counters: *inner.engine.counters(),
        }
    }

    pub fn latencies(&self) -> Latencies {
        self.lock().latencies.clone()
    }

    /// Forgets everything, as a process that starts anew.
    pub fn restart(&self) {
        let mut inner = self.lock();
        inner.engine = SimulatedEngine::new(self.limits.clone(), inner.timing);
        inner.seats.clear();
        inner.latencies = Latencies::default();
    }

    /// Ends every request in flight, as a sleeping or dying engine does.
    pub fn abort_all(&self) {
        let mut inner = self.lock();
        for (id, seat) in std::mem::take(&mut inner.seats) {
            inner.engine.abort(id);
            inner.latencies.forget(id);
            seat.progress.send_modify(|progress| progress.choices[seat.choice].aborted = true);
        }
    }

    /// Runs at `1/factor` of the configured speed.
    pub fn slow_down(&self, factor: f64) {
        let mut inner = self.lock();
        let timing = Timing { speed: inner.timing.speed / factor, ..inner.timing };
        inner.engine.set_timing(timing);
    }

    pub fn pause(&self) {
        self.lock().engine.pause();
    }

    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.engine.resume(self.now());
        drop(inner);
        self.wake.notify_one();
    }

    pub fn paused(&self) -> bool {
        self.lock().engine.paused()
    }

    pub fn clear_cache(&self) -> bool {
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
            let DriverInner { seats, latencies, .. } = &mut *inner;
            latencies.record(&event);
            let Some(ProgressSink { progress, choice }) = seats.get(&event.id) else { continue };
            progress.send_modify(|progress| {
                match event.kind {
                    EngineEventKind::FirstToken { cached_tokens } => {
                        // Later choices find the prompt of the first, which says nothing of the client's.
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
                seats.remove(&event.id);
            }
        }
        inner.engine.next_event_time()
    }

    fn abort(&self, ids: &[u64]) {
        let mut inner = self.lock();
        for id in ids {
            if inner.seats.remove(id).is_some() {
                inner.engine.abort(*id);
                inner.latencies.forget(*id);
            }
        }
        drop(inner);
        // Requests that waited may begin.
        self.wake.notify_one();
    }

    /// A panic elsewhere leaves numbers that are still whole, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, DriverInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Generation ===

impl Generation {
    /// Waits for the next step. After `End` it returns `End` again.
    pub async fn next(&mut self) -> Step {
        loop {
            if let Some(step) = self.ready() {
                return step;
            }
            if self.progress.changed().await.is_err() {
                // The engine was restarted under it; its connection is being closed.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for the end; the number of prompt tokens that came from the cache.
    pub async fn finish(&mut self) -> usize {
        let mut cached = 0;
        loop {
            match self.next().await {
                Step::Begun { cached_tokens } => cached = cached_tokens,
                Step::End => return cached,
                Step::Token { .. } | Step::Aborted { .. } => {}
            }
        }
    }

    /// Tokens of a choice told so far, and whether the engine aborted it.
    pub fn reported(&self, choice: usize) -> (usize, bool) {
        (self.told[choice].tokens, self.told[choice].aborted)
    }

    fn ready(&mut self) -> Option<Step> {
        let progress = self.progress.borrow_and_update();
        let began = progress.choices.iter().any(|choice| choice.tokens > 0 || choice.ended || choice.aborted);
        if !self.begun && began {
            self.begun = true;
            return Some(Step::Begun { cached_tokens: progress.cached_tokens });
        }
        for (choice, (told, now)) in self.told.iter_mut().zip(&progress.choices).enumerate() {
            if told.tokens < now.tokens {
                let index = told.tokens;
                told.tokens += 1;
                return Some(Step::Token { choice, index, last: told.tokens == self.lengths[choice] });
            }
            if now.aborted && !told.aborted {
                told.aborted = true;
                return Some(Step::Aborted { choice });
            }
            told.ended = now.ended;
        }
        self.told.iter().all(|choice| choice.ended || choice.aborted).then_some(Step::End)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.driver.abort(&self.ids);
    }
}
