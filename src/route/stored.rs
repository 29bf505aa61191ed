//! Ids of stored responses that carry their upstream and model.
//!
//! A vLLM server keeps a response in its own memory under the request's `request_id`. The balancer inserts an
//! id into a request without one:
//!
//! ```text
//! resp_ <upstream: 9> <name: 5> <secret: 18>        hexadecimal digits
//! ```
//!
//! The first part is a hash of the upstream's name, the second one of the model's name that the client gave,
//! or zeros; the third alone makes the id hard to guess: a client that knows an id may retrieve the
//! response, as with vLLM's own ids. The hash is keyed to differ from other software's, and is the same in
//! every balancer and at every start: it is no secret, and does not hide a name that can be guessed. vLLM's
//! own ids have 16 digits, in older versions 32, as ours: an id of 32 digits matches one of a thousand
//! upstreams by chance once in some ten million ids.
//!
//! The id is inserted right after the body's first brace, so that no later byte has to be moved or read; its
//! length is the same at every attempt. A request's own id after the peeked part takes effect: of equal keys
//! the last counts.
//!
//! Never: choose an upstream, read the set of upstreams.

pub(crate) mod location;

use std::ops::Range;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::json::skip_space;

/// The key of the hashes of names.
const HASH_KEY: u64 = u64::from_be_bytes(*b"vllm-lb\0");

const ID_PREFIX: &str = "resp_";
const UPSTREAM_DIGITS: Range<usize> = 5..14;
const MODEL_DIGITS: Range<usize> = 14..19;
const ID_LENGTH: usize = 37;

/// Random bytes in an id.
pub(crate) const SECRET_BYTES: usize = 9;

/// The longest id that is searched for.
const MAX_ID_BYTES: usize = 256;

/// The upstream and the model that an id of the balancer carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResponseIdTag {
    upstream: u64,
    name: u64,
}

/// The id of a response to be stored, without the part that depends on the upstream.
#[derive(Clone, Debug)]
pub(crate) struct ResponseIdStamp {
    name: u64,
    secret: [u8; SECRET_BYTES],
    /// The offset of the insertion in the body.
    at: usize,
}

/// Whether a text can be the id of a response: it becomes part of a path, unescaped, and of a key.
pub(crate) fn is_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte);
    (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(plain) && !id.starts_with('.')
}

fn hash(name: &str) -> u64 {
    xxh3_64_with_seed(name.as_bytes(), HASH_KEY)
}

fn of_upstream(name: &str) -> u64 {
    hash(name) >> 28
}

/// The number of a client's name for the model; 0 stands for no name only.
pub(crate) fn number(name: Option<&str>) -> u64 {
    name.map_or(0, |name| (hash(name) >> 44).max(1))
}

/// The name with this number.
pub(crate) fn name_of<'n>(wanted: u64, mut names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    names.find(|name| number(Some(name)) == wanted)
}

// === impl ResponseIdTag ===

impl ResponseIdTag {
    /// Parses an id; `None` for an id of another form.
    pub(crate) fn read(id: &str) -> Option<Self> {
        let digits = id.strip_prefix(ID_PREFIX)?;
        let ours =
            id.len() == ID_LENGTH && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let part = |range| u64::from_str_radix(id.get(range)?, 16).ok();
        let tag = ResponseIdTag { upstream: part(UPSTREAM_DIGITS)?, name: part(MODEL_DIGITS)? };
        ours.then_some(tag)
    }

    /// Whether the response is at the upstream of this name.
    pub(crate) fn is_at(self, upstream: &str) -> bool {
        self.upstream == of_upstream(upstream)
    }

    /// The number of the client's name for the model.
    pub(crate) fn name(self) -> u64 {
        self.name
    }
}

// === impl ResponseIdStamp ===

impl ResponseIdStamp {
    /// Creates the stamp of a body with this beginning and without an id; `name` is the model's `number`.
    /// `None` for a body other than an object, or with too few bytes to read past its brace.
    pub(crate) fn new(body: &[u8], name: u64, secret: [u8; SECRET_BYTES]) -> Option<Self> {
        let brace = skip_space(body, 0);
        let next = skip_space(body, brace + 1);
        let fits = body.get(brace) == Some(&b'{') && body.get(next) == Some(&b'"');
        fits.then(|| ResponseIdStamp { name, secret, at: brace + 1 })
    }

    /// The id at this upstream.
    pub(crate) fn id(&self, upstream: &str) -> String {
        let secret = self.secret.iter().fold(0, |all, byte| all << 8 | u128::from(*byte));
        format!("{ID_PREFIX}{:09x}{:05x}{secret:018x}", of_upstream(upstream), self.name)
    }

    /// The length of the insertion, in bytes.
    pub(crate) fn length() -> usize {
        r#""request_id":"","#.len() + ID_LENGTH
    }

    /// The insertion for this upstream: its offset and its text.
    pub(crate) fn insertion(&self, upstream: &str) -> (usize, String) {
        (self.at, format!(r#""request_id":"{}","#, self.id(upstream)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stamp(body: &str, model: Option<&str>) -> Option<ResponseIdStamp> {
        ResponseIdStamp::new(body.as_bytes(), number(model), [0xA7; SECRET_BYTES])
    }

    /// The beginning of a body, as it is sent to this upstream.
    fn stamped(stamp: &ResponseIdStamp, begin: &[u8], upstream: &str) -> Vec<u8> {
        let (at, text) = stamp.insertion(upstream);
        let (before, behind) = begin.split_at(at);
        [before, text.as_bytes(), behind].concat()
    }

    #[test]
    fn id_carries_the_upstream_and_the_clients_name() {
        let stamp = stamp(r#"{"model":"fast"}"#, Some("fast")).unwrap();
        let id = stamp.id("gpu-1");
        assert_eq!((id.len(), is_id(&id)), (ID_LENGTH, true));
        let tag = ResponseIdTag::read(&id).unwrap();
        assert_eq!((tag.is_at("gpu-1"), tag.is_at("gpu-2")), (true, false));
        assert_eq!(tag.name(), number(Some("fast")));
        assert_ne!(tag.name(), number(Some("slow")));
        // Balancers of different versions must read each other's.
        assert_eq!(id, "resp_13e0ffc9627ae1a7a7a7a7a7a7a7a7a7");
    }

    #[test]
    fn foreign_ids_carry_nothing() {
        for id in [
            "",
            "resp_",
            "resp_0123456789abcdef0123456789abcde",
            &format!("resp_{}", "g".repeat(32)),
            &format!("resp_{}", "A".repeat(32)),
            &format!("resp_{}", "é".repeat(16)),
            &format!("resp_+{}", "1".repeat(31)),
            &format!("rosp_{}", "1".repeat(32)),
            &format!("resp_{}", "1".repeat(33)),
        ] {
            assert_eq!(ResponseIdTag::read(id), None, "{id}");
        }
        assert_eq!(ResponseIdTag::read(&stamp("{\"", None).unwrap().id("a")).unwrap().name(), 0);
        assert_ne!(number(Some("")), 0);
    }

    #[test]
    fn accepts_only_ids_that_fit_into_a_path() {
        for (id, wanted) in [
            ("resp_1", true),
            ("a-b.c_D", true),
            ("user@host:1~(a)", true),
            ("", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("a%3A", false),
            ("a?b#c", false),
            ("é", false),
            ("a\n", false),
        ] {
            assert_eq!(is_id(id), wanted, "{id:?}");
        }
        assert_eq!((is_id(&"a".repeat(256)), is_id(&"a".repeat(257))), (true, false));
    }

    #[test]
    fn leaves_empty_objects_and_other_bodies_unchanged() {
        for body in ["", " ", "{", "{ ", "{}", " { } ", "[1]", "{1", "\u{feff}{\"a\":1}", "null"] {
            assert!(stamp(body, None).is_none(), "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn keeps_every_other_byte(
            space in "[ \t\r\n]{0,3}", inner in "[ \t\r\n]{0,3}", value in "[a-z]{0,20}", cut in 0usize..30
        ) {
            let body = format!("{space}{{{inner}\"input\":\"{value}\"}}{space}");
            let stamp = stamp(&body, Some("m")).unwrap();
            // The beginning is all that was peeked, or a part of it.
            let cut = body.len() - cut.min(value.len());
            let sent = stamped(&stamp, &body.as_bytes()[..cut], "gpu");
            let (at, insertion) = stamp.insertion("gpu");
            prop_assert_eq!(&sent[at..at + ResponseIdStamp::length()], insertion.as_bytes());
            prop_assert_eq!(sent.len(), cut + ResponseIdStamp::length());
            let whole = String::from_utf8([&sent[..], &body.as_bytes()[cut..]].concat()).unwrap();
            let read: serde_json::Value = serde_json::from_str(&whole).unwrap();
            prop_assert_eq!(read["request_id"].as_str().unwrap(), stamp.id("gpu"));
            prop_assert_eq!(read["input"].as_str().unwrap(), &value);
            let field = format!("\"request_id\":\"{}\",", stamp.id("gpu"));
            prop_assert_eq!(whole.replacen(&field, "", 1), body);
        }

        #[test]
        fn reading_never_panics(id in ".{0,60}", body in prop::collection::vec(any::<u8>(), 0..40)) {
            ResponseIdTag::read(&id);
            if let Some(stamp) = ResponseIdStamp::new(&body, 0, [0; SECRET_BYTES]) {
                let (at, text) = stamp.insertion("a");
                prop_assert!(at <= body.len() && text.len() == ResponseIdStamp::length());
            }
        }
    }
}
