//! Events of the exchange with sibling balancers over Redis.

use std::fmt::Display;
use std::time::Duration;

use log::{debug, info, warn};

use super::{Observer, counted, gauge};

impl Observer {
    /// Records a failed operation on Redis; only the `first` failure in a row is a warning.
    pub fn redis_failed(&self, cause: &'static str, error: &str, first: bool) {
        self.metrics().exchange.redis_failures.with_label_values(&[cause]).inc();
        self.metrics().exchange.redis_up.set(0);
        self.metrics().exchange.members_shared.set(0);
        if first {
            warn!(cause = cause, error = error; "redis does not work, routing goes on from local memory");
        } else {
            debug!(cause = cause, error = error; "redis still does not work");
        }
    }

    /// Records that Redis works for the first time, or again after `outage`.
    pub fn redis_works(&self, outage: Option<Duration>) {
        self.metrics().exchange.redis_up.set(1);
        match outage {
            Some(outage) => info!(after_seconds = outage.as_secs_f64(); "redis works again"),
            None => info!("redis works"),
        }
    }

    /// Records that Redis was out of memory, and that this many entries were removed to make room; only the
    /// `first` time in a while is a warning.
    pub fn redis_relieved(&self, entries: usize, first: bool) {
        self.metrics().exchange.redis_failures.with_label_values(&["full"]).inc();
        if first {
            warn!(entries = entries; "redis is out of memory, removed the oldest messages");
        } else {
            debug!(entries = entries; "redis is out of memory again, removed the oldest messages");
        }
    }

    /// Records that Redis does not let this balancer trim the streams; only the `first` time is a warning.
    pub fn trim_refused(&self, error: &str, first: bool) {
        if first {
            warn!(error = error; "redis refuses to trim the streams");
        } else {
            debug!(error = error; "redis still refuses to trim the streams");
        }
    }

    /// Records that the user of this balancer lacks a permission for the list of changed upstreams; only the
    /// `first` time is a warning.
    pub fn members_denied(&self, cause: &'static str, error: &str, first: bool) {
        self.metrics().exchange.redis_failures.with_label_values(&[cause]).inc();
        self.metrics().exchange.members_shared.set(0);
        if first {
            warn!(error = error; "redis does not permit sharing changes of upstreams, all else is shared");
        } else {
            debug!(error = error; "redis still does not permit sharing changes of upstreams");
        }
    }

    /// Records that the list of changed upstreams is shared; `again`: a permission for it was missing before.
    pub fn members_shared(&self, again: bool) {
        self.metrics().exchange.members_shared.set(1);
        if again {
            info!("redis permits sharing changes of upstreams again");
        }
    }

    /// Records that the user of this balancer may not store the entries of its file; only the `first` time is
    /// a warning.
    pub fn entries_denied(&self, cause: &'static str, error: &str, first: bool) {
        self.metrics().exchange.redis_failures.with_label_values(&[cause]).inc();
        if first {
            warn!(error = error; "redis does not permit storing the entries of the file");
        } else {
            debug!(error = error; "redis still does not permit storing the entries of the file");
        }
    }

    /// Records that a key, which another program has made unusable, was renamed.
    pub fn key_set_aside(&self, key: &str, found: &str, aside: &str) {
        warn!(
            key = key, found = found, renamed_to = aside;
            "renamed a key in redis that is not the balancers'"
        );
    }

    /// Sets how long Redis took for a command.
    pub fn redis_round_trip(&self, time: Duration) {
        self.metrics().exchange.round_trip.set(time.as_secs_f64());
    }

    /// Records the age of the newest message in a reading of the siblings' stream.
    pub fn exchange_lag(&self, age: Duration) {
        self.metrics().exchange.lag.observe_time(age);
    }

    /// Counts a message sent to the siblings.
    pub fn exchange_sent(&self, bytes: usize) {
        self.exchanged("said", bytes);
    }

    /// Counts a message received from a sibling.
    pub fn exchange_received(&self, bytes: usize) {
        self.exchanged("heard", bytes);
    }

    fn exchanged(&self, way: &str, bytes: usize) {
        self.metrics().exchange.messages.with_label_values(&[way]).inc();
        self.metrics().exchange.bytes.with_label_values(&[way]).inc_by(counted(bytes));
    }

    /// Counts events that were dropped before they were published.
    pub fn exchange_dropped(&self, events: u64) {
        self.metrics().exchange.lost.with_label_values(&["unsaid"]).inc_by(events);
    }

    /// Records an entry of the stream that is not a message, or is one of another version.
    pub fn message_unreadable(&self, error: &dyn Display) {
        self.metrics().exchange.lost.with_label_values(&["unreadable"]).inc();
        debug!(error:% = error; "skipped an unreadable message in the stream");
    }

    /// Counts the end of a chain with a beginning that this balancer does not know.
    pub fn chain_unplaced(&self) {
        self.metrics().exchange.lost.with_label_values(&["unplaced"]).inc();
    }

    /// Counts chains and take-backs of a sibling that cuts or hashes prompts in another way; `first` is its
    /// name, when it is to be reported.
    pub fn chains_foreign(&self, chains: usize, first: Option<&str>) {
        self.metrics().exchange.lost.with_label_values(&["foreign"]).inc_by(counted(chains));
        if let Some(sibling) = first {
            warn!(
                sibling = sibling;
                "ignores the chains of a sibling with another block_bytes or release, only its load counts"
            );
        }
    }

    /// Counts a look-up of a binding in Redis without an answer in time.
    pub fn lookup_failed(&self) {
        self.metrics().exchange.lost.with_label_values(&["lookup"]).inc();
    }

    /// Counts a search for the upstream of a stored response; `by` names the source that found it.
    pub fn response_found(&self, by: &str) {
        self.metrics().exchange.found.with_label_values(&[by]).inc();
    }

    /// Records a sibling's change of an upstream that cannot be applied here.
    pub fn member_unusable(&self, upstream: &str, error: &str) {
        self.metrics().exchange.lost.with_label_values(&["member"]).inc();
        warn!(upstream = upstream, error = error; "cannot apply a sibling's change of an upstream");
    }

    /// Records that the shared list of changed upstreams has more names than are read.
    pub fn members_overfull(&self, names: usize, most: usize) {
        warn!(names = names, most = most; "the list of changed upstreams is full, further names are ignored");
    }

    /// Records a run-time change that was rejected, since the list of changed upstreams is full.
    pub fn members_full(&self, upstream: &str, most: usize) {
        warn!(upstream = upstream, most = most; "rejected a change, the list of changed upstreams is full");
    }

    /// Records a sibling that serves none of this balancer's upstreams.
    pub fn foreign_sibling(&self, sibling: &str, prefix: &str) {
        warn!(
            sibling = sibling, prefix = prefix;
            "a sibling serves none of these upstreams, give each fleet a prefix of its own"
        );
    }

    /// Sets the number of siblings, and the age in seconds of the oldest of their last messages.
    pub fn siblings(&self, count: usize, age: f64) {
        self.metrics().exchange.siblings.set(gauge(count));
        self.metrics().exchange.age.set(age);
    }
}
