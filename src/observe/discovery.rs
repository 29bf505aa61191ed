//! What is told of sources, which are asked for upstreams. Of a mood only its beginning is news.

use log::{debug, info, warn};

use super::metrics::METRICS;

/// A source has answered, for the first time or again; from now on without a word.
pub fn answers(source: &str, upstreams: usize, model: Option<&str>) {
    info!(source = source, upstreams = upstreams, model = model.unwrap_or(""); "source names upstreams");
}

/// A source did not answer, or not in a way that can be used; what it gave before stays.
pub fn failed(source: &str, why: &str, first: bool) {
    METRICS.discovery.failures.with_label_values(&[source]).inc();
    if first {
        warn!(source = source, error = why; "source does not name upstreams, those it named stay");
    } else {
        debug!(source = source, error = why; "source still does not name upstreams");
    }
}

/// What a source has named cannot be used here.
pub fn unusable(source: &str, upstream: &str, why: &str) {
    METRICS.discovery.failures.with_label_values(&[source]).inc();
    warn!(source = source, upstream = upstream, error = why; "upstream of a source cannot be used");
}
