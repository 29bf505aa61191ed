//! Inputs made of others: a few changes each, of bytes and of words that the formats know.

use super::dice::Dice;

/// Changes to one input.
const MAX_CHANGES: u64 = 5;

/// Longer inputs are cut.
const MAX_BYTES: usize = 8 << 10;

const WORDS: [&str; 57] = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "\\",
    "\\u00e9",
    "\\ud83d\\ude00",
    "\\n",
    "null",
    "true",
    "false",
    "-1",
    "0",
    "2",
    "1.0",
    "1e3",
    "\"model\":",
    "\"messages\":",
    "\"role\":\"user\"",
    "\"content\":",
    "\"tools\":[]",
    "\"m\":{}",
    "\"a\":1,",
    "\"stream\":true",
    "\"stream\":",
    "\"background\":",
    "\"store\":",
    "\"previous_response_id\":",
    "\"r\":",
    "\"s\":0,",
    "\"b\":null",
    "data:",
    "data: ",
    "event: error",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\r\n\r\n",
    "\u{feff}",
    "é😀",
    " ",
    "\t",
    "- ",
    "  key: ",
    "&a ",
    "*a",
    "${PORT}",
    "0\r\n\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "transfer-encoding: chunked\r\n",
    "content-length: 5\r\n",
    "--b\r\n",
    "--b--",
];

/// One of the corpus, changed.
pub fn mutation(corpus: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let mut input = dice.one_of(corpus).clone();
    for _ in 0..dice.between(1, MAX_CHANGES) {
        change(&mut input, corpus, dice);
    }
    input.truncate(MAX_BYTES);
    input
}

fn change(input: &mut Vec<u8>, corpus: &[Vec<u8>], dice: &mut Dice) {
    let from = dice.between(0, input.len() as u64) as usize;
    let to = (from + dice.between(0, 30) as usize).min(input.len());
    match dice.between(0, 7) {
        0 => input.truncate(from),
        1 => drop(input.drain(from..to)),
        2 => input.extend_from_within(from..to),
        3 => insert(input, from, dice.one_of(&WORDS).as_bytes()),
        4 => {
            input.drain(from..to);
            insert(input, from, dice.one_of(&WORDS).as_bytes());
        }
        5 => insert(input, from, &[dice.between(0, 255) as u8]),
        // The top bit rarely, so that text stays text.
        6 if from < input.len() && dice.once_in(4) => input[from] ^= 0x80,
        6 if from < input.len() => input[from] ^= 1 << dice.between(0, 6),
        _ => {
            let other = dice.one_of(corpus);
            let start = dice.between(0, other.len() as u64) as usize;
            let end = (start + dice.between(0, 100) as usize).min(other.len());
            insert(input, from, &other[start..end]);
        }
    }
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}
