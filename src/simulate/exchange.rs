//! The exchange between the balancers of a replay, at the product's times.
//!
//! Each balancer publishes its gauges and the chains that it has sent since at every interval, and a
//! request at once when its last interval was without a message. A message takes `TRIP_SECONDS`, and
//! siblings read at most once in `READ_SECONDS`.

use std::collections::VecDeque;

use super::balancer::{ReplayBalancer, ReplayLoad};

/// The time from a message to the siblings that wait for it, in seconds, as measured on one machine.
const TRIP_SECONDS: f64 = 0.001;

/// The least time between two reads, in seconds: see `state::redis::subscriber`.
const READ_SECONDS: f64 = 0.004;

/// What the balancers have published and not yet read.
pub(super) struct ReplayExchange {
    /// Seconds between two messages of a balancer; `None`: no messages.
    interval: Option<f64>,
    all: Vec<ReplayPublisher>,
    /// The messages on their way, in the order of their publication.
    in_transit: VecDeque<ReplayMessage>,
    /// When siblings read the last of them.
    read_at: f64,
}

/// What one balancer has published.
struct ReplayPublisher {
    /// The gauges of its last message that siblings have read, and of its last message.
    read: Vec<ReplayLoad>,
    published: Vec<ReplayLoad>,
    /// When it publishes next.
    due_at: f64,
    /// Its last round had nothing to publish.
    is_quiet: bool,
    /// The flights that it has not published yet.
    unpublished: Vec<usize>,
}

/// A message of a balancer to its siblings.
struct ReplayMessage {
    /// When they read it.
    read_at: f64,
    balancer: usize,
    gauges: Vec<ReplayLoad>,
    flights: Vec<usize>,
}

/// The flights of a message that siblings have read.
pub(super) struct PublishedFlights {
    pub(super) balancer: usize,
    pub(super) flights: Vec<usize>,
}

// === impl ReplayExchange ===

impl ReplayExchange {
    pub(super) fn new(balancers: usize, upstreams: usize, interval: Option<f64>) -> Self {
        let idle = vec![ReplayLoad::default(); upstreams];
        let publisher = |number: usize| ReplayPublisher {
            read: idle.clone(),
            published: idle.clone(),
            // One after the other: real balancers do not publish at the same moment.
            due_at: interval.unwrap_or(0.0) * (number + 1) as f64 / balancers as f64,
            is_quiet: true,
            unpublished: Vec::new(),
        };
        ReplayExchange {
            interval: interval.filter(|_| balancers > 1),
            all: (0..balancers).map(publisher).collect(),
            in_transit: VecDeque::new(),
            read_at: 0.0,
        }
    }

    /// Sums what a balancer has read of its siblings' gauges into `others`, and returns the age of the
    /// oldest.
    pub(super) fn sum_others(&self, number: usize, now: f64, others: &mut [ReplayLoad]) -> f64 {
        others.fill(ReplayLoad::default());
        let Some(interval) = self.interval else { return 0.0 };
        let mut age: f64 = 0.0;
        for (_, sibling) in self.all.iter().enumerate().filter(|(sibling, _)| *sibling != number) {
            for (others, read) in others.iter_mut().zip(&sibling.read) {
                *others = others.and(*read);
            }
            age = age.max(now - (sibling.due_at - interval));
        }
        age
    }

    /// Publishes the gauges of a balancer with its unpublished flights, if there is anything new.
    fn publish(&mut self, number: usize, gauges: &[ReplayLoad], now: f64) {
        let publisher = &mut self.all[number];
        publisher.is_quiet = publisher.unpublished.is_empty() && publisher.published == gauges;
        if publisher.is_quiet {
            return;
        }
        publisher.published.copy_from_slice(gauges);
        let flights = std::mem::take(&mut publisher.unpublished);
        let arrived = now + TRIP_SECONDS;
        if arrived > self.read_at {
            self.read_at = arrived.max(self.read_at + READ_SECONDS);
        }
        let (read_at, gauges) = (self.read_at, gauges.to_vec());
        self.in_transit.push_back(ReplayMessage { read_at, balancer: number, gauges, flights });
    }

    /// Lets every balancer publish that is due.
    pub(super) fn publish_due(&mut self, balancers: &[ReplayBalancer], now: f64) {
        let Some(interval) = self.interval else { return };
        loop {
            let due = |one: &usize, other: &usize| self.all[*one].due_at.total_cmp(&self.all[*other].due_at);
            let Some(number) = (0..self.all.len()).min_by(due) else { break };
            let due_at = self.all[number].due_at;
            if due_at > now {
                break;
            }
            self.publish(number, balancers[number].gauges(), due_at);
            // The rounds after it have nothing new to publish.
            let rounds = ((now - due_at) / interval).floor() + 1.0;
            let publisher = &mut self.all[number];
            publisher.is_quiet |= rounds > 1.0;
            publisher.due_at += rounds * interval;
        }
    }

    /// Lets siblings read the next message that has arrived, if there is one.
    pub(super) fn read_next(&mut self, now: f64) -> Option<PublishedFlights> {
        self.in_transit.front().filter(|message| message.read_at <= now)?;
        let message = self.in_transit.pop_front()?;
        self.all[message.balancer].read = message.gauges;
        Some(PublishedFlights { balancer: message.balancer, flights: message.flights })
    }

    /// Takes a flight for the balancer's next message, and publishes at once where the last interval was
    /// without one.
    pub(super) fn take_flight(&mut self, number: usize, flight: usize, gauges: &[ReplayLoad], now: f64) {
        let Some(interval) = self.interval else { return };
        let publisher = &mut self.all[number];
        publisher.unpublished.push(flight);
        if publisher.is_quiet {
            publisher.due_at = now + interval;
            self.publish(number, gauges, now);
        }
    }
}
