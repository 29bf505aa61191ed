//! Reloads the configuration while requests are in flight.
//!
//! A valid configuration is applied as a whole, except for keys that require a restart, which are reported;
//! one with problems changes nothing. Requests end with the settings that they began with.
//!
//! The files of the listeners' certificates are read again too, since certificates expire while their paths
//! stay.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;

use crate::admin::{Reload, Reloaded};
use crate::config::diff::{self, ConfigDiff};
use crate::config::member::{MemberRecord, entry_hash};
use crate::config::types::{Config, UpstreamConfig};
use crate::fleet::breaker::BreakerRules;
use crate::fleet::{Fleet, FleetChange, FleetChangeError, Snapshot};
use crate::logging;
use crate::proxy::ProxyShared;
use crate::proxy::server::certificate::{CertificatePair, ListenerCertificate};
use crate::proxy::server::connection_limit::ConnectionLimiter;
use crate::state::members::Members;
use crate::state::redis::SiblingExchange;

/// The largest number of attempts to apply a reload to a fleet that changes meanwhile.
const MAX_FLEET_ATTEMPTS: usize = 8;

/// Loads the configuration as at the start. Returns it with its warnings, or its problems.
pub type LoadConfig = Arc<dyn Fn() -> Result<(Config, Vec<String>), Vec<String>> + Send + Sync>;

/// Returns a loader with these upstreams, which are not in the file.
pub(super) fn over(upstreams: Vec<UpstreamConfig>, load: LoadConfig) -> LoadConfig {
    Arc::new(move || {
        let (config, warnings) = load()?;
        Ok((Config { upstreams: upstreams.clone(), ..config }, warnings))
    })
}

/// The records of run-time changes, which end where the file names their upstreams anew.
pub(super) struct RuntimeChanges {
    pub members: Arc<Members>,
    /// The exchange with the siblings that share the records.
    pub exchange: Option<Arc<SiblingExchange>>,
}

/// Reads the configuration again and applies the changes to the running parts.
pub(super) struct Reloader {
    load: LoadConfig,
    /// The running configuration; one reload at a time changes it.
    config: Arc<ArcSwap<Config>>,
    turn: Mutex<()>,
    fleet: Arc<Fleet>,
    changes: RuntimeChanges,
    shared: Arc<ProxyShared>,
    limiter: Arc<ConnectionLimiter>,
    /// The certificates of the listeners.
    certificates: Vec<Arc<ListenerCertificate>>,
}

impl Reloader {
    pub(super) fn new(
        load: LoadConfig,
        config: Arc<ArcSwap<Config>>,
        (fleet, changes): (Arc<Fleet>, RuntimeChanges),
        shared: Arc<ProxyShared>,
        limiter: Arc<ConnectionLimiter>,
        certificates: Vec<Arc<ListenerCertificate>>,
    ) -> Arc<Self> {
        let turn = Mutex::new(());
        Arc::new(Reloader { load, config, turn, fleet, changes, shared, limiter, certificates })
    }

    /// Returns the running configuration.
    pub(super) fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Reloads once; concurrent calls take turns. Fails with all problems of the new configuration.
    pub(super) async fn reload(&self) -> Result<Reloaded, Vec<String>> {
        let _turn = self.turn.lock().await;
        let done = self.exchange().await;
        match &done {
            Ok(Reloaded { changed, restart, warnings }) => {
                self.shared.observer().reloaded(changed, restart, warnings)
            }
            Err(problems) => self.shared.observer().reload_failed(problems),
        }
        done
    }

    async fn exchange(&self) -> Result<Reloaded, Vec<String>> {
        let (load, certificates) = (self.load.clone(), self.certificates.clone());
        let old = self.config();
        let before = old.clone();
        // Reading files may block.
        let loaded = tokio::task::spawn_blocking(move || {
            let (new, warnings) = load()?;
            // Certificates of listeners that change at the next start may no longer exist.
            let stay = before.listen == new.listen;
            let renewed = if stay { renewed(&certificates)? } else { Vec::new() };
            Ok((new, warnings, renewed))
        });
        let (new, warnings, renewed) = loaded.await.unwrap_or_else(|error| Err(vec![error.to_string()]))?;
        let mut diff = diff::diff(&old, &new);
        let new = diff::as_it_runs(&old, new);
        // What an operator changes meanwhile would be overwritten with what the fleet was before.
        let _alone = self.changes.members.edit().await;
        // The only step that can fail runs first.
        let cleared = change_fleet(&self.fleet, |snapshot| {
            let cleared = self.changes.cleared(&old, &new, snapshot);
            let changes = fleet_changes(&old, &new, &diff, snapshot, &cleared);
            (cleared, changes)
        })
        .await?;
        if !renewed.is_empty() {
            diff.changed.push("listen.tls".into());
        }
        renewed.into_iter().for_each(|(certificate, pair)| certificate.replace(pair));
        self.shared.reload(&new);
        self.limiter.set_limit(new.limits.connections);
        // The log is the process's: only a change of this balancer's own setting may change it.
        if new.log.level != old.log.level {
            logging::set_level(new.log.level);
        }
        self.config.store(Arc::new(new));
        // After the configuration, from which a cleared record restores the upstream.
        self.changes.clear(cleared.records);
        self.changes.members.set_entries(&self.config().upstreams);
        for drained in cleared.drained {
            // The upstream is in the fleet since the changes above, so this fails only when the process ends.
            drop(self.fleet.apply(vec![drained]).await);
        }
        Ok(Reloaded { changed: diff.changed, restart: diff.restart, warnings })
    }
}

/// Applies the changes that `plan` finds for a snapshot, and returns what else it found. An upstream of the
/// snapshot may leave the fleet before its changes are applied, as a removed one does when its last request
/// ends. Then no change applies, and they are found again for the next snapshot.
async fn change_fleet<T>(
    fleet: &Fleet,
    mut plan: impl FnMut(&Snapshot) -> (T, Vec<FleetChange>),
) -> Result<T, Vec<String>> {
    let mut attempts_left = MAX_FLEET_ATTEMPTS;
    loop {
        // The keeper publishes what it knows before it answers: a change may wait for the next snapshot.
        fleet.apply(Vec::new()).await.map_err(|refusal| vec![refusal.to_string()])?;
        let (found, changes) = plan(&fleet.snapshot_owned());
        attempts_left -= 1;
        match fleet.apply(changes).await {
            Ok(()) => return Ok(found),
            Err(FleetChangeError::Unknown(_)) if attempts_left > 0 => {}
            Err(refusal) => return Err(vec![refusal.to_string()]),
        }
    }
}

/// Returns the changes that make the fleet of a snapshot that of the new configuration.
fn fleet_changes(
    old: &Config,
    new: &Config,
    diff: &ConfigDiff,
    snapshot: &Snapshot,
    cleared: &ClearedRecords,
) -> Vec<FleetChange> {
    let named = diff.upsert.iter().cloned();
    let mut changes: Vec<FleetChange> =
        named.filter_map(|named| taken_over(old, snapshot, named, &cleared.lasting)).collect();
    changes.extend(cleared.undrained.iter().cloned());
    for name in &diff.remove {
        // The operator may have removed this upstream already. An upstream that has the name since then is
        // another one.
        if snapshot.by_name(name).is_some_and(|there| there.upstream.config.discovered.is_none()) {
            let (leave, name) = (!new.sources.is_empty(), name.clone());
            changes.push(if leave {
                FleetChange::HandToDiscovery { name }
            } else {
                FleetChange::Remove { name, force: false }
            });
        }
    }
    changes.push(FleetChange::Rules(BreakerRules { health: new.health.clone(), breaker: new.breaker }));
    changes.push(FleetChange::QueueSize(new.queue.size));
    changes.push(FleetChange::Sources(new.sources.clone()));
    changes
}

/// The run-time changes that end with a reload.
#[derive(Default)]
struct ClearedRecords {
    /// The records of upstreams that the file names anew, as they become.
    records: Vec<(String, MemberRecord)>,
    /// Ends the drains of present upstreams.
    undrained: Vec<FleetChange>,
    /// Drains upstreams that may be new here and are drained elsewhere.
    drained: Vec<FleetChange>,
    /// The run-time changes that were made for the new entries of the file.
    lasting: HashMap<String, MemberRecord>,
}

// === impl RuntimeChanges ===

impl RuntimeChanges {
    /// Finds the run-time changes that end. An upstream whose entry in the file has changed, or that is new
    /// in the file, is as the file has it. One that is new in this file, and that a sibling serves, is no new
    /// upstream: its drain lasts. So do changes that another balancer with the new file has made since.
    fn cleared(&self, old: &Config, new: &Config, snapshot: &Snapshot) -> ClearedRecords {
        let mut cleared = ClearedRecords::default();
        let is_new = |named: &&UpstreamConfig| !old.upstreams.contains(named);
        for named in new.upstreams.iter().filter(is_new) {
            let name = || named.name.clone();
            let Some(text) = self.members.get(&named.name) else { continue };
            let record = MemberRecord::read(&text).unwrap_or_default();
            let changed = old.upstreams.iter().any(|before| before.name == named.name);
            if changed && record.outlasts(entry_hash(named)) {
                if record.drain == Some(true) {
                    cleared.drained.push(FleetChange::Drain { name: name(), drain: true });
                }
                cleared.lasting.insert(name(), record);
                continue;
            }
            let stays_drained = !changed && record.drain == Some(true) && self.sibling_serves(&named.name);
            if stays_drained {
                cleared.drained.push(FleetChange::Drain { name: name(), drain: true });
            } else if record.drain == Some(true) && snapshot.by_name(&named.name).is_some() {
                cleared.undrained.push(FleetChange::Drain { name: name(), drain: false });
            }
            let drain = stays_drained.then_some(true);
            cleared.records.push((name(), MemberRecord { drain, ..MemberRecord::default() }));
        }
        // A name that the file no longer has. Siblings may still serve their upstream of this name.
        let gone = old.upstreams.iter().map(|before| &before.name).filter(|_| self.exchange.is_none());
        let gone = gone.filter(|name| !new.upstreams.iter().any(|named| named.name == **name));
        cleared.records.extend(gone.map(|name| (name.clone(), MemberRecord::default())));
        cleared
    }

    /// Whether a sibling serves an upstream of this name.
    fn sibling_serves(&self, name: &str) -> bool {
        self.exchange.as_ref().is_some_and(|exchange| exchange.sibling_serves(name))
    }

    /// Replaces records that differ, here and at the siblings.
    fn clear(&self, records: Vec<(String, MemberRecord)>) {
        for (name, record) in records {
            let known = self.members.get(&name).map(|text| MemberRecord::read(&text).unwrap_or_default());
            if known.is_some_and(|known| known != record) {
                // The name has a record, so there is room.
                let _ = self.members.put(&name, record.write());
            }
        }
    }
}

/// What a reload makes of an upstream that the file names. Where the file says what it said before, what was
/// changed at run time stays: one that was taken out stays out, also at all siblings, and a weight stays as
/// it was set; only the files that it names are read again.
fn taken_over(
    old: &Config,
    snapshot: &Snapshot,
    named: UpstreamConfig,
    lasting: &HashMap<String, MemberRecord>,
) -> Option<FleetChange> {
    if let Some(record) = lasting.get(&named.name) {
        let weight = record.weight.unwrap_or(named.weight);
        let is_replaced = record.removed || record.upstream.is_some();
        return (!is_replaced).then_some(FleetChange::Upsert(UpstreamConfig { weight, ..named }));
    }
    if !old.upstreams.contains(&named) {
        return Some(FleetChange::Upsert(named));
    }
    let there = snapshot.by_name(&named.name).filter(|there| !there.removing)?;
    Some(FleetChange::Upsert(there.upstream.config.clone()))
}

/// A listener's certificate, and the pair that replaces it.
type RenewedCertificate = (Arc<ListenerCertificate>, CertificatePair);

/// Reads the certificate files that have changed since the listeners read them.
fn renewed(certificates: &[Arc<ListenerCertificate>]) -> Result<Vec<RenewedCertificate>, Vec<String>> {
    let mut found = Vec::new();
    for certificate in certificates {
        let pair = certificate.read_changed().map_err(|problem| vec![problem])?;
        found.extend(pair.map(|pair| (certificate.clone(), pair)));
    }
    Ok(found)
}

impl Reload for Reloader {
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, Vec<String>>> {
        Box::pin(Reloader::reload(self))
    }
}

#[cfg(test)]
mod tests;
