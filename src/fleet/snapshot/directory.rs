//! The places of upstreams in a snapshot, by id and by name.
//!
//! Consecutive snapshots share a directory until an upstream joins, leaves, or gets other settings. So does
//! all that was computed from names and sources, such as the upstreams of a route.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{SnapshotEntry, Upstream};

/// The version of the next directory. Versions count across all fleets of the process.
static NEXT_VERSION: AtomicU64 = AtomicU64::new(1);

/// The places of all upstreams of a snapshot.
pub(super) struct FleetDirectory {
    /// Differs between directories; above 0.
    pub version: u64,
    upstreams: Vec<Arc<Upstream>>,
    by_id: HashMap<usize, usize>,
    by_name: HashMap<String, usize>,
}

impl FleetDirectory {
    /// Returns the directory of these entries: the one before if it still fits.
    pub(super) fn of(entries: &[SnapshotEntry], before: Option<&Arc<FleetDirectory>>) -> Arc<Self> {
        let upstreams = || entries.iter().map(|entry| &entry.upstream);
        if let Some(before) = before.filter(|before| before.lists(upstreams())) {
            return before.clone();
        }
        let mut by_name = HashMap::with_capacity(entries.len());
        for (place, entry) in entries.iter().enumerate() {
            // While an upstream is replaced by one of its name, the first counts.
            by_name.entry(entry.upstream.name().to_string()).or_insert(place);
        }
        Arc::new(FleetDirectory {
            version: NEXT_VERSION.fetch_add(1, Ordering::Relaxed),
            upstreams: upstreams().cloned().collect(),
            by_id: upstreams().enumerate().map(|(place, upstream)| (upstream.id, place)).collect(),
            by_name,
        })
    }

    /// Whether these are its upstreams, with the same settings.
    fn lists<'a>(&self, mut upstreams: impl Iterator<Item = &'a Arc<Upstream>>) -> bool {
        let same =
            self.upstreams.iter().all(|own| upstreams.next().is_some_and(|other| Arc::ptr_eq(own, other)));
        same && upstreams.next().is_none()
    }

    /// Returns the place of the upstream with this id.
    pub(super) fn by_id(&self, id: usize) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// Returns the place of the upstream with this name.
    pub(super) fn by_name(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}
