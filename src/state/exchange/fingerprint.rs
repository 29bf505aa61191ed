//! The fingerprint of how a balancer cuts and hashes prompts.
//!
//! Hashes of two balancers can be compared only when both build the same canonical text, cut it into blocks
//! of the same size and publish the same hashes of a chain. Otherwise their chains have no block in common:
//! they would only evict useful blocks, and every tail would be requested as a whole.

use std::collections::HashSet;

use xxhash_rust::xxh3::xxh3_64;

use super::Message;

/// The version of what a chain is: which of a prompt's hashes are published, and how `depth` counts them.
const CHAIN_FORMAT: u32 = 1;

/// The largest number of senders that are remembered, so that each is reported once.
const MAX_FOREIGN_SENDERS: usize = 1024;

/// Returns the fingerprint of a balancer with this version of the canonical text and this size of a block.
pub fn fingerprint(canonical_form: u32, block_bytes: usize) -> u64 {
    let mut text = [0; 16];
    text[..4].copy_from_slice(&CHAIN_FORMAT.to_le_bytes());
    text[4..8].copy_from_slice(&canonical_form.to_le_bytes());
    text[8..].copy_from_slice(&(block_bytes as u64).to_le_bytes());
    xxh3_64(&text)
}

/// Recognises the chains that this balancer cannot apply.
#[derive(Debug)]
pub struct FingerprintFilter {
    own: u64,
    /// The senders of such chains.
    foreign: HashSet<u64>,
}

/// Whether the chains and take-backs of a message apply here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainAdmission {
    Applicable,
    /// The sender has another fingerprint or none; `first`: these are the first such chains of the sender.
    Foreign {
        first: bool,
    },
}

// === impl FingerprintFilter ===

impl FingerprintFilter {
    /// Builds the filter of a balancer with the fingerprint `own`.
    pub fn new(own: u64) -> Self {
        FingerprintFilter { own, foreign: HashSet::new() }
    }

    /// Compares the fingerprint of a message; one without chains and take-backs needs none.
    pub fn check(&mut self, message: &Message<'_>) -> ChainAdmission {
        if message.chain_count() == 0 || message.fingerprint == Some(self.own) {
            return ChainAdmission::Applicable;
        }
        let first = self.foreign.len() < MAX_FOREIGN_SENDERS && self.foreign.insert(message.balancer);
        ChainAdmission::Foreign { first }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ChainUpdate;
    use super::*;

    fn message(balancer: u64, fingerprint: Option<u64>, chains: usize) -> Message<'static> {
        let chain = ChainUpdate { upstream: "a", parent: None, depth: 0, hashes: vec![1].into(), end: None };
        Message { fingerprint, chains: vec![chain; chains], ..Message::new(balancer, 1) }
    }

    #[test]
    fn differs_with_every_input_and_not_between_processes() {
        assert_eq!(fingerprint(1, 512), 5_160_225_055_731_464_516);
        let all: HashSet<u64> = [(1, 512), (2, 512), (1, 256), (512, 1), (0, 0)]
            .map(|(form, bytes)| fingerprint(form, bytes))
            .into();
        assert_eq!(all.len(), 5);
    }

    #[test]
    fn admits_chains_of_the_own_fingerprint_only() {
        let mut filter = FingerprintFilter::new(5);
        let table = [
            (message(2, Some(5), 1), ChainAdmission::Applicable),
            (message(3, Some(6), 0), ChainAdmission::Applicable),
            (message(3, Some(6), 2), ChainAdmission::Foreign { first: true }),
            (message(3, Some(7), 1), ChainAdmission::Foreign { first: false }),
            (message(4, None, 0), ChainAdmission::Applicable),
            (message(4, None, 1), ChainAdmission::Foreign { first: true }),
            (message(4, Some(5), 1), ChainAdmission::Applicable),
        ];
        for (message, wanted) in table {
            assert_eq!(filter.check(&message), wanted, "{message:?}");
        }
        let reported = (10..5000).filter(|sender| {
            filter.check(&message(*sender, None, 1)) == ChainAdmission::Foreign { first: true }
        });
        assert_eq!(reported.count(), MAX_FOREIGN_SENDERS - 2);
    }
}
