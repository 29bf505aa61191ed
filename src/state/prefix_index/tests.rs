//! The index against plain tables, against a model of lists, and against many threads.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

mod long_chains;
mod model;
mod properties;
mod spreading;
mod tails;

use model::{IndexModel, LookupFacts, chains, facts, name};
use tails::share;

fn hits(index: &Index, chain: &[u64]) -> Hits {
    let mut hits = Hits::default();
    index.lookup(chain, &mut hits);
    hits
}

fn held(index: &Index, chain: &[u64], slot: Slot) -> usize {
    hits(index, chain).held(slot)
}

fn slots(index: &Index, count: usize) -> Vec<Slot> {
    (0..count).map(|_| index.enter().expect("there is a slot")).collect()
}

/// Returns the chain of a conversation, given the texts of its blocks.
fn chain(text: &str) -> Vec<u64> {
    name(text.as_bytes())
}

#[test]
fn finds_the_leading_blocks_of_each_upstream() {
    let index = Index::new(100, 1);
    let at = slots(&index, 3);
    index.learn(&chain("abcd"), None, at[0]);
    index.learn(&chain("abx"), None, at[1]);
    let hits = hits(&index, &chain("abcdef"));
    assert_eq!(at.iter().map(|slot| hits.held(*slot)).collect::<Vec<_>>(), [4, 2, 0]);
    assert_eq!((hits.known(), hits.length()), (4, 6));
    let branches: Vec<u32> = (0..6).map(|block| hits.branches(block)).collect();
    assert_eq!(branches, [2, 2, 1, 1, 0, 0]);
}

#[test]
fn charges_shared_blocks_by_their_share() {
    let index = Index::new(1000, 1);
    let at = slots(&index, 2);
    // Eight conversations through two blocks; the first goes on for two more.
    for name in "ijklmno".chars() {
        index.learn(&chain(&format!("ab{name}")), None, at[1]);
    }
    index.learn(&chain("abcd"), None, at[0]);
    let mut hits = hits(&index, &chain("abcdef"));
    assert_eq!(hits.missing(at[1]), 4.0, "before charge");
    hits.charge(2.0, 2);
    // Of eight conversations each of two upstreams is charged half a block, twice its share.
    assert_eq!(hits.missing(at[0]), 2.0);
    assert_eq!(hits.missing(at[1]), 4.0);
    let empty = index.enter().expect("there is a slot");
    assert_eq!(hits.missing(empty), 5.0);
    hits.charge(100.0, 2);
    assert_eq!(hits.missing(empty), 6.0);
    index.lookup(&chain("abcd"), &mut hits);
    hits.charge(2.0, 2);
    assert_eq!(hits.missing(at[0]), 0.0);
}

#[test]
fn charges_little_for_a_copy_while_too_few_upstreams_hold_it() {
    let index = Index::new(10_000, 1);
    let at = slots(&index, 8);
    let learn = |text: &str, at: Slot| assert!(index.learn(&chain(text), None, at).learned() > 0);
    let missing = |share: f64, candidates: usize| {
        let mut hits = hits(&index, &chain("abcd"));
        hits.charge(share, candidates);
        hits.missing(at[7])
    };
    // One conversation is no evidence of others, and neither is a second.
    learn("abc", at[0]);
    assert_eq!(missing(2.0, 8), 4.0);
    learn("abi", at[0]);
    assert_eq!(missing(2.0, 8), 4.0);
    // Each further conversation halves the doubt that all go through the two blocks: all eight upstreams
    // need them.
    "jklm".chars().for_each(|name| learn(&format!("ab{name}"), at[0]));
    assert_eq!(missing(2.0, 8), 2.0 + 2.0 / 16.0);
    // Of ten other conversations five go through them: half of the upstreams need them.
    "opqrs".chars().for_each(|name| learn(&name.to_string(), at[0]));
    (1..3).for_each(|upstream| learn("ab", at[upstream]));
    assert_eq!(missing(2.0, 8), 2.0 + 2.0 / 16.0, "the fourth copy");
    learn("ab", at[3]);
    assert_eq!(missing(2.0, 8), 4.0, "a fifth copy is spare");
    assert_eq!(missing(2.0, 9), 3.0, "half of the fifth, with nine upstreams");
    // Extreme values of the knob turn the discount off, or the cost of shared blocks.
    assert_eq!((missing(1e6, 8), missing(0.0, 8)), (4.0, 1.0));
}

#[test]
fn counts_a_conversation_once_for_all_its_turns() {
    let index = Index::new(1000, 1);
    let at = slots(&index, 1)[0];
    let opening = Some(1000);
    let turns = [("ab", opening), ("ab", opening), ("abcd", None), ("abcd", None), ("abcdefg", None)];
    for (text, end) in turns {
        index.learn(&chain(text), end, at);
        assert_eq!(hits(&index, &chain(text)).branches(0), 1, "{text}");
    }
}

#[test]
fn counts_each_short_question_behind_one_long_prompt() {
    let index = Index::new(1000, 1);
    let at = slots(&index, 1)[0];
    let branches = || hits(&index, &chain("abc")).branches(2);
    for question in 0..50 {
        index.learn(&chain("abc"), Some(1000 + question), at);
    }
    assert_eq!(branches(), 50);
    // The same prompt again, as with several samples of one prompt.
    index.learn(&chain("abc"), Some(1007), at);
    assert_eq!(branches(), 50);
    // One conversation continues; then a long question arrives and replaces another open ending.
    index.learn(&chain("abcd"), None, at);
    index.learn(&chain("abce"), None, at);
    assert_eq!(branches(), 50);
    // An undone request changes nothing.
    let receipt = index.learn(&chain("abcf"), None, at);
    index.take_back(&chain("abcf"), at, receipt);
    assert_eq!(branches(), 50);
    index.forget(at);
    index.learn(&[1; 100], None, at);
    assert_eq!(hits(&index, &chain("abc")).branches(2), 0);
}

#[test]
fn endings_do_not_count_towards_the_cache() {
    let index = Index::new(1000, 1);
    let at = slots(&index, 1)[0];
    index.limit(at, Some(3));
    for question in 0..9 {
        index.learn(&chain("abc"), Some(1000 + question), at);
    }
    assert_eq!((held(&index, &chain("abc"), at), index.held(at)), (3, 3));
    assert_eq!(index.learn(&chain("abcde"), Some(7), at).learned(), 3);
}

#[test]
fn keeps_blocks_with_a_saturated_claim_count() {
    let index = Index::new(100, 1);
    let at = slots(&index, 1)[0];
    let receipts: Vec<Receipt> = (0..70_000).map(|_| index.learn(&[1], None, at)).collect();
    receipts.into_iter().for_each(|receipt| index.take_back(&[1], at, receipt));
    assert_eq!(held(&index, &[1], at), 1);
}

#[test]
fn undoes_a_burst_that_never_arrived() {
    let index = Index::new(100, 1);
    let at = slots(&index, 1)[0];
    let mut receipts: Vec<Receipt> = (0..5).map(|_| index.learn(&[1, 2, 3], Some(4), at)).collect();
    assert_eq!((receipts[0].held(), receipts[4].held()), (0, 3));
    receipts.swap(0, 3);
    for receipt in receipts {
        assert_eq!(held(&index, &[1, 2, 3], at), 3);
        index.take_back(&[1, 2, 3], at, receipt);
    }
    assert_eq!(index.size().pairs, 0);
}

#[test]
fn ignores_a_receipt_from_before_a_restart() {
    let index = Index::new(100, 1);
    let at = slots(&index, 1)[0];
    for _ in 0..5 {
        let receipt = index.learn(&[1, 2], None, at);
        index.forget(at);
        index.learn(&[1, 2], None, at);
        index.take_back(&[1, 2], at, receipt);
        assert_eq!(held(&index, &[1, 2], at), 2);
    }
}

#[test]
fn tolerates_contradicting_chains() {
    let index = Index::new(100, 1);
    let at = slots(&index, 1)[0];
    index.learn(&[1, 2, 3], Some(4), at);
    for nonsense in [&[5, 5, 5][..], &[3, 2, 1], &[2, 1], &[1, 2, 1, 2], &[6, 3], &[4], &[1, 2, 3, 4]] {
        let receipt = index.learn(nonsense, nonsense.last().copied(), at);
        assert!(receipt.learned() < nonsense.len() || nonsense == [4], "{nonsense:?}");
        index.take_back(nonsense, at, receipt);
    }
    assert_eq!(held(&index, &[1, 2, 3], at), 3);
    index.forget(at);
    index.learn(&[], None, at);
    assert_eq!(index.size().pairs, 0);
    assert_eq!(index.size().blocks, 0);
}

#[test]
fn supports_more_upstreams_than_a_word_has_bits() {
    let index = Index::new(10_000, 1);
    let at = slots(&index, 200);
    for slot in &at {
        index.learn(&chain("abcdefgh")[..1 + slot.number() % 8], None, *slot);
    }
    let hits = hits(&index, &chain("abcdefgh"));
    assert!(at.iter().all(|slot| hits.held(*slot) == 1 + slot.number() % 8));
}

#[test]
fn reuses_slots_without_the_old_blocks() {
    let index = Index::new(10_000, 1);
    let at = slots(&index, 4);
    for slot in &at {
        index.learn(&chain("abc"), None, *slot);
    }
    index.leave(at[2]);
    assert_eq!(index.enter(), Some(at[2]));
    assert_eq!(held(&index, &chain("abc"), at[2]), 0);
    assert_eq!(held(&index, &chain("abc"), at[3]), 3);
    let all: Vec<Slot> = std::iter::from_fn(|| index.enter()).collect();
    assert!(all.len() > 4000);
    assert!(all.iter().collect::<BTreeSet<_>>().len() == all.len());
    all.iter().for_each(|slot| index.leave(*slot));
    assert!(index.enter().is_some());
}

#[test]
fn lookups_allocate_nothing_after_the_first() {
    let index = Index::new(10_000, 1);
    let at = slots(&index, 3);
    let long: Vec<u64> = (1..500).collect();
    index.learn(&long, None, at[1]);
    let mut hits = Hits::default();
    index.lookup(&long, &mut hits);
    let capacities = hits.capacities();
    for length in [0, 3, 499, 17] {
        index.lookup(&long[..length], &mut hits);
        assert_eq!((hits.held(at[1]), hits.capacities()), (length, capacities));
    }
}

#[test]
fn a_block_takes_at_most_75_bytes() {
    let index = Index::new(400_000, 1);
    let at = slots(&index, 8);
    let nothing = index.size().bytes;
    for conversation in 0u64..1000 {
        let chain: Vec<u64> = (0..250).map(|block| conversation * 1000 + block + 1).collect();
        index.learn(&chain, None, at[conversation as usize % 8]);
    }
    let size = index.size();
    // Of each prompt the last two blocks are behind the last stored one.
    assert_eq!((size.blocks, size.pairs), (248_000, 248_000));
    assert!(size.bytes - nothing < 75 * 248_000, "{} bytes a block", size.bytes / 248_000);
    assert!(size.bytes - nothing < 30 * 248_000, "{} bytes a block", size.bytes / 248_000);
    assert!(nothing < 1 << 20, "{nothing} bytes when empty");
}
