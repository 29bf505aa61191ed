//! Where an input is cut into pieces.

use std::ops::Range;

/// Inputs up to this length are also fed byte by byte.
const BYTEWISE: usize = 64;

/// A few ways to cut the bytes, which are the same for the same bytes: pieces in order, none of them lost.
pub fn ways(data: &[u8]) -> Vec<Vec<Range<usize>>> {
    let mut random = Random::of(data);
    let mut ways = vec![some(data.len(), 1, &mut random), some(data.len(), 7, &mut random)];
    if data.len() <= BYTEWISE {
        ways.push((0..data.len()).map(|at| at..at + 1).collect());
    }
    ways
}

/// One cut somewhere.
pub fn one(data: &[u8]) -> usize {
    Random::of(data).below(data.len() + 1)
}

fn some(length: usize, cuts: usize, random: &mut Random) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = (0..cuts).map(|_| random.below(length + 1)).collect();
    ends.extend([0, length]);
    ends.sort_unstable();
    ends.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// Xorshift, from a checksum of the input.
struct Random(u64);

impl Random {
    fn of(data: &[u8]) -> Self {
        let sum = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        Random(data.iter().fold(0xcbf2_9ce4_8422_2325, sum) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
