//! The upstreams: what they are, how they are, and what is in flight on them.
//!
//! One keeper task is the only writer of the snapshot; requests load it once and read it without a
//! lock. `Snapshot::candidates` is the one place that filters. Counts of requests in flight are guards
//! (`lease`), never numbers kept by hand.

pub mod breaker;
pub mod client;
mod keeper;
pub mod lease;
mod probe;
pub mod snapshot;
pub mod tls;
pub mod upstream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::config::types::{Health, UpstreamConfig};
use client::Client;
pub use lease::{Lease, Outcome};
pub use snapshot::{Entry, Routing, Snapshot, State};
pub use upstream::Upstream;

/// The shared handle: readers load snapshots, the keeper publishes them.
pub struct Fleet {
    snapshot: ArcSwap<Snapshot>,
    /// Moves with every published snapshot, for those who wait for a change.
    published: watch::Sender<u64>,
    turn: AtomicU64,
    client: Client,
}

impl Fleet {
    /// Builds the fleet; nothing is asked before `run`. Fails when an upstream's `tls.ca` cannot be used.
    pub fn new(configs: &[UpstreamConfig]) -> Result<Arc<Self>, String> {
        let made = |(id, config): (usize, &UpstreamConfig)| Ok(Arc::new(Upstream::new(id, config.clone())?));
        let upstreams = configs.iter().enumerate().map(made).collect::<Result<Vec<_>, String>>()?;
        Ok(Arc::new(Fleet {
            snapshot: ArcSwap::from_pointee(Snapshot::unknown(upstreams.into_iter())),
            published: watch::Sender::new(0),
            turn: AtomicU64::new(0),
            client: Client,
        }))
    }

    /// The present view; hold it no longer than one decision takes.
    pub fn snapshot(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The present view, to keep across awaits.
    pub fn snapshot_owned(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// A number that moves by one with every call, for policies that take turns.
    pub fn next_turn(&self) -> u64 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks upstreams; the connections are its own, never the proxy's.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Told whenever a new snapshot is published.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    /// Asks every upstream, again and again, and publishes what it learns. Ends with `stop`.
    pub async fn run(self: Arc<Self>, health: Health, stop: watch::Receiver<bool>) {
        keeper::run(self, health, stop).await;
    }

    fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
        self.published.send_modify(|count| *count += 1);
    }
}
