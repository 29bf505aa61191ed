//! Events of upstreams: their state, their settings, and what their caches are believed to hold.

use log::{debug, info};

use super::{Observer, gauge};

impl Observer {
    pub fn upstream_changed(&self, upstream: &str, from: &'static str, to: &'static str) {
        self.metrics().upstream_changes.with_label_values(&[upstream, to]).inc();
        let level = if matches!(to, "down" | "tripped") { log::Level::Warn } else { log::Level::Info };
        log::log!(level, upstream = upstream, from = from, to = to; "upstream changed");
    }

    /// The upstream's cache counts as empty from now on.
    pub fn upstream_began_anew(&self, upstream: &str, why: &'static str) {
        info!(upstream = upstream, why = why; "upstream has an empty cache");
    }

    pub fn upstream_added(&self, upstream: &str, url: &str) {
        info!(upstream = upstream, url = url; "upstream added");
    }

    /// The upstream has other settings.
    pub fn upstream_altered(&self, upstream: &str) {
        info!(upstream = upstream; "upstream altered");
    }

    /// The upstream takes no requests and is removed after the last one in flight.
    pub fn upstream_removing(&self, upstream: &str, active: u64) {
        info!(upstream = upstream, active = active; "upstream to be removed");
    }

    pub fn upstream_removed(&self, upstream: &str) {
        info!(upstream = upstream; "upstream removed");
    }

    /// The engine reported that it is full.
    pub fn upstream_busy(&self, upstream: &str) {
        self.metrics().upstream_busy.with_label_values(&[upstream]).inc();
        debug!(upstream = upstream; "upstream is full");
    }

    /// The keeper's inbox was full: a report of a request was lost.
    pub fn sign_lost(&self) {
        self.metrics().signs_lost.inc();
    }

    /// A probe failed. The first failure in a row is logged at info level, the next ones at debug level.
    pub fn probe_failed(&self, upstream: &str, why: &str, in_a_row: u32) {
        self.metrics().probe_failures.with_label_values(&[upstream]).inc();
        if in_a_row == 1 {
            info!(upstream = upstream, error = why; "upstream does not answer");
        } else {
            debug!(upstream = upstream, error = why, in_a_row = in_a_row; "upstream does not answer");
        }
    }

    // === the prefix index ===

    /// The upstream's cache is empty: the prefix index has forgotten its blocks.
    pub fn cache_forgotten(&self, upstream: &str) {
        info!(upstream = upstream; "prefix index has forgotten the upstream's blocks");
    }

    /// An engine reported how many of a prompt's tokens its cache held.
    pub fn cache_compared(&self, upstream: &str, predicted: u64, reported: u64) {
        self.metrics().cache.predicted.with_label_values(&[upstream]).inc_by(predicted);
        self.metrics().cache.reported.with_label_values(&[upstream]).inc_by(reported);
    }

    /// The engine holds far less than the prefix index says: the index keeps the share `keep`.
    pub fn cache_trimmed(&self, upstream: &str, keep: f64) {
        self.metrics().cache.trimmed.with_label_values(&[upstream]).inc();
        info!(upstream = upstream, keep = keep; "the upstream holds far less than was believed");
    }

    /// Sets the size of the prefix index.
    pub fn index_size(&self, blocks: usize, pairs: usize, bytes: usize) {
        self.metrics().cache.blocks.set(gauge(blocks));
        self.metrics().cache.pairs.set(gauge(pairs));
        self.metrics().cache.bytes.set(gauge(bytes));
    }
}
