//! Seeded random numbers: every random choice of a simulation comes from a seed.

/// A splitmix64 generator: short, and good enough for anything but secrets.
#[derive(Clone, Debug)]
pub struct Dice(u64);

// === impl Dice ===

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// Derives an independent generator for each `number` from one seed.
    pub fn of(seed: u64, number: u64) -> Self {
        Dice(mix(seed).wrapping_add(mix(!number)))
    }

    /// Returns the next pseudo-random number.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Returns a number in 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.roll() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Returns a number from `least` to `most`, both included.
    pub fn between(&mut self, least: usize, most: usize) -> usize {
        least + (self.roll() % (most - least + 1) as u64) as usize
    }

    /// Returns an exponentially distributed gap between two arrivals at `rate` a second.
    pub fn gap(&mut self, rate: f64) -> f64 {
        -(1.0 - self.unit()).ln() / rate
    }
}

/// Scrambles a number; equal numbers give equal results.
pub fn mix(number: u64) -> u64 {
    let mut z = number;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_by_seed_and_stays_within_bounds() {
        let throw = |seed| -> Vec<usize> {
            let mut dice = Dice::of(seed, 3);
            (0..1000).map(|_| dice.between(5, 9)).collect()
        };
        assert_eq!(throw(1), throw(1));
        assert_ne!(throw(1), throw(2));
        assert!((5..=9).all(|number| throw(1).contains(&number)));
        assert!(throw(1).iter().all(|number| (5..=9).contains(number)));
    }

    #[test]
    fn gaps_average_to_the_rate() {
        let mut dice = Dice::new(1);
        let total: f64 = (0..10_000).map(|_| dice.gap(4.0)).sum();
        assert!((2300.0..2700.0).contains(&total), "{total}");
    }
}
