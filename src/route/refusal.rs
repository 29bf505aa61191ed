//! The refusal of a body that a field was put into: vLLM's errors tell how many fields the body has
//! (`'input': '<dict of 5 items>'`), and where it is broken (`'loc': 'body.40'`), and the client must be told
//! of its own.
//!
//! Never: fail, hold more than an error may be long.

use std::collections::HashSet;
use std::ops::Range;

use memchr::memmem;

use super::json;

/// What is longer is no error of vLLM's.
const LONGEST: usize = 1 << 20;

/// What comes before an offset into the body, in a refusal of what is no JSON.
const PLACE: &[u8] = b"body.";

/// One refusal on its way.
#[derive(Debug)]
pub struct Refusal {
    said: Vec<u8>,
    meant: Vec<u8>,
    held: Vec<u8>,
    is_long: bool,
    /// Where the field stands, of a body that is broken behind it.
    before: Option<Range<usize>>,
}

impl Refusal {
    /// `body`: as it was sent, with one field more than the client's.
    pub fn new(body: &[u8]) -> Option<Self> {
        let object = json::document(body)?;
        let fields = object.members.iter().map(|member| &member.key).collect::<HashSet<_>>().len();
        let told = |fields: usize| format!("<dict of {fields} items>").into_bytes();
        let meant = told(fields.checked_sub(1)?);
        Some(Refusal { said: told(fields), meant, held: Vec::new(), is_long: false, before: None })
    }

    /// The body is broken, and this is where the field stands before it.
    pub fn broken_behind(self, field: Range<usize>) -> Self {
        Refusal { before: Some(field), ..self }
    }

    /// Whether the refusal is as long as it was.
    pub fn keeps_length(&self) -> bool {
        self.said.len() == self.meant.len() && self.before.is_none()
    }

    /// Takes the next piece, and gives what can go on; `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Vec<u8> {
        if self.is_long {
            return piece.to_vec();
        }
        self.held.extend_from_slice(piece);
        self.is_long = self.held.len() > LONGEST;
        if !end && !self.is_long {
            return Vec::new();
        }
        let held = std::mem::take(&mut self.held);
        let (mut out, mut at) = (Vec::with_capacity(held.len()), 0);
        for found in memmem::find_iter(&held, &self.said) {
            out.extend_from_slice(&held[at..found]);
            out.extend_from_slice(&self.meant);
            at = found + self.said.len();
        }
        out.extend_from_slice(&held[at..]);
        match &self.before {
            Some(field) if memmem::find(&out, b"json_invalid").is_some() => without(field, &out),
            _ => out,
        }
    }
}

/// The text with its offsets as they are in a body without the field.
fn without(field: &Range<usize>, text: &[u8]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
    for found in memmem::find_iter(text, PLACE) {
        let from = found + PLACE.len();
        let to = from + text[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let offset =
            std::str::from_utf8(&text[from..to]).ok().and_then(|digits| digits.parse::<usize>().ok());
        if let Some(offset) = offset.filter(|offset| *offset >= field.end) {
            out.extend_from_slice(&text[at..from]);
            out.extend_from_slice((offset - field.len()).to_string().as_bytes());
            at = to;
        }
    }
    out.extend_from_slice(&text[at..]);
    out
}
