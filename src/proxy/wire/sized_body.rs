//! A request's body of a declared length, which the connection reads itself.
//!
//! Pingora reads a body into a buffer of its own, which lives as long as the request, and hands out copies.
//! Here it goes from the socket to where it is held. Pingora is given the head with a length of 0 in place of
//! the declared one; `client` puts the declared one back before any other code sees the head.
//!
//! Never: a head that could be read in two ways. Pingora reads every body without a
//! single plain length.

use bytes::{Bytes, BytesMut};

/// More digits than any body has bytes for.
const MAX_DIGITS: usize = 18;

/// See the module.
#[derive(Debug)]
pub(crate) struct SizedBody {
    /// The declared length.
    pub length: u64,
    /// What was received with the head.
    pub received: Bytes,
    /// The bytes that are still to be read from the socket.
    pub left: u64,
}

impl SizedBody {
    /// Takes the body from behind a head of so many bytes, if it has a single plain length.
    pub(crate) fn split(bytes: &mut BytesMut, head: usize) -> Option<SizedBody> {
        let digits = plain_length(&bytes[..head])?;
        let text = std::str::from_utf8(&bytes[digits.clone()]).ok()?;
        let length: u64 = text.parse().ok()?;
        let left = length.checked_sub((bytes.len() - head) as u64).filter(|_| length > 0)?;
        bytes[digits].fill(b'0');
        let received = split_off(bytes, head);
        Some(SizedBody { length, received, left })
    }

    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.received.is_empty()
    }
}

fn split_off(bytes: &mut BytesMut, at: usize) -> Bytes {
    if at == bytes.len() { Bytes::new() } else { bytes.split_off(at).freeze() }
}

/// Where the digits of the length stand in a head that has one field of a length, and no field that could
/// change what it means.
fn plain_length(head: &[u8]) -> Option<std::ops::Range<usize>> {
    let mut found = None;
    let mut line_start = 0;
    let mut is_field = false;
    for line_end in memchr::memchr_iter(b'\n', head) {
        let line = &head[line_start..line_end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        // Empty lines may stand before the request line, which is no field.
        if is_field && !line.is_empty() {
            let name_length = memchr::memchr(b':', line)?;
            let (name, value) = (&line[..name_length], &line[name_length + 1..]);
            if name.first().is_none_or(u8::is_ascii_whitespace) {
                return None;
            }
            match name.len() {
                17 if name.eq_ignore_ascii_case(b"transfer-encoding") => return None,
                7 if name.eq_ignore_ascii_case(b"upgrade") => return None,
                14 if name.eq_ignore_ascii_case(b"content-length") => {
                    let digits = value.trim_ascii();
                    let is_plain =
                        (1..=MAX_DIGITS).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
                    if found.is_some() || !is_plain {
                        return None;
                    }
                    let start = line_start + name_length + 1 + (value.len() - value.trim_ascii_start().len());
                    found = Some(start..start + digits.len());
                }
                _ => {}
            }
        }
        is_field |= !line.is_empty();
        line_start = line_end + 1;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> (Option<SizedBody>, String) {
        let length = text.find("\r\n\r\n").map_or(text.len(), |end| end + 4);
        let mut bytes = BytesMut::from(text);
        let body = SizedBody::split(&mut bytes, length);
        (body, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[test]
    fn takes_a_body_of_a_plain_length_from_behind_its_head() {
        for (text, length, received, head) in [
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\nabc", 12, "abc", "Length: 00\r\n\r\n"),
            ("\r\nPOST / HTTP/1.1\r\ncontent-length:3 \r\n\r\nabc", 3, "abc", "length:0 \r\n\r\n"),
            ("POST / HTTP/1.1\ncontent-length: 007\n\r\n\r\n", 7, "", "length: 000\n\r\n\r\n"),
        ] {
            let (body, left) = split(text);
            let body = body.unwrap();
            assert_eq!((body.length, &body.received[..]), (length, received.as_bytes()), "{text:?}");
            assert_eq!(body.left, length - received.len() as u64);
            assert!(left.ends_with(head), "{left:?}");
        }
    }

    #[test]
    fn leaves_to_pingora_what_could_be_read_in_two_ways() {
        for fields in [
            "",
            "content-length: 0",
            "content-length: 3\r\ncontent-length: 3",
            "content-length: 3, 3",
            "content-length: +3",
            "content-length: 0x3",
            "content-length: 3 3",
            "content-length: ",
            "content-length : 3",
            "content-length: 3\r\n 1",
            "content-length: 3\r\n\t1",
            " content-length: 3",
            "content-length: 9999999999999999999",
            "content-length: 3\r\ntransfer-encoding: chunked",
            "Transfer-Encoding: identity\r\ncontent-length: 3",
            "content-length: 3\r\nupgrade: websocket",
            "content-length: 3\r\nno field",
            // More than the body has come.
            "content-length: 2",
        ] {
            let text = format!("POST / HTTP/1.1\r\n{fields}\r\n\r\nabc");
            let (body, head) = split(&text);
            assert!(body.is_none(), "{fields:?} {body:?}");
            assert_eq!(head, text);
        }
    }
}
