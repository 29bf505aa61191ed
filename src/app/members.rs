//! Applies the records of run-time changes to the fleet: those of siblings, and those that a process of this
//! balancer made before its upgrade.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::config::member::{MemberRecord, NOT_ON_A_SOCKET};
use crate::config::types::{Config, UpstreamConfig};
use crate::fleet::{Fleet, FleetChange, FleetChangeError};
use crate::observe::Observer;
use crate::state::members::Members;

/// The interval between two looks at records that would expire although their upstreams are configured.
const REFRESH_INTERVAL: Duration = Duration::from_secs(3600);

/// The least number of discovered names at which those that have left are forgotten.
const MIN_NAMES_TO_FORGET: usize = 1_024;

/// Records by name.
pub(super) type MemberTexts = HashMap<String, String>;

/// Applies records to the fleet.
#[derive(Clone)]
pub(super) struct RecordApplier {
    fleet: Arc<Fleet>,
    /// The running configuration, whose upstreams return when a record is cleared.
    config: Arc<ArcSwap<Config>>,
    pub members: Arc<Members>,
    observer: Observer,
}

/// Applies the changes of the list of members to the fleet.
pub(super) struct MemberFollower {
    applier: RecordApplier,
    /// The list as it was last applied.
    known: MemberTexts,
    met: DiscoveredNames,
}

/// The upstreams that were discovered here: those that are present, and those that have left and have a
/// record.
struct DiscoveredNames {
    /// Their ids by name; `None` while one is being removed.
    ids: HashMap<String, Option<usize>>,
    /// The number of names at which others are forgotten.
    forget_at: usize,
}

// === impl RecordApplier ===

impl RecordApplier {
    pub(super) fn new(
        fleet: &Arc<Fleet>,
        config: &Arc<ArcSwap<Config>>,
        members: &Arc<Members>,
        observer: &Observer,
    ) -> Self {
        let (fleet, config) = (fleet.clone(), config.clone());
        RecordApplier { fleet, config, members: members.clone(), observer: observer.clone() }
    }

    /// Applies a record in place of `before`. With a Redis it may come from another machine.
    pub(super) async fn apply(&self, name: &str, before: Option<&str>, text: &str) {
        let is_foreign = self.config.load().redis.is_some();
        let before = before.and_then(|text| MemberRecord::read(text).ok()).unwrap_or_default();
        match MemberRecord::read(text).and_then(|record| checked(name, record, is_foreign)) {
            Ok(record) => self.carry_out(name, &before, record).await,
            Err(why) => self.observer.member_unusable(name, &why),
        }
    }

    async fn carry_out(&self, name: &str, before: &MemberRecord, record: MemberRecord) {
        let config = self.config.load_full();
        let configured = config.upstreams.iter().find(|upstream| upstream.name == name);
        for change in changes(name, before, record, configured) {
            match self.fleet.apply(vec![change]).await {
                // The upstream is configured at another balancer only, or was removed already.
                Ok(()) | Err(FleetChangeError::Unknown(_) | FleetChangeError::Stopping) => {}
                Err(refusal) => self.observer.member_unusable(name, &refusal.to_string()),
            }
        }
    }
}

/// Rejects a record that names another upstream, or one that no other machine reaches.
fn checked(name: &str, record: MemberRecord, is_foreign: bool) -> Result<MemberRecord, String> {
    if let Some(upstream) = &record.upstream {
        if upstream.name != name {
            return Err(format!("the record is of an upstream named {:?}", upstream.name));
        }
        if is_foreign && upstream.url.unix.is_some() {
            return Err(NOT_ON_A_SOCKET.into());
        }
    }
    Ok(record)
}

/// Returns the changes that lead from one record to the next. `configured` is the upstream of this name in
/// the file: what a cleared record had changed is as in the file again.
fn changes(
    name: &str,
    before: &MemberRecord,
    record: MemberRecord,
    configured: Option<&UpstreamConfig>,
) -> Vec<FleetChange> {
    let MemberRecord { upstream, drain, weight, removed, entry: _ } = record;
    let name = || name.to_string();
    if removed {
        return vec![FleetChange::Remove { name: name(), force: false }];
    }
    let returns = before.removed || before.upstream.is_some();
    let upstream = upstream.or_else(|| configured.filter(|_| returns).cloned()).map(|mut upstream| {
        upstream.weight = weight.unwrap_or(upstream.weight);
        FleetChange::Upsert(upstream)
    });
    let original = configured.filter(|_| before.weight.is_some()).map(|configured| configured.weight);
    let weight = weight.or(original).filter(|_| upstream.is_none());
    let weight = weight.map(|weight| FleetChange::Weight { name: name(), weight });
    let drain = drain.or((before.drain == Some(true)).then_some(false));
    let drain = drain.map(|drain| FleetChange::Drain { name: name(), drain });
    upstream.into_iter().chain(weight).chain(drain).collect()
}

// === impl DiscoveredNames ===

impl DiscoveredNames {
    fn new() -> Self {
        DiscoveredNames { ids: HashMap::new(), forget_at: MIN_NAMES_TO_FORGET }
    }

    /// Forgets the names that are not `kept`, once there are many.
    fn forget(&mut self, kept: impl Fn(&str) -> bool) {
        if self.ids.len() >= self.forget_at {
            self.ids.retain(|name, _| kept(name));
            self.forget_at = MIN_NAMES_TO_FORGET.max(2 * self.ids.len());
        }
    }
}

// === impl MemberFollower ===

impl MemberFollower {
    pub(super) fn new(applier: RecordApplier) -> Self {
        MemberFollower { applier, known: HashMap::new(), met: DiscoveredNames::new() }
    }

    /// Applies the records as they change until `stop`; `changed` has the list of the siblings.
    pub(super) async fn follow(
        mut self,
        mut changed: Option<watch::Receiver<MemberTexts>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut fleet_changed = self.applier.fleet.changes();
        let mut refresh = tokio::time::interval(REFRESH_INTERVAL);
        loop {
            let stopped = async { drop(stop.wait_for(|stopping| *stopping).await) };
            let update = async {
                match &mut changed {
                    Some(changed) => changed.changed().await.map(|()| changed.borrow_and_update().clone()),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stopped => return,
                update = update => match update {
                    Ok(all) => self.take_over(all).await,
                    Err(_) => return,
                },
                Ok(()) = fleet_changed.changed() => self.greet().await,
                _ = refresh.tick() => self.refresh(),
            }
        }
    }

    /// Applies the records that differ from the known ones.
    pub(super) async fn take_over(&mut self, all: MemberTexts) {
        for (name, text) in all.iter().filter(|(name, text)| self.known.get(*name) != Some(*text)) {
            let before = self.known.get(name).map(String::as_str);
            self.applier.apply(name, before, text).await;
        }
        self.known = all;
    }

    /// Applies the changes that were made to a discovered upstream before this balancer discovered it. An
    /// upstream that its source lists again starts without them: its removal is outdated and is deleted from
    /// the list.
    async fn greet(&mut self) {
        let snapshot = self.applier.fleet.snapshot_owned();
        for entry in snapshot.entries.iter().filter(|entry| entry.upstream.config.discovered.is_some()) {
            let (name, id) = (entry.upstream.name(), entry.upstream.id);
            let now = (!entry.removing).then_some(id);
            let before = self.met.ids.insert(name.to_string(), now);
            if now.is_none() || before == Some(now) {
                continue;
            }
            let Some(text) = self.applier.members.get(name) else { continue };
            match before {
                None => self.applier.apply(name, None, &text).await,
                Some(_) if MemberRecord::read(&text).is_ok_and(|member| member.removed) => {
                    // The name has a record already, so there is room.
                    let _ = self.applier.members.put(name, MemberRecord::default().write());
                }
                Some(_) => {}
            }
        }
        let members = &self.applier.members;
        self.met.forget(|name| snapshot.by_name(name).is_some() || members.get(name).is_some());
    }

    /// Keeps the removals of upstreams that the file or a source names: without them the upstreams would be
    /// back after a restart.
    fn refresh(&self) {
        let config = self.applier.config.load();
        let configured = config.upstreams.iter().map(|upstream| &upstream.name);
        for name in configured.chain(self.met.ids.keys()) {
            let record = self.applier.members.get(name).and_then(|text| MemberRecord::read(&text).ok());
            if record.is_some_and(|record| record.removed) {
                self.applier.members.refresh(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;

    /// Regression: each pod of a service leaves its name behind.
    #[test]
    fn forgets_names_that_have_left_but_for_those_with_a_record() {
        let mut met = DiscoveredNames::new();
        let is_removed = |number: usize| number.is_multiple_of(100);
        for number in 0..50_000 {
            met.ids.insert(number.to_string(), Some(number));
            met.forget(|name| {
                let named: usize = name.parse().expect("is a number");
                is_removed(named) || number - named < 300
            });
            assert!(met.ids.len() <= MIN_NAMES_TO_FORGET + 2 * (300 + number / 100), "{number}");
        }
        let kept = |number: usize| met.ids.contains_key(&number.to_string());
        assert!((0..50_000).filter(|number| is_removed(*number)).all(kept) && (49_700..50_000).all(kept));
    }

    fn upstream(text: &str) -> UpstreamConfig {
        check::upstream_alone(text).expect(text)
    }

    /// The changes between two records, as words.
    fn shown(before: &str, record: &str, configured: Option<&UpstreamConfig>) -> Vec<String> {
        let read = |text: &str| MemberRecord::read(text).expect("is a record");
        let shown = |change: FleetChange| match change {
            FleetChange::Upsert(config) => format!("{} x{}", config.url.display(), config.weight),
            FleetChange::Remove { name, .. } => format!("{name} goes"),
            FleetChange::Drain { drain, .. } => format!("drain {drain}"),
            FleetChange::Weight { weight, .. } => format!("weight {weight}"),
            other => format!("{other:?}"),
        };
        changes("a", &read(before), read(record), configured).into_iter().map(shown).collect()
    }

    #[test]
    fn a_cleared_record_restores_the_configured_upstream() {
        let configured = upstream(r#"{"url": "http://a:1", "name": "a", "weight": 3}"#);
        let all = r#"{"drain": true, "weight": 2, "upstream": {"url": "http://a:9", "name": "a"}}"#;
        let table: [(&str, &str, &[&str], &[&str]); 6] = [
            (r#"{"drain": true}"#, "{}", &["drain false"], &["drain false"]),
            (r#"{"weight": 2}"#, "{}", &["weight 3"], &[]),
            (r#"{"removed": true}"#, "{}", &["http://a:1 x3"], &[]),
            (all, "{}", &["http://a:1 x3", "drain false"], &["drain false"]),
            ("{}", all, &["http://a:9 x2", "drain true"], &["http://a:9 x2", "drain true"]),
            (all, r#"{"removed": true}"#, &["a goes"], &["a goes"]),
        ];
        for (before, record, with_file, without) in table {
            assert_eq!(shown(before, record, Some(&configured)), with_file, "{before} -> {record}");
            assert_eq!(shown(before, record, None), without, "{before} -> {record}");
        }
    }

    #[test]
    fn rejects_records_of_other_names_and_sockets_of_other_machines() {
        let record = |text: &str| MemberRecord { upstream: Some(upstream(text)), ..MemberRecord::default() };
        let socket = record(r#"{"url": "unix:/run/a.sock", "name": "a"}"#);
        assert!(checked("a", socket.clone(), true).is_err());
        assert!(checked("a", socket.clone(), false).is_ok());
        assert!(checked("b", socket, false).is_err());
    }
}
