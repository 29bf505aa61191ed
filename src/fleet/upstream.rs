//! One vLLM server: its settings, its address, and what is in flight on it.
//!
//! Settings never change in place. A server whose settings change gets another `Upstream`, which shares
//! what is alive with the one before, so that no count is lost; requests in flight keep theirs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;

use super::engine_load::{EngineLoad, ForeignLoad, GaugeReport};
use super::pace::PrefillPace;
use super::queue::Queue;
use super::tls::{self, Secure};
use crate::aggregate::ModelCard;
use crate::config::types::UpstreamConfig;

/// The longest that an engine's Retry-After keeps requests away from it.
const MAX_BUSY_TIME: Duration = Duration::from_secs(60);

/// For so long when it gives none.
const DEFAULT_BUSY_TIME: Duration = Duration::from_secs(1);

pub struct Upstream {
    /// Of this server and no other, for the life of the process; kept when only its settings change.
    pub id: usize,
    pub config: UpstreamConfig,
    /// The `host` field of requests to it.
    pub host: String,
    /// Whole `authorization` value sent in place of the client's.
    pub authorization: Option<String>,
    /// The authorities of `tls.ca`, read once.
    pub authorities: Vec<CertificateDer<'static>>,
    /// How our own questions talk to it, where its URL is https.
    pub(super) secure: Option<Secure>,
    pub(super) live: Arc<Live>,
}

/// What is alive of a server, whatever its settings.
pub(super) struct Live {
    pub id: usize,
    name: String,
    /// The source that it was discovered by, as far as the keeper has taken its settings over.
    source: ArcSwapOption<String>,
    /// Written by leases only.
    pub gauges: LoadGauges,
    /// What siblings have in flight, by their word.
    pub siblings: LoadGauges,
    pub pace: PrefillPace,
    /// The one request that is let through after a trip is on its way.
    pub trial: AtomicBool,
    /// Answers to requests that have begun.
    pub answers: AtomicU64,
    /// Answers are news to the keeper now.
    pub wants_answers: AtomicBool,
    /// What it serves, as the keeper last learnt it.
    pub serves: ArcSwap<Vec<ModelCard>>,
    /// Wakes its prober ahead of time.
    pub doubt: Notify,
    /// A round of probing went well: its metrics may be read.
    pub well: Notify,
    /// What its metrics said.
    pub engine_load: EngineLoad,
    /// Told whenever nothing is in flight any more.
    pub emptied: Notify,
    /// Where requests wait for a place on it.
    pub queue: Arc<Queue>,
    /// Full by its own word until then: milliseconds after `born`.
    busy_until: AtomicU64,
    born: Instant,
    /// Where its name led when it was last asked; resolving is never on a request's path.
    address: ArcSwapOption<SocketAddr>,
}

/// What is in flight. Relaxed everywhere: each is a number of its own, read as a hint.
#[derive(Default)]
pub(super) struct LoadGauges {
    pub active: AtomicU64,
    pub backlog: AtomicU64,
    pub context: AtomicU64,
}

/// The gauges at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpstreamLoad {
    /// Requests in flight.
    pub active: u64,
    /// Prompt tokens sent whose first byte has not come back.
    pub backlog: u64,
    /// Prompt tokens of the requests in flight.
    pub context: u64,
}

impl LoadGauges {
    pub fn read(&self) -> UpstreamLoad {
        UpstreamLoad {
            active: self.active.load(Relaxed),
            backlog: self.backlog.load(Relaxed),
            context: self.context.load(Relaxed),
        }
    }
}

fn source(config: &UpstreamConfig) -> Option<Arc<String>> {
    config.discovered.as_ref().map(|discovered| Arc::new(discovered.source.clone()))
}

// === impl Live ===

impl Live {
    /// Whether this is its name, or the name of the source that it was discovered by, as routes have it.
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name || self.source.load().as_deref().is_some_and(|source| source == name)
    }
}

// === impl Upstream ===

impl Upstream {
    /// Fails when what TLS towards it needs cannot be used.
    pub(super) fn new(id: usize, config: UpstreamConfig, queue: Arc<Queue>) -> Result<Self, String> {
        let live = Live {
            id,
            name: config.name.clone(),
            source: ArcSwapOption::new(source(&config)),
            gauges: LoadGauges::default(),
            siblings: LoadGauges::default(),
            pace: PrefillPace::new(super::now()),
            trial: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            wants_answers: AtomicBool::new(false),
            serves: ArcSwap::default(),
            doubt: Notify::new(),
            well: Notify::new(),
            engine_load: EngineLoad::new(super::now()),
            emptied: Notify::new(),
            queue,
            busy_until: AtomicU64::new(0),
            born: super::now(),
            address: ArcSwapOption::empty(),
        };
        Self::with(config, Arc::new(live))
    }

    /// The same server with other settings.
    pub(super) fn renewed(&self, config: UpstreamConfig) -> Result<Self, String> {
        Self::with(config, self.live.clone())
    }

    fn with(config: UpstreamConfig, live: Arc<Live>) -> Result<Self, String> {
        let say = |error: String| format!("upstream {}: {error}", config.name);
        let authorities = tls::authorities(&config).map_err(say)?;
        let secure = tls::secure(&config, &authorities).map_err(say)?;
        let authorization = config.api_key.as_ref().map(|key| format!("Bearer {}", key.expose()));
        let url = &config.url;
        let host = if url.unix.is_some() { "localhost".into() } else { url.authority() };
        Ok(Upstream { id: live.id, host, config, authorization, authorities, secure, live })
    }

    /// Whether `config` means just this: the same settings, with the same text in the files that they name.
    pub(super) fn is_as(&self, config: &UpstreamConfig) -> bool {
        self.config == *config && tls::authorities(config).is_ok_and(|found| found == self.authorities)
    }

    /// Whether a connection that was made by these settings may serve by the other's.
    pub fn connects_as(&self, other: &Upstream) -> bool {
        let (own, others) = (&self.config, &other.config);
        own.url == others.url && own.tls == others.tls && self.authorities == other.authorities
    }

    /// How to talk TLS with it, and the name that it must prove; `None`: its URL is not https.
    pub fn tls(&self) -> Option<&(TlsConnector, ServerName<'static>)> {
        self.secure.as_ref()
    }

    /// Its settings are in force from now on.
    pub(super) fn enters(&self) {
        self.live.source.store(source(&self.config));
    }

    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// What is in flight now.
    pub fn load(&self) -> UpstreamLoad {
        self.load_at(super::now())
    }

    pub fn load_at(&self, now: Instant) -> UpstreamLoad {
        let gauges = &self.live.gauges;
        match self.live.pace.over(now) {
            0 => {}
            over => drop(gauges.backlog.fetch_sub(over, Relaxed)),
        }
        gauges.read()
    }

    /// What other balancers have in flight on it, as they said last.
    pub fn siblings(&self) -> UpstreamLoad {
        self.live.siblings.read()
    }

    pub fn set_siblings(&self, load: UpstreamLoad) {
        let gauges = &self.live.siblings;
        gauges.active.store(load.active, Relaxed);
        gauges.backlog.store(load.backlog, Relaxed);
        gauges.context.store(load.context, Relaxed);
    }

    /// What others have in flight on it, by its own metrics; nothing when they are not known, or too old.
    pub fn foreign(&self, now: Instant) -> ForeignLoad {
        self.live.engine_load.foreign(now)
    }

    /// What its metrics said last; `None` when they are not known, or too old.
    pub fn gauge_report(&self, now: Instant) -> Option<GaugeReport> {
        self.live.engine_load.gauge_report(now)
    }

    /// The address that its name led to; `None` before the first answer of the resolver.
    pub fn address(&self) -> Option<SocketAddr> {
        self.live.address.load().as_deref().copied()
    }

    pub(super) fn set_address(&self, address: SocketAddr) {
        if self.address() != Some(address) {
            self.live.address.store(Some(Arc::new(address)));
        }
    }

    /// A request could not reach it, or was given up: ask it now rather than at the next interval.
    pub fn doubt(&self) {
        self.live.doubt.notify_one();
    }

    /// The engine said that it is full: nothing is sent for so long. The longest word counts.
    pub(super) fn busy(&self, retry_after: Option<Duration>, now: Instant) {
        let until = now + retry_after.unwrap_or(DEFAULT_BUSY_TIME).min(MAX_BUSY_TIME);
        let millis = until.saturating_duration_since(self.live.born).as_millis();
        self.live.busy_until.fetch_max(u64::try_from(millis).unwrap_or(u64::MAX), Relaxed);
    }

    /// Until when it is full by its own word.
    pub fn busy_until(&self, now: Instant) -> Option<Instant> {
        let millis = self.live.busy_until.load(Relaxed);
        if millis == 0 {
            return None;
        }
        let until = self.live.born + Duration::from_millis(millis);
        (until > now).then_some(until)
    }

    /// Waits until nothing is in flight.
    pub(super) async fn idle(&self) {
        loop {
            let emptied = self.live.emptied.notified();
            tokio::pin!(emptied);
            // Listening begins before looking, so that nothing is missed in between.
            emptied.as_mut().enable();
            if self.load().active == 0 {
                return;
            }
            emptied.await;
        }
    }
}
