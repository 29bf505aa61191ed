//! The siblings' load on the upstreams of the fleet.
//!
//! Siblings report upstreams by name, also upstreams that the fleet has not discovered yet or has again after
//! a change. Changes go to the upstreams that they name; all upstreams are set only when the fleet has
//! published another snapshot.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use crate::fleet::snapshot::Snapshot;
use crate::fleet::upstream::UpstreamLoad;
use crate::state::exchange::SiblingLoad;

/// The siblings' load by the name of the upstream.
#[derive(Default)]
pub(super) struct SiblingLoads {
    by_name: HashMap<Arc<str>, UpstreamLoad>,
    /// The snapshot whose upstreams were set. Weak, so that upstreams that have left are freed.
    snapshot: Weak<Snapshot>,
    /// The indexes of the snapshot's entries, by name.
    entries: HashMap<String, Vec<usize>>,
}

// === impl SiblingLoads ===

impl SiblingLoads {
    /// Sets the changed loads, and all loads where the snapshot is another one than before.
    pub(super) fn apply(&mut self, changed: &[(Arc<str>, SiblingLoad)], snapshot: &Arc<Snapshot>) {
        let is_new = !std::ptr::eq(self.snapshot.as_ptr(), Arc::as_ptr(snapshot));
        for (name, load) in changed {
            let SiblingLoad { active, backlog, context } = *load;
            let load = UpstreamLoad { active, backlog, context };
            match load == UpstreamLoad::default() {
                true => drop(self.by_name.remove(name)),
                false => drop(self.by_name.insert(name.clone(), load)),
            }
            let entries = self.entries.get(&**name).into_iter().flatten().filter(|_| !is_new);
            entries.for_each(|entry| snapshot.entries[*entry].upstream.set_siblings(load));
        }
        if is_new {
            self.apply_all(snapshot);
        }
    }

    fn apply_all(&mut self, snapshot: &Arc<Snapshot>) {
        self.snapshot = Arc::downgrade(snapshot);
        self.entries.clear();
        for (index, entry) in snapshot.entries.iter().enumerate() {
            let name = entry.upstream.name();
            self.entries.entry(name.to_string()).or_default().push(index);
            entry.upstream.set_siblings(self.by_name.get(name).copied().unwrap_or_default());
        }
    }
}
