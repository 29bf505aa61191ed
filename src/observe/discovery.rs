//! Events of discovery sources, which are polled for upstreams. Of successive polls with the same result only
//! the first is logged above debug level.

use log::{debug, info, warn};

use super::Observer;

impl Observer {
    /// Records that a source answered, for the first time or after a failure.
    pub fn source_answers(&self, source: &str, upstreams: usize, model: Option<&str>) {
        info!(source = source, upstreams = upstreams, model = model.unwrap_or(""); "source names upstreams");
    }

    /// Records that a source gave no usable answer; its last list stays in effect.
    pub fn source_failed(&self, source: &str, error: &str, first: bool) {
        self.metrics().probes.discovery_failures.with_label_values(&[source]).inc();
        if first {
            warn!(source = source, error = error; "source does not name upstreams, those it named stay");
        } else {
            debug!(source = source, error = error; "source still does not name upstreams");
        }
    }

    /// Records that an upstream listed by a source cannot be used.
    pub fn discovered_unusable(&self, source: &str, upstream: &str, error: &str) {
        self.metrics().probes.discovery_failures.with_label_values(&[source]).inc();
        warn!(source = source, upstream = upstream, error = error; "upstream of a source cannot be used");
    }
}
