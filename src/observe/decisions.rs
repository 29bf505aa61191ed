//! The latest choices of upstreams, each with the numbers behind it, for `GET /admin/decisions`.
//!
//! A ring of slots. A choice takes the lock of the next slot if it is free; while a reader holds it, the
//! choice is not recorded. Slots keep their memory, so that recording allocates nothing once the ring has
//! gone round. Text from clients is cut before it is stored.
//!
//! Never: a wait on a request's path, a lock that all requests share, a record that mixes two choices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::Duration;

use crate::config::types::Balance;
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::pick::forecast::forecast;
use crate::pick::{Candidate, Choice, cost};

/// The number of choices that are kept.
pub(crate) const KEPT_DECISIONS: usize = 256;

/// The largest number of candidates recorded of one choice.
const MAX_RECORDED_CANDIDATES: usize = 512;

/// A choice of an upstream, as the request's task reports it.
pub struct Decision<'a> {
    /// The id of the request.
    pub id: &'a str,
    /// The name that the client gave the model, or that of the only model where it gave none.
    pub client_model: Option<&'a str>,
    /// The model that the upstream is asked for.
    pub model: Option<&'a str>,
    /// The name of the configured route.
    pub route: Option<&'a str>,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// Where the request named its session, if it did.
    pub session: Option<&'static str>,
    /// The estimated tokens of the prompt, and the number of its hashed blocks.
    pub tokens: u64,
    pub blocks: usize,
    pub choice: Choice,
    /// The number of candidates.
    pub of: usize,
    /// The candidates that were compared: of many, those that could win.
    pub candidates: &'a [Candidate],
    pub knobs: &'a Balance,
    /// Returns the name of a candidate's upstream by the candidate's index.
    pub name: &'a dyn Fn(usize) -> &'a str,
}

/// A recorded choice.
#[derive(Clone, Debug, Default)]
pub struct DecisionRecord {
    /// Choices are counted from 1; 0 is an empty slot.
    pub number: u64,
    /// The time since 1970.
    pub at: Duration,
    pub id: String,
    /// Empty when the request names none and several are served, as `client_model`.
    pub model: String,
    pub client_model: String,
    /// Empty when the request matched no route.
    pub route: String,
    pub attempt: u32,
    pub session: Option<&'static str>,
    pub tokens: u64,
    pub blocks: usize,
    pub reason: &'static str,
    /// The number of candidates; fewer may be recorded.
    pub of: usize,
    /// The index of the chosen candidate among the rows.
    chosen: usize,
    /// The names of all candidates, concatenated.
    names: String,
    rows: Vec<CandidateRow>,
}

#[derive(Clone, Copy, Debug)]
struct CandidateRow {
    /// The end of this candidate's name in `names`.
    name_end: usize,
    terms: Candidate,
    cost: f64,
}

/// A candidate of a recorded choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CandidateRecord<'r> {
    pub upstream: &'r str,
    pub terms: Candidate,
    pub cost: f64,
    /// The forecast of the time from the choice to the first token.
    pub forecast: Duration,
}

/// The ring of the latest choices.
#[derive(Debug)]
pub struct Decisions {
    slots: Box<[Mutex<DecisionRecord>]>,
    last: AtomicU64,
}

// === impl Decision ===

impl Decision<'_> {
    /// The reason for the choice, as a label.
    pub fn reason(&self) -> &'static str {
        if self.attempt > 1 { "retry" } else { self.choice.reason.label() }
    }
}

// === impl Decisions ===

impl Default for Decisions {
    fn default() -> Self {
        Decisions::new(KEPT_DECISIONS)
    }
}

impl Decisions {
    fn new(kept: usize) -> Self {
        Decisions { slots: (0..kept).map(|_| Mutex::default()).collect(), last: AtomicU64::new(0) }
    }

    /// Records a choice made `at` this time since 1970, unless a reader holds its slot.
    pub fn record(&self, decision: &Decision<'_>, at: Duration) {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let mut slot = match self.slot(number).try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::Poisoned(slot)) => slot.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // A thread that was delayed for a whole round must not overwrite a newer choice.
        if slot.number < number {
            slot.write(decision, number, at);
        }
    }

    /// Returns the latest choices, newest first.
    pub fn latest(&self, limit: usize) -> Vec<DecisionRecord> {
        self.latest_of(limit, |_| true)
    }

    /// Returns the latest choices for the requests with this id, newest first. Ids are compared as they are
    /// recorded: cut.
    pub(crate) fn of_request(&self, id: &str, limit: usize) -> Vec<DecisionRecord> {
        let recorded = cut(id, MAX_SHOWN_BYTES).concat();
        self.latest_of(limit, |record| record.id == recorded)
    }

    fn latest_of(&self, limit: usize, is_wanted: impl Fn(&DecisionRecord) -> bool) -> Vec<DecisionRecord> {
        let last = self.last.load(Ordering::Relaxed);
        let oldest = last.saturating_sub(self.slots.len() as u64);
        let numbers = (oldest + 1..=last).rev();
        let kept = numbers.filter_map(|number| {
            let slot = self.slot(number).lock().unwrap_or_else(PoisonError::into_inner);
            (slot.number == number && is_wanted(&slot)).then(|| slot.clone())
        });
        kept.take(limit).collect()
    }

    fn slot(&self, number: u64) -> &Mutex<DecisionRecord> {
        &self.slots[(number % self.slots.len() as u64) as usize]
    }
}

// === impl DecisionRecord ===

impl DecisionRecord {
    /// The recorded candidates, in the order of the choice.
    pub fn candidates(&self) -> impl Iterator<Item = CandidateRecord<'_>> {
        let starts = std::iter::once(0).chain(self.rows.iter().map(|row| row.name_end));
        starts.zip(&self.rows).map(|(start, row)| CandidateRecord {
            upstream: &self.names[start..row.name_end],
            terms: row.terms,
            cost: row.cost,
            forecast: forecast(&row.terms),
        })
    }

    pub fn chosen(&self) -> Option<CandidateRecord<'_>> {
        self.candidates().nth(self.chosen)
    }

    fn write(&mut self, decision: &Decision<'_>, number: u64, at: Duration) {
        // A panic half-way leaves an empty slot.
        self.number = 0;
        self.at = at;
        refill(&mut self.id, decision.id);
        refill(&mut self.model, decision.model.unwrap_or_default());
        refill(&mut self.client_model, decision.client_model.unwrap_or_default());
        refill(&mut self.route, decision.route.unwrap_or_default());
        self.attempt = decision.attempt;
        self.session = decision.session;
        self.tokens = decision.tokens;
        self.blocks = decision.blocks;
        self.reason = decision.reason();
        self.of = decision.of;
        self.names.clear();
        self.rows.clear();
        for (place, candidate) in decision.candidates.iter().enumerate() {
            let is_chosen = candidate.index == decision.choice.index;
            // Above the limit the first candidates and the chosen one are recorded.
            if place >= MAX_RECORDED_CANDIDATES && !is_chosen {
                continue;
            }
            if is_chosen {
                self.chosen = self.rows.len();
            }
            self.names.push_str((decision.name)(candidate.index));
            let name_end = self.names.len();
            self.rows.push(CandidateRow {
                name_end,
                terms: *candidate,
                cost: cost(candidate, decision.knobs),
            });
        }
        self.number = number;
    }
}

/// Replaces `text` with another one, cut to a bound.
fn refill(text: &mut String, with: &str) {
    text.clear();
    cut(with, MAX_SHOWN_BYTES).iter().for_each(|part| text.push_str(part));
}

#[cfg(test)]
mod tests;
