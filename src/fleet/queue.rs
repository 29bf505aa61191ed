//! Where requests wait while every upstream that could have them is full: first come, first served.
//!
//! Requests that ask for the same thing (a model, mostly) stand in one line. Only the first of a line may
//! look whether there is room; everybody else waits for the one before. A place that becomes free lets one
//! line's head look, the one that has waited longest; what it does not take, the next line's head is let
//! look at; when it does take it, the one behind it looks, since there may be more. So nobody overtakes in a
//! line, one free place wakes one waiter, and no free place is forgotten: a line that was not let look
//! yet stays `due`.
//!
//! Waiting is a guard: a future that is dropped leaves its line, and hands its turn on if it had one.
//! Never: who gets which upstream. Whoever has the turn asks the snapshot.

mod pace;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time;

use super::snapshot::Query;
use super::upstream::Live;
use crate::observe::{self, Waited};
use pace::Pace;

/// What a request waits for; those with equal keys stand in one line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Key {
    model: Option<String>,
    only: Option<usize>,
    /// The names of the upstreams of its route. Not their ids: an upstream that joins under one of these
    /// names must find the requests that wait already, and later requests must find their line.
    names: Option<Vec<String>>,
    /// Where no names are known.
    among: Option<Vec<usize>>,
    tried: Vec<usize>,
}

/// Why nobody waits, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// So many wait already that there is no place to wait.
    Full { retry_after: Duration },
    /// The time to wait is over.
    WaitedOut { retry_after: Duration },
}

pub struct Queue {
    /// How many wait; read without the lock by everybody whose request ends.
    waiting: AtomicUsize,
    /// Held for a look at the lines, never across an await.
    lines: Mutex<Lines>,
}

struct Lines {
    by_key: HashMap<Key, Line>,
    size: usize,
    /// The number of the next to come.
    next: u64,
    pace: Pace,
}

#[derive(Default)]
struct Line {
    waiters: VecDeque<Waiter>,
    /// The first has the turn.
    looking: bool,
    /// Something happened since the first looked.
    due: bool,
}

struct Waiter {
    number: u64,
    wake: Arc<Notify>,
}

/// The right to look for room: whoever holds it is the first of its line. Say `taken` when there was, and
/// `wait_on` when there was none; dropped, it is handed on.
pub struct Turn(Place);

/// A place in a line.
struct Place {
    queue: Arc<Queue>,
    key: Key,
    number: u64,
    wake: Arc<Notify>,
    end: Waited,
}

// === impl Key ===

impl Key {
    pub fn new(query: &Query<'_>) -> Self {
        // Whoever may go back to where it was may take any place.
        let mut tried = if query.again { Vec::new() } else { query.tried.to_vec() };
        tried.sort_unstable();
        let names = query.names.map(<[String]>::to_vec);
        let among = query.among.filter(|_| names.is_none()).map(<[usize]>::to_vec);
        Key { model: query.model.map(str::to_string), only: query.only, names, among, tried }
    }

    fn served_by(&self, live: &Live) -> bool {
        self.only.is_none_or(|only| only == live.id)
            && self.names.as_ref().is_none_or(|names| names.iter().any(|name| live.is_named(name)))
            && self.among.as_ref().is_none_or(|among| among.contains(&live.id))
            && !self.tried.contains(&live.id)
            && self.model.as_ref().is_none_or(|model| live.serves.load().iter().any(|card| card.id == *model))
    }
}

// === impl Queue ===

impl Queue {
    pub fn new(size: usize) -> Arc<Self> {
        let lines = Lines { by_key: HashMap::new(), size, next: 0, pace: Pace::default() };
        Arc::new(Queue { waiting: AtomicUsize::new(0), lines: Mutex::new(lines) })
    }

    /// Lets so many wait. Who waits already goes on waiting.
    pub fn resize(&self, size: usize) {
        self.lock().size = size;
    }

    pub fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether others stand in the line: then a newcomer must not look before them.
    pub(super) fn is_waiting(&self, key: &Key) -> bool {
        !self.is_empty() && self.lock().by_key.contains_key(key)
    }

    /// Waits for the turn, until `deadline`. `until`: when there will be room for sure.
    pub(super) async fn wait(
        self: &Arc<Self>,
        key: Key,
        until: Option<Instant>,
        deadline: Instant,
    ) -> Result<Turn, Refused> {
        self.join(key)?.turn(until, deadline).await
    }

    /// There may be room on an upstream: one who waits for it may look. Cheap while nobody waits.
    pub(super) fn freed(&self, live: &Live) {
        // Either we see who waits, or who waits sees the place: the other fence is in `room_was_made`.
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return;
        }
        let mut lines = self.lock();
        for (key, line) in &mut lines.by_key {
            line.due |= key.served_by(live);
        }
        lines.let_one_look();
    }

    /// There may be nobody left to wait for: whoever is first in a line looks, one after the other.
    pub(super) fn lost(&self) {
        fence(Ordering::SeqCst);
        if self.is_empty() {
            return;
        }
        let mut lines = self.lock();
        lines.by_key.values_mut().for_each(|line| line.due = true);
        lines.let_one_look();
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, key: Key) -> Result<Place, Refused> {
        let now = super::now();
        let mut lines = self.lock();
        let waiting = self.len();
        if waiting >= lines.size {
            observe::queue_ended(Waited::NoPlace);
            return Err(Refused::Full { retry_after: lines.pace.wait(waiting, now) });
        }
        if waiting == 0 {
            lines.pace.begin(now);
        }
        let (number, wake) = (lines.next, Arc::new(Notify::new()));
        lines.next += 1;
        let line = lines.by_key.entry(key.clone()).or_default();
        // The first looks at once: room may have been made since it looked last.
        line.looking |= line.waiters.is_empty();
        line.waiters.push_back(Waiter { number, wake: wake.clone() });
        self.waiting.store(waiting + 1, Ordering::Relaxed);
        observe::queue_joined();
        Ok(Place { queue: self.clone(), key, number, wake, end: Waited::Left })
    }

    fn leave(&self, place: &Place) {
        let mut lines = self.lock();
        let Some(line) = lines.by_key.get_mut(&place.key) else { return };
        let Some(at) = line.waiters.iter().position(|waiter| waiter.number == place.number) else { return };
        line.waiters.remove(at);
        let had_turn = at == 0 && std::mem::take(&mut line.looking);
        // The next looks: there may be more room, and it must learn when there will be.
        line.due |= at == 0;
        if line.waiters.is_empty() {
            lines.by_key.remove(&place.key);
        }
        match place.end {
            Waited::Admitted => lines.pace.admitted(super::now()),
            // The place that it was to look at may be any other line's.
            _ if had_turn => lines.by_key.values_mut().for_each(|line| line.due = true),
            _ => {}
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        lines.let_one_look();
    }
}

impl Lines {
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

// === impl Place ===

impl Place {
    async fn turn(mut self, mut until: Option<Instant>, deadline: Instant) -> Result<Turn, Refused> {
        loop {
            let (first, looking) = self.standing();
            if looking {
                // Room that is made from here on finds us waiting; what was made before, we see.
                fence(Ordering::SeqCst);
                return Ok(Turn(self));
            }
            let wake = until.filter(|until| first && *until < deadline);
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                () = time::sleep_until(wake.unwrap_or(deadline).into()) => match wake {
                    Some(_) => {
                        until = None;
                        self.look_later();
                    }
                    None => return Err(self.waited_out()),
                }
            }
        }
    }

    /// Whether it is the first of its line, and whether it has the turn.
    fn standing(&self) -> (bool, bool) {
        let lines = self.queue.lock();
        let line = lines.by_key.get(&self.key);
        let first = line.filter(|line| line.waiters.front().is_some_and(|first| first.number == self.number));
        (first.is_some(), first.is_some_and(|line| line.looking))
    }

    /// Its line has a reason to look.
    fn look_later(&self) {
        let mut lines = self.queue.lock();
        if let Some(line) = lines.by_key.get_mut(&self.key) {
            line.due = true;
        }
        lines.let_one_look();
    }

    fn waited_out(&mut self) -> Refused {
        self.end = Waited::Out;
        let lines = self.queue.lock();
        let line = lines.by_key.get(&self.key);
        let ahead = line.map_or(0, |line| line.waiters.iter().filter(|w| w.number < self.number).count());
        Refused::WaitedOut { retry_after: lines.pace.wait(ahead + 1, super::now()) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Told before the place is free, so that whoever takes it is not counted beside this one.
        observe::queue_left();
        self.queue.leave(self);
        observe::queue_ended(self.end);
    }
}

// === impl Turn ===

impl Turn {
    /// There was room, and it is taken.
    pub fn taken(mut self) {
        self.0.end = Waited::Admitted;
    }

    /// There was none: back to the head of the line.
    pub async fn wait_on(self, until: Option<Instant>, deadline: Instant) -> Result<Turn, Refused> {
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
