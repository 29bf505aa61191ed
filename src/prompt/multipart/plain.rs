//! The forms that engines and the scanner read alike.
//!
//! Parsers differ in how they take escapes, quotes, repeated and extended parameters, and so do versions of
//! the parser behind vLLM. A form that is plain has none of these, and is what clients send.

use memchr::memchr;

use crate::json::work::spend;

/// The bytes in which a plain form gives its fields: in others, as in UTF-7, a name can be another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FormCharset {
    Utf8,
    /// Also ISO 8859-1, in which only ASCII is what it is in UTF-8.
    Ascii,
}

impl FormCharset {
    /// The encoding that a plain `content-type` header names; `None` when the header is not plain.
    pub(super) fn of_type(content_type: &[u8]) -> Option<Self> {
        let (mut boundaries, mut charset) = (0, None);
        let is_plain = each_parameter(content_type, |parameter| {
            if parameter.is("boundary") {
                boundaries += 1;
                return boundaries == 1 && is_boundary(parameter.value);
            }
            if !parameter.is("charset") {
                return !parameter.is_extended();
            }
            charset.replace(parameter.value).is_none()
        });
        match charset.unwrap_or(b"utf-8").to_ascii_lowercase().as_slice() {
            b"utf-8" | b"utf8" if is_plain => Some(FormCharset::Utf8),
            b"us-ascii" | b"iso-8859-1" if is_plain => Some(FormCharset::Ascii),
            _ => None,
        }
    }

    /// Whether engines read this text as it is read here. They take what is invalid for ISO 8859-1.
    pub(super) fn reads(self, text: &[u8]) -> bool {
        spend(text.len());
        match self {
            FormCharset::Utf8 => std::str::from_utf8(text).is_ok(),
            FormCharset::Ascii => text.is_ascii(),
        }
    }
}

/// Whether the headers of a part are plain; `headers` begins with the line end before them, if there are any.
pub(super) fn are_headers(headers: &[u8]) -> bool {
    spend(headers.len());
    let Some(lines) = headers.strip_prefix(b"\r\n") else { return headers.is_empty() };
    let mut dispositions = 0;
    let mut lines = lines.split(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        let line = if lines.peek().is_some() { line.strip_suffix(b"\r") } else { Some(line) };
        let Some(line) = line.filter(|line| memchr(b'\r', line).is_none()) else { return false };
        let Some(colon) = memchr(b':', line) else { return false };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        if !is_token(name) {
            return false;
        }
        if name.eq_ignore_ascii_case(b"content-disposition") {
            dispositions += 1;
            if dispositions > 1 || !is_disposition(value) {
                return false;
            }
        }
    }
    true
}

/// Whether every engine takes the part for the same field, or for a file.
fn is_disposition(header: &[u8]) -> bool {
    let (mut name, mut file, mut extended_file) = (None, None, None);
    let is_plain = each_parameter(header, |parameter| {
        let known = match () {
            () if parameter.is("name") => &mut name,
            () if parameter.is("filename") => &mut file,
            () if parameter.is("filename*") => &mut extended_file,
            () => return !parameter.is_extended(),
        };
        known.replace(parameter.value).is_none()
    });
    // Clients write file names so that are not ASCII. By it alone some engines see a file, others a field.
    let is_unclear = extended_file.is_some() && file.is_none();
    is_plain && !(is_unclear && matches!(name, Some(b"model" | b"stream")))
}

struct Parameter<'a> {
    name: &'a [u8],
    value: &'a [u8],
}

impl Parameter<'_> {
    fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name.as_bytes())
    }

    /// Whether it is written as in RFC 2231: in pieces, or with its encoding.
    fn is_extended(&self) -> bool {
        memchr(b'*', self.name).is_some()
    }
}

/// Whether the header is plain, and each of its parameters is accepted.
fn each_parameter<'a>(header: &'a [u8], mut accepts: impl FnMut(Parameter<'a>) -> bool) -> bool {
    spend(header.len());
    let (kind, mut rest) = header.split_at(memchr(b';', header).unwrap_or(header.len()));
    if !without_blanks(kind).iter().all(|byte| is_token_byte(*byte) || *byte == b'/') {
        return false;
    }
    while let Some(next) = rest.strip_prefix(b";") {
        rest = without_blanks(next);
        if rest.is_empty() || rest.starts_with(b";") {
            continue;
        }
        let Some(equals) = memchr(b'=', rest) else { return false };
        let name = without_blanks(&rest[..equals]);
        let Some((value, behind)) = plain_value(without_blanks(&rest[equals + 1..])) else { return false };
        rest = behind;
        if !is_token(name) || !accepts(Parameter { name, value }) {
            return false;
        }
    }
    rest.is_empty()
}

/// The value that stands there, without its quotes, and what follows it.
fn plain_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let (value, behind) = match text.strip_prefix(b"\"") {
        Some(quoted) => {
            let (value, behind) = quoted.split_at(memchr(b'"', quoted)?);
            if value.iter().any(|byte| *byte == b'\\' || byte.is_ascii_control()) {
                return None;
            }
            (value, &behind[1..])
        }
        None => {
            let end = text.iter().position(|byte| !is_token_byte(*byte)).unwrap_or(text.len());
            (end > 0).then(|| text.split_at(end))?
        }
    };
    Some((value, without_blanks(behind)))
}

/// As in RFC 2046, and what a token may be.
fn is_boundary(value: &[u8]) -> bool {
    let is_plain = |byte: &u8| is_token_byte(*byte) || b"(),/:=? ".contains(byte);
    value.iter().all(is_plain) && !value.ends_with(b" ")
}

fn is_token(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|byte| is_token_byte(*byte))
}

/// As in RFC 9110.
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Without spaces and tabs around it.
fn without_blanks(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = text {
        text = rest;
    }
    text
}

#[cfg(test)]
mod tests;
