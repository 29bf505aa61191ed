//! Where changes to the fleet are made: here at once, and, with siblings, in the list that all go by.

use crate::config::member::MemberRecord;
use crate::fleet::{Change, ChangeError, Fleet};
use crate::state::redis::SiblingExchange;

/// Applies the changes that operators make to the fleet, and publishes them to siblings.
pub struct FleetEditor<'a> {
    pub fleet: &'a Fleet,
    pub exchange: Option<&'a SiblingExchange>,
}

impl FleetEditor<'_> {
    /// Carries out all changes, or none; siblings hear of them within a moment.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<(), ChangeError> {
        self.fleet.apply(changes.clone()).await?;
        let Some(exchange) = self.exchange else { return Ok(()) };
        let mut members = exchange.members();
        for change in changes {
            let Some(name) = name(&change).map(String::from) else { continue };
            let known = members.get(&name).and_then(|text| MemberRecord::read(text).ok());
            let text = noted(known.unwrap_or_default(), change).write();
            exchange.put_member(&name, text.clone());
            members.insert(name, text);
        }
        Ok(())
    }
}

fn name(change: &Change) -> Option<&str> {
    match change {
        Change::Upsert(config) => Some(&config.name),
        Change::Remove { name, .. } | Change::Drain { name, .. } | Change::Weight { name, .. } => Some(name),
        // These changes are not about one upstream.
        _ => None,
    }
}

/// What is known of an upstream, with this change.
fn noted(known: MemberRecord, change: Change) -> MemberRecord {
    match change {
        // Named again it stays drained; one that was removed begins anew.
        Change::Upsert(config) => {
            MemberRecord { upstream: Some(config), drain: known.drain, ..MemberRecord::default() }
        }
        Change::Remove { .. } => MemberRecord { removed: true, ..MemberRecord::default() },
        Change::Drain { drain, .. } => MemberRecord { drain: Some(drain), ..known },
        Change::Weight { weight, .. } => MemberRecord { weight: Some(weight), ..known },
        _ => known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::UpstreamConfig;
    use crate::config::url;

    #[test]
    fn changes_add_up_until_it_is_another_upstream() {
        let config = UpstreamConfig::new(url::upstream("http://a").expect("is a URL"));
        let name = || config.name.clone();
        let drained = noted(MemberRecord::default(), Change::Drain { name: name(), drain: true });
        let heavy = noted(drained, Change::Weight { name: name(), weight: 2.0 });
        let both = MemberRecord { drain: Some(true), weight: Some(2.0), ..MemberRecord::default() };
        assert_eq!(heavy, both);
        let named = noted(heavy.clone(), Change::Upsert(config.clone()));
        assert_eq!(named.drain, Some(true), "who was drained and is named again stays drained");
        let gone = noted(heavy, Change::Remove { name: name(), force: true });
        assert_eq!(gone, MemberRecord { removed: true, ..MemberRecord::default() });
        let again = noted(gone, Change::Upsert(config.clone()));
        assert_eq!(again, MemberRecord { upstream: Some(config.clone()), ..MemberRecord::default() });
    }
}
