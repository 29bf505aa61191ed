//! `GET /admin/overview`: the state of the whole balancer in one document, for the dashboard and
//! `vllm-lb top`. `GET /admin/live` streams the same document.
//!
//! ```text
//! time, balancer     when it was made, and by which process
//! totals             requests, errors, tokens, times to the first byte, memory
//! upstreams          one row for each, in the order of the fleet
//! models, routes     what was requested
//! siblings, traces   the exchange with other balancers, the store of recorded calls
//! decisions          the latest choices, newest first, each with its best candidates
//! ```
//!
//! An unknown value is null. Counters only grow while the process lives: readers compute the rates.

mod views;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use serde_json::{Map, Value};

use super::parts::AdminParts;
use super::{decisions, siblings, upstreams};
use crate::config::types::{Config, RouteConfig};
use crate::fleet::SnapshotEntry;
use crate::observe::decisions::{CandidateRecord, DecisionRecord};
use crate::observe::resident_bytes;
use crate::observe::traffic::BalancerTraffic;
use crate::observe::usage::UsageTotal;
use crate::state::exchange::SiblingRow;
use crate::state::redis::SiblingExchange;
use crate::traces::store::StoreError;
use views::{
    BalancerView, ModelView, OverviewDocument, RouteView, SiblingsView, TotalTimes, TotalsView, TracesView,
    UpstreamOverview, UpstreamTimes,
};

/// The number of choices in a document.
const MAX_SHOWN_DECISIONS: usize = 20;

/// The number of candidates of a choice; `GET /admin/decisions` shows all of them.
const MAX_SHOWN_CANDIDATES: usize = 16;

/// Makes overviews.
pub(super) struct OverviewSource {
    parts: Arc<AdminParts>,
    config: Arc<ArcSwap<Config>>,
    leaving: Arc<AtomicBool>,
    /// The id of this balancer, and when it started.
    id: String,
    started: f64,
}

/// An overview; readers get its choices from where they left off.
#[derive(Debug)]
pub(super) struct OverviewFrame {
    /// The document up to its list of choices.
    head: String,
    /// The numbers of the latest choices, and the choices; newest first.
    decisions: Vec<(u64, String)>,
}

/// Sums of tokens.
#[derive(Clone, Copy, Default)]
struct TokenSums {
    requests: u64,
    prompt: u64,
    cached: u64,
    output: u64,
}

// === impl OverviewSource ===

impl OverviewSource {
    /// `fallback_id`: the id of a balancer without siblings, which has none there.
    pub(super) fn new(
        parts: Arc<AdminParts>,
        config: Arc<ArcSwap<Config>>,
        leaving: Arc<AtomicBool>,
        fallback_id: u64,
    ) -> Self {
        let id = parts.exchange.as_deref().map_or(fallback_id, SiblingExchange::id);
        OverviewSource { parts, config, leaving, id: siblings::id(id), started: unix_time() }
    }

    /// Returns the overview at this moment.
    pub(super) fn frame(&self) -> OverviewFrame {
        let (parts, now) = (&*self.parts, Instant::now());
        let snapshot = parts.fleet.snapshot_owned();
        let models = parts.observer.usage().models();
        let document = OverviewDocument {
            time: unix_time(),
            balancer: BalancerView {
                id: &self.id,
                name: &parts.host,
                identity: &parts.name,
                version: env!("CARGO_PKG_VERSION"),
                started: self.started,
                ready: snapshot.any_ready() && !self.leaving.load(Ordering::Acquire),
                leaving: self.leaving.load(Ordering::Acquire),
            },
            totals: self.totals(&models),
            upstreams: snapshot.entries.iter().map(|entry| self.upstream(entry, now)).collect(),
            models: models_of(&snapshot.entries, &models),
            routes: self.routes(),
            siblings: siblings_of(parts.exchange.as_deref()),
            traces: self.traces(),
        };
        let mut head = serde_json::to_string(&document).unwrap_or_default();
        // The list of choices follows.
        head.pop();
        let latest = parts.observer.decisions().latest(MAX_SHOWN_DECISIONS);
        let decisions = latest.iter().map(|record| (record.number, decision(record))).collect();
        OverviewFrame { head, decisions }
    }

    fn totals(&self, models: &[(String, UsageTotal)]) -> TotalsView {
        let parts = &*self.parts;
        let mut tokens = TokenSums::default();
        models.iter().for_each(|(_, total)| tokens.add(total));
        let (traffic, size) = (parts.observer.balancer_traffic(), parts.state.size());
        let BalancerTraffic { requests, errors, rejects, retries, broken_streams, in_flight, .. } = traffic;
        let [p50, p90, p99] = traffic.first_byte_ms.unwrap_or_default().map(rounded);
        TotalsView {
            requests,
            errors,
            rejects,
            retries,
            broken_streams,
            in_flight,
            queued: traffic.queued,
            connections: traffic.connections,
            prompt_tokens: tokens.prompt,
            cached_tokens: tokens.cached,
            output_tokens: tokens.output,
            predicted_tokens: traffic.predicted_tokens,
            reported_tokens: traffic.reported_tokens,
            compared_tokens: traffic.compared_tokens,
            first_byte_ms: traffic.first_byte_ms.map(|_| TotalTimes { p50, p90, p99 }),
            peeked_bytes: traffic.peeked_bytes,
            index_blocks: size.blocks,
            index_bytes: size.bytes,
            memory_bytes: resident_bytes(),
        }
    }

    fn upstream<'e>(&self, entry: &'e SnapshotEntry, now: Instant) -> UpstreamOverview<'e> {
        let (upstream, config) = (&entry.upstream, &entry.upstream.config);
        let traffic = self.parts.observer.upstream_traffic(upstream.name());
        let (load, report, sight) = (upstream.load(), upstream.gauge_report(now), upstream.sight());
        let is_full = upstream.busy_until(now).is_some();
        UpstreamOverview {
            name: &config.name,
            url: config.url.display(),
            state: entry.state().label(),
            reason: upstreams::reason(entry, is_full),
            drained: entry.status.drained,
            removing: entry.removing,
            full: is_full,
            since_seconds: now.saturating_duration_since(entry.status.since).as_secs(),
            weight: config.weight,
            models: entry.models.iter().map(|card| card.id.as_str()).collect(),
            version: entry.version.as_deref(),
            source: config.discovered.as_ref().map(|discovered| discovered.source.as_str()),
            active: load.active,
            active_elsewhere: upstream.siblings().active,
            max_active: config.max_active,
            foreign: report.and_then(|report| report.foreign),
            queued: report.and_then(|report| report.waiting),
            backlog: load.backlog,
            context: load.context,
            kv_usage: report.and_then(|report| report.kv_usage),
            cache_tokens: entry.cache_tokens,
            requests: traffic.requests,
            failures: traffic.failures,
            predicted_tokens: traffic.predicted_tokens,
            reported_tokens: traffic.reported_tokens,
            compared_tokens: traffic.compared_tokens,
            prompt_tokens: traffic.prompt_tokens,
            output_tokens: traffic.output_tokens,
            first_byte_ms: traffic
                .first_byte_ms
                .map(|[p50, p90]| UpstreamTimes { p50: rounded(p50), p90: rounded(p90) }),
            forecast_error_ms: upstream.forecast_error().map(|error| rounded(error.as_secs_f64() * 1e3)),
            sight: Some(sight.state.label()),
            sight_reason: sight.reason.map(|reason| reason.to_string()),
            incarnation: entry.incarnation,
        }
    }

    /// The configured routes, in their order.
    fn routes(&self) -> Vec<RouteView> {
        let (config, used) = (self.config.load(), self.parts.observer.usage().routes());
        let row = |(index, route): (usize, &RouteConfig)| {
            let name = route.name(index);
            let mut tokens = TokenSums::default();
            used.iter().filter(|(used, _)| *used == name).for_each(|(_, total)| tokens.add(total));
            let model = route.to.clone().or_else(|| route.model.clone());
            let TokenSums { requests, prompt, cached, output } = tokens;
            RouteView {
                name,
                model,
                requests,
                prompt_tokens: prompt,
                cached_tokens: cached,
                output_tokens: output,
            }
        };
        config.routes.iter().enumerate().map(row).collect()
    }

    fn traces(&self) -> TracesView {
        let traffic = self.parts.observer.balancer_traffic();
        let (waiting, _, stored_bytes) = self.parts.traces.sizes();
        TracesView {
            enabled: !matches!(self.parts.traces.store(), Err(StoreError::Off)),
            stored_bytes,
            waiting,
            stored: traffic.traces_stored,
            lost: traffic.traces_lost,
        }
    }
}

// === impl OverviewFrame ===

impl OverviewFrame {
    /// `decisions`: the numbers and the texts of the latest choices, newest first.
    #[cfg(test)]
    pub(super) fn of(head: &str, decisions: &[u64]) -> Self {
        let decisions = decisions.iter().map(|number| (*number, number.to_string())).collect();
        OverviewFrame { head: head.into(), decisions }
    }

    /// The number of the latest choice; 0 before the first one.
    pub(super) fn last_decision(&self) -> u64 {
        self.decisions.first().map_or(0, |(number, _)| *number)
    }

    /// Returns the document with the choices that followed the one with this number.
    pub(super) fn document(&self, after: u64) -> String {
        let newer: Vec<&str> = self
            .decisions
            .iter()
            .take_while(|(number, _)| *number > after)
            .map(|(_, text)| text.as_str())
            .collect();
        format!("{},\"decisions\":[{}]}}", self.head, newer.join(","))
    }
}

// === impl TokenSums ===

impl TokenSums {
    fn add(&mut self, total: &UsageTotal) {
        // Engines report what they like.
        for (sum, more) in [
            (&mut self.requests, Some(total.requests)),
            (&mut self.prompt, total.usage.prompt_tokens),
            (&mut self.cached, total.usage.cached_tokens),
            (&mut self.output, total.usage.output_tokens),
        ] {
            *sum = sum.saturating_add(more.unwrap_or(0));
        }
    }
}

/// The models of the fleet, and those that were served before, by name.
fn models_of<'a>(entries: &'a [SnapshotEntry], used: &'a [(String, UsageTotal)]) -> Vec<ModelView<'a>> {
    let mut rows: BTreeMap<&str, (usize, usize, TokenSums)> = BTreeMap::new();
    for entry in entries {
        for card in entry.models.iter() {
            let (upstreams, ready, _) = rows.entry(card.id.as_str()).or_default();
            *upstreams += 1;
            *ready += usize::from(entry.is_ready());
        }
    }
    used.iter().for_each(|(name, total)| rows.entry(name).or_default().2.add(total));
    let view = |(name, (upstreams, ready, tokens)): (&'a str, (usize, usize, TokenSums))| ModelView {
        name,
        upstreams,
        ready,
        requests: tokens.requests,
        prompt_tokens: tokens.prompt,
        cached_tokens: tokens.cached,
        output_tokens: tokens.output,
    };
    rows.into_iter().map(view).collect()
}

/// The siblings with the fields of `GET /admin/siblings`, and their names in this document.
fn siblings_of(exchange: Option<&SiblingExchange>) -> SiblingsView {
    let view = |sibling: &SiblingRow| {
        let mut row = Map::new();
        row.insert("id".into(), siblings::id(sibling.balancer).into());
        row.insert("age_ms".into(), rounded(sibling.age.as_secs_f64() * 1e3).into());
        row.insert("in_flight".into(), sibling.sum.active.into());
        if let Value::Object(listed) = siblings::row(sibling, exchange) {
            row.extend(listed);
        }
        Value::Object(row)
    };
    SiblingsView {
        enabled: exchange.is_some(),
        redis_up: exchange.is_some_and(SiblingExchange::works),
        balancers: exchange.map(SiblingExchange::rows).unwrap_or_default().iter().map(view).collect(),
    }
}

/// A choice with its candidates of the least costs, and the chosen one.
fn decision(record: &DecisionRecord) -> String {
    let mut candidates: Vec<CandidateRecord<'_>> = record.candidates().collect();
    if candidates.len() > MAX_SHOWN_CANDIDATES {
        let chosen = record.chosen().map(|chosen| chosen.terms.index);
        // `false` comes first.
        let place = |candidate: &CandidateRecord<'_>| Some(candidate.terms.index) != chosen;
        candidates.sort_by(|one, other| place(one).cmp(&place(other)).then(one.cost.total_cmp(&other.cost)));
        candidates.truncate(MAX_SHOWN_CANDIDATES);
    }
    decisions::row(record, candidates).to_string()
}

/// Milliseconds to a microsecond.
fn rounded(millis: f64) -> f64 {
    (millis * 1e3).round() / 1e3
}

fn unix_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as f64 / 1e3
}

#[cfg(test)]
mod tests;
