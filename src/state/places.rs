//! The slot of each upstream in the index, by its id in this process and by the name that siblings use.

use std::collections::HashMap;
use std::sync::Arc;

use super::prefix_index::Slot;

/// The slots and names of all upstreams.
#[derive(Default)]
pub struct UpstreamPlaces {
    by_id: Vec<Option<UpstreamPlace>>,
    by_name: HashMap<Arc<str>, usize>,
}

#[derive(Clone)]
struct UpstreamPlace {
    slot: Slot,
    name: Option<Arc<str>>,
}

// === impl UpstreamPlaces ===

impl UpstreamPlaces {
    /// Builds the table from ids, slots and names.
    pub fn new(all: impl Iterator<Item = (usize, Slot, Option<Arc<str>>)>) -> Self {
        let mut places = UpstreamPlaces::default();
        for (id, slot, name) in all {
            if places.by_id.len() <= id {
                places.by_id.resize(id + 1, None);
            }
            if let Some(name) = &name {
                places.by_name.insert(name.clone(), id);
            }
            places.by_id[id] = Some(UpstreamPlace { slot, name });
        }
        places
    }

    /// Returns the slot of an upstream.
    pub fn slot(&self, id: usize) -> Option<Slot> {
        Some(self.by_id.get(id)?.as_ref()?.slot)
    }

    /// Returns the name of an upstream, if it is known.
    pub fn name(&self, id: usize) -> Option<&str> {
        self.by_id.get(id)?.as_ref()?.name.as_deref()
    }

    /// Returns the id of the upstream with this name.
    pub fn id(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}
