//! Tests of the chain: limits, checkpoints, and independence from the pieces of a prompt.

use proptest::prelude::*;

use super::*;

fn chained(pieces: &[&[u8]], seed: u64, blocks: BlockLayout) -> Chain {
    let mut hasher = ChainHasher::default();
    hasher.begin(seed, PromptFamily::Text, blocks);
    for piece in pieces {
        hasher.write(piece);
    }
    hasher.chain().clone()
}

const TEN: BlockLayout = BlockLayout { bytes: 10, max_blocks: 100 };

#[test]
fn each_hash_includes_all_blocks_before_it() {
    let chain = chained(&[b"0123456789abcdefghij+++"], 7, TEN);
    let first = xxh3_64_with_seed(b"0123456789", 7);
    assert_eq!(chain.blocks, [first, xxh3_64_with_seed(b"abcdefghij", first)]);
    assert_eq!((chain.bytes, chain.block_bytes), (23, 10));
    let other = chained(&[b"0123456789abcdefghij+++"], 8, TEN);
    assert!(chain.blocks.iter().all(|hash| !other.blocks.contains(hash)));
}

#[test]
fn limits_the_length_of_a_chain() {
    let chain = chained(&[&[b'x'; 95], &[b'y'; 95]], 7, BlockLayout { bytes: 10, max_blocks: 4 });
    assert_eq!((chain.blocks.len(), chain.bytes), (4, 190));
    assert_eq!(chain.blocks, chained(&[&[b'x'; 40]], 7, TEN).blocks);
    let none = chained(&[&[b'x'; 95]], 7, BlockLayout { bytes: 0, max_blocks: 0 });
    assert_eq!((none.blocks.len(), none.bytes), (0, 95));
}

#[test]
fn counts_bytes_after_the_longest_chain() {
    let mut hasher = ChainHasher::default();
    hasher.begin(7, PromptFamily::Text, BlockLayout { bytes: 10, max_blocks: 2 });
    hasher.write(&[b'x'; 15]);
    assert!(!hasher.skip(100), "the second block has to be hashed");
    hasher.write(&[b'x'; 5]);
    assert!(hasher.skip(100));
    assert_eq!(hasher.chain(), &chained(&[&[b'x'; 120]], 7, BlockLayout { bytes: 10, max_blocks: 2 }));
}

#[test]
fn rewinds_to_a_checkpoint() {
    let mut hasher = ChainHasher::default();
    hasher.begin(7, PromptFamily::Text, TEN);
    hasher.write(b"0123456789abc");
    hasher.checkpoint();
    hasher.write(&[b'x'; 50]);
    hasher.rewind();
    hasher.write(b"defghij");
    assert_eq!(*hasher.chain(), chained(&[b"0123456789abcdefghij"], 7, TEN));
}

#[test]
fn reports_an_opening_that_no_block_contains() {
    let opened = |before: &[u8], after: &[u8]| {
        let mut hasher = ChainHasher::default();
        hasher.begin(7, PromptFamily::Chat, TEN);
        hasher.write(before);
        hasher.opened();
        hasher.write(after);
        hasher.opened();
        hasher.chain().end()
    };
    let end = opened(b"0123456789abc", b"");
    assert!(end.is_some() && end == opened(b"0123456789abc", b"defghi"), "the same in every turn");
    assert_ne!(end, opened(b"0123456789abd", b""), "another question");
    assert_ne!(end, opened(b"0123456788abc", b""), "another beginning");
    assert_eq!(opened(b"0123456789abc", b"defghij"), None, "a block tells");
    assert_eq!(opened(b"0123456789", b""), None, "a block tells");
    assert_eq!(chained(&[b"0123456789abc"], 7, TEN).end(), None, "nobody said where it ends");
}

#[test]
fn reports_an_opening_behind_the_last_stored_block_of_a_long_prompt() {
    let opened = |before: usize, after: usize| {
        let mut hasher = ChainHasher::default();
        hasher.begin(7, PromptFamily::Chat, TEN);
        hasher.write(&vec![b'x'; before]);
        hasher.opened();
        hasher.write(&vec![b'y'; after]);
        hasher.chain().end()
    };
    // Of 45 blocks the 40th is the last that is stored.
    assert_eq!(opened(400, 50), None, "the stored blocks tell");
    assert!(opened(405, 45).is_some() && opened(405, 45) == opened(405, 74), "the same in every turn");
    assert_ne!(opened(405, 45), opened(406, 45));
    assert_eq!(opened(405, 75), None, "the 48th block tells");
}

proptest! {
    #[test]
    fn chain_does_not_depend_on_the_pieces(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
        bytes in 1usize..40,
        most in 0usize..30,
    ) {
        let whole = pieces.concat();
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let blocks = BlockLayout { bytes, max_blocks: most };
        let chain = chained(&pieces, 7, blocks);
        prop_assert_eq!(chain.blocks.len(), most.min(whole.len() / bytes));
        prop_assert_eq!(chain.bytes, whole.len() as u64);
        prop_assert_eq!(chain, chained(&[&whole], 7, blocks));
    }
}
