//! Token ids in the canonical text: four bytes each, little end first.

use crate::json::work::spend;
use crate::json::{ByteSink, is_space};

/// Reads a list of numbers in pieces of any size. Of a cut number only its value so far is kept, so that
/// every byte is read once, for numbers of any length.
#[derive(Debug, Default)]
pub(super) struct IdReader {
    /// The value of the digits at the end of the pieces read so far, which may go on.
    number: Option<u32>,
}

/// The part of a list of numbers that was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdsRead {
    /// Up to the first number that may go on behind the bytes.
    pub used: usize,
    /// The list has ended, or is not a list of token ids.
    pub over: bool,
}

/// The number of ids that are written to the sink at once.
const MAX_BATCHED_IDS: usize = 512;

// === impl IdReader ===

impl IdReader {
    /// Writes the numbers of the next piece of a list whose opening bracket stands before the first piece.
    pub(super) fn read<S: ByteSink>(&mut self, bytes: &[u8], out: &mut S) -> IdsRead {
        let mut at = 0;
        if let Some(begun) = self.number {
            let (id, length) = digits(bytes, begun);
            if length == bytes.len() {
                self.number = Some(id);
                return IdsRead { used: 0, over: false };
            }
            out.write(&id.to_le_bytes());
            self.number = None;
            at = length;
        }
        let mut batch = [0; MAX_BATCHED_IDS];
        let mut filled = 0;
        let over = loop {
            let Some(&byte) = bytes.get(at) else { break false };
            match byte {
                b',' => at += 1,
                _ if is_space(byte) => at += 1,
                b'0'..=b'9' => {
                    let rest = &bytes[at..];
                    let Some((id, length)) = short_number(rest).or_else(|| number(rest)) else {
                        self.number = Some(digits(rest, 0).0);
                        break false;
                    };
                    batch[filled..filled + 4].copy_from_slice(&id.to_le_bytes());
                    filled += 4;
                    at += length;
                    if filled == MAX_BATCHED_IDS {
                        out.write(&batch);
                        filled = 0;
                    }
                }
                _ => break true,
            }
        };
        spend(at);
        out.write(&batch[..filled]);
        IdsRead { used: at, over }
    }
}

/// Writes the numbers of a list whose opening bracket stands before the bytes.
pub(super) fn write<S: ByteSink>(bytes: &[u8], out: &mut S) -> IdsRead {
    IdReader::default().read(bytes, out)
}

/// A number of up to seven digits and its length, out of eight bytes at once: digits are added up in pairs,
/// in fours, in eights.
#[inline]
fn short_number(bytes: &[u8]) -> Option<(u32, usize)> {
    const ONE_PER_BYTE: u64 = u64::MAX / 255;
    let values = u64::from_le_bytes(*bytes.first_chunk()?) ^ (ONE_PER_BYTE * u64::from(b'0'));
    // Bytes above 9 have or get the high bit; the lowest high bit marks the first byte other than a digit.
    let stops = (values.wrapping_add(ONE_PER_BYTE * 0x76) | values) & (ONE_PER_BYTE << 7);
    let length = stops.trailing_zeros() / 8;
    if stops == 0 || length == 0 {
        return None;
    }
    let digits = values << (64 - 8 * length);
    let pairs = (digits.wrapping_mul((10 << 8) + 1) >> 8) & 0x00ff_00ff_00ff_00ff;
    let fours = (pairs.wrapping_mul((100 << 16) + 1) >> 16) & 0x0000_ffff_0000_ffff;
    let eights = fours.wrapping_mul((10_000 << 32) + 1) >> 32;
    Some((eights as u32, length as usize))
}

/// A number and its length; `None` when the number may continue.
fn number(bytes: &[u8]) -> Option<(u32, usize)> {
    let (id, length) = digits(bytes, 0);
    (length < bytes.len()).then_some((id, length))
}

/// The value of a number that began with the value `id` and goes on with the digits in front of the bytes,
/// and how many digits those are.
fn digits(bytes: &[u8], mut id: u32) -> (u32, usize) {
    let mut length = 0;
    for byte in bytes {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            break;
        }
        id = id.wrapping_mul(10).wrapping_add(u32::from(digit));
        length += 1;
    }
    spend(length + 1);
    (id, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ids_that_are_complete() {
        for (text, ids, used, over) in [
            ("1,23 , 456]", vec![1, 23, 456], 10, true),
            ("1,23", vec![1], 2, false),
            ("1,23,", vec![1, 23], 5, false),
            ("", vec![], 0, false),
            ("]", vec![], 0, true),
            ("4294967295,1.5]", vec![u32::MAX, 1], 12, true),
            ("7,-1", vec![7], 2, true),
        ] {
            let mut written = Vec::new();
            let expected: Vec<u8> = ids.into_iter().flat_map(u32::to_le_bytes).collect();
            assert_eq!(write(text.as_bytes(), &mut written), IdsRead { used, over }, "{text}");
            assert_eq!(written, expected, "{text}");
        }
    }

    #[test]
    fn joins_a_number_in_pieces() {
        let text = b"4294967295,17 , 000000000000000000000012345,8,9]";
        let mut whole = Vec::new();
        assert!(write(text, &mut whole).over);
        for size in 1..text.len() {
            let (mut reader, mut written, mut over) = (IdReader::default(), Vec::new(), false);
            for piece in text.chunks(size).flat_map(|piece| [piece, b""]) {
                over |= reader.read(piece, &mut written).over;
            }
            assert_eq!((&written, over), (&whole, true), "pieces of {size}");
        }
    }

    #[test]
    fn fast_and_slow_readers_agree() {
        for digits in ["0", "7", "10", "007", "128255", "9999999", "12345678", "4294967295"] {
            for end in
                [",1234567", "]       ", ", 5     ", "\u{ff}\u{ff}\u{ff}\u{ff}", ".5,6,7,8", ":/:/:/:/"]
            {
                let text = format!("{digits}{end}");
                let fast = short_number(text.as_bytes());
                let slow = number(text.as_bytes());
                assert!(fast == slow || fast.is_none() && digits.len() > 7, "{text}: {fast:?} {slow:?}");
            }
        }
        assert_eq!(short_number(b"1234567"), None);
    }

    #[test]
    fn reads_long_lists() {
        let ids: Vec<u32> = (0..1000).map(|id| id * 131).collect();
        let text = format!("{}]", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
        let mut written = Vec::new();
        assert!(write(text.as_bytes(), &mut written).over);
        assert_eq!(written, ids.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    }
}
