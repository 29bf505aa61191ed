//! The index under any sequence of steps, beside a plain model, and readers beside writers.

use super::*;

/// While one upstream's blocks change, readers always find the blocks of another.
#[test]
fn readers_find_present_blocks_during_writes() {
    let index = Index::new(100_000, 1);
    let at = slots(&index, 2);
    let kept: Vec<u64> = (1..100).map(|block| block << 40).collect();
    index.learn(&kept, None, at[0]);
    index.limit(at[1], Some(3000));
    let wrong = std::thread::scope(|scope| {
        let writers: Vec<_> = (1u64..3)
            .map(|thread| {
                let (index, at) = (&index, &at);
                scope.spawn(move || {
                    for round in 0..3000 {
                        let first = thread << 32 | (round * 20);
                        let chain: Vec<u64> = (first..first + 20).collect();
                        let receipt = index.learn(&chain, None, at[1]);
                        if round % 3 == 0 {
                            index.take_back(&chain, at[1], receipt);
                        }
                    }
                })
            })
            .collect();
        let mut wrong = 0;
        let mut hits = Hits::default();
        while !writers.iter().all(|writer| writer.is_finished()) {
            index.lookup(&kept, &mut hits);
            wrong += usize::from(hits.held(at[0]) != kept.len() || hits.held(at[1]) != 0);
        }
        wrong
    });
    assert_eq!(wrong, 0);
    assert!(index.held(at[1]) <= 3000);
}

/// Returns the lookup facts of every chain.
fn everything(index: &Index, at: &[Slot]) -> BTreeMap<Vec<u8>, LookupFacts> {
    chains().map(|text| (text.clone(), facts(&hits(index, &name(&text)), at))).collect()
}

#[derive(Clone, Debug)]
enum IndexStep {
    Learn(Vec<u8>, usize, Option<u64>),
    TakeBack,
    Limit(usize, Option<usize>),
    Forget(usize),
    Replace(usize),
}

pub(super) fn text() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0u8..2, 1..7)
}

fn steps(all: bool) -> impl Strategy<Value = Vec<IndexStep>> {
    let limit = prop::option::of(0usize..20);
    let rare = u32::from(all);
    let end = prop::option::of(1u64 << 60..(1 << 60) + 5).prop_map(move |end| end.filter(|_| all));
    let step = prop_oneof![
        20 => (text(), 0usize..3, end).prop_map(|(text, at, end)| IndexStep::Learn(text, at, end)),
        4 => Just(IndexStep::TakeBack),
        2 => (0usize..3, limit).prop_map(|(at, limit)| IndexStep::Limit(at, limit)),
        rare => (0usize..3).prop_map(IndexStep::Forget),
        rare => (0usize..3).prop_map(IndexStep::Replace),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Compares learning, undoing and evicting with plain lists. A sibling that gets only the tails has the
    /// same state.
    #[test]
    fn agrees_with_the_model(limit in 1usize..40, steps in steps(false)) {
        let (index, sibling) = (Index::new(limit, 3), Index::new(limit, 3));
        let mut model = IndexModel::new(limit, 3);
        let at = slots(&index, 3);
        slots(&sibling, 3);
        let mut last = None;
        for (number, step) in (1..).zip(steps) {
            match step {
                IndexStep::Learn(text, slot, _) => {
                    let receipt = index.learn(&name(&text), None, at[slot]);
                    let theirs = share(&sibling, &name(&text), &receipt, at[slot]).expect("known parent");
                    model.learn(&text, slot);
                    last = Some((text, slot, receipt, theirs));
                }
                IndexStep::TakeBack => {
                    let Some((text, slot, receipt, theirs)) = last.take() else { continue };
                    index.take_back(&name(&text), at[slot], receipt);
                    sibling.take_back(&name(&text), at[slot], theirs);
                    model.take_back(&text, slot);
                }
                IndexStep::Limit(slot, blocks) => {
                    index.limit(at[slot], blocks);
                    sibling.limit(at[slot], blocks);
                    model.limit(slot, blocks.unwrap_or(usize::MAX));
                    last = None;
                }
                IndexStep::Forget(_) | IndexStep::Replace(_) => {}
            }
            // Every second time, since the model is slow.
            for text in chains().filter(|_| number % 2 == 0) {
                prop_assert_eq!(facts(&hits(&index, &name(&text)), &at), model.facts(&text), "{:?}", text);
                prop_assert_eq!(facts(&hits(&sibling, &name(&text)), &at), model.facts(&text), "{:?}", text);
            }
            prop_assert_eq!(index.size().pairs, model.pairs());
        }
    }

    /// No order of events exceeds a limit, and an upstream that was forgotten holds nothing.
    #[test]
    fn never_exceeds_a_limit(limit in 0usize..40, steps in steps(true)) {
        let index = Index::new(limit, 3);
        let mut at = slots(&index, 3);
        let mut limits = [usize::MAX; 3];
        let mut open = Vec::new();
        for step in steps {
            match step {
                IndexStep::Learn(text, slot, end) => {
                    let receipt = index.learn(&name(&text), end.map(|end| end + name(&text)[0]), at[slot]);
                    let most = limits[slot].min(limit).min(text.len());
                    prop_assert_eq!(receipt.learned(), most);
                    prop_assert_eq!(held(&index, &name(&text), at[slot]), most, "holds what it was sent");
                    open.push((text, at[slot], receipt));
                }
                IndexStep::TakeBack => {
                    if !open.is_empty() {
                        let (text, slot, receipt) = open.swap_remove(open.len() / 2);
                        index.take_back(&name(&text), slot, receipt);
                    }
                }
                IndexStep::Limit(slot, blocks) => {
                    limits[slot] = blocks.unwrap_or(usize::MAX);
                    index.limit(at[slot], blocks);
                }
                IndexStep::Forget(slot) => {
                    index.forget(at[slot]);
                    prop_assert!(chains().all(|text| held(&index, &name(&text), at[slot]) == 0));
                }
                IndexStep::Replace(slot) => {
                    index.leave(at[slot]);
                    at[slot] = index.enter().expect("there is a slot");
                    limits[slot] = usize::MAX;
                    prop_assert!(chains().all(|text| held(&index, &name(&text), at[slot]) == 0));
                }
            }
            prop_assert!(index.size().pairs <= limit);
            prop_assert!(index.size().blocks <= index.size().pairs);
            for (slot, most) in at.iter().zip(limits) {
                prop_assert!(index.held(*slot) <= most);
            }
        }
        // No pair or block is left when all upstreams are forgotten.
        at.iter().for_each(|slot| index.forget(*slot));
        for _ in 0..20 {
            index.learn(&[], None, at[0]);
        }
        prop_assert_eq!((index.size().pairs, index.size().blocks), (0, 0));
    }

    /// Taking back undoes one `learn`, also with others in between.
    #[test]
    fn take_back_restores_the_state_before(
        before in prop::collection::vec((text(), 0usize..3), 0..30),
        lost in (text(), 0usize..3),
        meanwhile in prop::collection::vec((text(), 0usize..3), 0..5),
    ) {
        let (index, other) = (Index::new(10_000, 3), Index::new(10_000, 3));
        let at = slots(&index, 3);
        assert_eq!(slots(&other, 3), at);
        let learn = |index: &Index, sent: &(Vec<u8>, usize)| index.learn(&name(&sent.0), None, at[sent.1]);
        for sent in &before {
            learn(&index, sent);
            learn(&other, sent);
        }
        let receipt = learn(&index, &lost);
        for sent in &meanwhile {
            learn(&index, sent);
            learn(&other, sent);
        }
        index.take_back(&name(&lost.0), at[lost.1], receipt);
        prop_assert_eq!(everything(&index, &at), everything(&other, &at));
        prop_assert_eq!(index.size().pairs, other.size().pairs);
        prop_assert_eq!(index.size().blocks, other.size().blocks);
    }
}
