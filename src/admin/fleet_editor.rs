//! Changes to the fleet: applied here at once and recorded. With siblings the records are shared, and all of
//! them apply the changes.

use std::collections::HashMap;

use crate::config::member::MemberRecord;
use crate::fleet::{Fleet, FleetChange, FleetChangeError};
use crate::observe::Observer;
use crate::state::members::{MAX_MEMBERS, Members};
use http::StatusCode;

use super::answer::AdminReject;

/// Applies the changes that operators make to the fleet, and records them.
pub(crate) struct FleetEditor<'a> {
    pub fleet: &'a Fleet,
    pub members: &'a Members,
    /// The records are shared with siblings over a Redis.
    pub is_shared: bool,
    pub observer: &'a Observer,
}

/// Why a change was rejected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum EditRefusal {
    Fleet(FleetChangeError),
    /// There is no room for the record of another name.
    Full,
    /// The record cannot be shared with siblings; the text says why.
    Unshareable(&'static str),
}

impl FleetEditor<'_> {
    /// Applies all changes or none, and records them. Of two calls one waits for the other: both may change
    /// the record of one upstream.
    pub(crate) async fn apply(&self, changes: Vec<FleetChange>) -> Result<(), EditRefusal> {
        let _alone = self.members.edit().await;
        let mut records: HashMap<String, MemberRecord> = HashMap::new();
        for change in &changes {
            let Some(name) = name(change) else { continue };
            let known = records.remove(name).or_else(|| MemberRecord::read(&self.members.get(name)?).ok());
            let entry = self.members.entries().0.get(name).copied();
            let record = noted(known.unwrap_or_default(), change.clone());
            records.insert(name.into(), MemberRecord { entry, ..record });
        }
        for record in records.values().filter(|_| self.is_shared) {
            record.check_shareable().map_err(EditRefusal::Unshareable)?;
        }
        if !self.members.has_room(records.keys().map(String::as_str)) {
            let first = records.keys().next().map(String::as_str);
            self.observer.members_full(first.unwrap_or_default(), MAX_MEMBERS);
            return Err(EditRefusal::Full);
        }
        self.fleet.apply(changes).await.map_err(EditRefusal::Fleet)?;
        for (name, record) in records {
            let text = if self.is_shared { record.write() } else { record.write_with_key() };
            if !self.members.put(&name, text) {
                // Another call took the last place meanwhile.
                self.observer.members_full(&name, MAX_MEMBERS);
            }
        }
        Ok(())
    }
}

impl From<EditRefusal> for AdminReject {
    fn from(refusal: EditRefusal) -> Self {
        match refusal {
            EditRefusal::Fleet(refusal) => refusal.into(),
            EditRefusal::Full => {
                let error = format!(
                    "{MAX_MEMBERS} names have run-time changes, and there is no room for another: name \
                     upstreams in the file; removed names are forgotten after 7 days"
                );
                AdminReject::new(StatusCode::INSUFFICIENT_STORAGE, error)
            }
            EditRefusal::Unshareable(why) => AdminReject::problem(why),
        }
    }
}

fn name(change: &FleetChange) -> Option<&str> {
    match change {
        FleetChange::Upsert(config) => Some(&config.name),
        FleetChange::Remove { name, .. }
        | FleetChange::Drain { name, .. }
        | FleetChange::Weight { name, .. } => Some(name),
        // These changes are not about one upstream.
        _ => None,
    }
}

/// The record of an upstream after this change.
fn noted(known: MemberRecord, change: FleetChange) -> MemberRecord {
    match change {
        // An upstream that is added again stays drained; a removed one starts with defaults.
        FleetChange::Upsert(config) => {
            MemberRecord { upstream: Some(config), drain: known.drain, ..MemberRecord::default() }
        }
        FleetChange::Remove { .. } => MemberRecord { removed: true, ..MemberRecord::default() },
        FleetChange::Drain { drain, .. } => MemberRecord { drain: Some(drain), ..known },
        FleetChange::Weight { weight, .. } => MemberRecord { weight: Some(weight), ..known },
        _ => known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::{Config, UpstreamConfig};
    use crate::config::url;
    use tokio::sync::watch;

    /// Both were made from the same record, and the second overwrote what the first had recorded.
    #[tokio::test]
    async fn two_changes_at_once_are_both_recorded() {
        let upstream = UpstreamConfig::new(url::upstream("http://127.0.0.1:1").expect("is a URL"));
        let name = || upstream.name.clone();
        let config = Config { upstreams: vec![upstream.clone()], ..Config::default() };
        let (fleet, keeper) = Fleet::new(&config, Observer::default()).expect("it needs no file");
        let (_stop, stopping) = watch::channel(false);
        let running = tokio::spawn(keeper.run(stopping));
        let (members, observer) = (Members::default(), Observer::default());
        let editor = FleetEditor { fleet: &fleet, members: &members, is_shared: false, observer: &observer };
        let (drained, weighed) = tokio::join!(
            editor.apply(vec![FleetChange::Drain { name: name(), drain: true }]),
            editor.apply(vec![FleetChange::Weight { name: name(), weight: 2.0 }]),
        );
        assert_eq!((drained, weighed), (Ok(()), Ok(())));
        let record = MemberRecord::read(&members.get(&upstream.name).expect("is recorded")).expect("is one");
        assert_eq!((record.drain, record.weight), (Some(true), Some(2.0)));
        running.abort();
    }

    #[test]
    fn changes_add_up_until_it_is_another_upstream() {
        let config = UpstreamConfig::new(url::upstream("http://a").expect("is a URL"));
        let name = || config.name.clone();
        let drained = noted(MemberRecord::default(), FleetChange::Drain { name: name(), drain: true });
        let heavy = noted(drained, FleetChange::Weight { name: name(), weight: 2.0 });
        let both = MemberRecord { drain: Some(true), weight: Some(2.0), ..MemberRecord::default() };
        assert_eq!(heavy, both);
        let named = noted(heavy.clone(), FleetChange::Upsert(config.clone()));
        assert_eq!(named.drain, Some(true), "who was drained and is named again stays drained");
        let gone = noted(heavy, FleetChange::Remove { name: name(), force: true });
        assert_eq!(gone, MemberRecord { removed: true, ..MemberRecord::default() });
        let again = noted(gone, FleetChange::Upsert(config.clone()));
        assert_eq!(again, MemberRecord { upstream: Some(config.clone()), ..MemberRecord::default() });
    }
}
