//! Events of the exchange with sibling balancers over Redis.

use std::fmt::Display;
use std::time::Duration;

use log::{debug, info, warn};

use super::{Observer, counted, gauge};

impl Observer {
    /// An operation on Redis failed; only the `first` failure in a row is a warning.
    pub fn redis_failed(&self, cause: &'static str, error: &str, first: bool) {
        self.metrics().exchange.redis_failures.with_label_values(&[cause]).inc();
        self.metrics().exchange.redis_up.set(0);
        if first {
            warn!(cause = cause, error = error; "redis does not work, routing goes on from local memory");
        } else {
            debug!(cause = cause, error = error; "redis still does not work");
        }
    }

    /// Redis works for the first time, or again after `outage`.
    pub fn redis_works(&self, outage: Option<Duration>) {
        self.metrics().exchange.redis_up.set(1);
        match outage {
            Some(outage) => info!(after_seconds = outage.as_secs_f64(); "redis works again"),
            None => info!("redis works"),
        }
    }

    /// A message to the siblings was sent.
    pub fn exchange_sent(&self, bytes: usize) {
        self.exchanged("said", bytes);
    }

    /// A message of a sibling was received.
    pub fn exchange_received(&self, bytes: usize) {
        self.exchanged("heard", bytes);
    }

    fn exchanged(&self, way: &str, bytes: usize) {
        self.metrics().exchange.messages.with_label_values(&[way]).inc();
        self.metrics().exchange.bytes.with_label_values(&[way]).inc_by(counted(bytes));
    }

    /// Events were dropped before they were published.
    pub fn exchange_dropped(&self, events: u64) {
        self.metrics().exchange.lost.with_label_values(&["unsaid"]).inc_by(events);
    }

    /// An entry of the stream is no message, or one of another version.
    pub fn message_unreadable(&self, error: &dyn Display) {
        self.metrics().exchange.lost.with_label_values(&["unreadable"]).inc();
        debug!(error:% = error; "skipped an unreadable message in the stream");
    }

    /// Counts the end of a chain whose beginning this balancer does not know.
    pub fn chain_unplaced(&self) {
        self.metrics().exchange.lost.with_label_values(&["unplaced"]).inc();
    }

    /// A request looked up a binding in Redis and got no answer in time.
    pub fn lookup_failed(&self) {
        self.metrics().exchange.lost.with_label_values(&["lookup"]).inc();
    }

    /// The upstream of a stored response was searched; `by` names the source that reported it.
    pub fn response_found(&self, by: &str) {
        self.metrics().exchange.found.with_label_values(&[by]).inc();
    }

    /// A sibling's change of an upstream cannot be applied here.
    pub fn member_unusable(&self, upstream: &str, error: &str) {
        self.metrics().exchange.lost.with_label_values(&["member"]).inc();
        warn!(upstream = upstream, error = error; "cannot apply a sibling's change of an upstream");
    }

    /// Sets the number of siblings, and the age in seconds of the oldest message that counts.
    pub fn siblings(&self, count: usize, age: f64) {
        self.metrics().exchange.siblings.set(gauge(count));
        self.metrics().exchange.age.set(age);
    }
}
