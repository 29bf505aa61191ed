//! The encoding of numbers and strings in messages.
//!
//! A number is encoded in seven bits a byte, the lowest first; a string as its length and its bytes. Reading
//! never panics, and allocates nothing for a length that exceeds the input.

/// The longest encoding of a number, in bytes.
const MAX_NUMBER_BYTES: u32 = 10;

/// Reads encoded values; every method returns `None` at the end of the input or on damage.
#[derive(Clone, Copy, Debug)]
pub struct WireReader<'a>(&'a [u8]);

// === writing ===

/// Appends a number in groups of seven bits, lowest first.
pub(super) fn put_number(out: &mut Vec<u8>, number: u64) {
    let mut left = number;
    while left >= 0x80 {
        out.push(left as u8 | 0x80);
        left >>= 7;
    }
    out.push(left as u8);
}

/// Appends bytes behind their length.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

pub(super) fn put_hash(out: &mut Vec<u8>, hash: u64) {
    out.extend_from_slice(&hash.to_le_bytes());
}

// === impl WireReader ===

impl<'a> WireReader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        WireReader(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads one byte.
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Reads a number; `None` where the bytes end within it or it is too long.
    pub fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for place in 0..MAX_NUMBER_BYTES {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7F);
            // The last byte has room for one bit.
            if place == MAX_NUMBER_BYTES - 1 && bits > 1 {
                return None;
            }
            number |= bits << (7 * place);
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// Reads bytes behind their length.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    pub fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// Reads one hash of eight bytes.
    pub fn hash(&mut self) -> Option<u64> {
        let (hash, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*hash))
    }

    /// Reads a counted list of hashes.
    pub fn hashes(&mut self) -> Option<Vec<u64>> {
        let count = self.number()?;
        self.hash_list(count)
    }

    /// Reads this many hashes.
    pub fn hash_list(&mut self, count: u64) -> Option<Vec<u64>> {
        let count = usize::try_from(count).ok()?;
        let (hashes, rest) = self.0.split_at_checked(count.checked_mul(size_of::<u64>())?)?;
        self.0 = rest;
        let (hashes, _) = hashes.as_chunks();
        Some(hashes.iter().map(|hash| u64::from_le_bytes(*hash)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rejects_numbers_that_are_cut_or_too_large() {
        let table: [&[u8]; 4] =
            [&[], &[0x80], &[0xFF; 10], &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2]];
        for bytes in table {
            assert_eq!(WireReader::new(bytes).number(), None, "{bytes:?}");
        }
        let claims = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1, 7];
        assert_eq!(WireReader::new(&claims).number(), Some(u64::MAX));
        assert_eq!((WireReader::new(&claims).bytes(), WireReader::new(&claims).hashes()), (None, None));
    }

    proptest! {
        #[test]
        fn reads_what_was_written(number: u64, small in 0u64..300, text in "\\PC{0,9}", hash: u64) {
            let mut out = Vec::new();
            put_number(&mut out, number);
            put_bytes(&mut out, text.as_bytes());
            put_hash(&mut out, hash);
            put_number(&mut out, small);
            let mut reader = WireReader::new(&out);
            prop_assert_eq!((reader.number(), reader.text()), (Some(number), Some(text.as_str())));
            prop_assert_eq!((reader.hash(), reader.number()), (Some(hash), Some(small)));
            prop_assert!(reader.is_empty());
        }
    }
}
