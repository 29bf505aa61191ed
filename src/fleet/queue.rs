//! The queue in which requests wait while every suitable upstream is full: first come, first served.
//!
//! Requests with equal keys (mostly the same model) wait in one line. Only the head of a line may look for
//! room. A freed place wakes the head of one line, the one that has waited longest. If that head does not
//! take the place, the head of the next line looks; if it does, the next request of its own line looks,
//! since there may be more room. So requests of one line stay in order, one freed place wakes one request,
//! and no freed place is lost: a line that could not look yet stays `due`.
//!
//! A place in a line is a guard: a request whose future is dropped leaves its line and passes its turn on.
//! The request that has the turn chooses the upstream from the snapshot; the queue does not.

mod pace;

use std::collections::{HashMap, VecDeque};
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
    /// The longest forecast with which a request of this line is sent.
    slo: Option<Duration>,
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

/// The waiting requests of one key.
#[derive(Default)]
struct WaitingLine {
    waiters: VecDeque<Waiter>,
    /// The head has the turn to look for room.
    looking: bool,
    /// There may be room since the head last looked.
    due: bool,
}

/// One waiting request.
struct Waiter {
    number: u64,
    wake: Arc<Notify>,
}

/// The turn of a line's head to look for room. The request calls `taken` when it found room and `wait_on`
/// when it did not; a dropped turn passes on.
pub struct QueueTurn(QueuePlace);

/// The place of a request in a line.
struct QueuePlace {
    queue: Arc<Queue>,
    key: QueueKey,
    number: u64,
    wake: Arc<Notify>,
    end: QueueEnd,
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
            slo: query.slo,
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

    /// Waits until `deadline` for the turn. `until`: the time at which there is room without another event.
    pub(super) async fn wait(
        self: &Arc<Self>,
        key: QueueKey,
        until: Option<Instant>,
        deadline: Instant,
    ) -> Result<QueueTurn, QueueRefusal> {
        self.join(key)?.turn(until, deadline).await
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
            line.due |= key.served_by(upstream);
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
        lines.by_key.values_mut().for_each(|line| line.due = true);
        lines.let_one_look();
    }

    fn lock(&self) -> MutexGuard<'_, WaitingLines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, key: QueueKey) -> Result<QueuePlace, QueueRefusal> {
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
        let line = lines.by_key.entry(key.clone()).or_default();
        // The first request of a line looks at once: a place may have been freed since it last looked.
        line.looking |= line.waiters.is_empty();
        line.waiters.push_back(Waiter { number, wake: wake.clone() });
        self.waiting.store(waiting + 1, Ordering::Relaxed);
        self.observer.queue_joined();
        Ok(QueuePlace { queue: self.clone(), key, number, wake, end: QueueEnd::Left })
    }

    /// Removes a request from its line and passes its turn on.
    fn leave(&self, place: &QueuePlace) {
        let mut lines = self.lock();
        let Some(line) = lines.by_key.get_mut(&place.key) else { return };
        let Some(at) = line.waiters.iter().position(|waiter| waiter.number == place.number) else { return };
        line.waiters.remove(at);
        let had_turn = at == 0 && std::mem::take(&mut line.looking);
        // The next request looks: there may be more room, and its look yields the next `until`.
        line.due |= at == 0;
        if line.waiters.is_empty() {
            lines.by_key.remove(&place.key);
        }
        match place.end {
            QueueEnd::Admitted => lines.pace.admitted(super::now()),
            // The unused place may suit any other line.
            _ if had_turn => lines.by_key.values_mut().for_each(|line| line.due = true),
            _ => {}
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        lines.let_one_look();
    }
}

impl WaitingLines {
    /// Gives the turn to the head of the due line that has waited longest.
    fn let_one_look(&mut self) {
        let due = self.by_key.values_mut().filter(|line| line.due && !line.looking);
        let oldest = due.min_by_key(|line| line.waiters.front().map(|waiter| waiter.number));
        if let Some(line) = oldest
            && let Some(first) = line.waiters.front()
        {
            first.wake.notify_one();
            (line.due, line.looking) = (false, true);
        }
    }
}

// === impl QueuePlace ===

impl QueuePlace {
    async fn turn(
        mut self,
        mut until: Option<Instant>,
        deadline: Instant,
    ) -> Result<QueueTurn, QueueRefusal> {
        loop {
            let (first, looking) = self.position();
            if looking {
                // Pairs with the fence in `Queue::freed`: a place freed from here on finds this request
                // waiting; this request sees the places freed before.
                fence(Ordering::SeqCst);
                return Ok(QueueTurn(self));
            }
            let wake = until.filter(|until| first && *until < deadline);
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                () = time::sleep_until(wake.unwrap_or(deadline).into()) => match wake {
                    Some(_) => {
                        until = None;
                        self.mark_due();
                    }
                    None => return Err(self.waited_out()),
                }
            }
        }
    }

    /// Returns whether the request is the head of its line, and whether it has the turn.
    fn position(&self) -> (bool, bool) {
        let lines = self.queue.lock();
        let line = lines.by_key.get(&self.key);
        let first = line.filter(|line| line.waiters.front().is_some_and(|first| first.number == self.number));
        (first.is_some(), first.is_some_and(|line| line.looking))
    }

    /// Marks the line as due.
    fn mark_due(&self) {
        let mut lines = self.queue.lock();
        if let Some(line) = lines.by_key.get_mut(&self.key) {
            line.due = true;
        }
        lines.let_one_look();
    }

    fn waited_out(&mut self) -> QueueRefusal {
        self.end = QueueEnd::WaitedOut;
        let lines = self.queue.lock();
        let line = lines.by_key.get(&self.key);
        let ahead = line.map_or(0, |line| line.waiters.iter().filter(|w| w.number < self.number).count());
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

    /// Waits again at the head of the line: the request found no room.
    pub async fn wait_on(self, until: Option<Instant>, deadline: Instant) -> Result<QueueTurn, QueueRefusal> {
        {
            let mut lines = self.0.queue.lock();
            if let Some(line) = lines.by_key.get_mut(&self.0.key) {
                line.looking = false;
            }
            lines.let_one_look();
        }
        self.0.turn(until, deadline).await
    }
}

#[cfg(test)]
mod tests;
