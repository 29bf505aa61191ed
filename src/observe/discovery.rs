//! Events of discovery sources. Of successive reports with the same result only the first is logged above
//! debug level.

use std::time::{SystemTime, UNIX_EPOCH};

use log::{debug, info, warn};

use super::{Observer, gauge};

/// The value of the label `reason` for an upstream that cannot be used.
const UNUSABLE: &str = "unusable";

impl Observer {
    /// Records that a source answered, for the first time or after a failure.
    pub fn source_answers(&self, source: &str, upstreams: usize, model: Option<&str>) {
        info!(source = source, upstreams = upstreams, model = model.unwrap_or(""); "source names upstreams");
    }

    /// Records the number of upstreams in an answer of a source.
    pub fn source_listed(&self, source: &str, upstreams: usize) {
        let metrics = &self.metrics().discovery;
        metrics.upstreams.with_label_values(&[source]).set(gauge(upstreams));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        metrics.answered.with_label_values(&[source]).set(now.as_secs_f64());
    }

    /// Records that a source lists no upstream and means it: those it named go.
    #[cfg(feature = "kubernetes")]
    pub fn source_is_empty(&self, source: &str, why: &str) {
        warn!(source = source, why = why; "source lists no upstream, those it named go");
    }

    /// Records that a source begins to list upstreams that have no IP addresses; they are left out.
    #[cfg(feature = "kubernetes")]
    pub fn source_lists_names(&self, source: &str, upstreams: usize) {
        warn!(source = source, upstreams = upstreams; "source lists upstreams without IP addresses");
    }

    /// Records that a source gave no usable answer; its last list stays in effect.
    pub fn source_failed(&self, source: &str, reason: &'static str, error: &str, first: bool) {
        self.metrics().discovery.failures.with_label_values(&[source, reason]).inc();
        if first {
            warn!(source = source, error = error; "source does not name upstreams, those it named stay");
        } else {
            debug!(source = source, error = error; "source still does not name upstreams");
        }
    }

    /// Records that an upstream listed by a source cannot be used.
    pub fn discovered_unusable(&self, source: &str, upstream: &str, error: &str, first: bool) {
        self.metrics().discovery.failures.with_label_values(&[source, UNUSABLE]).inc();
        if first {
            warn!(source = source, upstream = upstream, error = error; "upstream of a source cannot be used");
        } else {
            debug!(source = source, upstream = upstream, error = error; "upstream still cannot be used");
        }
    }

    /// Removes the series of sources that are not configured any more.
    pub fn keep_sources(&self, is_configured: impl Fn(&str) -> bool) {
        self.metrics().forget(&|label, value| label == "source" && !is_configured(value));
    }
}
