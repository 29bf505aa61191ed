//! The slot of each upstream in the index, by its id in this process and by the name that siblings use.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::prefix_index::Slot;

/// The slots and names of all upstreams.
#[derive(Default)]
pub(super) struct UpstreamPlaces {
    /// Apart from the names: a choice reads the slots of all candidates.
    slots: HashMap<usize, Slot, BuildHasherDefault<IdHasher>>,
    names: HashMap<usize, Arc<str>>,
    by_name: HashMap<Arc<str>, usize>,
}

/// Scatters the ids of upstreams, which the process counts up and no client chooses.
#[derive(Default)]
struct IdHasher(u64);

// === impl IdHasher ===

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_usize(usize::from(*byte)));
    }

    fn write_usize(&mut self, number: usize) {
        let mixed = (self.0 ^ number as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

// === impl UpstreamPlaces ===

impl UpstreamPlaces {
    /// Builds the table from ids, slots and names.
    pub(super) fn new(all: impl Iterator<Item = (usize, Slot, Option<Arc<str>>)>) -> Self {
        let mut places = UpstreamPlaces::default();
        for (id, slot, name) in all {
            if let Some(name) = name {
                places.by_name.insert(name.clone(), id);
                places.names.insert(id, name);
            }
            places.slots.insert(id, slot);
        }
        places
    }

    /// Returns the slot of an upstream.
    pub(super) fn slot(&self, id: usize) -> Option<Slot> {
        self.slots.get(&id).copied()
    }

    /// Returns the name of an upstream, if it is known.
    pub(super) fn name(&self, id: usize) -> Option<&str> {
        self.names.get(&id).map(|name| &**name)
    }

    /// Returns the id of the upstream with this name.
    pub(super) fn id(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}
