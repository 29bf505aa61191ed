//! The prefix index as one process hands it over to its successor.
//!
//! Chains go in batches, the most recent batch of each upstream first, so that a transfer that is cut short
//! has the recent part. Within a batch the least recent chain comes first, as they are to be learned.

use std::borrow::Cow;
use std::collections::HashSet;

use super::State;
use super::exchange::ChainUpdate;
use super::prefix_index::IndexLeaf;
use crate::prompt::chain::thinning::stored_depth;

/// The largest number of hashes of a batch, with the beginnings that its chains share counted each time.
const MAX_BATCH_HASHES: usize = 1 << 18;

/// The largest number of hashes of a batch that are sent.
const MAX_BATCH_NEW_HASHES: usize = 1 << 15;

/// The chains of one upstream that are still to be handed over.
struct PendingChains {
    upstream: String,
    /// The least recent leaf first.
    leaves: Vec<IndexLeaf>,
}

/// One chain from its beginning.
struct WholeChain {
    hashes: Vec<u64>,
    end: Option<u64>,
}

impl State {
    /// Visits batches of the chains that upstreams hold, until `visit` returns `false`.
    pub fn export_chains(&self, mut visit: impl FnMut(Vec<ChainUpdate<'_>>) -> bool) {
        let names: Vec<(String, _)> = self
            .upstreams()
            .by_id
            .values()
            .filter_map(|upstream| Some((upstream.name.as_ref()?.to_string(), upstream.slot)))
            .collect();
        let leaves = names.into_iter().map(|(upstream, slot)| {
            let leaves = self.index.leaves(slot);
            PendingChains { upstream, leaves }
        });
        let mut pending: Vec<PendingChains> = leaves.collect();
        while !pending.is_empty() {
            for chains in &mut pending {
                let batch = self.next_batch(chains);
                if !batch.is_empty() && !visit(updates(&chains.upstream, &batch)) {
                    return;
                }
            }
            pending.retain(|chains| !chains.leaves.is_empty());
        }
    }

    /// Removes the most recent leaves and returns their chains, the least recent first.
    fn next_batch(&self, chains: &mut PendingChains) -> Vec<WholeChain> {
        let (mut batch, mut hashes, mut new) = (Vec::new(), 0, HashSet::new());
        while hashes < MAX_BATCH_HASHES && new.len() < MAX_BATCH_NEW_HASHES {
            let Some(leaf) = chains.leaves.pop() else { break };
            // The block may have been evicted since.
            let Some(chain) = self.chain_to(&chains.upstream, leaf.hash) else { continue };
            hashes += chain.len();
            new.extend(chain.iter().copied());
            batch.push(WholeChain { hashes: chain, end: leaf.end });
        }
        batch.reverse();
        batch
    }
}

/// Returns the chains without the beginnings that the ones before them have.
fn updates<'c>(upstream: &'c str, chains: &'c [WholeChain]) -> Vec<ChainUpdate<'c>> {
    let mut known: HashSet<u64> = HashSet::new();
    let update = |chain: &'c WholeChain| {
        let shared = chain.hashes.iter().take_while(|hash| known.contains(*hash)).count();
        let (before, hashes) = chain.hashes.split_at(shared);
        known.extend(hashes);
        let (parent, hashes) = (before.last().copied(), Cow::Borrowed(hashes));
        let depth = stored_depth(shared) as u64;
        ChainUpdate { upstream, parent, depth, hashes, end: chain.end }
    };
    chains.iter().map(update).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::super::{PromptLookup, TrackedUpstream};
    use super::*;
    use crate::config::types::PrefixIndex;
    use crate::observe::Observer;
    use crate::prompt::chain::thinning::stored;

    fn state() -> Arc<State> {
        let config = PrefixIndex { blocks: Some(1_000_000), block_bytes: 100 };
        let state = State::new(config, Duration::from_secs(60), 7, None, Observer::default());
        let present =
            |(id, name)| TrackedUpstream { id, name, incarnation: 0, cache_tokens: None, model: None };
        state.follow_fleet(&[(3, "a"), (5, "b")].map(present));
        state
    }

    fn learn(state: &State, chain: &[u64], end: Option<u64>, id: usize) {
        let lookup = PromptLookup { chain: chain.to_vec(), end, ..PromptLookup::default() };
        state.learn(&lookup, id, Instant::now());
    }

    /// Conversations with a common beginning, the last one the most recent.
    fn chain(number: u64, blocks: u64) -> Vec<u64> {
        let own = (4..=blocks).map(|block| number << 32 | block);
        (1..4).chain(own).collect()
    }

    #[test]
    fn hands_over_all_chains_with_their_recency() {
        let (from, to) = (state(), state());
        for number in 1..=400 {
            learn(&from, &chain(number, 1600), None, 3);
            learn(&from, &chain(number, 9), Some(number << 48), 5);
        }
        learn(&from, &chain(1, 1608), None, 3);
        let mut batches: Vec<Vec<u8>> = Vec::new();
        from.export_chains(|chains| {
            let message = super::super::exchange::Message { chains, ..Default::default() };
            batches.push(message.encode());
            true
        });
        assert!(batches.len() > 2, "several batches of one upstream: {}", batches.len());
        for batch in batches.iter().rev() {
            let message = super::super::exchange::Message::decode(batch).expect("is a message");
            assert!(message.chains.iter().all(|chain| to.apply_chain(chain)));
        }
        assert_eq!((to.size().blocks, to.size().pairs), (from.size().blocks, from.size().pairs));
        assert_eq!(to.chain_to("a", (1 << 32) | 1608), Some(stored(&chain(1, 1608)).collect()));
        // The oldest are evicted first: those of 2, since 1 was used again.
        let slot = to.slot(3).expect("has a slot");
        to.index.limit(slot, Some(to.index.held(slot) - 100));
        assert!(to.chain_to("a", (2 << 32) | 1600).is_none());
        assert!(to.chain_to("a", (1 << 32) | 1608).is_some() && to.chain_to("a", (3 << 32) | 1600).is_some());
    }

    #[test]
    fn stops_when_it_is_told_to() {
        let state = state();
        learn(&state, &chain(1, 10), None, 3);
        learn(&state, &chain(1, 10), None, 5);
        let mut count = 0;
        state.export_chains(|_| {
            count += 1;
            false
        });
        assert_eq!(count, 1);
    }
}
