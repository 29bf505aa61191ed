//! The blocks of a chain that are stored and published: all of the first 32, and every 8th behind them.
//!
//! A stored block stands for itself and the blocks since the stored one before it. Which blocks are stored
//! depends on nothing but their depth, so that all balancers store the same blocks of a chain. The depth of a
//! block is the number of blocks up to and including it.
//!
//! Short prompts and the openings of long ones differ in their first blocks, which are exact. Behind them a
//! prompt is longer than 16 KiB, and eight blocks are a small part of it.

/// The number of leading blocks that are all stored.
const DENSE_BLOCKS: usize = 32;

/// The distance of two stored blocks behind the leading ones.
const THIN_STRIDE: usize = 8;

/// Returns the number of stored blocks in a chain of this length.
pub fn stored_count(length: usize) -> usize {
    match length.checked_sub(DENSE_BLOCKS) {
        None => length,
        Some(thin) => DENSE_BLOCKS + thin / THIN_STRIDE,
    }
}

/// Returns the depth of a stored block, given its number among the stored ones, from 1; 0 for 0.
pub fn stored_depth(number: usize) -> usize {
    match number.checked_sub(DENSE_BLOCKS) {
        None => number,
        Some(thin) => DENSE_BLOCKS + thin * THIN_STRIDE,
    }
}

/// Returns the depth of the last stored block in a chain of this length.
pub fn last_stored(length: usize) -> usize {
    stored_depth(stored_count(length))
}

/// Returns the number of blocks that the stored block at this depth stands for.
pub const fn stored_weight(depth: usize) -> usize {
    if depth > DENSE_BLOCKS { THIN_STRIDE } else { 1 }
}

/// Returns the blocks that a prompt shares on average with a stored one, behind the last stored block that
/// both have, of `rest` blocks that the prompt has there.
pub fn expected_beyond(depth: usize, rest: usize) -> usize {
    if depth >= DENSE_BLOCKS { rest.min((THIN_STRIDE - 1) / 2) } else { 0 }
}

/// Returns the hashes of the stored blocks.
pub fn stored(chain: &[u64]) -> impl Iterator<Item = u64> {
    let (dense, thin) = chain.split_at(chain.len().min(DENSE_BLOCKS));
    dense.iter().chain(thin.iter().skip(THIN_STRIDE - 1).step_by(THIN_STRIDE)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_all_leading_blocks_and_every_eighth_behind_them() {
        let depths = |length: u64| stored(&(1..=length).collect::<Vec<u64>>()).collect::<Vec<u64>>();
        assert_eq!(depths(3), [1, 2, 3]);
        assert_eq!(depths(39), (1..=32).collect::<Vec<u64>>());
        assert_eq!(depths(56)[31..], [32, 40, 48, 56]);
        assert_eq!(depths(63), depths(56));
    }

    #[test]
    fn counts_agree_with_the_stored_blocks() {
        for length in 0..200 {
            let all: Vec<u64> = stored(&(1..=length as u64).collect::<Vec<u64>>()).collect();
            assert_eq!(stored_count(length), all.len());
            assert_eq!(last_stored(length) as u64, all.last().copied().unwrap_or(0));
            for (number, depth) in all.iter().enumerate() {
                assert_eq!(stored_depth(number + 1) as u64, *depth);
            }
            let weights: usize = all.iter().map(|depth| stored_weight(*depth as usize)).sum();
            assert_eq!(weights, last_stored(length), "every block up to the last stored one counts once");
        }
        assert_eq!([31, 32, 40].map(|depth| expected_beyond(depth, 9)), [0, 3, 3]);
        assert_eq!((expected_beyond(40, 2), expected_beyond(40, 0)), (2, 0));
    }
}
