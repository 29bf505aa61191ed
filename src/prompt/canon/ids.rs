//! Token ids in the canonical text: four bytes each, little end first.

use super::super::chain::Sink;

/// What was read of a list of numbers.
#[derive(Debug, PartialEq, Eq)]
pub struct Read {
    /// Up to the first number that may go on behind the bytes.
    pub used: usize,
    /// The list is over, or no list of token ids.
    pub over: bool,
}

/// Written at once, so that the sink is not asked for every number.
const BATCH: usize = 512;

/// Writes the numbers of a list whose opening bracket stands before the bytes.
pub fn write<S: Sink>(bytes: &[u8], out: &mut S) -> Read {
    let mut batch = [0; BATCH];
    let mut filled = 0;
    let mut at = 0;
    let over = loop {
        let Some(&byte) = bytes.get(at) else { break false };
        match byte {
            b',' | b' ' | b'\n' | b'\r' | b'\t' => at += 1,
            b'0'..=b'9' => {
                let Some((id, length)) = number(&bytes[at..]) else { break false };
                batch[filled..filled + 4].copy_from_slice(&id.to_le_bytes());
                filled += 4;
                at += length;
                if filled == BATCH {
                    out.write(&batch);
                    filled = 0;
                }
            }
            _ => break true,
        }
    };
    out.write(&batch[..filled]);
    Read { used: at, over }
}

/// A number and its length; none where it may go on.
fn number(bytes: &[u8]) -> Option<(u32, usize)> {
    let mut id = 0_u32;
    for (length, byte) in bytes.iter().enumerate() {
        let digit = byte.wrapping_sub(b'0');
        if digit > 9 {
            return Some((id, length));
        }
        id = id.wrapping_mul(10).wrapping_add(u32::from(digit));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_far_as_they_are_sure() {
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
            assert_eq!(write(text.as_bytes(), &mut written), Read { used, over }, "{text}");
            assert_eq!(written, expected, "{text}");
        }
    }

    #[test]
    fn long_lists_are_no_different() {
        let ids: Vec<u32> = (0..1000).map(|id| id * 131).collect();
        let text = format!("{}]", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
        let mut written = Vec::new();
        assert!(write(text.as_bytes(), &mut written).over);
        assert_eq!(written, ids.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    }
}
