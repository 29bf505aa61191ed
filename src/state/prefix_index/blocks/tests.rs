//! Branches against the formula, and entries that are freed.

use super::*;
use proptest::prelude::*;

/// Computes the branches by the formula of the module's header.
fn expected_branches(blocks: &BlockTable, at: u32, alive: &[u32]) -> u32 {
    let children = alive.iter().filter(|child| blocks.at(**child).parent.load(Relaxed) == at);
    let below: u32 = children.map(|child| expected_branches(blocks, *child, alive)).sum();
    (blocks.at(at).open.load(Relaxed) + below).max(1)
}

proptest! {
    #[test]
    fn counts_branches_by_the_formula(
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8, any::<bool>()), 0..60),
        climb_blocks in 1usize..5,
    ) {
        let (blocks, mut writer) = (BlockTable::new(1000, 1), TableWriter::default());
        writer.climb_blocks = climb_blocks;
        let mut alive: Vec<u32> = Vec::new();
        for (number, (which, what, settled)) in (1u64..).zip(steps) {
            let any = alive.get(which.index(alive.len().max(1))).copied();
            let parent = any.filter(|at| !blocks.is_ending(*at));
            let leaf = any.filter(|at| {
                let block = blocks.at(*at);
                block.children.load(Relaxed) + block.endings.load(Relaxed) == 0
            });
            match (what, parent, leaf) {
                (0..3, _, Some(leaf)) => {
                    // The parents are held, so they stay.
                    blocks.release(&mut writer, leaf, 3);
                    alive.retain(|at| *at != leaf);
                }
                (3..5, Some(parent), _) => {
                    alive.extend(blocks.add(&mut writer, number, BlockParent::Block(parent), true));
                }
                _ => {
                    let group = (number % 3) as u8;
                    let above = parent.map_or(BlockParent::None { group }, BlockParent::Block);
                    alive.extend(blocks.add(&mut writer, number, above, false));
                }
            }
            alive.iter().for_each(|at| blocks.hold(*at, 3));
            if !settled {
                continue;
            }
            // Changes that wait reach all blocks in steps of any size.
            while writer.changes.len() > 0 {
                blocks.settle(&mut writer, climb_blocks);
            }
            for &at in alive.iter().filter(|at| !blocks.is_ending(**at)) {
                let full: Vec<u32> = alive.iter().copied().filter(|at| !blocks.is_ending(*at)).collect();
                prop_assert_eq!(blocks.branches(at), expected_branches(&blocks, at, &full));
            }
        }
        blocks.settle(&mut writer, usize::MAX);
        prop_assert_eq!(blocks.len(), alive.len());
        let first = || alive.iter().filter(|at| blocks.at(**at).parent.load(Relaxed) == NO_ENTRY);
        for group in 0u8..3 {
            let place = u32::from(group) << DEPTH_BITS | 1;
            let own = first().filter(|at| blocks.at(**at).place.load(Relaxed) == place);
            let conversations = blocks.conversations_of(place).load(Relaxed);
            prop_assert_eq!(conversations, own.map(|at| blocks.branches(*at)).sum::<u32>());
        }
    }
}

/// A burst of branches below a long path: each call changes a bounded number of blocks, and the branches are
/// exact once the changes have settled.
#[test]
fn a_branch_behind_a_long_path_changes_a_bounded_number_of_blocks() {
    let (blocks, mut writer) = (BlockTable::new(10_000, 1), TableWriter::default());
    let mut path: Vec<u32> = Vec::new();
    for number in 0..4000 {
        let above = path.last().map_or(BlockParent::None { group: 0 }, |last| BlockParent::Block(*last));
        path.extend(blocks.add(&mut writer, 1 + number, above, false));
    }
    let last = path.last().copied().expect("the path has blocks");
    blocks.touched.store(0, Relaxed);
    for number in 0..20 {
        assert!(blocks.add(&mut writer, 1 << 32 | number, BlockParent::Block(last), false).is_some());
    }
    let touched = blocks.touched.load(Relaxed);
    assert!(touched < 20 * 3 * MAX_CLIMB_BLOCKS, "{touched} accesses");
    assert_eq!(blocks.branches(path[0]), 1, "the changes are on their way");
    assert_eq!(blocks.branches(last), 20);
    // The changes are summed where they wait: the path is climbed once.
    blocks.touched.store(0, Relaxed);
    blocks.settle(&mut writer, usize::MAX);
    let touched = blocks.touched.load(Relaxed);
    assert!(touched < 2 * path.len(), "{touched} accesses");
    assert!(path.iter().all(|at| blocks.branches(*at) == 20));
    assert_eq!(blocks.conversations(last), 20);
}

#[test]
fn frees_a_block_with_its_last_holder_in_any_word() {
    let (blocks, mut writer) = (BlockTable::new(10, 1), TableWriter::default());
    let at = blocks.add(&mut writer, 9, BlockParent::None { group: 0 }, false).expect("there is room");
    blocks.hold(at, 5);
    blocks.hold(at, 64 * 3 + 1);
    blocks.release(&mut writer, at, 5);
    assert_eq!(blocks.find(9), at);
    assert!(blocks.is_held_by(at, 193) && !blocks.is_held_by(at, 5) && !blocks.is_held_by(at, 65));
    blocks.release(&mut writer, at, 193);
    assert_eq!((blocks.find(9), blocks.len()), (NO_ENTRY, 0));
}

#[test]
fn keeps_a_parent_without_holders_while_a_block_follows_it() {
    let (blocks, mut writer) = (BlockTable::new(10, 1), TableWriter::default());
    let parent = blocks.add(&mut writer, 1, BlockParent::None { group: 0 }, false).expect("there is room");
    let child = blocks.add(&mut writer, 2, BlockParent::Block(parent), false).expect("there is room");
    blocks.hold(parent, 0);
    blocks.hold(child, 0);
    blocks.release(&mut writer, parent, 0);
    assert_eq!(blocks.len(), 2);
    blocks.release(&mut writer, child, 0);
    assert_eq!(blocks.len(), 0);
}
