//! Reloads the configuration while requests are in flight.
//!
//! A valid configuration is applied as a whole, except for keys that require a restart, which are reported;
//! one with problems changes nothing. Requests end with the settings that they began with.
//!
//! The files of the listeners' certificates are read again too, since certificates expire while their paths
//! stay.

use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;

use crate::admin::{Reload, Reloaded};
use crate::config::diff;
use crate::config::types::{Config, UpstreamConfig};
use crate::fleet::breaker::BreakerRules;
use crate::fleet::{Fleet, FleetChange, Snapshot};
use crate::logging;
use crate::proxy::ProxyShared;
use crate::proxy::server::certificate::{CertificatePair, ListenerCertificate};
use crate::proxy::server::connection_limit::ConnectionLimiter;

/// Loads the configuration as at the start. Returns it with its warnings, or its problems.
pub type LoadConfig = Arc<dyn Fn() -> Result<(Config, Vec<String>), Vec<String>> + Send + Sync>;

/// Returns a loader with these upstreams, which are not in the file.
pub(super) fn over(upstreams: Vec<UpstreamConfig>, load: LoadConfig) -> LoadConfig {
    Arc::new(move || {
        let (config, warnings) = load()?;
        Ok((Config { upstreams: upstreams.clone(), ..config }, warnings))
    })
}

/// Reads the configuration again and applies the changes to the running parts.
pub(super) struct Reloader {
    load: LoadConfig,
    /// The running configuration; one reload at a time changes it.
    config: Arc<ArcSwap<Config>>,
    turn: Mutex<()>,
    fleet: Arc<Fleet>,
    shared: Arc<ProxyShared>,
    limiter: Arc<ConnectionLimiter>,
    /// The certificates of the listeners.
    certificates: Vec<Arc<ListenerCertificate>>,
}

impl Reloader {
    pub fn new(
        load: LoadConfig,
        config: Arc<ArcSwap<Config>>,
        fleet: Arc<Fleet>,
        shared: Arc<ProxyShared>,
        limiter: Arc<ConnectionLimiter>,
        certificates: Vec<Arc<ListenerCertificate>>,
    ) -> Arc<Self> {
        Arc::new(Reloader { load, config, turn: Mutex::new(()), fleet, shared, limiter, certificates })
    }

    /// Returns the running configuration.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Reloads once; concurrent calls take turns. Fails with all problems of the new configuration.
    pub async fn reload(&self) -> Result<Reloaded, Vec<String>> {
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
        let snapshot = self.fleet.snapshot_owned();
        let mut changes: Vec<FleetChange> =
            diff.upsert.into_iter().filter_map(|named| taken_over(&old, &snapshot, named)).collect();
        for name in diff.remove {
            // The operator may have removed this upstream already. An upstream that has the name since then
            // is another one.
            if snapshot.by_name(&name).is_some_and(|there| there.upstream.config.discovered.is_none()) {
                let leave = !new.sources.is_empty();
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
        // The only step that can fail runs first.
        self.fleet.apply(changes).await.map_err(|refusal| vec![refusal.to_string()])?;
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
        Ok(Reloaded { changed: diff.changed, restart: diff.restart, warnings })
    }
}

/// What a reload makes of an upstream that the file names. Where the file says what it said before, what was
/// changed at run time stays: one that was taken out stays out, also at all siblings, and a weight stays as
/// it was set; only the files that it names are read again.
fn taken_over(old: &Config, snapshot: &Snapshot, named: UpstreamConfig) -> Option<FleetChange> {
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
