//! The waiting requests of one key, and which of them looks for room next.
//!
//! A round begins when there may be room: the oldest request looks. Where it finds all upstreams full, the
//! others would as well, and the round ends.
//!
//! Requests with a limit of the time to the first token need more than room: an engine has to begin with the
//! prompt soon enough. Each of them tolerates some delay, which is its limit less the time of an idle engine.
//!
//! ```text
//! delay      how long the engines read before they begin with another prompt, as the last look found
//! tolerated  the delay with which the request would still meet its limit
//! ```
//!
//! A request that tolerates less than the present delay gives way: the oldest request that tolerates the
//! delay looks next, and so on, for `MAX_ROUND_LOOKS` looks. Requests that tolerate about the same delay are
//! in one class and keep their order, so a round costs a few looks, however many wait.
//!
//! A request with a tight limit could be passed over for ever. So once the oldest one has waited for
//! `MAX_PATIENCE`, it gives way to none for as long; then again for as long it does, and so on, since what it
//! waits for may be kept away by requests without a limit.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// The shortest and the longest time until the next look of a request that waits for a forecast.
const LOOK_INTERVAL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// The looks of one round.
const MAX_ROUND_LOOKS: u32 = 4;

/// The wait after which the oldest request gives way to none, and for how long.
pub(super) const MAX_PATIENCE: Duration = Duration::from_secs(5);

/// The classes of delays in an octave: the delays of one class differ by at most 9 %.
const CLASSES_PER_OCTAVE: f64 = 8.0;

/// The longest delay that is told from longer ones: no forecast is longer.
const MAX_DELAY: Duration = Duration::from_secs(600);

/// What a request found that looked for room in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissedLook {
    /// When there is room without another event.
    pub until: Option<Instant>,
    /// There is room, but the forecasts are too late for the request's limit, or older requests go first.
    pub delay: Option<StartDelay>,
}

/// The delay of a request with a limit of the time to its first token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartDelay {
    /// The least delay of any upstream at the time of the look.
    pub present: Duration,
    /// The longest delay with which the request meets its limit.
    pub tolerated: Duration,
}

/// A range of delays that count as equal. The greatest one also has the requests without a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct DelayClass(u16);

/// The waiting requests of one key.
#[derive(Default)]
pub(super) struct WaitingLine {
    /// By the delay that the requests tolerate; in each class in order of arrival. No class is empty.
    classes: BTreeMap<DelayClass, VecDeque<Waiter>>,
    /// The number of the request that has the turn to look for room.
    turn: Option<u64>,
    /// There may be room since the last round began.
    due: bool,
    /// When the next round begins without another event.
    look_at: Option<Instant>,
    /// The looks of the round.
    looks: u32,
    /// The round goes on with the oldest request of these classes.
    goes_on_from: Option<DelayClass>,
    /// Since when the oldest request gives way to none, for `MAX_PATIENCE`.
    patience_ended: Option<Instant>,
}

/// One waiting request.
pub(super) struct Waiter {
    pub number: u64,
    pub joined: Instant,
    pub wake: Arc<Notify>,
}

// === impl StartDelay ===

impl StartDelay {
    /// Returns by how much the request is late.
    pub fn excess(&self) -> Duration {
        self.present.saturating_sub(self.tolerated)
    }

    /// Returns the time at which the request should look again: an engine reads on meanwhile, so that the
    /// delay falls about as fast as time passes.
    fn next_look(&self, now: Instant) -> Instant {
        now + self.excess().clamp(LOOK_INTERVAL.0, LOOK_INTERVAL.1)
    }
}

// === impl MissedLook ===

impl MissedLook {
    /// Returns the class of the request; without a delay any delay is tolerated.
    pub(super) fn class(&self) -> DelayClass {
        self.delay.map_or(DelayClass::ANY, |delay| DelayClass::of(delay.tolerated))
    }

    fn next_look(&self, now: Instant) -> Option<Instant> {
        let by_forecast = self.delay.filter(|delay| !delay.excess().is_zero());
        self.until.into_iter().chain(by_forecast.map(|delay| delay.next_look(now))).min()
    }
}

// === impl DelayClass ===

impl DelayClass {
    const ANY: DelayClass = DelayClass(u16::MAX);

    fn of(delay: Duration) -> Self {
        let millis = delay.min(MAX_DELAY).as_secs_f64() * 1e3;
        DelayClass(if millis < 1.0 { 0 } else { 1 + (CLASSES_PER_OCTAVE * millis.log2()) as u16 })
    }

    fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(DelayClass)
    }

    /// Returns the least delay of the class.
    fn least(self) -> Duration {
        let octaves = f64::from(self.0.saturating_sub(1)) / CLASSES_PER_OCTAVE;
        let seconds = if self.0 == 0 { 0.0 } else { octaves.exp2() / 1e3 };
        Duration::try_from_secs_f64(seconds).unwrap_or(MAX_DELAY).min(MAX_DELAY)
    }
}

// === impl WaitingLine ===

impl WaitingLine {
    pub(super) fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// Returns the oldest request, by its number.
    pub(super) fn oldest_number(&self) -> Option<u64> {
        self.oldest_from(DelayClass(0)).map(|oldest| oldest.number)
    }

    /// Returns the number of the request that looks next; `None`: the turn is taken, or no look is due.
    pub(super) fn next_number(&self) -> Option<u64> {
        let from = self.goes_on_from.or(self.due.then_some(DelayClass(0)));
        let next = self.oldest_from(from.filter(|_| self.turn.is_none())?);
        next.map(|next| next.number).or_else(|| self.oldest_number().filter(|_| self.due))
    }

    pub(super) fn has_turn(&self, number: u64) -> bool {
        self.turn == Some(number)
    }

    pub(super) fn look_at(&self) -> Option<Instant> {
        self.look_at
    }

    /// Records that there may be room.
    pub(super) fn mark_due(&mut self) {
        self.due = true;
    }

    /// Records that the time for the next round has come.
    pub(super) fn pass_look_at(&mut self) {
        (self.due, self.look_at) = (true, None);
    }

    /// Whether a request that would not be late may be sent before all requests of the line: each of them
    /// tolerates less.
    pub(super) fn lets_pass(&mut self, missed: &MissedLook, now: Instant) -> bool {
        missed.delay.is_some_and(|delay| delay.excess().is_zero())
            && self.oldest_from(missed.class()).is_none()
            && self.oldest_gives_way(now)
    }

    /// Returns the number of requests that are older than this one.
    pub(super) fn count_before(&self, number: u64) -> usize {
        self.classes.values().map(|waiters| waiters.partition_point(|waiter| waiter.number < number)).sum()
    }

    /// Adds a request that came last, after a look in vain. The first request of a line gets the turn at
    /// once: a place may have been freed since it looked.
    pub(super) fn join(&mut self, waiter: Waiter, missed: &MissedLook) {
        let (is_first, now) = (self.is_empty(), waiter.joined);
        self.insert(missed.class(), waiter);
        if is_first {
            self.give_turn();
        } else {
            self.due |= missed.delay.is_some_and(|delay| delay.excess().is_zero());
        }
        self.look_no_later_than(missed.next_look(now));
    }

    /// Removes a request. Returns whether it had the turn; `None`: it was not in the line.
    pub(super) fn leave(&mut self, class: DelayClass, number: u64) -> Option<bool> {
        let was_oldest = self.oldest_number() == Some(number);
        self.remove(class, number)?;
        let had_turn = self.turn == Some(number);
        if had_turn {
            (self.turn, self.goes_on_from) = (None, None);
        }
        // The next request looks: there may be more room, and its look yields the next `look_at`.
        self.due |= was_oldest || had_turn;
        Some(had_turn)
    }

    /// Gives the turn to the next request of the round, or begins a round with the oldest one.
    pub(super) fn give_turn(&mut self) {
        let goes_on = self.goes_on_from.take();
        if goes_on.is_some_and(|from| self.give_turn_from(from)) {
            return;
        }
        (self.due, self.looks, self.look_at) = (false, 0, None);
        self.give_turn_from(DelayClass(0));
    }

    /// Takes the turn back from a request that looked in vain. Returns the request's new class.
    pub(super) fn miss(
        &mut self,
        class: DelayClass,
        number: u64,
        missed: &MissedLook,
        now: Instant,
    ) -> DelayClass {
        self.turn = None;
        // A look that found no room shows nothing of the forecasts.
        let new_class = if missed.delay.is_some() { missed.class() } else { class };
        if new_class != class
            && let Some(waiter) = self.remove(class, number)
        {
            self.insert(new_class, waiter);
        }
        self.look_no_later_than(missed.next_look(now));
        let Some(delay) = missed.delay else { return new_class };
        if self.oldest_gives_way(now) {
            let from = new_class.next().map(|next| next.max(DelayClass::of(delay.present)));
            self.goes_on_from =
                from.filter(|from| self.looks < MAX_ROUND_LOOKS && self.oldest_from(*from).is_some());
            if self.goes_on_from.is_none()
                && let Some((most, _)) = self.classes.last_key_value()
            {
                let last = StartDelay { present: delay.present, tolerated: most.least() };
                self.look_no_later_than(Some(last.next_look(now)));
            }
        }
        new_class
    }

    /// Gives the turn to the oldest request of these classes. Returns false where there is none.
    fn give_turn_from(&mut self, from: DelayClass) -> bool {
        let Some(next) = self.oldest_from(from) else { return false };
        next.wake.notify_one();
        self.turn = Some(next.number);
        self.looks += 1;
        true
    }

    fn oldest_from(&self, from: DelayClass) -> Option<&Waiter> {
        let firsts = self.classes.range(from..).filter_map(|(_, waiters)| waiters.front());
        firsts.min_by_key(|waiter| waiter.number)
    }

    /// Whether the oldest request may be passed over at `now`.
    fn oldest_gives_way(&mut self, now: Instant) -> bool {
        let joined = self.oldest_from(DelayClass(0)).map_or(now, |oldest| oldest.joined);
        if now.saturating_duration_since(joined) < MAX_PATIENCE {
            self.patience_ended = None;
            return true;
        }
        let ended =
            self.patience_ended.filter(|ended| now.saturating_duration_since(*ended) < 2 * MAX_PATIENCE);
        let ended = *self.patience_ended.insert(ended.unwrap_or(now));
        now.saturating_duration_since(ended) >= MAX_PATIENCE
    }

    /// Moves the next round forward. The oldest request waits for its time, and has to notice.
    fn look_no_later_than(&mut self, at: Option<Instant>) {
        let Some(at) = at.filter(|at| self.look_at.is_none_or(|look_at| *at < look_at)) else { return };
        self.look_at = Some(at);
        if let Some(oldest) = self.oldest_from(DelayClass(0)) {
            oldest.wake.notify_one();
        }
    }

    fn insert(&mut self, class: DelayClass, waiter: Waiter) {
        let waiters = self.classes.entry(class).or_default();
        let at = waiters.partition_point(|other| other.number < waiter.number);
        waiters.insert(at, waiter);
    }

    fn remove(&mut self, class: DelayClass, number: u64) -> Option<Waiter> {
        let waiters = self.classes.get_mut(&class)?;
        let at = waiters.binary_search_by_key(&number, |waiter| waiter.number).ok()?;
        let waiter = waiters.remove(at);
        if waiters.is_empty() {
            self.classes.remove(&class);
        }
        waiter
    }
}
