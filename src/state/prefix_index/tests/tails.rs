//! Chains whose beginning is known are published by their tails.

use super::model::{chains, name};
use super::properties::text;
use super::*;

/// Applies the new part of a chain to a sibling's index.
pub(super) fn share(sibling: &Index, chain: &[u64], receipt: &Receipt, slot: Slot) -> Option<Receipt> {
    let ChainTail { parent, hashes, end, .. } = receipt.new_part(chain);
    match parent {
        Some(parent) => sibling.learn_after(parent, &hashes, end, slot),
        None => sibling.learn_stored(&hashes, end, slot),
    }
}

#[test]
fn learns_a_tail_with_all_blocks_before_it() {
    let index = Index::new(100, 1);
    let at = slots(&index, 2);
    index.learn(&chain("abcd"), None, at[0]);
    let tail = &chain("abxy")[2..];
    let receipt = index.learn_after(chain("ab")[1], tail, Some(9), at[1]).expect("the parent is known");
    assert_eq!(
        (receipt.held(), receipt.learned(), receipt.new_part(&chain("abxy"))),
        (0, 4, ChainTail { parent: None, depth: 0, hashes: chain("abxy"), end: Some(9) })
    );
    assert_eq!((held(&index, &chain("abxy"), at[1]), held(&index, &chain("abcd"), at[1])), (4, 2));
    assert_eq!(hits(&index, &chain("ab")).branches(0), 2);
    // A repeated tail without new blocks only makes the chain recent.
    let again = index.learn_after(chain("abxy")[3], &[], None, at[1]).expect("the parent is known");
    let nothing = ChainTail { parent: Some(chain("abxy")[3]), depth: 4, hashes: Vec::new(), end: None };
    assert_eq!(again.new_part(&chain("abxy")), nothing);
    assert_eq!(index.learn_after(77, tail, None, at[1]), None, "no upstream holds the parent");
    assert_eq!(index.learn_after(9, tail, None, at[1]), None, "nothing follows an ending");
    assert_eq!(index.chain_to(chain("abx")[2], at[1]), Some(chain("abx")));
    assert_eq!(index.chain_to(chain("abx")[2], at[0]), None);
    assert_eq!((index.chain_to(9, at[1]), index.chain_to(77, at[1])), (None, None));
    index.limit(at[0], Some(3));
    let receipt = index.learn_after(chain("abxy")[3], &[5, 6], Some(7), at[0]).expect("the parent is known");
    assert_eq!((receipt.learned(), index.held(at[0])), (3, 3), "blocks beyond the cache are left out");
}

fn end() -> impl Strategy<Value = Option<u64>> {
    prop::option::of(1u64 << 60..(1 << 60) + 5)
}

proptest! {
    /// A sibling that receives the tails in any order, and requests the chains without a known parent, has
    /// the same state.
    #[test]
    fn a_late_sibling_catches_up(
        steps in prop::collection::vec((text(), 0usize..3, end()), 0..30),
        late in 0usize..10,
    ) {
        let (index, sibling) = (Index::new(10_000, 3), Index::new(10_000, 3));
        let at = slots(&index, 3);
        slots(&sibling, 3);
        for (number, (text, slot, end)) in steps.iter().enumerate() {
            let (chain, at) = (name(text), at[*slot]);
            let receipt = index.learn(&chain, end.map(|end| end + chain[0]), at);
            if number < late || share(&sibling, &chain, &receipt, at).is_some() {
                continue;
            }
            let whole = index.chain_to(*chain.last().expect("no text is empty"), at);
            prop_assert_eq!(whole.as_ref(), Some(&chain));
            sibling.learn(&chain, None, at);
        }
        for (text, slot, _) in steps.iter().skip(late) {
            prop_assert_eq!(held(&sibling, &name(text), at[*slot]), text.len());
        }
        let fewer = |text: &Vec<u8>, slot: &Slot| {
            held(&sibling, &name(text), *slot) <= held(&index, &name(text), *slot)
        };
        prop_assert!(chains().all(|text| at.iter().all(|slot| fewer(&text, slot))));
    }
}
