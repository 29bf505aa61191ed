//! The queue in which requests wait while every suitable upstream is full: first come, first served.
//!
//! Requests with equal keys (mostly the same model) wait in one line. Only the head of a line may look for
//! room. A freed place wakes the head of one line, the one that has waited longest. If that head does not
//! take the place, the head of the next line looks; if it does, the next request of its own line looks,
//! since there may be more room. So requests of one line stay in order, one freed place wakes one request,
//! and no freed place is lost: a line that could not look yet stays `due`.
//!
//! Requests with a limit of the time to the first token have lines of their own, one for all limits. There a
//! head that would be late gives way to later requests; see `line`.
//!
//! A place in a line is a guard: a request whose future is dropped leaves its line and passes its turn on.
//! The request that has the turn chooses the upstream from the snapshot; the queue does not.

mod line;
mod pace;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time;

use super::identity::UpstreamIdentity;
use super::query::UpstreamQuery;
use crate::observe::Observer;
use crate::observe::queue::QueueEnd;
use crate::route::upstreams::RouteNames;
use line::{DelayClass, Waiter, WaitingLine};
pub use line::{MissedLook, StartDelay};
use pace::AdmissionPace;

/// The upstreams that a request waits for; requests with equal keys wait in one line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct QueueKey {
    model: Option<String>,
    only: Option<usize>,
    /// The upstream names of the request's route. Names rather than ids, so that an upstream that joins
    /// under one of them serves the requests that wait already, and later requests join the same line.
    names: Option<Arc<RouteNames>>,
    /// The ids of the allowed upstreams, for requests without `names`.
    among: Option<Vec<usize>>,
    tried: Vec<usize>,
    /// The requests of this line have limits of the time to the first token.
    is_limited: bool,
}

/// Why a request may not wait, or not any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRefusal {
    /// The queue is full.
    Full { retry_after: Duration },
    /// The deadline has passed.
    WaitedOut { retry_after: Duration },
}

/// The queue of requests that wait for room.
pub struct Queue {
    /// The number of waiting requests; read without the lock by every request that ends.
    waiting: AtomicUsize,
    /// A plain mutex, never held across an await.
    lines: Mutex<WaitingLines>,
    observer: Observer,
}

/// All lines of the queue.
struct WaitingLines {
    by_key: HashMap<QueueKey, WaitingLine>,
    /// The number of requests that may wait.
    size: usize,
    /// The number of the next request to join.
    next_number: u64,
    pace: AdmissionPace,
}

/// The turn of a line's head to look for room. The request calls `taken` when it found room and `wait_on`
/// when it did not; a dropped turn passes on.
pub struct QueueTurn(QueuePlace);

/// The place of a request in a line.
struct QueuePlace {
    queue: Arc<Queue>,
    key: QueueKey,
    class: DelayClass,
    number: u64,
    wake: Arc<Notify>,
    end: QueueEnd,
}

/// Where a request stands in its line.
struct PlaceStatus {
    has_turn: bool,
    /// When the request has to begin the next round: it is the oldest of its line.
    look_at: Option<Instant>,
}

// === impl QueueKey ===

impl QueueKey {
    pub(super) fn new(query: &UpstreamQuery<'_>) -> Self {
        // A request that may return to an upstream that it tried may take any place.
        let mut tried = if query.again { Vec::new() } else { query.tried.to_vec() };
        tried.sort_unstable();
        let names = query.names.cloned();
        let among = query.among.filter(|_| names.is_none()).map(|among| among.ids().to_vec());
        QueueKey {
            model: query.model.map(str::to_string),
            only: query.only,
            names,
            among,
            tried,
            is_limited: query.slo.is_some(),
        }
    }

    /// Whether the upstream can take the requests of this key.
    fn served_by(&self, upstream: &UpstreamIdentity) -> bool {
        self.only.is_none_or(|only| only == upstream.id)
            && self.names.as_ref().is_none_or(|names| upstream.is_among(names))
            && self.among.as_ref().is_none_or(|among| among.binary_search(&upstream.id).is_ok())
            && !self.tried.contains(&upstream.id)
            && self
                .model
                .as_ref()
                .is_none_or(|model| upstream.serves.load().iter().any(|card| card.id == *model))
    }
}

// === impl Queue ===

impl Queue {
    /// Builds a queue in which `size` requests may wait.
    pub fn new(size: usize, observer: Observer) -> Arc<Self> {
        let lines =
            WaitingLines { by_key: HashMap::new(), size, next_number: 0, pace: AdmissionPace::default() };
        Arc::new(Queue { waiting: AtomicUsize::new(0), lines: Mutex::new(lines), observer })
    }

    /// Sets the number of requests that may wait. Requests beyond it that wait already stay.
    pub fn resize(&self, size: usize) {
        self.lock().size = size;
    }

    /// Returns the number of waiting requests.
    pub fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether requests wait with this key. A new request must then not look before them.
    pub(super) fn is_waiting(&self, key: &QueueKey) -> bool {
        !self.is_empty() && self.lock().by_key.contains_key(key)
    }

    /// Whether a new request may be sent before those that wait with this key. `missed`: what it found
    /// without taking any room.
    pub(super) fn lets_pass(&self, key: &QueueKey, missed: &MissedLook) -> bool {
        let mut lines = self.lock();
        lines.by_key.get_mut(key).is_none_or(|line| line.lets_pass(missed, super::now()))
    }

    /// Waits until `deadline` for the turn, after a look in vain.
    pub(super) async fn wait(
        self: &Arc<Self>,
        key: QueueKey,
        missed: MissedLook,
        deadline: Instant,
    ) -> Result<QueueTurn, QueueRefusal> {
        self.join(key, missed)?.turn(deadline).await
    }

    /// Reports that an upstream may have room: one request that waits for the upstream may look. Cheap while
    /// the queue is empty.
    pub(super) fn freed(&self, upstream: &UpstreamIdentity) {
        // Pairs with the fence in `QueuePlace::turn`: either this thread sees the waiting request, or that
        // request sees the freed place.
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return;
        }
        let mut lines = self.lock();
        for (key, line) in &mut lines.by_key {
            if key.served_by(upstream) {
                line.mark_due();
            }
        }
        lines.let_one_look();
    }

    /// Reports that an upstream was lost: the head of every line looks, one after the other.
    pub(super) fn lost(&self) {
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return;
        }
        let mut lines = self.lock();
        lines.by_key.values_mut().for_each(WaitingLine::mark_due);
        lines.let_one_look();
    }

    fn lock(&self) -> MutexGuard<'_, WaitingLines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, key: QueueKey, missed: MissedLook) -> Result<QueuePlace, QueueRefusal> {
        let now = super::now();
        let mut lines = self.lock();
        let waiting = self.len();
        if waiting >= lines.size {
            self.observer.queue_full();
            return Err(QueueRefusal::Full { retry_after: lines.pace.wait(waiting, now) });
        }
        if waiting == 0 {
            lines.pace.begin(now);
        }
        let (number, wake) = (lines.next_number, Arc::new(Notify::new()));
        lines.next_number += 1;
        let waiter = Waiter { number, joined: now, wake: wake.clone() };
        let line = lines.by_key.entry(key.clone()).or_default();
        line.join(waiter, &missed);
        if line.next_number().is_some() {
            lines.let_one_look();
        }
        self.waiting.store(waiting + 1, Ordering::Relaxed);
        self.observer.queue_joined();
        let class = missed.class();
        Ok(QueuePlace { queue: self.clone(), key, class, number, wake, end: QueueEnd::Left })
    }

    /// Removes a request from its line and passes its turn on.
    fn leave(&self, place: &QueuePlace) {
        let mut lines = self.lock();
        let Some(line) = lines.by_key.get_mut(&place.key) else { return };
        let Some(had_turn) = line.leave(place.class, place.number) else { return };
        if line.is_empty() {
            lines.by_key.remove(&place.key);
        }
        match place.end {
            QueueEnd::Admitted => lines.pace.admitted(super::now()),
            // The unused place may suit any other line.
            _ if had_turn => lines.by_key.values_mut().for_each(WaitingLine::mark_due),
            _ => {}
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        lines.let_one_look();
    }
}

impl WaitingLines {
    /// Gives the turn to the request that has waited longest of those that should look.
    fn let_one_look(&mut self) {
        let due = self.by_key.values_mut().filter_map(|line| Some((line.next_number()?, line)));
        if let Some((_, line)) = due.min_by_key(|(number, _)| *number) {
            line.give_turn();
        }
    }
}

// === impl QueuePlace ===

impl QueuePlace {
    async fn turn(self, deadline: Instant) -> Result<QueueTurn, QueueRefusal> {
        loop {
            let PlaceStatus { has_turn, look_at } = self.status();
            if has_turn {
                // Pairs with the fence in `Queue::freed`: a place freed from here on finds this request
                // waiting; this request sees the places freed before.
                fence(Ordering::SeqCst);
                return Ok(QueueTurn(self));
            }
            let look_at = look_at.filter(|look_at| *look_at < deadline);
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                () = time::sleep_until(look_at.unwrap_or(deadline).into()) => match look_at {
                    Some(_) => self.begin_round(),
                    None => return Err(self.waited_out()),
                }
            }
        }
    }

    fn status(&self) -> PlaceStatus {
        let lines = self.queue.lock();
        let line = lines.by_key.get(&self.key);
        let oldest = line.filter(|line| line.oldest_number() == Some(self.number));
        PlaceStatus {
            has_turn: line.is_some_and(|line| line.has_turn(self.number)),
            look_at: oldest.and_then(WaitingLine::look_at),
        }
    }

    /// Begins a round at the line's time for it.
    fn begin_round(&self) {
        let mut lines = self.queue.lock();
        if let Some(line) = lines.by_key.get_mut(&self.key) {
            line.pass_look_at();
        }
        lines.let_one_look();
    }

    fn waited_out(mut self) -> QueueRefusal {
        self.end = QueueEnd::WaitedOut;
        let lines = self.queue.lock();
        let ahead = lines.by_key.get(&self.key).map_or(0, |line| line.count_before(self.number));
        QueueRefusal::WaitedOut { retry_after: lines.pace.wait(ahead + 1, super::now()) }
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        // Reported before the place is free, so that the gauge never counts this request and its successor at
        // once.
        self.queue.observer.queue_left(self.end);
        self.queue.leave(self);
    }
}

// === impl QueueTurn ===

impl QueueTurn {
    /// Ends the wait: the request has taken a lease.
    pub fn taken(mut self) {
        self.0.end = QueueEnd::Admitted;
    }

    /// Waits again in the same place: the request looked in vain.
    pub async fn wait_on(mut self, missed: MissedLook, deadline: Instant) -> Result<QueueTurn, QueueRefusal> {
        {
            let place = &mut self.0;
            let mut lines = place.queue.lock();
            if let Some(line) = lines.by_key.get_mut(&place.key) {
                place.class = line.miss(place.class, place.number, &missed, super::now());
            }
            lines.let_one_look();
        }
        self.0.turn(deadline).await
    }
}

#[cfg(test)]
mod tests;
