//! Where each upstream stands in the index: by its number in this process, and by the name that siblings
//! know.

use std::collections::HashMap;
use std::sync::Arc;

use super::local::Slot;

#[derive(Default)]
pub struct Places {
    by_id: Vec<Option<Place>>,
    by_name: HashMap<Arc<str>, usize>,
}

#[derive(Clone)]
struct Place {
    slot: Slot,
    name: Option<Arc<str>>,
}

// === impl Places ===

impl Places {
    pub fn new(all: impl Iterator<Item = (usize, Slot, Option<Arc<str>>)>) -> Self {
        let mut places = Places::default();
        for (id, slot, name) in all {
            if places.by_id.len() <= id {
                places.by_id.resize(id + 1, None);
            }
            if let Some(name) = &name {
                places.by_name.insert(name.clone(), id);
            }
            places.by_id[id] = Some(Place { slot, name });
        }
        places
    }

    pub fn slot(&self, id: usize) -> Option<Slot> {
        Some(self.by_id.get(id)?.as_ref()?.slot)
    }

    /// `None` also for one that was never told of.
    pub fn name(&self, id: usize) -> Option<&str> {
        self.by_id.get(id)?.as_ref()?.name.as_deref()
    }

    /// The number of who is called so.
    pub fn id(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}
