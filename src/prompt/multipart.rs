//! The fields `model` and `stream` of a `multipart/form-data` body that may be cut, as audio comes in.
//!
//! The model may stand behind a file of many megabytes, so the file is stepped over at the speed of a
//! substring search, and like the JSON scanner this one goes on where the bytes ended. A line that only
//! begins like the boundary is content. The last of two equal fields wins, as in Starlette.
//!
//! Never: a copy of the body, a change to it, a panic, more than a bounded look at the headers of a part.

mod plain;
pub(crate) mod tail;

use std::ops::Range;

use memchr::memmem;

use self::plain::FormCharset;
use super::scan::ScanProgress;
use super::value::{MAX_MODEL_NAME_BYTES, MAX_TRUE_WORD_BYTES, ModelField, is_true_word, lossy_short};
use crate::json::work::spend;

/// Longer boundaries are refused by vLLM's own parser.
const MAX_BOUNDARY_BYTES: usize = 256;

/// The headers of one part; what vLLM's parser allows is a few lines of 4 KiB.
const MAX_PART_HEADER_BYTES: usize = 32 << 10;

/// Starlette takes 1,000 files and as many fields.
const MAX_PARTS: usize = 2000;

/// The facts in the bytes read so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormFacts<'a> {
    /// A name above the limit is cut: no upstream serves it.
    pub model: ModelField<'a>,
    /// Whether the client requests a stream of events.
    pub stream: bool,
    pub state: ScanProgress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FormField {
    Model,
    Stream,
}

#[derive(Clone, Copy, Debug)]
enum FormParserState {
    /// Before the first boundary, which may be the body's very first bytes.
    Start,
    /// After a boundary's line.
    Headers {
        start: usize,
    },
    /// In a part's content, or in a preamble.
    Content {
        start: usize,
        field: Option<FormField>,
    },
    /// Behind the boundary that stands there and ends the form.
    End {
        start: usize,
    },
    Malformed(usize),
}

/// Scans one form. Every call must pass the same buffer, grown at its end.
#[derive(Clone, Debug)]
pub struct FormScanner {
    /// Line end, two dashes, boundary.
    delimiter: memmem::Finder<'static>,
    place: FormParserState,
    /// Everything before it has been looked at.
    at: usize,
    parts: usize,
    model: Option<Range<usize>>,
    stream: Option<Range<usize>>,
    charset: FormCharset,
    /// Whether every engine reads the scanned part in the same way as this scanner.
    is_plain: bool,
}

impl FormScanner {
    /// `None` when the `content-type` header names no form or no usable boundary: vLLM refuses that.
    pub fn new(content_type: &str) -> Option<Self> {
        let kind = content_type.split(';').next()?.trim();
        let boundary = parameter(content_type.as_bytes(), b"boundary")?;
        let is_usable = (1..=MAX_BOUNDARY_BYTES).contains(&boundary.len()) && boundary.is_ascii();
        if !kind.eq_ignore_ascii_case("multipart/form-data") || !is_usable {
            return None;
        }
        let delimiter = [b"\r\n--", boundary.as_slice()].concat();
        let charset = FormCharset::of_type(content_type.as_bytes());
        Some(FormScanner {
            delimiter: memmem::Finder::new(&delimiter).into_owned(),
            place: FormParserState::Start,
            at: 0,
            parts: 0,
            model: None,
            stream: None,
            charset: charset.unwrap_or(FormCharset::Utf8),
            is_plain: charset.is_some(),
        })
    }

    /// Scans the bytes that the buffer has gained since the last call.
    pub fn scan(&mut self, body: &[u8]) {
        while match self.place {
            FormParserState::Start => self.start(body),
            FormParserState::Headers { start } => self.headers(body, start),
            FormParserState::Content { start, field } => self.content(body, start, field),
            FormParserState::End { .. } | FormParserState::Malformed(_) => false,
        } {}
    }

    /// The facts so far, from the buffer that was scanned. A field counts once it is complete.
    pub fn facts<'a>(&self, body: &'a [u8]) -> FormFacts<'a> {
        // Only as much is looked at as a field can mean something with, since this is asked for again.
        let text = |span: &Option<Range<usize>>, most| {
            span.clone().and_then(|span| body.get(span)).map(|text| lossy_short(text, most))
        };
        FormFacts {
            model: text(&self.model, MAX_MODEL_NAME_BYTES).map_or(ModelField::Absent, ModelField::named),
            stream: text(&self.stream, MAX_TRUE_WORD_BYTES).is_some_and(|word| is_true_word(&word)),
            state: match self.place {
                FormParserState::End { .. } => ScanProgress::Complete,
                FormParserState::Malformed(offset) => ScanProgress::Malformed(offset),
                _ => ScanProgress::Cut,
            },
        }
    }

    /// Where the name of the model stands, once it is whole.
    pub fn model_span(&self) -> Option<Range<usize>> {
        self.model.clone()
    }

    /// Where the boundary stands that ends the form, with the dashes in front of it, once it is whole.
    pub fn end(&self) -> Option<Range<usize>> {
        let FormParserState::End { start } = self.place else { return None };
        Some(start..start + self.delimiter.needle().len() - 2)
    }

    /// Whether the form cannot be parsed any further, or engines may read it differently.
    pub fn is_lost(&self) -> bool {
        !self.is_plain || matches!(self.place, FormParserState::Malformed(_))
    }

    fn start(&mut self, body: &[u8]) -> bool {
        let first = &self.delimiter.needle()[2..];
        if body.len() < first.len() + 2 {
            return false;
        }
        if !body.starts_with(first) || !self.boundary_line(body, first.len()) {
            self.is_plain = false;
            self.place = FormParserState::Content { start: 0, field: None };
        }
        true
    }

    fn headers(&mut self, body: &[u8], start: usize) -> bool {
        let window = body.get(self.at..body.len().min(start + MAX_PART_HEADER_BYTES)).unwrap_or_default();
        let found = memmem::find(window, b"\r\n\r\n");
        spend(found.unwrap_or(window.len()));
        let Some(found) = found else {
            if body.len() >= start + MAX_PART_HEADER_BYTES {
                self.place = FormParserState::Malformed(start);
            }
            self.at = self.at.max(body.len().saturating_sub(3));
            return false;
        };
        let end = self.at + found;
        let headers = body.get(start..end).unwrap_or_default();
        let field = field_of(headers);
        self.is_plain &= plain::are_headers(headers);
        self.at = end + 4;
        self.place = FormParserState::Content { start: self.at, field };
        true
    }

    fn content(&mut self, body: &[u8], start: usize, field: Option<FormField>) -> bool {
        let rest = body.get(self.at..).unwrap_or_default();
        let found = self.delimiter.find(rest);
        spend(found.unwrap_or(rest.len()) + self.delimiter.needle().len());
        let Some(found) = found else {
            self.at = self.at.max((body.len() + 1).saturating_sub(self.delimiter.needle().len()));
            return false;
        };
        self.at += found;
        let (content, line) = (start..self.at, self.at + self.delimiter.needle().len());
        if body.len() < line + 2 {
            return false;
        }
        if !self.boundary_line(body, line) {
            // Engines may skip blanks there. The next line may be the boundary; its line end may be the one
            // right behind.
            self.is_plain = false;
            self.at += 2;
            return true;
        }
        match field {
            Some(FormField::Model) => {
                self.is_plain &= self.charset.reads(body.get(content.clone()).unwrap_or_default());
                self.model = Some(content);
            }
            Some(FormField::Stream) => self.stream = Some(content),
            None => {}
        }
        true
    }

    /// Goes on behind a boundary that ends at `at`; false when the line goes on, so that it is none.
    fn boundary_line(&mut self, body: &[u8], at: usize) -> bool {
        match body.get(at..at + 2) {
            Some(b"\r\n") => {
                self.parts += 1;
                // From the line end on, since a part without headers begins with the empty line.
                self.at = at;
                let too_many = self.parts > MAX_PARTS;
                self.place = if too_many {
                    FormParserState::Malformed(at)
                } else {
                    FormParserState::Headers { start: at }
                };
                true
            }
            Some(b"--") => {
                self.place = FormParserState::End { start: at + 2 - self.delimiter.needle().len() };
                true
            }
            _ => false,
        }
    }
}

/// The field that a part's headers name. A part with a file name is a file, whatever else it is called.
fn field_of(headers: &[u8]) -> Option<FormField> {
    spend(headers.len());
    let mut field = None;
    for line in headers.split(|byte| *byte == b'\n') {
        let Some(colon) = memchr::memchr(b':', line) else {
            continue;
        };
        if !line[..colon].trim_ascii().eq_ignore_ascii_case(b"content-disposition") {
            continue;
        }
        let disposition = &line[colon + 1..];
        field = match parameter(disposition, b"name").as_deref() {
            _ if parameter(disposition, b"filename").is_some() => None,
            Some(b"model") => Some(FormField::Model),
            Some(b"stream") => Some(FormField::Stream),
            _ => None,
        };
    }
    field
}

/// A parameter of a header as in `form-data; name="model"`, without its quotes; the last one of a name.
fn parameter(header: &[u8], name: &[u8]) -> Option<Vec<u8>> {
    spend(header.len());
    let mut value = None;
    let mut rest = &header[segment_end(header)..];
    while let Some(tail) = rest.strip_prefix(b";") {
        let segment;
        (segment, rest) = tail.split_at(segment_end(tail));
        if let Some(equals) = memchr::memchr(b'=', segment)
            && segment[..equals].trim_ascii().eq_ignore_ascii_case(name)
        {
            value = Some(unquoted(segment[equals + 1..].trim_ascii()));
        }
    }
    value
}

/// Where the semicolon stands that ends a segment; one in quotes does not.
fn segment_end(text: &[u8]) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    let ends = |byte: &u8| {
        let end = *byte == b';' && !quoted;
        quoted ^= *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && quoted && !escaped;
        end
    };
    text.iter().position(ends).unwrap_or(text.len())
}

fn unquoted(value: &[u8]) -> Vec<u8> {
    let Some(inside) = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) else {
        return value.to_vec();
    };
    let mut text = Vec::with_capacity(inside.len());
    let mut bytes = inside.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escapes = byte == b'\\' && matches!(bytes.peek(), Some(b'"' | b'\\'));
        text.push(if escapes { bytes.next().unwrap_or(byte) } else { byte });
    }
    text
}

#[cfg(test)]
mod tests;
