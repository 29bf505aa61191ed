//! Changes to the fleet: applied here at once and, with siblings, written to the list that all of them read.

use crate::config::member::MemberRecord;
use crate::fleet::{Fleet, FleetChange, FleetChangeError};
use crate::state::redis::SiblingExchange;

/// Applies the changes that operators make to the fleet, and publishes them to siblings.
pub struct FleetEditor<'a> {
    pub fleet: &'a Fleet,
    pub exchange: Option<&'a SiblingExchange>,
}

impl FleetEditor<'_> {
    /// Applies all changes or none, and publishes them to the siblings.
    pub async fn apply(&self, changes: Vec<FleetChange>) -> Result<(), FleetChangeError> {
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
    use crate::config::types::UpstreamConfig;
    use crate::config::url;

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
