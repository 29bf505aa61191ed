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
pub const KEPT_DECISIONS: usize = 256;

/// The largest number of candidates recorded of one choice.
const MAX_RECORDED_CANDIDATES: usize = 512;

/// A choice of an upstream, as the request's task reports it.
pub struct Decision<'a> {
    /// The id of the request.
    pub id: &'a str,
    pub model: Option<&'a str>,
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
    /// Empty when the request names none.
    pub model: String,
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
        let last = self.last.load(Ordering::Relaxed);
        let oldest = last.saturating_sub(self.slots.len() as u64);
        let numbers = (oldest + 1..=last).rev();
        let kept = numbers.filter_map(|number| {
            let slot = self.slot(number).lock().unwrap_or_else(PoisonError::into_inner);
            (slot.number == number).then(|| slot.clone())
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

/// Replaces `text` with a text of the client, cut to a bound.
fn refill(text: &mut String, with: &str) {
    text.clear();
    cut(with, MAX_SHOWN_BYTES).iter().for_each(|part| text.push_str(part));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::pick::ChoiceReason;
    use crate::pick::forecast::terms::ForecastTerms;

    const NAMES: [&str; 3] = ["gpu-0", "é", "gpu-two"];

    /// A candidate whose numbers all derive from `seed`, so that a record that mixes two choices is detected.
    fn candidate(index: usize, seed: u64) -> Candidate {
        Candidate {
            index,
            backlog: seed,
            missing: seed,
            active: seed,
            context: seed,
            weight: 1.0,
            session_penalty: seed,
            cold: seed,
            hit: seed,
            uncached: seed,
            own_backlog: seed,
            head_millis: seed as u32,
            terms: ForecastTerms::default(),
        }
    }

    fn record(decisions: &Decisions, seed: u64, candidates: &[Candidate], chosen: usize) {
        let id = format!("request-{seed}");
        let choice = Choice { index: chosen, cost: 1.0, reason: ChoiceReason::Load };
        let decision = Decision {
            id: &id,
            model: Some("m"),
            attempt: 1,
            session: Some("header"),
            tokens: seed,
            blocks: seed as usize,
            choice,
            of: candidates.len(),
            candidates,
            knobs: &Balance::default(),
            name: &|index| NAMES[index % NAMES.len()],
        };
        decisions.record(&decision, Duration::from_secs(seed));
    }

    fn seeds(decisions: &Decisions, limit: usize) -> Vec<u64> {
        decisions.latest(limit).iter().map(|record| record.tokens).collect()
    }

    #[test]
    fn records_a_choice_with_all_its_candidates() {
        let decisions = Decisions::new(4);
        assert!(decisions.latest(9).is_empty());
        record(&decisions, 5, &[candidate(2, 5), candidate(0, 5), candidate(1, 5)], 0);
        let [record] = &decisions.latest(9)[..] else { panic!("one was made") };
        assert_eq!((record.id.as_str(), record.model.as_str(), record.of), ("request-5", "m", 3));
        assert_eq!((record.reason, record.session, record.attempt), ("load", Some("header"), 1));
        assert_eq!((record.at, record.blocks), (Duration::from_secs(5), 5));
        let told: Vec<_> = record.candidates().map(|told| (told.upstream, told.terms)).collect();
        assert_eq!(told, [("gpu-two", candidate(2, 5)), ("gpu-0", candidate(0, 5)), ("é", candidate(1, 5))]);
        let chosen = record.chosen().unwrap();
        assert_eq!((chosen.upstream, chosen.cost), ("gpu-0", cost(&candidate(0, 5), &Balance::default())));
    }

    /// A ring full of names of 2 MiB held 512 MiB.
    #[test]
    fn cuts_texts_of_clients() {
        let (decisions, long) = (Decisions::new(1), "é".repeat(1 << 20));
        let choice = Choice { index: 0, cost: 0.0, reason: ChoiceReason::Load };
        let decision = Decision {
            id: &long,
            model: Some(&long),
            attempt: 1,
            session: None,
            tokens: 0,
            blocks: 0,
            choice,
            of: 0,
            candidates: &[],
            knobs: &Balance::default(),
            name: &|index| NAMES[index],
        };
        decisions.record(&decision, Duration::ZERO);
        let slot = decisions.slot(1).lock().unwrap();
        for kept in [&slot.id, &slot.model] {
            assert!(kept.len() <= 128 && kept.ends_with("é…"), "{kept}");
            assert!(kept.capacity() <= 256, "{}", kept.capacity());
        }
    }

    #[test]
    fn returns_the_newest_first_and_drops_the_oldest() {
        let decisions = Decisions::new(4);
        (1..=3).for_each(|seed| record(&decisions, seed, &[candidate(0, seed)], 0));
        assert_eq!(seeds(&decisions, 9), [3, 2, 1]);
        (4..=6).for_each(|seed| record(&decisions, seed, &[candidate(0, seed)], 0));
        assert_eq!(seeds(&decisions, 9), [6, 5, 4, 3]);
        assert_eq!(seeds(&decisions, 2), [6, 5]);
        assert!(seeds(&decisions, 0).is_empty());
    }

    #[test]
    fn skips_a_slot_that_a_reader_holds() {
        let decisions = Decisions::new(2);
        (1..=2).for_each(|seed| record(&decisions, seed, &[candidate(0, seed)], 0));
        let reading = decisions.slot(3).lock().unwrap();
        record(&decisions, 3, &[candidate(0, 3)], 0);
        drop(reading);
        record(&decisions, 4, &[candidate(0, 4)], 0);
        assert_eq!(seeds(&decisions, 9), [4]);
    }

    #[test]
    fn reports_retry_as_the_reason_of_later_attempts() {
        let choice = Choice { index: 0, cost: 0.0, reason: ChoiceReason::Prefix };
        let knobs = Balance::default();
        let mut decision = Decision {
            id: "",
            model: None,
            attempt: 1,
            session: None,
            tokens: 0,
            blocks: 0,
            choice,
            of: 0,
            candidates: &[],
            knobs: &knobs,
            name: &|_| "",
        };
        assert_eq!(decision.reason(), "prefix");
        decision.attempt = 2;
        assert_eq!(decision.reason(), "retry");
        let decisions = Decisions::new(1);
        decisions.record(&decision, Duration::ZERO);
        assert!(decisions.latest(1)[0].chosen().is_none(), "nobody is no problem");
    }

    #[test]
    fn records_the_first_and_the_chosen_of_many_candidates() {
        let decisions = Decisions::new(1);
        let all: Vec<Candidate> = (0..MAX_RECORDED_CANDIDATES * 2).map(|index| candidate(index, 1)).collect();
        record(&decisions, 1, &all, MAX_RECORDED_CANDIDATES + 7);
        let [record] = &decisions.latest(1)[..] else { panic!("one was made") };
        assert_eq!(
            (record.candidates().count(), record.of),
            (MAX_RECORDED_CANDIDATES + 1, MAX_RECORDED_CANDIDATES * 2)
        );
        assert_eq!(record.chosen().unwrap().terms.index, MAX_RECORDED_CANDIDATES + 7);
    }

    #[test]
    fn slots_reuse_their_memory() {
        let decisions = Decisions::new(1);
        let many: Vec<Candidate> = (0..3).map(|index| candidate(index, 1)).collect();
        record(&decisions, 1, &many, 0);
        let memory = |decisions: &Decisions| {
            let slot = decisions.slot(1).lock().unwrap();
            (slot.rows.as_ptr() as usize, slot.names.as_ptr() as usize, slot.id.as_ptr() as usize)
        };
        let before = memory(&decisions);
        (2..9).for_each(|seed| record(&decisions, seed, &many[..(seed as usize % 3) + 1], 0));
        assert_eq!(memory(&decisions), before);
    }

    #[test]
    fn readers_see_no_record_that_mixes_two_choices() {
        let decisions = Decisions::new(8);
        let over = AtomicBool::new(false);
        let write = |thread: u64| {
            for round in 0..5000 {
                let seed = thread * 10_000 + round + 1;
                let all: Vec<Candidate> =
                    (0..=round as usize % 3).map(|index| candidate(index, seed)).collect();
                record(&decisions, seed, &all, 0);
            }
        };
        let read = || {
            let mut seen = 0;
            let mut is_last = false;
            while !is_last {
                // Read once more after the last writer: a record exists then, however fast the writers were.
                is_last = over.load(Ordering::Relaxed);
                let records = decisions.latest(8);
                assert!(records.windows(2).all(|pair| pair[0].number > pair[1].number));
                for record in records {
                    let seed = record.tokens;
                    let own = |told: CandidateRecord<'_>| told.terms == candidate(told.terms.index, seed);
                    assert!(record.candidates().all(own));
                    assert_eq!((record.id, record.of), (format!("request-{seed}"), record.rows.len()));
                    seen += 1;
                }
            }
            seen
        };
        std::thread::scope(|scope| {
            let readers = [scope.spawn(read), scope.spawn(read)];
            let writers = [0, 1, 2, 3].map(|thread| scope.spawn(move || write(thread)));
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            over.store(true, Ordering::Relaxed);
            assert!(readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>() > 0);
        });
        assert!(!decisions.latest(8).is_empty());
    }
}
