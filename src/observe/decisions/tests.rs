//! Tests of the ring of choices: order, limits, and readers beside writers.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::pick::ChoiceReason;
use crate::pick::forecast::terms::ForecastTerms;

const NAMES: [&str; 3] = ["gpu-0", "é", "gpu-two"];

/// A candidate with numbers that all derive from `seed`, which reveals a record that mixes two choices.
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
    record_for(decisions, &format!("request-{seed}"), seed, candidates, chosen);
}

fn record_for(decisions: &Decisions, id: &str, seed: u64, candidates: &[Candidate], chosen: usize) {
    let choice = Choice { index: chosen, cost: 1.0, reason: ChoiceReason::Load };
    let decision = Decision {
        id,
        model: Some("m"),
        client_model: Some("fast"),
        route: Some("quick"),
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
    assert_eq!((record.client_model.as_str(), record.route.as_str()), ("fast", "quick"));
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
        client_model: Some(&long),
        route: None,
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
    for kept in [&slot.id, &slot.model, &slot.client_model] {
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
fn finds_the_choices_for_one_request() {
    let decisions = Decisions::new(6);
    let long = "é".repeat(100);
    for (seed, id) in (1..).zip(["gone", "a", "b", "a", "ab", long.as_str(), "a"]) {
        record_for(&decisions, id, seed, &[candidate(0, seed)], 0);
    }
    let found = |id: &str, limit| -> Vec<u64> {
        decisions.of_request(id, limit).iter().map(|record| record.tokens).collect()
    };
    assert_eq!(found("a", 9), [7, 4, 2]);
    assert_eq!(found("a", 2), [7, 4]);
    assert_eq!(found(&long, 9), [6], "by an id that was cut when it was recorded");
    let shown = decisions.of_request(&long, 9).remove(0).id;
    assert_eq!(found(&shown, 9), [6], "by the id as it is shown");
    for id in ["", "gone", "A", "ba"] {
        assert_eq!(found(id, 9), [0; 0], "{id:?}");
    }
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
        client_model: None,
        route: None,
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
            let all: Vec<Candidate> = (0..=round as usize % 3).map(|index| candidate(index, seed)).collect();
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
