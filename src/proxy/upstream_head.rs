//! The head of a request on its way to an upstream.
//!
//! Each request has one, which is written once: a list of fields costs a fraction of a map of them. Pingora's
//! session learns only what decides how the answer is read.
//!
//! Never: a byte that could end a field, or the request line, before its end.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderName, HeaderValue, Method, header};
use pingora::Result;
use pingora::http::RequestHeader;

/// See the module. Names are written in lower case.
#[derive(Debug)]
pub(super) struct UpstreamHead {
    method: Method,
    target: Vec<u8>,
    fields: Vec<(HeaderName, HeaderValue)>,
}

impl UpstreamHead {
    /// `fields`: about so many will follow.
    pub(super) fn new(method: Method, target: Vec<u8>, fields: usize) -> Self {
        UpstreamHead { method, target, fields: Vec::with_capacity(fields) }
    }

    /// Puts a field in the place of all of its name.
    pub(super) fn insert(&mut self, name: HeaderName, value: HeaderValue) {
        self.remove(name.as_str());
        self.fields.push((name, value));
    }

    pub(super) fn append(&mut self, name: HeaderName, value: HeaderValue) {
        self.fields.push((name, value));
    }

    /// Removes the fields of a name, in whatever case it is given.
    pub(super) fn remove(&mut self, name: &str) {
        self.fields.retain(|(field, _)| !field.as_str().eq_ignore_ascii_case(name));
    }

    /// Replaces the client's key by this one; Anthropic's clients send theirs in another field.
    pub(super) fn replace_key(&mut self, key: HeaderValue) {
        self.remove("x-api-key");
        self.insert(header::AUTHORIZATION, key);
    }

    /// The first field of a name.
    pub(super) fn get(&self, name: &HeaderName) -> Option<&HeaderValue> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value)
    }

    /// Whether the body is sent in chunks.
    pub(super) fn is_chunked(&self) -> bool {
        self.get(&header::TRANSFER_ENCODING).is_some()
    }

    /// The head as it is sent; `None` where the target cannot be.
    pub(super) fn to_bytes(&self) -> Option<Bytes> {
        let is_plain = |byte: &u8| !byte.is_ascii_control() && *byte != b' ';
        if self.target.is_empty() || !self.target.iter().all(is_plain) {
            return None;
        }
        // The version, the delimiters and the line ends.
        let line = self.method.as_str().len() + self.target.len() + 16;
        let fields: usize =
            self.fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        let mut bytes = BytesMut::with_capacity(line + fields);
        bytes.put_slice(self.method.as_str().as_bytes());
        bytes.put_u8(b' ');
        bytes.put_slice(&self.target);
        bytes.put_slice(b" HTTP/1.1\r\n");
        for (name, value) in &self.fields {
            bytes.put_slice(name.as_str().as_bytes());
            bytes.put_slice(b": ");
            bytes.put_slice(value.as_bytes());
            bytes.put_slice(b"\r\n");
        }
        bytes.put_slice(b"\r\n");
        Some(bytes.freeze())
    }

    /// What decides how the answer is read.
    pub(super) fn for_session(&self) -> Result<RequestHeader> {
        let mut head = RequestHeader::build_no_case(self.method.clone(), b"/", Some(0))?;
        if self.get(&header::UPGRADE).is_some() {
            head.insert_header(header::CONNECTION, "Upgrade")?;
            head.insert_header(header::UPGRADE, "websocket")?;
        }
        Ok(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &'static str) -> HeaderValue {
        HeaderValue::from_static(text)
    }

    #[test]
    fn writes_its_fields_in_order() {
        let mut head = UpstreamHead::new(Method::POST, b"/v1/a%20b?x=\xc3\xa9".to_vec(), 4);
        head.append(header::HOST, value("gpu:8000"));
        head.append(header::VIA, value("a"));
        head.append(header::VIA, value("b"));
        head.append(header::AUTHORIZATION, value("client's"));
        head.insert(header::AUTHORIZATION, value("own"));
        head.append(HeaderName::from_static("x-gone"), value("1"));
        head.remove("X-Gone");
        let sent = b"POST /v1/a%20b?x=\xc3\xa9 HTTP/1.1\r\nhost: gpu:8000\r\nvia: a\r\nvia: b\r\n\
            authorization: own\r\n\r\n";
        assert_eq!(head.to_bytes().unwrap(), &sent[..]);
        assert_eq!(head.to_bytes().unwrap().len(), sent.len());
        assert!(!head.is_chunked());
        head.insert(header::TRANSFER_ENCODING, value("chunked"));
        assert!(head.is_chunked());
    }

    #[test]
    fn refuses_a_target_that_would_end_the_request_line() {
        for target in ["", "/a b", "/a\r\nx: y", "/a\n", "/\0", "/\x7f"] {
            let head = UpstreamHead::new(Method::GET, target.as_bytes().to_vec(), 0);
            assert!(head.to_bytes().is_none(), "{target:?}");
        }
    }

    #[test]
    fn the_session_learns_of_the_method_and_of_an_upgrade() {
        let mut head = UpstreamHead::new(Method::HEAD, b"/v1/models".to_vec(), 0);
        head.append(header::VIA, value("a"));
        let told = head.for_session().unwrap();
        assert_eq!((&told.method, told.headers.len()), (&Method::HEAD, 0));
        head.insert(header::UPGRADE, value("websocket"));
        assert_eq!(head.for_session().unwrap().headers.len(), 2);
    }
}
