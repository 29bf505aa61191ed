//! The limit of the whole index where the configuration sets none.
//!
//! The index should hold what the engines' caches hold, and no more: the limits of the upstreams are the
//! capacities of their caches, so their sum with some head-room is enough. An upstream of unknown capacity
//! counts like the mean of the others.

/// The largest limit: at most 1.6 GB, where every prompt is short.
pub(super) const MAX_INDEX_BLOCKS: usize = 16_000_000;

/// The least limit of a fleet whose capacities are known: at most 100 MB.
const MIN_INDEX_BLOCKS: usize = 1_000_000;

/// The limit while no capacity is known.
pub(super) const DEFAULT_INDEX_BLOCKS: usize = 4_000_000;

/// The limit by the sum of the capacities. Endings of conversations take room beside the blocks.
const HEAD_ROOM: f64 = 1.25;

/// Returns the limit of the index for upstreams with these capacities in blocks.
pub(super) fn index_limit(capacities: impl Iterator<Item = Option<usize>>) -> usize {
    let (mut upstreams, mut known, mut blocks) = (0_usize, 0_usize, 0.0);
    for capacity in capacities {
        upstreams += 1;
        known += usize::from(capacity.is_some());
        blocks += capacity.unwrap_or(0) as f64;
    }
    if known == 0 {
        return DEFAULT_INDEX_BLOCKS;
    }
    let all = blocks / known as f64 * upstreams as f64 * HEAD_ROOM;
    (all as usize).clamp(MIN_INDEX_BLOCKS, MAX_INDEX_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_sum_of_the_known_capacities() {
        let limit = |capacities: &[Option<usize>]| index_limit(capacities.iter().copied());
        assert_eq!(limit(&[]), DEFAULT_INDEX_BLOCKS);
        assert_eq!(limit(&[None, None]), DEFAULT_INDEX_BLOCKS);
        assert_eq!(limit(&[Some(2_000_000), Some(4_000_000)]), 7_500_000);
        assert_eq!(limit(&[Some(2_000_000), None, Some(4_000_000)]), 11_250_000, "as the mean of the others");
        assert_eq!(limit(&[Some(8_000); 16]), MIN_INDEX_BLOCKS);
        assert_eq!(limit(&[Some(usize::MAX); 3]), MAX_INDEX_BLOCKS);
    }
}
