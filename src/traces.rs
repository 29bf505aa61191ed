//! Recorded calls: captured while the answer streams, assembled and stored on a separate thread.
//!
//! ```text
//! proxy: Capture  ->  CaptureQueue (bounded)  ->  writer: assemble (pure)  ->  Store: memory | SQL
//! admin API       ->  Traces: sessions, weight version, flush; Store: what is read
//! ```
//!
//! Never: an await in the path of a request (unless `traces.sync` requires it), an unlimited queue, a trace
//! that a public listener can read.

pub mod assemble;
pub(crate) mod capture;
mod cumulative;
pub(crate) mod json;
mod known_prompts;
mod queue;
pub mod record;
mod sessions;
mod shared;
pub mod store;
mod writer;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::config::types::{CaptureScope, TraceStore, TracesConfig};
use crate::observe::Observer;
use crate::route::cumulative::{FallbackReason, RecordedTurn};
use capture::{Capture, CaptureStart};
use queue::TraceMessage;
use record::SessionSettings;
use sessions::{KnownSettings, SessionRegistry};
pub use shared::now;
use shared::{NO_VERSION, SharedTraces};
use store::{Store, StoreError};
use writer::WriterThread;

/// The longest time that a request waits for a look-up of its session in a database.
const MAX_LOOKUP: Duration = Duration::from_millis(250);

/// The longest time that the start waits for such a look-up.
const MAX_START_LOOKUP: Duration = Duration::from_secs(1);

/// The time for which requests skip a database that did not answer.
const LOOKUP_PAUSE: Duration = Duration::from_secs(5);

/// The traces of one balancer.
pub struct Traces {
    shared: Arc<SharedTraces>,
    sessions: SessionRegistry,
    /// The time until which requests skip a store that did not answer.
    lookup_pause: Mutex<Option<Instant>>,
    writer: WriterThread,
}

impl Traces {
    /// Opens the store and starts the writer. Fails if the configured store can never work; a database that
    /// cannot be reached is retried.
    pub async fn start(config: &TracesConfig, observer: Observer) -> Result<Arc<Self>, String> {
        let store = match Store::open(config, &observer).await {
            Ok(store) => Some(Arc::new(store)),
            Err(error) if matches!(config.store, TraceStore::Postgres(_)) => {
                observer.trace_store_failed(&error);
                None
            }
            Err(error) => return Err(format!("traces.store: {error}")),
        };
        let is_shared = matches!(config.store, TraceStore::Postgres(_));
        let is_durable = is_shared || matches!(config.store, TraceStore::Sqlite(_));
        let version = match &store {
            // The writer connects again until the server is back.
            Some(store) => timeout(MAX_START_LOOKUP, store.weight_version()).await,
            None => Ok(Ok(None)),
        };
        let version = version.ok().and_then(Result::ok).flatten();
        let traces = Traces {
            shared: Arc::new(SharedTraces::new(config, store, version, observer)),
            sessions: SessionRegistry::new(is_durable, is_shared),
            lookup_pause: Mutex::new(None),
            writer: WriterThread::default(),
        };
        traces.writer.start(&traces.shared)?;
        traces.shared.observer.trace_store_started(&config.store.to_string());
        Ok(Arc::new(traces))
    }

    /// Applies `config` to calls that begin from now on, and its limits to the store, which stays.
    pub fn reload(&self, config: &TracesConfig) {
        self.shared.queue.set_max_calls(config.queue);
        if let Some(store) = &*self.shared.store.load() {
            store.set_limits(config);
        }
        self.shared.settings.store(Arc::new(config.clone()));
    }

    pub fn settings(&self) -> Arc<TracesConfig> {
        self.shared.settings.load_full()
    }

    /// Whether a call may be captured, or changed for its session; `named`: the path names its session.
    pub fn may_capture(&self, named: bool) -> bool {
        let settings = self.shared.settings.load();
        let others = || settings.capture != CaptureScope::Sessions || self.sessions.may_have_any();
        settings.store != TraceStore::None && (named || others())
    }

    /// Whether a call is captured: `named`: the path names its session, `made`: the API made it. `random`
    /// decides on the share of other calls.
    pub fn captures(&self, named: bool, made: bool, random: u64) -> bool {
        let settings = self.shared.settings.load();
        settings.store != TraceStore::None
            && match settings.capture {
                CaptureScope::All => true,
                CaptureScope::Sessions => named || made,
                // 53 bits are what a float holds exactly.
                CaptureScope::Share(share) => {
                    named || made || ((random >> 11) as f64) < share * (1_u64 << 53) as f64
                }
            }
    }

    /// Begins the capture of a call.
    pub fn begin(&self, start: CaptureStart) -> Capture {
        Capture::new(self.shared.clone(), start, self.weight_version())
    }

    /// The settings of a session from the API. Waits shortly for a database, if one is needed.
    pub async fn session_settings(&self, id: &str) -> Option<Arc<SessionSettings>> {
        match self.sessions.get(id, Instant::now()) {
            KnownSettings::Current(settings) => settings,
            KnownSettings::Outdated(old) => {
                let Some(found) = self.look_up(async |store| store.load_session(id).await).await else {
                    return old;
                };
                let settings = found.map(|found| SessionSettings { metadata: Default::default(), ..found });
                let settings = settings.map(Arc::new);
                self.sessions.put(id, settings.clone(), Instant::now());
                settings
            }
        }
    }

    /// Reads from the store for a request. `None`: the store did not answer in time; other requests then skip
    /// it for a while.
    async fn look_up<T>(&self, read: impl AsyncFnOnce(Arc<Store>) -> Result<T, StoreError>) -> Option<T> {
        let store = self.shared.store.load_full()?;
        let pause = || self.lookup_pause.lock().unwrap_or_else(PoisonError::into_inner);
        if pause().is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let found = timeout(MAX_LOOKUP, read(store)).await.ok().and_then(Result::ok);
        *pause() = if found.is_some() { None } else { Some(Instant::now() + LOOKUP_PAUSE) };
        found
    }

    /// Creates a session, or replaces its settings.
    pub async fn put_session(&self, settings: SessionSettings) -> Result<(), StoreError> {
        self.store()?.put_session(&settings).await?;
        let id = settings.session_id.clone();
        // Requests need no metadata.
        let settings = SessionSettings { metadata: Default::default(), ..settings };
        self.sessions.put(&id, Some(Arc::new(settings)), Instant::now());
        Ok(())
    }

    /// Deletes sessions with their traces. Returns the number of traces: 0 without a store.
    pub async fn delete_sessions(&self, ids: &[String]) -> Result<u64, StoreError> {
        self.flush().await;
        let deleted = match self.store() {
            Ok(store) => store.delete_sessions(ids).await?,
            Err(StoreError::Off) => 0,
            Err(error) => return Err(error),
        };
        for id in ids {
            self.sessions.remove(id);
            self.shared.last_turns.remove(id);
            self.shared.known_prompts.remove(id);
        }
        Ok(deleted)
    }

    /// Whether turns continue from recorded tokens.
    pub fn is_cumulative(&self) -> bool {
        self.shared.settings.load().cumulative
    }

    /// The last turn of a session, as this balancer has recorded it.
    pub async fn last_turn(&self, session: &str) -> Result<Option<Arc<RecordedTurn>>, FallbackReason> {
        self.shared.last_turns.get(session).await.map_err(|_| FallbackReason::Late)
    }

    /// Whether there may be turns that only the store has.
    pub fn may_have_stored_turns(&self) -> bool {
        matches!(self.shared.settings.load().store, TraceStore::Sqlite(_) | TraceStore::Postgres(_))
    }

    /// The last turn of a session in a store that other balancers write to, or that is older than this
    /// process. `known`: this balancer has recorded one.
    pub async fn stored_turn(&self, session: &str, known: bool) -> Option<RecordedTurn> {
        let is_elsewhere = match &self.shared.settings.load().store {
            TraceStore::None | TraceStore::Memory => false,
            TraceStore::Sqlite(_) => !known,
            TraceStore::Postgres(_) => true,
        };
        if !is_elsewhere {
            return None;
        }
        let latest = self.look_up(async |store| store.latest_trace(session).await).await??;
        cumulative::recorded_turn(&latest.record)
    }

    pub fn weight_version(&self) -> Option<i64> {
        Some(self.shared.weight_version.load(Ordering::Acquire)).filter(|version| *version != NO_VERSION)
    }

    /// Stores the weight version, which is recorded with calls from now on.
    pub async fn set_weight_version(&self, version: i64) -> Result<(), StoreError> {
        let stored = match self.store() {
            Ok(store) => store.set_weight_version(Some(version)).await,
            Err(StoreError::Off) => Ok(()),
            Err(error) => Err(error),
        };
        // This balancer's own calls use the version even while a database is away.
        self.shared.weight_version.store(version, Ordering::Release);
        stored
    }

    /// Waits until every call that has ended so far is stored or dropped.
    pub async fn flush(&self) {
        let (told, heard) = oneshot::channel();
        self.shared.push(TraceMessage::Flush(told));
        // On an error the writer has ended, and nothing is left to store.
        heard.await.ok();
    }

    /// The store. `Err` until a database is first reached, and without a store.
    pub fn store(&self) -> Result<Arc<Store>, StoreError> {
        match self.shared.store.load_full() {
            Some(store) if matches!(*store, Store::None) => Err(StoreError::Off),
            Some(store) => Ok(store),
            None => Err(StoreError::Unreached),
        }
    }

    /// Stores the captured calls within `grace`, and ends the writer.
    pub async fn stop(&self, grace: Duration) {
        self.shared.queue.close();
        self.writer.join(grace).await;
        if let Some(store) = self.shared.store.load_full() {
            timeout(grace, store.close()).await.ok();
        }
    }

    /// The number of calls that wait to be stored, their bytes, and the size of the store.
    pub fn sizes(&self) -> (usize, usize, u64) {
        let (calls, bytes) = self.shared.queue.size();
        (calls, bytes, self.shared.store.load().as_ref().map_or(0, |store| store.bytes()))
    }
}
