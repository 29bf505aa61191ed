//! Skipping: the loops in which the scanner spends its time.
//!
//! Nothing here knows where in a document it stands.

use super::super::work::spend;

/// Where the closing quote of a string stands, whose text begins at `start` and has been searched up to
/// `from`. A quote counts unless an odd number of backslashes stands before it; looking back for them at
/// quotes only, instead of stopping at every escape, is what makes text full of `\n` fast.
#[inline]
pub(crate) fn string_end(body: &[u8], start: usize, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let rest = body.get(at..)?;
        let quote = memchr::memchr(b'"', rest);
        spend(quote.unwrap_or(rest.len()));
        at += quote?;
        let backslashes = body.get(start..at)?.iter().rev().take_while(|byte| **byte == b'\\').count();
        spend(1 + backslashes);
        if backslashes % 2 == 0 {
            return Some(at);
        }
        at += 1;
    }
}

/// How many bytes from `at` on were looked at for the beginnings of numbers, and how many began there.
///
/// A prompt of token ids is nothing but numbers: a window of them without quotes and brackets is looked at
/// as a whole, in a form that compilers turn into vector instructions.
#[inline]
pub(super) fn numbers_at(body: &[u8], at: usize) -> (usize, u64) {
    let Some(window) = body.get(at - 1..).and_then(|rest| rest.first_chunk::<WINDOW>()) else {
        return (1, u64::from(begins_number(body[at - 1], body[at])));
    };
    spend(WINDOW);
    let (mut structure, mut numbers) = (0, 0);
    for index in 1..WINDOW {
        let (before, byte) = (window[index - 1], window[index]);
        let folded = byte | 0x20;
        structure |= u8::from((byte == b'"') | (folded == b'{') | (folded == b'}'));
        numbers += u8::from(begins_number(before, byte));
    }
    if structure == 0 {
        (WINDOW - 1, u64::from(numbers))
    } else {
        (1, u64::from(begins_number(window[0], window[1])))
    }
}

/// 32 bytes to look at, and the one before them.
const WINDOW: usize = 33;

/// Without branches, so that many can be asked at once.
#[inline]
fn begins_number(before: u8, byte: u8) -> bool {
    let begins = |byte: u8| (byte.wrapping_sub(b'0') < 10) | (byte == b'-');
    let goes_on = begins(before) | (before == b'.') | (before == b'+') | (before | 0x20 == b'e');
    begins(byte) & !goes_on
}

/// What a byte means inside an object or array, outside strings.
#[derive(Clone, Copy)]
pub(super) enum Class {
    Other,
    Quote,
    Open,
    Close,
    /// It may begin a number.
    Number,
}

pub(super) const CLASSES: [Class; 256] = {
    let mut classes = [Class::Other; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'"' => Class::Quote,
            b'{' | b'[' => Class::Open,
            b'}' | b']' => Class::Close,
            b'-' | b'0'..=b'9' => Class::Number,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};
