//! The probes that balancers make for each other: the reports to publish, and the reports of siblings.
//!
//! `probe_duty` decides which balancer probes. A report is applied where both balancers mean the same server:
//! the names and the URLs are equal, and for an address that every machine has, such as `127.0.0.1` or a unix
//! socket, the machines too. Balancers in network namespaces of their own have host names of their own.
//!
//! Of a report
//!
//! - the result of a probe changes no state: see `probe_duty`;
//! - models, the version, the start of the process, the cache size and the load by other clients are taken
//!   over as if this balancer had read them, while the report is not too old. Where the list of models
//!   differs and is not in the report, this balancer reads it;
//! - a full engine gets no requests for as long as it reported, whichever balancer it reported to;
//! - a breaker that tripped at a sibling makes one failure enough here: it takes no requests away by itself,
//!   since the requests of one client may trip upstreams.
//!
//! Everything in a report is limited here again: ages and remaining times, and the length of texts. Messages
//! of siblings may be old, and other programs may write to the same Redis.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use super::engine_load::{ForeignLoad, GaugeReport};
use super::keeper_message::{KeeperMessage, SiblingFacts};
use super::metrics_reader::report_lifetime;
use super::probe::{MAX_VERSION_CHARS, ProbeReport};
use super::probe_duty::{DutyView, HeardReport, LiveBalancers, MISSED_INTERVALS, UpstreamCondition};
use super::snapshot_entry::SnapshotEntry;
use super::upstream::Upstream;
use super::{Fleet, now};
use crate::aggregate::{self, EngineMetrics, ModelCard};
use crate::state::exchange::{EngineFinding, MAX_CARDS_BYTES, ProbeFinding, UpstreamReport};

/// The number of reports in one message above which the upstreams are looked up in a table.
const MAX_SCANNED_REPORTS: usize = 8;

/// The size of an encoded report without its name and its cards, at most, in bytes.
const MAX_BARE_REPORT_BYTES: usize = 200;

/// The balancers that share the probes, and the reports for them.
#[derive(Default)]
pub(super) struct SharedProbes {
    circle: watch::Sender<Arc<ProbeCircle>>,
    pending: Mutex<BTreeMap<usize, PendingReport>>,
}

/// The balancers that share the probes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ProbeCircle {
    pub live: LiveBalancers,
    /// The hash of this machine's host name.
    host: u64,
}

/// The findings about one upstream since its last report.
#[derive(Default)]
struct PendingReport {
    name: Box<str>,
    server: u64,
    /// The end of the probe, its result, and the hash of the models.
    probe: Option<(Instant, bool, u64)>,
    cards: Option<Box<str>>,
    version: Option<Box<str>>,
    /// When a page of metrics was read, and its values.
    engine: Option<(Instant, EngineFinding)>,
    busy_until: Option<Instant>,
    tripped_until: Option<Instant>,
}

// === impl ProbeCircle ===

impl ProbeCircle {
    /// Returns the hash that identifies the server of an upstream.
    fn server(&self, upstream: &Upstream) -> u64 {
        let url = &upstream.config.url;
        let host = url.host.trim_start_matches('[').trim_end_matches(']');
        let loopback = host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
        let is_local = url.unix.is_some() || loopback || host.eq_ignore_ascii_case("localhost");
        xxh3_64_with_seed(url.display().as_bytes(), if is_local { self.host } else { 0 })
    }
}

/// Returns the hash of a list of models: of the parts by which `ModelCard`s are compared.
pub(super) fn models_hash(models: &[ModelCard]) -> u64 {
    let mut hash = Xxh3::new();
    for card in models {
        for text in [card.id.as_str(), card.parent.as_deref().unwrap_or_default()] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        hash.update(&card.max_model_len.unwrap_or(0).to_le_bytes());
    }
    hash.digest()
}

// === impl SharedProbes ===

impl SharedProbes {
    /// Returns a receiver that is notified when a balancer comes or goes.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<ProbeCircle>> {
        self.circle.subscribe()
    }

    pub(super) fn circle(&self) -> Arc<ProbeCircle> {
        self.circle.borrow().clone()
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<usize, PendingReport>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a finding to the next report on an upstream.
    fn put(&self, upstream: &Upstream, add: impl FnOnce(&mut PendingReport)) {
        let circle = self.circle();
        if circle.live.is_alone() {
            return;
        }
        let mut pending = self.pending();
        let report = pending.entry(upstream.id).or_insert_with(|| PendingReport {
            name: upstream.name().into(),
            server: circle.server(upstream),
            ..PendingReport::default()
        });
        add(report);
    }

    /// Publishes the result of an own probe. The cards follow when they differ from the `known` list.
    pub(super) fn put_probe(&self, upstream: &Upstream, found: Option<&ProbeReport>, known: &[ModelCard]) {
        let models = found.map_or(0, |report| models_hash(&report.models));
        let changed = found.filter(|_| models_hash(known) != models);
        let cards = changed.map(|report| list(&report.models));
        let version = found.and_then(|report| report.version.as_deref());
        self.put(upstream, |report| {
            report.probe = Some((now(), found.is_some(), models));
            report.cards = cards.filter(|cards| cards.len() <= MAX_CARDS_BYTES).or(report.cards.take());
            report.version = version.map(Box::from).or(report.version.take());
        });
    }

    /// Publishes the values of a page of metrics.
    pub(super) fn put_engine(
        &self,
        upstream: &Upstream,
        metrics: &EngineMetrics,
        foreign: Option<ForeignLoad>,
    ) {
        let EngineMetrics { running, waiting, kv_usage, cache_tokens, started, prefix_caching } = *metrics;
        let foreign = foreign.map(|foreign| (foreign.requests, foreign.tokens));
        let age = Duration::ZERO;
        let engine =
            EngineFinding { age, running, waiting, kv_usage, cache_tokens, started, foreign, prefix_caching };
        self.put(upstream, |report| report.engine = Some((now(), engine)));
    }

    /// Publishes until when the upstream is full by its own report.
    pub(super) fn put_busy(&self, upstream: &Upstream, until: Instant) {
        self.put(upstream, |report| report.busy_until = report.busy_until.max(Some(until)));
    }

    /// Publishes until when this balancer's breaker keeps requests away from the upstream.
    pub(super) fn put_trip(&self, upstream: &Upstream, until: Instant) {
        self.put(upstream, |report| report.tripped_until = Some(until));
    }
}

/// Writes a list of models with the cards as they are.
fn list(models: &[ModelCard]) -> Box<str> {
    let cards = models.iter().map(|card| (card.id.as_str(), vec![card]));
    String::from_utf8(aggregate::models_list(cards)).unwrap_or_default().into()
}

impl PendingReport {
    /// Returns the bytes of the encoded report, about.
    fn weight(&self) -> usize {
        let cards = self.cards.as_ref().map_or(0, |cards| cards.len());
        MAX_BARE_REPORT_BYTES + self.name.len() + cards
    }

    /// Builds the report; times in it count from `now`.
    fn report(self, now: Instant) -> UpstreamReport {
        let age = |at: Instant| now.saturating_duration_since(at);
        let left = |until: Instant| Some(until.saturating_duration_since(now)).filter(|left| !left.is_zero());
        UpstreamReport {
            upstream: self.name,
            server: self.server,
            probe: self.probe.map(|(at, good, models)| ProbeFinding { age: age(at), good, models }),
            cards: self.cards,
            version: self.version,
            engine: self.engine.map(|(at, engine)| EngineFinding { age: age(at), ..engine }),
            busy: self.busy_until.and_then(left),
            tripped: self.tripped_until.and_then(left),
        }
    }
}

// === impl Fleet ===

impl Fleet {
    /// Sets the balancers that share the probes: this one by its id and its machine's name, and its siblings;
    /// no siblings while their reports would not come.
    pub fn set_balancers(&self, own: u64, siblings: &[u64], host: &str) {
        let changed = self.shared.circle.send_if_modified(|circle| {
            if circle.live.own == own && circle.live.siblings == siblings {
                return false;
            }
            let live = LiveBalancers { own, siblings: siblings.to_vec() };
            *circle = Arc::new(ProbeCircle { live, host: xxh3_64(host.as_bytes()) });
            true
        });
        if changed && siblings.is_empty() {
            self.shared.pending().clear();
        }
    }

    /// Removes and returns reports for the siblings, of about `max_bytes` at most, but at least one where
    /// there are any.
    pub fn take_reports(&self, max_bytes: usize) -> Vec<UpstreamReport> {
        let (now, mut pending) = (now(), self.shared.pending());
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while let Some(first) = pending.first_entry() {
            bytes += first.get().weight();
            if bytes > max_bytes && !taken.is_empty() {
                break;
            }
            taken.push(first.remove().report(now));
        }
        taken
    }

    /// Returns the facts about an upstream by which its duty is decided.
    pub(super) fn duty_view<'c>(
        &self,
        upstream: &Upstream,
        entry: Option<&SnapshotEntry>,
        circle: &'c ProbeCircle,
        now: Instant,
    ) -> DutyView<'c> {
        let condition = entry.map_or(UpstreamCondition::Unsure, SnapshotEntry::condition);
        let interval = self.rules.load().health.interval;
        DutyView { key: upstream.live.key, balancers: &circle.live, interval, condition, now }
    }

    /// Applies the reports of a sibling, which were published `age` ago.
    pub fn apply_reports(&self, from: u64, reports: &[UpstreamReport], age: Duration) {
        let circle = self.shared.circle();
        if circle.live.is_alone() {
            return;
        }
        let snapshot = self.snapshot();
        let table: HashMap<&str, &SnapshotEntry> = match reports.len() > MAX_SCANNED_REPORTS {
            true => snapshot.entries.iter().map(|entry| (entry.upstream.name(), entry)).collect(),
            false => HashMap::new(),
        };
        let mut facts = Vec::new();
        for report in reports {
            let name = &*report.upstream;
            let entry = if table.is_empty() { snapshot.by_name(name) } else { table.get(name).copied() };
            let Some(entry) = entry.filter(|entry| circle.server(&entry.upstream) == report.server) else {
                continue;
            };
            self.observer.probe_report_applied(name);
            let found = self.apply_report(from, report, age, entry, &circle);
            if found != SiblingFacts::default() {
                facts.push((entry.upstream.id, found));
            }
        }
        if !facts.is_empty() && self.keeper.try_send(KeeperMessage::Reported { facts }).is_err() {
            // The inbox is full; the next report has the same facts.
            self.observer.sign_lost();
        }
    }

    /// Applies one report. Returns the part that the keeper has to apply.
    fn apply_report(
        &self,
        from: u64,
        report: &UpstreamReport,
        age: Duration,
        entry: &SnapshotEntry,
        circle: &ProbeCircle,
    ) -> SiblingFacts {
        let (upstream, now) = (&*entry.upstream, now());
        let view = self.duty_view(upstream, Some(entry), circle, now);
        let mut facts = SiblingFacts::default();
        let is_fresh = |found: Duration| found + age <= view.interval * MISSED_INTERVALS;
        if let Some(probe) = report.probe.filter(|probe| is_fresh(probe.age)) {
            facts = apply_probe(from, probe, age, report, entry, &view);
        }
        let lifetime = report_lifetime(view.interval);
        let rules = self.rules.load();
        let reads = rules.health.metrics;
        if let Some(engine) = report.engine.filter(|engine| reads && engine.age + age < lifetime) {
            facts.metrics = Some(store_engine(upstream, &engine, now + lifetime - (engine.age + age)));
        }
        if let Some(left) = report.busy.and_then(|left| left.checked_sub(age)) {
            upstream.mark_busy(Some(left), now);
        }
        let tripped = report.tripped.and_then(|left| left.checked_sub(age));
        facts.tripped_until = tripped.map(|left| now + left.min(rules.breaker.max_open));
        facts
    }
}

/// Applies the result of a sibling's probe.
fn apply_probe(
    from: u64,
    probe: ProbeFinding,
    age: Duration,
    report: &UpstreamReport,
    entry: &SnapshotEntry,
    view: &DutyView<'_>,
) -> SiblingFacts {
    let mut facts = SiblingFacts::default();
    let live = &entry.upstream.live;
    let probed = view.now.checked_sub(probe.age + age).unwrap_or(view.now);
    let mut duty = live.duty();
    let heard = duty.heard(from, probe.good, probed, view);
    // The operator's list of models is not the upstream's.
    let comparable = probe.good && entry.upstream.config.models.is_none();
    if heard == HeardReport::Agrees {
        facts.version = report.version.as_ref().map(|text| text.chars().take(MAX_VERSION_CHARS).collect());
        if comparable && probe.models != models_hash(&entry.models) {
            let cards =
                report.cards.as_ref().and_then(|cards| aggregate::parse_models(cards.as_bytes()).ok());
            facts.models = cards.filter(|cards| models_hash(cards) == probe.models);
            if facts.models.is_none() {
                duty.doubt_with_others(view);
            }
        }
    }
    if duty.is_in_doubt() {
        live.wake.notify_one();
    }
    facts
}

/// Stores the load in a sibling's report, valid until `until`. Returns the values as a page of metrics.
fn store_engine(upstream: &Upstream, engine: &EngineFinding, until: Instant) -> EngineMetrics {
    let EngineFinding { running, waiting, kv_usage, cache_tokens, started, foreign, prefix_caching, .. } =
        *engine;
    let (requests, tokens) = foreign.unwrap_or_default();
    let foreign = foreign.map(|(requests, _)| requests);
    let report = GaugeReport { running, waiting, kv_usage, foreign, unaccounted: None };
    upstream.live.engine_load.latest.store(Some(report.into()));
    upstream.live.engine_load.set(ForeignLoad { requests, tokens }, until);
    EngineMetrics { running, waiting, kv_usage, cache_tokens, started, prefix_caching }
}

#[cfg(test)]
mod tests;
