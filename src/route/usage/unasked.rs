//! Takes out of a stream what stands in it only because its usage was asked for.
//!
//! Most pieces have nothing to do with it: they end where a line does, and neither name a usage nor end a
//! choice. Two searches find that out, and the piece goes on as it is, without a copy. In a text, the quotes
//! of such a name would be escaped, so that what is found is a name, or a text of that one word.
//!
//! The others are read line by line, and only a line that has such a name is read as JSON.
//!
//! Never: fail, change a line but for the fingerprint, hold more than a line and the chunk that ended.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::route::answer::EVENT;
use crate::route::json::{self, Object, Span};

static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"usage\""));
static FINISH: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"finish_reason\""));

const FINGERPRINT: &str = "system_fingerprint";

/// One stream on its way. See the module.
#[derive(Debug, Default)]
pub struct Unasked {
    /// A line whose end has not come.
    line: Vec<u8>,
    /// The chunk that ended the choice, and what came behind it.
    ended: Vec<u8>,
    /// Where in `ended` the fingerprint would stand.
    seam: usize,
    /// The chunk was taken out; the empty line behind it goes too.
    skip: bool,
    /// A line that is too long goes by.
    is_long: bool,
}

// === impl Unasked ===

impl Unasked {
    /// Takes the next piece, and gives what can go on; `None`: the piece as it is. `end`: it is the last.
    pub fn feed(&mut self, piece: &[u8], end: bool) -> Option<Vec<u8>> {
        let at_ease = self.line.is_empty() && self.ended.is_empty() && !self.skip && !self.is_long;
        if at_ease && (end || piece.is_empty() || piece.ends_with(b"\n")) && !is_of_interest(piece) {
            return None;
        }
        let mut out = Vec::with_capacity(self.line.len() + self.ended.len() + piece.len());
        let mut rest = piece;
        while let Some(length) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(length + 1);
            rest = after;
            if std::mem::take(&mut self.is_long) {
                out.extend_from_slice(line);
            } else if self.line.is_empty() {
                self.whole_line(line, &mut out);
            } else {
                let mut whole = std::mem::take(&mut self.line);
                whole.extend_from_slice(line);
                self.whole_line(&whole, &mut out);
            }
        }
        self.part_of_line(rest, &mut out);
        if end {
            let line = std::mem::take(&mut self.line);
            self.whole_line(&line, &mut out);
            self.let_go(&mut out);
        }
        Some(out)
    }

    fn part_of_line(&mut self, part: &[u8], out: &mut Vec<u8>) {
        if self.is_long {
            out.extend_from_slice(part);
            return;
        }
        self.line.extend_from_slice(part);
        if self.line.len() > EVENT {
            self.let_go(out);
            out.append(&mut self.line);
            self.is_long = true;
        }
    }

    fn whole_line(&mut self, line: &[u8], out: &mut Vec<u8>) {
        if std::mem::take(&mut self.skip) && matches!(line, b"\n" | b"\r\n") {
            return;
        }
        let Some(data) = line.strip_prefix(b"data:") else { return self.put(line, out) };
        // Whatever comes next, the chunk that ended the choice waits no longer.
        let start = 5 + json::skip_space(data, 0);
        let document = line[start..].trim_ascii_end();
        let object = Some(document).filter(|data| is_of_interest(data)).and_then(json::document);
        match object {
            Some(object) if is_usage_alone(document, &object) => {
                if let Some(fingerprint) = fingerprint(document, &object) {
                    let member = [b",\"", FINGERPRINT.as_bytes(), b"\":", fingerprint].concat();
                    self.stamp(&member);
                }
                self.let_go(out);
                self.skip = true;
            }
            Some(object) if object.get(FINGERPRINT).is_none() && ends_choice(document) => {
                self.let_go(out);
                self.ended.extend_from_slice(line);
                self.seam = start + object.span.end - 1;
            }
            _ => {
                self.let_go(out);
                out.extend_from_slice(line);
            }
        }
    }

    /// Puts a line that is no data behind what is held.
    fn put(&mut self, line: &[u8], out: &mut Vec<u8>) {
        if self.ended.is_empty() {
            out.extend_from_slice(line);
            return;
        }
        self.ended.extend_from_slice(line);
        if self.ended.len() > EVENT {
            self.let_go(out);
        }
    }

    fn stamp(&mut self, member: &[u8]) {
        if !self.ended.is_empty() {
            self.ended.splice(self.seam..self.seam, member.iter().copied());
        }
    }

    fn let_go(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.ended);
    }
}

/// Whether some of it may be a usage, or the end of a choice.
fn is_of_interest(bytes: &[u8]) -> bool {
    ends_choice(bytes) || USAGE.find(bytes).is_some()
}

/// Whether a choice says why it ended.
fn ends_choice(bytes: &[u8]) -> bool {
    FINISH.find_iter(bytes).any(|at| {
        let colon = json::skip_space(bytes, at + FINISH.needle().len());
        let value = json::skip_space(bytes, colon + 1);
        bytes.get(colon) == Some(&b':') && bytes.get(value) == Some(&b'"')
    })
}

/// The chunk that carries a stream's usage and nothing else.
fn is_usage_alone(bytes: &[u8], object: &Object<'_>) -> bool {
    let usage = object.get("usage").is_some_and(|span| bytes[span.start] == b'{');
    usage && object.get("choices").is_some_and(|span| json::is_empty_list(bytes, &span))
}

/// As it is written.
fn fingerprint<'a>(bytes: &'a [u8], object: &Object<'_>) -> Option<&'a [u8]> {
    let written = |span: Span| &bytes[span];
    object.get(FINGERPRINT).map(written).filter(|value| value.starts_with(b"\""))
}
