//! A ratio of two decaying sums, such as bytes per token. Readers and writers take no lock. The caller
//! provides the initial sums, so that there is always a value.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Both sums, two f32 in one word, so that they change together.
pub(crate) struct Rate(AtomicU64);

impl Rate {
    pub(crate) fn new(above: f32, below: f32) -> Self {
        Rate(AtomicU64::new(pack(above, below)))
    }

    /// The current value.
    pub(crate) fn value(&self) -> f64 {
        let (above, below) = unpack(self.0.load(Relaxed));
        f64::from(above) / f64::from(below)
    }

    /// Adds to both sums, after scaling them by `keep`, 0 to 1.
    pub(crate) fn add(&self, above: f32, below: f32, keep: f32) {
        let add = |packed| {
            let (before, under) = unpack(packed);
            Some(pack(before * keep + above, under * keep + below))
        };
        // The closure always returns a value.
        let _ = self.0.fetch_update(Relaxed, Relaxed, add);
    }
}

fn pack(above: f32, below: f32) -> u64 {
    u64::from(above.to_bits()) << 32 | u64::from(below.to_bits())
}

fn unpack(packed: u64) -> (f32, f32) {
    (f32::from_bits((packed >> 32) as u32), f32::from_bits(packed as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_new_values_and_decays_old_ones() {
        let rate = Rate::new(8.0, 2.0);
        assert_eq!(rate.value(), 4.0);
        rate.add(6.0, 1.0, 0.5);
        assert_eq!(rate.value(), 5.0);
        rate.add(3.0, 1.0, 0.0);
        assert_eq!(rate.value(), 3.0);
    }
}
