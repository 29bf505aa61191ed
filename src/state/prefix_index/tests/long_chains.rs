//! Long chains: of blocks behind the first ones only some are stored, and a tail costs its own blocks.

use std::sync::atomic::Ordering::Relaxed;

use super::model::{IndexModel, facts, name};
use super::tails::share;
use super::*;
use crate::prompt::chain::thinning::{last_stored, stored};

/// Texts of a few long pieces, which share beginnings of any length.
fn long_text() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((0u8..3, 1usize..45), 1..6)
        .prop_map(|pieces| pieces.into_iter().flat_map(|(text, length)| vec![text; length]).collect())
}

#[derive(Clone, Debug)]
enum LongStep {
    Learn(Vec<u8>, usize),
    /// Learns the text of an earlier step with this behind it.
    Continue(prop::sample::Index, Vec<u8>),
    TakeBack,
    Limit(usize, Option<usize>),
    LimitAll(usize),
}

fn long_steps() -> impl Strategy<Value = Vec<LongStep>> {
    let step = prop_oneof![
        6 => (long_text(), 0usize..3).prop_map(|(text, at)| LongStep::Learn(text, at)),
        6 => (any::<prop::sample::Index>(), long_text()).prop_map(|(of, more)| LongStep::Continue(of, more)),
        3 => Just(LongStep::TakeBack),
        2 => (0usize..3, prop::option::of(0usize..300)).prop_map(|(at, limit)| LongStep::Limit(at, limit)),
        1 => (1usize..800).prop_map(LongStep::LimitAll),
    ];
    prop::collection::vec(step, 0..25)
}

proptest! {
    /// Compares with plain lists, as `agrees_with_the_model` does. A sibling that gets only the tails has the
    /// same state.
    #[test]
    fn agrees_with_the_model_on_long_chains(limit in 1usize..800, steps in long_steps()) {
        let (index, sibling) = (Index::new(limit, 3), Index::new(limit, 3));
        let mut model = IndexModel::new(limit, 3);
        let at = slots(&index, 3);
        slots(&sibling, 3);
        let mut sent: Vec<(Vec<u8>, usize)> = Vec::new();
        let mut last: Option<(Vec<u8>, usize, Receipt)> = None;
        for step in steps {
            let learned = match step {
                LongStep::Learn(text, slot) => Some((text, slot)),
                LongStep::Continue(of, more) => {
                    let old = sent.get(of.index(sent.len().max(1))).cloned();
                    old.map(|(text, slot)| ([text, more].concat(), slot))
                }
                LongStep::TakeBack => {
                    if let Some((text, slot, receipt)) = last.take() {
                        let ChainTail { hashes, end, .. } = receipt.new_part(&name(&text));
                        index.take_back(&name(&text), at[slot], receipt);
                        sibling.release(&hashes, end, at[slot]);
                        model.take_back(&text, slot);
                    }
                    None
                }
                LongStep::Limit(slot, blocks) => {
                    [&index, &sibling].iter().for_each(|index| index.limit(at[slot], blocks));
                    model.limit(slot, blocks.unwrap_or(usize::MAX));
                    last = None;
                    None
                }
                LongStep::LimitAll(blocks) => {
                    [&index, &sibling].iter().for_each(|index| index.set_limit(blocks));
                    model.limit_all(blocks.min(limit));
                    last = None;
                    None
                }
            };
            if let Some((text, slot)) = learned {
                let receipt = index.learn(&name(&text), None, at[slot]);
                share(&sibling, &name(&text), &receipt, at[slot]).expect("known parent");
                model.learn(&text, slot);
                sent.push((text.clone(), slot));
                last = Some((text, slot, receipt));
            }
            for (text, _) in &sent {
                let expected = model.facts(text);
                prop_assert_eq!(&facts(&hits(&index, &name(text)), &at), &expected);
                prop_assert_eq!(&facts(&hits(&sibling, &name(text)), &at), &expected);
            }
            prop_assert_eq!(index.size().pairs, model.pairs());
        }
    }
}

/// Scatters numbers over 64 bits, as hashes are.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 27)
}

fn touched(index: &Index) -> usize {
    index.blocks.touched.load(Relaxed) + index.writer().touched_and_limit().0
}

/// Returns how many blocks and pairs a call touches.
fn touches<T>(index: &Index, call: impl FnOnce() -> T) -> usize {
    let before = touched(index);
    call();
    touched(index) - before
}

/// The cost of a tail does not depend on what is before it: neither for a sibling that hears the tail, nor
/// for a balancer that sends the whole prompt, of whose known part it looks at a few blocks.
#[test]
fn learning_a_tail_touches_a_bounded_number_of_entries() {
    let (mut heard, mut sent) = (Vec::new(), Vec::new());
    for known in [64u64, 1024, 65_536] {
        let index = Index::new(1 << 20, 1);
        let at = slots(&index, 64)[7];
        let head: Vec<u64> = (1..=known).map(scatter).collect();
        let tail = |number: u64| (1..=16).map(move |block| scatter((number + 1) << 40 | block));
        let receipt = index.learn(&head, None, at);
        assert_eq!((receipt.learned(), index.held(at)), (known as usize, known as usize));
        let parent = head.last().copied().expect("the head has blocks");
        // The second tail is a branch; later ones are too.
        for number in 0..2 {
            let stored: Vec<u64> = tail(number).skip(7).step_by(8).collect();
            let cost = touches(&index, || assert!(index.learn_after(parent, &stored, None, at).is_some()));
            if number == 0 {
                heard.push(cost);
            }
            assert!(cost < 1200, "{cost} behind {known}");
        }
        let whole: Vec<u64> = head.iter().copied().chain(tail(0)).chain(tail(3)).collect();
        sent.push(touches(&index, || assert_eq!(index.learn(&whole, None, at).held(), known as usize + 16)));
    }
    assert!(heard.iter().all(|cost| *cost < 100), "{heard:?}");
    // Behind the longest head, the branches of the call before are still being counted.
    assert!(sent[..2].iter().all(|cost| *cost < 100) && sent[2] < 400, "{sent:?}");
}

/// The limit of all pairs falls, as when upstreams leave: a request between two steps does a few of them.
#[test]
fn a_request_does_not_wait_for_a_lowered_limit() {
    const FEWER: usize = 1000;
    let index = Index::new(1 << 20, 1);
    let at = slots(&index, 4);
    for number in 0..1000 {
        let chain: Vec<u64> = (1..=24u64).map(|block| scatter((number + 1) << 40 | block)).collect();
        index.learn(&chain, None, at[number as usize % 4]);
    }
    assert!(index.writer().limit_all(&index.blocks, FEWER), "there are more steps");
    let before = index.size().pairs;
    let cost = touches(&index, || index.learn(&[7, 8, 9], None, at[0]));
    assert!(cost < 100_000, "{cost}");
    assert!((FEWER..before - 1000).contains(&index.size().pairs), "{} of {before}", index.size().pairs);
    index.set_limit(FEWER);
    assert!(index.size().pairs <= FEWER);
}

#[test]
fn counts_the_blocks_that_are_not_stored() {
    const END: Option<u64> = Some(1 << 60);
    let index = Index::new(1000, 1);
    let at = slots(&index, 2);
    let long: Vec<u64> = (1..=100).collect();
    let receipt = index.learn(&long, END, at[0]);
    assert_eq!((receipt.learned(), receipt.held(), receipt.end()), (100, 0, END));
    let hashes: Vec<u64> = stored(&long).collect();
    let tail = ChainTail { parent: None, depth: 0, hashes: hashes.clone(), end: END };
    assert_eq!((receipt.new_part(&long), receipt.new_hashes(&long)), (tail, hashes.clone()));
    assert_eq!((hashes.len(), last_stored(100)), (40, 96));
    // The ending is a pair too.
    assert_eq!((index.held(at[0]), index.size().blocks, index.size().pairs), (96, 97, 97));
    assert_eq!(index.chain_to(96, at[0]), Some(hashes));
    assert_eq!(index.chain_to(97, at[0]), None, "it is not stored");
    // Half of the blocks up to the next stored one, where the prompt has them.
    let lengths = [32, 33, 34, 39, 40, 47, 96, 98, 100];
    let found = lengths.map(|length| held(&index, &long[..length], at[0]));
    assert_eq!(found, [32, 33, 34, 35, 40, 43, 96, 98, 99]);
    let again = index.learn(&long, END, at[0]);
    let nothing = ChainTail { parent: Some(96), depth: 96, hashes: Vec::new(), end: END };
    assert_eq!((again.held(), again.new_part(&long)), (96, nothing));
    // A cache of fifty blocks has room for the stored one at 48.
    index.limit(at[1], Some(50));
    let cut = index.learn(&long, END, at[1]);
    assert_eq!((cut.learned(), cut.end(), index.held(at[1])), (48, None, 48));
}

/// The blocks behind the last stored one are shared as that one is: on a warm upstream they draw no
/// conversation that the stored ones do not draw.
#[test]
fn charges_the_blocks_beyond_as_the_last_stored_one() {
    let index = Index::new(100_000, 1);
    let at = slots(&index, 8);
    let chain = |own: u64| (1..=46).chain((0..20).map(move |block| own << 32 | block)).collect::<Vec<u64>>();
    for own in 1..=40 {
        index.learn(&chain(own), None, at[0]);
    }
    let mut hits = hits(&index, &chain(99));
    hits.charge(2.0, 8);
    assert_eq!((hits.held(at[0]), hits.branches(39), hits.branches(40)), (43, 40, 0));
    let drawn = hits.missing(at[1]) - hits.missing(at[0]);
    let each = hits.charged(1);
    assert!(each < 0.5 && (drawn - 43.0 * each).abs() < 1e-9, "{drawn} for {each} each");
}

/// A sibling undoes a tail without its sender's receipt, and keeps what was before the tail.
#[test]
fn releases_a_tail_and_keeps_the_blocks_before_it() {
    let index = Index::new(1000, 1);
    let at = slots(&index, 2);
    index.learn(&chain("abcd"), None, at[0]);
    let tail = &chain("abxy")[2..];
    index.learn_after(chain("ab")[1], tail, Some(9), at[1]).expect("the parent is known");
    index.release(tail, Some(9), at[1]);
    assert_eq!((held(&index, &chain("abxy"), at[1]), index.held(at[1])), (2, 2));
    assert_eq!(hits(&index, &chain("ab")).branches(0), 1);
    // Another request has learned the blocks since.
    index.learn_after(chain("ab")[1], tail, None, at[1]).expect("the parent is known");
    index.learn_after(chain("ab")[1], tail, None, at[1]).expect("the parent is known");
    index.release(tail, None, at[1]);
    assert_eq!(held(&index, &chain("abxy"), at[1]), 4);
    index.release(&[77], None, at[1]);
    index.release(&[], None, at[1]);
    assert_eq!(index.held(at[1]), 4);
}

/// Another model's conversations are no evidence against the share of a block.
#[test]
fn conversations_of_other_groups_do_not_count() {
    let cost = |others: u64, group: usize| {
        let index = Index::new(100_000, 1);
        let at = slots(&index, 9);
        index.set_group(at[8], group);
        "ijklmnop".chars().for_each(|name| {
            index.learn(&chain(&format!("abcd{name}")), None, at[0]);
        });
        (0..others).for_each(|number| {
            index.learn(&[1 << 50 | number], None, at[8]);
        });
        let mut hits = hits(&index, &chain("abcdq"));
        hits.charge(2.0, 8);
        hits.missing(at[1])
    };
    assert_eq!(cost(0, 0), cost(500, 3), "another group");
    assert!(cost(0, 0) < cost(500, 0), "the same group");
    assert_eq!(cost(500, 1000), cost(500, MAX_GROUP), "the largest group");
}
