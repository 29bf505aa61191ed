//! Events of upstreams: their state, their settings, and the blocks that their caches are believed to hold.

use log::{Level, debug, info, log};

use super::{Observer, gauge};

impl Observer {
    /// Records a change of an upstream's state.
    pub fn upstream_changed(&self, upstream: &str, from: &'static str, to: &'static str) {
        self.traffic().enter(upstream);
        self.metrics().probes.changes.with_label_values(&[upstream, to]).inc();
        let level = if matches!(to, "down" | "tripped") { Level::Warn } else { Level::Info };
        log!(level, upstream = upstream, from = from, to = to; "upstream changed");
    }

    /// Records that an upstream's cache counts as empty from now on.
    pub fn upstream_began_anew(&self, upstream: &str, why: &'static str) {
        info!(upstream = upstream, why = why; "upstream has an empty cache");
    }

    /// Records a change of how well the balancer sees an upstream's cache.
    pub fn sight_changed(&self, upstream: &str, from: &'static str, to: &'static str, why: &str) {
        let level = if to == "blind" { Level::Warn } else { Level::Info };
        log!(level, upstream = upstream, from = from, to = to, reason = why; "sight changed");
    }

    pub fn upstream_added(&self, upstream: &str, url: &str) {
        info!(upstream = upstream, url = url; "upstream added");
    }

    /// Records a change of an upstream's settings.
    pub fn upstream_altered(&self, upstream: &str, changed: &[&str]) {
        info!(upstream = upstream, changed = changed.join(", "); "upstream altered");
    }

    /// Records that an upstream takes no more requests and is removed after its last request in flight.
    pub fn upstream_removing(&self, upstream: &str, active: u64) {
        info!(upstream = upstream, active = active; "upstream to be removed");
    }

    /// Records that an upstream has left the fleet.
    pub fn upstream_removed(&self, upstream: &str) {
        self.traffic().leave(upstream);
        info!(upstream = upstream; "upstream removed");
    }

    /// Counts an answer in which the engine reports that it is full.
    pub fn upstream_busy(&self, upstream: &str) {
        self.metrics().probes.busy.with_label_values(&[upstream]).inc();
        debug!(upstream = upstream; "upstream is full");
    }

    /// Counts a report of a request that was lost because the keeper's inbox was full.
    pub fn sign_lost(&self) {
        self.metrics().probes.signs_lost.inc();
    }

    /// Counts a probe of an upstream.
    pub fn probed(&self, upstream: &str) {
        self.metrics().probes.made.with_label_values(&[upstream]).inc();
    }

    /// Counts a sibling's report on an upstream that was applied.
    pub fn probe_report_applied(&self, upstream: &str) {
        self.metrics().probes.reports.with_label_values(&[upstream]).inc();
    }

    /// Records a failed probe.
    pub fn probe_failed(&self, upstream: &str, why: &str, answered: bool, in_a_row: u32, level: Level) {
        self.metrics().probes.failed.with_label_values(&[upstream]).inc();
        if answered {
            log!(level, upstream = upstream, error = why, in_a_row = in_a_row;
                 "upstream answers its probe with an error");
        } else {
            log!(level, upstream = upstream, error = why, in_a_row = in_a_row; "upstream does not answer");
        }
    }

    // === the prefix index ===

    /// Records that the prefix index removed the blocks of an upstream whose cache is empty.
    pub fn cache_forgotten(&self, upstream: &str) {
        info!(upstream = upstream; "prefix index has forgotten the upstream's blocks");
    }

    /// Counts the cached tokens of a prompt: the prediction and the engine's report.
    pub fn cache_compared(&self, upstream: &str, prompt: u64, predicted: u64, reported: u64) {
        self.traffic().cache_compared(upstream, prompt, predicted, reported);
        let cache = &self.metrics().cache;
        cache.prompts.with_label_values(&[upstream]).inc_by(prompt);
        cache.predicted.with_label_values(&[upstream]).inc_by(predicted);
        cache.reported.with_label_values(&[upstream]).inc_by(reported);
    }

    /// Records that the engine holds far less than predicted: the prefix index keeps the share `keep`.
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
