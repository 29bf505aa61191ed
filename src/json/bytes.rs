//! Skipping: the loops in which the cores spend their time.
//!
//! Nothing here has a position in a document.

use super::work::spend;

/// The offset of the quote that closes a string, whose text begins at `start` and has been searched up to
/// `from`. A quote counts unless an odd number of backslashes stands before it.
#[inline]
pub(crate) fn string_end(body: &[u8], start: usize, from: usize) -> Option<usize> {
    let rest = body.get(from..)?;
    // Keys and most values are short, and a call costs more than looking at them.
    let quote = match rest.first_chunk().and_then(|near| find_in(near, b'"')) {
        None => memchr::memchr(b'"', rest),
        near => near,
    };
    spend(quote.unwrap_or(rest.len()) + 1);
    let at = from + quote?;
    let may_be_escaped = at > start && body[at - 1] == b'\\';
    if may_be_escaped && is_escaped(body, start, at) {
        end_behind_escaped(body, start, at + 1)
    } else {
        Some(at)
    }
}

/// The first of a few bytes that is `wanted`.
#[inline]
pub(super) fn find_in(bytes: &[u8; 16], wanted: u8) -> Option<usize> {
    let (words, _) = bytes.as_chunks::<8>();
    let find = |word: [u8; 8]| {
        let zero_where_found = u64::from_le_bytes(word) ^ (ONE_PER_BYTE * u64::from(wanted));
        // The lowest bit that is set belongs to the first match; none is set where there is none.
        zero_where_found.wrapping_sub(ONE_PER_BYTE) & !zero_where_found & (ONE_PER_BYTE << 7)
    };
    let (low, high) = (find(words[0]), find(words[1]));
    if low | high == 0 {
        return None;
    }
    let bit = if low == 0 { 64 + high.trailing_zeros() } else { low.trailing_zeros() };
    Some(bit as usize / 8)
}

const ONE_PER_BYTE: u64 = u64::MAX / 255;

/// As `string_end`, of a text in which escaped quotes are to be expected: a search from quote to quote would
/// mispredict the distance to each of them. A window is passed over as a whole while none of its quotes can
/// close the string: each has a backslash before it, and no backslash before that.
fn end_behind_escaped(body: &[u8], start: usize, from: usize) -> Option<usize> {
    let mut at = from;
    while let Some([here, one_before, two_before]) = windows(body, [at, at - 1, at - 2]) {
        spend(WINDOW_BYTES);
        let mut may_close = 0;
        for ((here, one_before), two_before) in here.iter().zip(one_before).zip(two_before) {
            let is_plain = (*one_before != b'\\') | (*two_before == b'\\');
            may_close |= u8::from((*here == b'"') & is_plain);
        }
        if may_close != 0
            && let Some(end) = first_end(&body[..at + WINDOW_BYTES], start, at)
        {
            return Some(end);
        }
        at += WINDOW_BYTES;
    }
    first_end(body, start, at)
}

/// The number of bytes that are searched at once.
pub(crate) const WINDOW_BYTES: usize = 64;

/// The windows of the body that begin at these offsets, if it is that long. Loops over windows, and not over
/// their offsets, become vector instructions.
#[inline(always)]
pub(crate) fn windows<const N: usize>(body: &[u8], starts: [usize; N]) -> Option<[&[u8; WINDOW_BYTES]; N]> {
    let mut windows = [&[0; WINDOW_BYTES]; N];
    for (window, start) in windows.iter_mut().zip(starts) {
        *window = body.get(start..)?.first_chunk()?;
    }
    Some(windows)
}

fn first_end(body: &[u8], start: usize, from: usize) -> Option<usize> {
    let mut quotes = memchr::memchr_iter(b'"', &body[from..]).map(|quote| from + quote);
    spend(body.len() - from);
    quotes.find(|quote| !is_escaped(body, start, *quote))
}

/// Whether an odd number of backslashes stands before `at`, none of them before `start`.
pub(super) fn is_escaped(body: &[u8], start: usize, at: usize) -> bool {
    let backslashes = body[start..at].iter().rev().take_while(|byte| **byte == b'\\').count();
    spend(backslashes);
    backslashes % 2 == 1
}

/// How many bytes from `at` on were examined for the beginnings of numbers, and how many began there.
///
/// A prompt of token ids is nothing but numbers: a window of them without quotes and brackets is examined
/// as a whole, in a form that compilers turn into vector instructions.
#[inline]
pub(super) fn numbers_at(body: &[u8], at: usize) -> (usize, u64) {
    let Some(window) = body.get(at - 1..).and_then(|rest| rest.first_chunk::<NUMBER_WINDOW_BYTES>()) else {
        return (1, u64::from(begins_number(body[at - 1], body[at])));
    };
    spend(NUMBER_WINDOW_BYTES);
    let (mut structure, mut numbers) = (0, 0);
    for index in 1..NUMBER_WINDOW_BYTES {
        let (before, byte) = (window[index - 1], window[index]);
        structure |= is_structure(byte);
        numbers += u8::from(begins_number(before, byte));
    }
    if structure == 0 {
        (NUMBER_WINDOW_BYTES - 1, u64::from(numbers))
    } else {
        (1, u64::from(begins_number(window[0], window[1])))
    }
}

/// 32 bytes to examine, and the one before them.
const NUMBER_WINDOW_BYTES: usize = 33;

/// Without branches, so that many can be asked at once.
#[inline]
fn begins_number(before: u8, byte: u8) -> bool {
    let begins = |byte: u8| (byte.wrapping_sub(b'0') < 10) | (byte == b'-');
    let goes_on = begins(before) | (before == b'.') | (before == b'+') | (before | 0x20 == b'e');
    begins(byte) & !goes_on
}

/// 1 for a quote or a bracket, else 0. A bracket and a brace differ by one bit.
#[inline]
fn is_structure(byte: u8) -> u8 {
    let folded = byte | 0x20;
    u8::from(byte == b'"') | u8::from(folded == b'{') | u8::from(folded == b'}')
}

/// How many of the next bytes are no quotes and no brackets: all of them where they are few, and many of
/// them where they are many.
#[inline]
pub(super) fn plain_prefix(bytes: &[u8]) -> usize {
    let (words, _) = bytes.as_chunks::<8>();
    for (index, word) in words.iter().take(2).enumerate() {
        let word = u64::from_le_bytes(*word);
        let braces = word | (ONE_PER_BYTE * 0x20);
        let find = |word: u64, wanted: u8| {
            let zero_where_found = word ^ (ONE_PER_BYTE * u64::from(wanted));
            zero_where_found.wrapping_sub(ONE_PER_BYTE) & !zero_where_found
        };
        // The lowest bit that is set belongs to the first match; none is set where there is none.
        let found = (find(word, b'"') | find(braces, b'{') | find(braces, b'}')) & (ONE_PER_BYTE << 7);
        if found != 0 {
            return index * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    let near = words.len().min(2) * 8;
    near + plain_run(&bytes[near..])
}

/// How many of the next bytes are no quotes and no brackets, in whole windows: lists of numbers are long.
pub(super) fn plain_run(bytes: &[u8]) -> usize {
    const PLAIN_WINDOW_BYTES: usize = 32;
    // Without branches, and with bytes of 0 and 1, so that it becomes vector instructions: truth values are
    // not compared many at a time.
    let is_plain = |window: &&[u8; PLAIN_WINDOW_BYTES]| {
        window.iter().fold(0, |found, byte| found | is_structure(*byte)) == 0
    };
    bytes.as_chunks::<PLAIN_WINDOW_BYTES>().0.iter().take_while(is_plain).count() * PLAIN_WINDOW_BYTES
}

/// What a byte means inside an object or array, outside strings.
#[derive(Clone, Copy)]
pub(super) enum ByteClass {
    Other,
    Quote,
    Open,
    Close,
    /// It may begin a number.
    Number,
}

/// The class of each byte.
pub(super) const CLASSES: [ByteClass; 256] = {
    let mut classes = [ByteClass::Other; 256];
    let mut byte = 0;
    while byte < 256 {
        classes[byte] = match byte as u8 {
            b'"' => ByteClass::Quote,
            b'{' | b'[' => ByteClass::Open,
            b'}' | b']' => ByteClass::Close,
            b'-' | b'0'..=b'9' => ByteClass::Number,
            _ => ByteClass::Other,
        };
        byte += 1;
    }
    classes
};
