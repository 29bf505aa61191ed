//! The state that all connections of one simulated server share.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::clock;
use super::connection_state::{ConnectionState, ConnectionUse, Control};
use super::driver::Driver;
use super::fault::{Faults, InjectedFault};
use super::options::Options;
use super::record::{Recorded, RecordedGeneration, Ring, Stats};
use super::store::StoredAnswers;
use super::traffic::Traffic;

/// What all connections of one engine share.
pub(super) struct EngineShared {
    pub options: Options,
    pub driver: Arc<Driver>,
    pub faults: Faults,
    pub requests: Ring<Recorded>,
    /// Polls have a queue of their own, since they would push out all other requests.
    pub polls: Ring<Recorded>,
    pub generations: Ring<RecordedGeneration>,
    pub store: StoredAnswers,
    pub traffic: Traffic,
    pub control: watch::Sender<Control>,
    /// Whether the listener is open, set by the task that owns it.
    pub listening: watch::Sender<bool>,
    pub received: AtomicU64,
    pub polled: AtomicU64,
    pub connections: AtomicUsize,
    /// Open connections, without those that have carried only polls.
    pub used: AtomicUsize,
    pub accepted: AtomicU64,
    restarts: AtomicU64,
    /// Represents the simulated process; its connections hold a reference.
    process: Mutex<Arc<()>>,
    /// How often the server went silent; requests that were open then stay silent.
    silences: AtomicU64,
    started: Mutex<f64>,
    ids: AtomicU64,
    /// 0: awake; otherwise the level of sleep plus 1.
    pub sleep: AtomicUsize,
}

impl EngineShared {
    pub(super) fn new(options: Options) -> Self {
        let driver = Arc::new(Driver::new(options.limits(), options.timing));
        Self {
            options,
            driver,
            faults: Faults::default(),
            requests: Ring::default(),
            polls: Ring::default(),
            generations: Ring::default(),
            store: StoredAnswers::default(),
            traffic: Traffic::default(),
            control: watch::Sender::new(Control { listening: true, ..Control::default() }),
            listening: watch::Sender::new(true),
            received: AtomicU64::new(0),
            polled: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
            used: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
            process: Mutex::default(),
            silences: AtomicU64::new(0),
            started: Mutex::new(clock::unix()),
            ids: AtomicU64::new(0),
            sleep: AtomicUsize::new(0),
        }
    }

    /// Returns the start of the simulated process, in seconds since 1970.
    pub(super) fn started(&self) -> f64 {
        *self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns sixteen hex digits that have not been used before.
    pub(super) fn random_hex(&self) -> String {
        let next = self.ids.fetch_add(1, Ordering::Relaxed);
        let clock = self.started().to_bits() ^ self.options.seed;
        format!("{:016x}", xxh3_64_with_seed(&next.to_le_bytes(), clock))
    }

    /// Pauses the engine and drops its cache, at this level of sleep.
    pub(super) fn fall_asleep(&self, level: usize) {
        self.driver.pause();
        self.driver.clear_cache();
        self.sleep.store(level + 1, Ordering::SeqCst);
    }

    pub(super) fn silence(&self) -> u64 {
        self.silences.load(Ordering::SeqCst)
    }

    /// The counts that `/sim/stats` answers.
    pub(super) fn stats(&self) -> Stats {
        let gauges = self.driver.gauges();
        let counters = gauges.counters;
        Stats {
            received: self.received.load(Ordering::SeqCst),
            polled: self.polled.load(Ordering::SeqCst),
            running: gauges.running,
            waiting: gauges.waiting,
            finished: counters.finished_stop + counters.finished_length,
            aborted: counters.aborted,
            refused: counters.refused,
            connections: self.connections.load(Ordering::SeqCst),
            accepted: self.accepted.load(Ordering::SeqCst),
            used: self.used.load(Ordering::SeqCst),
            prefix_queries: counters.prefix_queries,
            prefix_hits: counters.prefix_hits,
            prompt_tokens: counters.prompt_tokens,
            generation_tokens: counters.generation_tokens,
            kv_usage: gauges.kv_usage,
            restarts: self.restarts.load(Ordering::SeqCst),
        }
    }

    /// Records a received request; `poll`: it is a probe or a scrape.
    pub(super) fn record(&self, recorded: Recorded, poll: bool) {
        if poll {
            self.polled.fetch_add(1, Ordering::SeqCst);
            self.polls.push(recorded);
        } else {
            self.received.fetch_add(1, Ordering::SeqCst);
            self.requests.push(recorded);
        }
    }

    /// Counts a connection as used, unless it has carried only polls.
    pub(super) fn carries(&self, connection: &ConnectionState, poll: bool) {
        match connection.carries(poll) {
            ConnectionUse::BecamePoller => drop(self.used.fetch_sub(1, Ordering::SeqCst)),
            ConnectionUse::BecameUsed => drop(self.used.fetch_add(1, Ordering::SeqCst)),
            ConnectionUse::Same => {}
        }
    }

    /// Sets or clears the fault; returns when the listener has followed.
    pub(super) async fn set_fault(&self, fault: Option<InjectedFault>, requests: Option<u64>) {
        let closed = matches!(fault, Some(InjectedFault::Refuse | InjectedFault::Silent));
        let close_idle = closed || fault == Some(InjectedFault::CloseIdle);
        let factor = if let Some(InjectedFault::Slow { factor }) = fault { factor } else { 1.0 };
        let silent = fault == Some(InjectedFault::Silent);
        // Closing idle connections happens once and does not stay set.
        self.faults.set(fault.filter(|fault| *fault != InjectedFault::CloseIdle), requests);
        self.driver.slow_down(factor);
        self.control.send_modify(|control| {
            control.listening = !closed;
            control.close_idle += u64::from(close_idle);
        });
        if silent {
            self.silences.fetch_add(1, Ordering::SeqCst);
            self.driver.abort_all();
        }
        let mut listening = self.listening.subscribe();
        // An error means that the server and its listener are gone.
        let _ = listening.wait_for(|&listening| listening != closed).await;
    }

    /// Returns the reference that a connection holds to its process.
    pub(super) fn process(&self) -> Arc<()> {
        Arc::clone(&self.process.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Simulates a new process on the same address: no requests, an empty cache, all connections closed.
    /// Returns a reference that is valid until the last connection of the old process has ended.
    pub(super) fn restart(&self) -> Weak<()> {
        let old = std::mem::take(&mut *self.process.lock().unwrap_or_else(PoisonError::into_inner));
        self.driver.restart();
        self.store.clear();
        self.traffic.clear();
        self.sleep.store(0, Ordering::SeqCst);
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = clock::unix();
        self.restarts.fetch_add(1, Ordering::SeqCst);
        self.control.send_modify(|control| control.close_all += 1);
        Arc::downgrade(&old)
    }
}
