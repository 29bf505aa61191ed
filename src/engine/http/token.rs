//! A simple tokenizer: deterministic, reversible, about four bytes a token, and stable on shared prefixes.
//!
//! A token is up to four ASCII bytes, or up to three other bytes; a space begins a new token. The id is the
//! bytes packed into an integer below 2^30, so that no table is needed and an id means the same text in
//! every process. Ids below `FIRST_TEXT` are markers of the chat template. Ids depend on the input alone:
//! they are compared across engines.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::engine::cache::BlockHash;

/// The marker that opens a message of the chat template.
pub(super) const START_MARKER: u32 = 1;
/// The marker that closes a message of the chat template.
pub(super) const END_MARKER: u32 = 2;

/// The first id with text; each group below has tokens of one length.
const FIRST_TEXT: u32 = 16;
const FIRST_OF_TWO: u32 = FIRST_TEXT + (1 << 8);
const FIRST_OF_THREE: u32 = FIRST_OF_TWO + (1 << 16);
const FIRST_OF_FOUR: u32 = FIRST_OF_THREE + (1 << 24);
const TEXT_LIMIT: u32 = FIRST_OF_FOUR + (1 << 28);

/// Splits `text` into the bytes of its tokens, in order.
fn pieces(text: &str) -> impl Iterator<Item = &[u8]> {
    let mut rest = text.as_bytes();
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let mut length = 1;
        if first.is_ascii() {
            while length < 4 && rest.get(length).is_some_and(|byte| byte.is_ascii() && *byte != b' ') {
                length += 1;
            }
        } else {
            while length < 3 && rest.get(length).is_some_and(|byte| (0x80..0xC0).contains(byte)) {
                length += 1;
            }
        }
        let (piece, after) = rest.split_at(length);
        rest = after;
        Some(piece)
    })
}

fn id_of(piece: &[u8]) -> u32 {
    match *piece {
        [a] => FIRST_TEXT + u32::from(a),
        [a, b] => FIRST_OF_TWO + u32::from_be_bytes([0, 0, a, b]),
        [a, b, c] => FIRST_OF_THREE + u32::from_be_bytes([0, a, b, c]),
        [a, b, c, d] => {
            FIRST_OF_FOUR + (u32::from(a) << 21 | u32::from(b) << 14 | u32::from(c) << 7 | u32::from(d))
        }
        _ => 0,
    }
}

/// Appends the token ids of `text` to `ids`.
pub(super) fn encode_into(text: &str, ids: &mut Vec<u32>) {
    ids.extend(pieces(text).map(id_of));
}

/// Returns the token ids of `text`.
pub(super) fn encode(text: &str) -> Vec<u32> {
    let mut ids = Vec::with_capacity(text.len() / 3);
    encode_into(text, &mut ids);
    ids
}

/// Returns the bytes of one token; for an id that the tokenizer never returns, a word that shows the id.
pub(super) fn bytes_of(id: u32) -> Vec<u8> {
    match id {
        START_MARKER => b"<|im_start|>".to_vec(),
        END_MARKER => b"<|im_end|>".to_vec(),
        0..FIRST_TEXT => format!("<|{id}|>").into_bytes(),
        FIRST_TEXT..FIRST_OF_TWO => vec![(id - FIRST_TEXT) as u8],
        FIRST_OF_TWO..FIRST_OF_THREE => (id - FIRST_OF_TWO).to_be_bytes()[2..].to_vec(),
        FIRST_OF_THREE..FIRST_OF_FOUR => (id - FIRST_OF_THREE).to_be_bytes()[1..].to_vec(),
        FIRST_OF_FOUR..TEXT_LIMIT => {
            let packed = id - FIRST_OF_FOUR;
            [21, 14, 7, 0].iter().map(|shift| (packed >> shift & 0x7F) as u8).collect()
        }
        TEXT_LIMIT.. => format!(" t{id}").into_bytes(),
    }
}

/// Returns the text of `ids`; a cut character becomes U+FFFD, as with a real tokenizer.
pub(super) fn decode(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|&id| bytes_of(id)).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns the token as in a vocabulary: byte pair encoders write `Ġ` for a space.
pub(super) fn written(id: u32) -> String {
    String::from_utf8_lossy(&bytes_of(id)).replace(' ', "Ġ").replace('\n', "Ċ")
}

/// Returns the chained hashes of the full blocks of `ids`. `seed` separates adapters and cache salts.
pub(super) fn chain(ids: &[u32], block_size: usize, seed: u64) -> Vec<BlockHash> {
    let mut parent = seed;
    let mut bytes = Vec::with_capacity(block_size * 4);
    ids.chunks_exact(block_size)
        .map(|block| {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|id| id.to_le_bytes()));
            parent = xxh3_64_with_seed(&bytes, parent);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn encodes_a_word_as_one_token() {
        let ids = encode("the of and to in");
        let text: Vec<String> = ids.iter().map(|&id| written(id)).collect();
        assert_eq!(text, ["the", "Ġof", "Ġand", "Ġto", "Ġin"]);
        assert_eq!(ids, encode("the of and to in"), "ids are stable");
    }

    #[test]
    fn decodes_markers_and_unknown_ids() {
        assert_eq!(decode(&[START_MARKER, END_MARKER]), "<|im_start|><|im_end|>");
        assert_eq!(decode(&[0, u32::MAX]), format!("<|0|> t{}", u32::MAX));
    }

    #[test]
    fn chains_differ_from_the_first_different_token_on() {
        let one = chain(&encode(&" word".repeat(40)), 16, 0);
        let mut text = " word".repeat(40);
        text.push_str(" and more, enough for another block of tokens, is it not so, dear reader of tests");
        let two = chain(&encode(&text), 16, 0);
        assert!(one.len() >= 2 && two.len() > one.len());
        assert_eq!(one, two[..one.len()]);
        assert_ne!(one[0], chain(&encode(&text), 16, 7)[0], "another seed, another cache");
    }

    proptest! {
        #[test]
        fn decodes_what_was_encoded(text in any::<String>()) {
            prop_assert_eq!(decode(&encode(&text)), text);
        }

        #[test]
        fn gives_every_piece_its_own_id(text in "[ -~é漢😀]{0,60}") {
            for piece in pieces(&text) {
                prop_assert_eq!(bytes_of(id_of(piece)), piece);
            }
        }

        /// The tokens of a text stay equal when more text is appended after a space.
        #[test]
        fn shared_prefixes_share_tokens(start in "[a-z ]{0,80}", more in " [a-z ]{0,20}") {
            let known = encode(&start);
            let all = encode(&format!("{start}{more}"));
            prop_assert_eq!(&all[..known.len()], &known[..]);
        }
    }
}
