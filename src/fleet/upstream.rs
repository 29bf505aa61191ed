//! One vLLM server: its settings, its address, and its requests in flight.
//!
//! Settings never change in place. When they change, the server gets another `Upstream` that shares the live
//! state (`Live`) with the one before, so that no count is lost; requests in flight keep the settings they
//! began with.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;
use xxhash_rust::xxh3::xxh3_64;

use super::authorities::ReadAuthorities;
use super::cached_reports::CachedTokenReports;
use super::engine_load::{EngineLoad, ForeignLoad, GaugeReport};
use super::forecast::{ForecastAccuracy, UpstreamForecast};
use super::identity::UpstreamIdentity;
use super::pace::PrefillPace;
use super::probe_duty::ProbeDuty;
use super::queue::Queue;
use super::sight::{Sight, SightChange, SightTracker};
use super::tls::{self, Secure};
use super::{instant, millis};
use crate::config::secret::Secret;
use crate::config::types::UpstreamConfig;
use crate::config::values;
use crate::observe::Observer;
use crate::reply::usage::{CachedTokensField, Usage};

/// The longest time for which an engine's Retry-After keeps requests away.
const MAX_BUSY_TIME: Duration = Duration::from_secs(60);

/// The time for which a full engine without Retry-After gets no requests.
const DEFAULT_BUSY_TIME: Duration = Duration::from_secs(1);

/// One vLLM server with its present settings.
pub struct Upstream {
    /// Identifies the server for the life of the process; kept when only its settings change.
    pub id: usize,
    /// The configured or discovered settings.
    pub config: UpstreamConfig,
    /// The `host` header of requests to the server.
    pub host: String,
    /// The `authorization` header that replaces the client's.
    pub authorization: Option<String>,
    /// The authorities of `tls.ca`, read once.
    pub authorities: Vec<CertificateDer<'static>>,
    /// The TLS settings of the balancer's own requests; `None` without https.
    pub(super) secure: Option<Secure>,
    pub(super) live: Arc<Live>,
}

/// The live state of a server, shared by all its settings. A choice among many upstreams reads the first
/// numbers of each of them: they lie together, in two lines of a processor's cache.
#[repr(C, align(64))]
pub(super) struct Live {
    /// Written by leases only.
    pub gauges: LoadGauges,
    /// The requests of siblings in flight, by their latest reports.
    pub siblings: LoadGauges,
    /// Until when the engine is full by its own report, by `fleet::millis`; 0: it is not.
    busy_until: AtomicU64,
    /// The load by the server's metrics.
    pub engine_load: EngineLoad,
    pub forecast: UpstreamForecast,
    pub pace: PrefillPace,
    pub accuracy: ForecastAccuracy,
    /// The most requests of siblings in flight since the metrics reader last reset it.
    pub siblings_peak: AtomicU64,
    pub identity: UpstreamIdentity,
    /// The trial request after a trip is in flight, and its answer was not judged.
    pub trial: AtomicBool,
    /// The number of answers to requests that have begun.
    pub answers: AtomicU64,
    /// The number of those whose beginnings were judged good.
    pub good_answers: AtomicU64,
    /// The keeper needs answers as signals now.
    pub reports_answers: AtomicBool,
    /// The hash of the upstream's name.
    pub key: u64,
    /// Decides when the prober probes. Locked for a moment, by the prober and for each report.
    duty: Mutex<ProbeDuty>,
    /// The fields in which the engine has reported cached tokens.
    cached_reports: CachedTokenReports,
    /// How well the balancer sees the engine's cache. Locked for a moment, by answers and the keeper.
    sight: Mutex<SightTracker>,
    /// Wakes the prober for another decision.
    pub wake: Notify,
    /// Notified after each successful probe: the metrics may be read.
    pub well: Notify,
    /// Notified when the last request in flight has ended.
    pub emptied: Notify,
    /// The queue of requests that wait for a place.
    pub queue: Arc<Queue>,
    /// The latest resolved address; requests never wait for the resolver.
    address: ArcSwapOption<SocketAddr>,
}

/// The load in flight. Relaxed everywhere: each number is independent and read as a hint.
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
    /// Prompt tokens of the requests whose prefill has not ended.
    pub backlog: u64,
    /// Prompt tokens of all requests in flight.
    pub context: u64,
}

impl LoadGauges {
    /// Reads the gauges.
    pub(super) fn read(&self) -> UpstreamLoad {
        UpstreamLoad {
            active: self.active.load(Relaxed),
            backlog: self.backlog.load(Relaxed),
            context: self.context.load(Relaxed),
        }
    }
}

/// Reads the key in an environment variable.
#[allow(
    clippy::disallowed_methods,
    reason = "siblings share the variable's name, and each has its own value"
)]
fn key_in(variable: &str) -> Result<Secret, String> {
    let text =
        std::env::var(variable).map_err(|_| format!("the variable {variable} of api_key_env is not set"))?;
    values::secret(&text).map_err(|what| format!("the variable {variable} of api_key_env {what}"))
}

// === impl Live ===

impl Live {
    /// Returns the load in flight at `now`, by `fleet::millis`; removes prefills whose estimated end has
    /// passed.
    pub(super) fn load_at(&self, now: u64) -> UpstreamLoad {
        match self.pace.take_over_at(now) {
            0 => {}
            over => {
                self.gauges.backlog.fetch_sub(over, Relaxed);
                self.forecast.begin_head(now);
            }
        }
        self.gauges.read()
    }

    /// Returns until when the engine is full by its own report, at `now`, by `fleet::millis`.
    pub(super) fn busy_until(&self, now: u64) -> Option<Instant> {
        let until = self.busy_until.load(Relaxed);
        (until > now).then(|| instant(until))
    }

    /// Locks the duty to probe.
    pub(super) fn duty(&self) -> MutexGuard<'_, ProbeDuty> {
        self.duty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sight(&self) -> MutexGuard<'_, SightTracker> {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Upstream ===

impl Upstream {
    /// Builds a new server; fails when its TLS settings cannot be used. `read` has the file of `tls.ca`.
    pub(super) fn new(
        id: usize,
        config: UpstreamConfig,
        queue: Arc<Queue>,
        read: &ReadAuthorities,
    ) -> Result<Self, String> {
        let live = Live {
            gauges: LoadGauges::default(),
            siblings: LoadGauges::default(),
            busy_until: AtomicU64::new(0),
            engine_load: EngineLoad::new(),
            forecast: UpstreamForecast::new(),
            pace: PrefillPace::new(),
            accuracy: ForecastAccuracy::default(),
            identity: UpstreamIdentity::new(id, &config),
            siblings_peak: AtomicU64::new(0),
            trial: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            good_answers: AtomicU64::new(0),
            reports_answers: AtomicBool::new(false),
            key: xxh3_64(config.name.as_bytes()),
            duty: Mutex::new(ProbeDuty::new(super::now(), 0.5)),
            cached_reports: CachedTokenReports::default(),
            sight: Mutex::default(),
            wake: Notify::new(),
            well: Notify::new(),
            emptied: Notify::new(),
            queue,
            address: ArcSwapOption::empty(),
        };
        let authorities = read.of(&config)?;
        Self::with(config, authorities, Arc::new(live), None)
    }

    /// Builds the same server with other settings; those of TLS, and the authorities, are the same.
    pub(crate) fn renewed(&self, config: UpstreamConfig) -> Result<Self, String> {
        Self::with(config, self.authorities.clone(), self.live.clone(), Some(self))
    }

    /// Builds the same server with other settings and files.
    pub(super) fn replaced(&self, config: UpstreamConfig, read: &ReadAuthorities) -> Result<Self, String> {
        let authorities = read.of(&config)?;
        Self::with(config, authorities, self.live.clone(), Some(self))
    }

    fn with(
        config: UpstreamConfig,
        authorities: Vec<CertificateDer<'static>>,
        live: Arc<Live>,
        before: Option<&Upstream>,
    ) -> Result<Self, String> {
        let named = |error: String| format!("upstream {}: {error}", config.name);
        // Settings of TLS are expensive to build, and most changes leave them as they are.
        let same = before.filter(|before| {
            let connects = &before.config;
            connects.url == config.url && connects.tls == config.tls && before.authorities == authorities
        });
        let secure = match same {
            Some(before) => before.secure.clone(),
            None => tls::secure(&config, &authorities).map_err(named)?,
        };
        let key = match &config.api_key_env {
            Some(variable) => Some(key_in(variable).map_err(named)?),
            None => config.api_key.clone(),
        };
        let authorization = key.map(|key| format!("Bearer {}", key.expose()));
        let url = &config.url;
        let host = match &config.host {
            Some(host) => host.clone(),
            None if url.unix.is_some() => "localhost".into(),
            None => url.authority(),
        };
        Ok(Upstream { id: live.identity.id, host, config, authorization, authorities, secure, live })
    }

    /// Whether the server has exactly these settings, and the files that they name are unchanged.
    pub(super) fn has_settings(&self, config: &UpstreamConfig, read: &ReadAuthorities) -> bool {
        self.config == *config && read.of(config).is_ok_and(|found| found == self.authorities)
    }

    /// Whether a connection that was opened with these settings may serve requests with the other ones.
    pub fn connects_as(&self, other: &Upstream) -> bool {
        let (one, two) = (&self.config, &other.config);
        one.url == two.url && one.tls == two.tls && self.authorities == other.authorities
    }

    /// Returns the TLS connector and the name that the certificate must have; `None` without https.
    pub fn tls(&self) -> Option<&(TlsConnector, ServerName<'static>)> {
        self.secure.as_ref()
    }

    /// Publishes the source of these settings to the queue, once the keeper has applied them.
    pub(super) fn publish_source(&self) {
        self.live.identity.set_source(&self.config);
    }

    /// Returns the configured name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Returns the load in flight now.
    pub fn load(&self) -> UpstreamLoad {
        self.load_at(super::now())
    }

    /// Returns the load in flight at `now`; removes prefills whose estimated end has passed.
    pub fn load_at(&self, now: Instant) -> UpstreamLoad {
        self.live.load_at(millis(now))
    }

    /// Returns the siblings' load on the upstream, by their latest reports.
    pub fn siblings(&self) -> UpstreamLoad {
        self.live.siblings.read()
    }

    /// Sets the siblings' load on the upstream.
    pub fn set_siblings(&self, load: UpstreamLoad) {
        let gauges = &self.live.siblings;
        gauges.active.store(load.active, Relaxed);
        gauges.backlog.store(load.backlog, Relaxed);
        gauges.context.store(load.context, Relaxed);
        self.live.siblings_peak.fetch_max(load.active, Relaxed);
    }

    /// Returns the load of other clients by the server's metrics; none when they are unknown or too old.
    pub fn foreign(&self, now: Instant) -> ForeignLoad {
        self.live.engine_load.foreign(millis(now))
    }

    /// Returns the load by the server's latest metrics; `None` when they are unknown or too old.
    pub fn gauge_report(&self, now: Instant) -> Option<GaugeReport> {
        self.live.engine_load.gauge_report(now)
    }

    /// Returns how well the balancer sees the engine's cache.
    pub fn sight(&self) -> Sight {
        self.live.sight().sight()
    }

    /// Returns the cached tokens of an answer; see `cached_reports`.
    pub fn cached_tokens(
        &self,
        usage: &Usage,
        field: Option<CachedTokensField>,
        is_whole: bool,
    ) -> Option<u64> {
        self.live.cached_reports.cached_tokens(usage, field, is_whole)
    }

    /// Compares the predicted cached tokens of a prompt with those that its answer reports, if any. The sight
    /// is blind when predictions are wrong by more than the share `max_error`.
    pub fn observe_cached_tokens(
        &self,
        predicted: u64,
        reported: Option<u64>,
        max_error: f64,
        observer: &Observer,
    ) {
        self.update_sight(observer, |tracker| tracker.answered(predicted, reported, max_error));
    }

    /// Sets whether the engine caches prompts, as its metrics report.
    pub(super) fn observe_prefix_caching(&self, caches: bool, observer: &Observer) {
        self.update_sight(observer, |tracker| tracker.set_prefix_caching(caches));
    }

    /// Forgets what was known of the engine's reports: its process is another one.
    pub(super) fn reset_sight(&self, observer: &Observer) {
        self.live.cached_reports.reset();
        self.update_sight(observer, SightTracker::reset);
    }

    fn update_sight(
        &self,
        observer: &Observer,
        update: impl FnOnce(&mut SightTracker) -> Option<SightChange>,
    ) {
        let change = update(&mut self.live.sight());
        if let Some(SightChange { from, to }) = change {
            let why = to.reason.map(|reason| reason.to_string()).unwrap_or_default();
            observer.sight_changed(self.name(), from.state.label(), to.state.label(), &why);
        }
    }

    /// Corrects the forecasts by a first token that came `actual` after the choice, behind so many tokens.
    pub fn correct_forecast(&self, tokens: u64, forecast: Duration, actual: Duration, now: Instant) {
        let answers = self.live.accuracy.add(forecast, actual, millis(now));
        self.live.forecast.correct(tokens, actual, answers);
    }

    /// Returns the share of a forecast, 0 to 1, that counts as a reason to refuse a request.
    pub fn forecast_trust(&self, now: Instant) -> f64 {
        let (live, now) = (&self.live, millis(now));
        let (siblings, foreign) = (live.siblings.read().backlog, live.engine_load.foreign(now).tokens);
        let backlog = live.load_at(now).backlog.saturating_add(siblings).saturating_add(foreign);
        live.accuracy.trust(now, live.forecast.terms().forecast(backlog))
    }

    /// Returns the moving average of the difference between forecasts and times to first tokens; `None`
    /// before the first streaming answer of this incarnation.
    pub fn forecast_error(&self) -> Option<Duration> {
        self.live.accuracy.error()
    }

    /// Forgets what answers have taught of forecasts: another process may answer from now on.
    pub(super) fn reset_forecast(&self) {
        self.live.forecast.reset();
        self.live.accuracy.reset();
    }

    /// Returns the latest resolved address; `None` before the first answer of the resolver.
    pub fn address(&self) -> Option<SocketAddr> {
        self.live.address.load().as_deref().copied()
    }

    /// Publishes the resolved address, where it changed.
    pub(crate) fn set_address(&self, address: SocketAddr) {
        if self.address() != Some(address) {
            self.live.address.store(Some(Arc::new(address)));
        }
    }

    /// Wakes the prober: a request could not reach the upstream, or was given up.
    pub fn probe_soon(&self) {
        self.live.duty().doubt(super::now());
        self.live.wake.notify_one();
    }

    /// Keeps new requests away for `retry_after`: the engine reported that it is full. The longest report
    /// counts.
    pub(super) fn mark_busy(&self, retry_after: Option<Duration>, now: Instant) {
        self.mark_busy_until(Self::busy_end(retry_after, now));
    }

    /// Returns until when an engine with this report gets no requests.
    pub(super) fn busy_end(retry_after: Option<Duration>, now: Instant) -> Instant {
        now + retry_after.unwrap_or(DEFAULT_BUSY_TIME).min(MAX_BUSY_TIME)
    }

    /// Keeps new requests away until this time.
    pub(super) fn mark_busy_until(&self, until: Instant) {
        self.live.busy_until.fetch_max(millis(until), Relaxed);
    }

    /// Returns until when the engine is full by its own report.
    pub fn busy_until(&self, now: Instant) -> Option<Instant> {
        self.live.busy_until(millis(now))
    }

    /// Waits until nothing is in flight.
    pub(super) async fn idle(&self) {
        loop {
            let emptied = self.live.emptied.notified();
            tokio::pin!(emptied);
            // Registered before the check, so that no notification in between is missed.
            emptied.as_mut().enable();
            if self.load().active == 0 {
                return;
            }
            emptied.await;
        }
    }
}
