//! The session of a request: the key that connects the turns of a conversation.
//!
//! A client may name it in four places; the first one that holds a name counts: the path
//! (`/sessions/{id}/v1/…`), the headers, the fields of the body and the cookie that the configuration lists,
//! in the order of its lists. The same name in another place is the same session. Claude Code writes its
//! session into `metadata.user_id`, which is read where `metadata.session_id` is configured and missing.
//!
//! The key is a hash of the name and the model: an agent may use two models in one session, whose caches
//! have nothing in common. It is the same in every balancer. A name has no length limit; empty names and
//! names that the cut of a body goes through are ignored.
//!
//! Records and totals show a label: the name as far as it can be printed, cut to a bound.
//!
//! Never: keep or report a name unchanged.

use std::borrow::Cow;

use http::{HeaderMap, header};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::canon::cursor::{JsonCursor, RawValue};
use super::scan::{BodyField, Scanner};
use super::value::unescape;
use crate::config::types::SessionConfig;

/// The longest name that is its own label, in bytes.
pub const MAX_LABEL_BYTES: usize = 128;

/// The parts of a request that may name its session.
#[derive(Clone, Copy)]
pub struct SessionLookup<'a> {
    /// The session that its path names, decoded.
    pub path: Option<&'a str>,
    pub headers: &'a HeaderMap,
    /// The part of the body that has been read, and its scanner; `None` where the body is no JSON.
    pub body: Option<(&'a [u8], &'a Scanner)>,
    /// As the upstream knows it.
    pub model: &'a str,
}

/// A session, known by a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    pub key: u64,
    pub source: SessionOrigin,
}

/// Where a session's name stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionOrigin {
    Path,
    Header,
    Body,
    Cookie,
}

// === impl Source ===

impl SessionOrigin {
    pub fn label(self) -> &'static str {
        match self {
            SessionOrigin::Path => "path",
            SessionOrigin::Header => "header",
            SessionOrigin::Body => "body",
            SessionOrigin::Cookie => "cookie",
        }
    }
}

// === impl Request ===

impl<'a> SessionLookup<'a> {
    /// The session that the request names, if any, and its label.
    pub fn session(&self, sessions: &SessionConfig) -> Option<(Session, String)> {
        let (name, source) = self.name(sessions)?;
        Some((Session { key: key_of(&name, self.model), source }, printable(&name)))
    }

    fn name(&self, sessions: &SessionConfig) -> Option<(Cow<'a, [u8]>, SessionOrigin)> {
        let borrowed = |source| move |name: &'a [u8]| (Cow::Borrowed(name), source);
        let path = || self.path.map(str::as_bytes).and_then(trimmed_name).map(borrowed(SessionOrigin::Path));
        let header = || sessions.headers.iter().find_map(|name| self.header(name));
        let header = || header().map(borrowed(SessionOrigin::Header));
        let body = || sessions.body.iter().find_map(|field| self.field(field));
        let body = || body().map(|name| (name, SessionOrigin::Body));
        let cookie = || sessions.cookie.as_deref().and_then(|name| self.cookie(name));
        let cookie = || cookie().map(borrowed(SessionOrigin::Cookie));
        path().or_else(header).or_else(body).or_else(cookie)
    }

    fn header(&self, name: &str) -> Option<&'a [u8]> {
        self.headers.get_all(name).iter().find_map(|value| trimmed_name(value.as_bytes()))
    }

    fn cookie(&self, name: &str) -> Option<&'a [u8]> {
        let lines = self.headers.get_all(header::COOKIE).iter();
        let mut pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';'));
        pairs.find_map(|pair| {
            let rest = pair.trim_ascii().strip_prefix(name.as_bytes())?;
            trimmed_name(rest.trim_ascii_start().strip_prefix(b"=")?)
        })
    }

    /// The value of a field; dots in its name separate the objects around it.
    fn field(&self, name: &str) -> Option<Cow<'a, [u8]>> {
        let (body, scanner) = self.body?;
        let (outer, inner) = name.split_once('.').map_or((name, None), |(outer, inner)| (outer, Some(inner)));
        let value = body.get(scanner.span(BodyField::of_key(outer.as_bytes())?)?)?;
        let Some(inner) = inner else {
            return text(RawValue { bytes: value, whole: true });
        };
        let object = JsonCursor::new(value).object(&[inner, "user_id"]);
        let own = object.get(0).ok().flatten().and_then(text);
        if own.is_some() || inner != "session_id" {
            return own;
        }
        claude_code(&text(object.get(1).ok().flatten()?)?).map(Cow::Owned)
    }
}

/// The key of the session of this name, for requests of this model. A name counts without the white space
/// around it.
pub fn key_of(name: &[u8], model: &str) -> u64 {
    xxh3_64_with_seed(name.trim_ascii(), xxh3_64(model.as_bytes()))
}

/// The label of a session: unprintable characters are shown as `\u{fffd}`, and a long name as its beginning
/// with a hash of the whole name. The label of a label is the same label.
pub fn printable(name: &[u8]) -> String {
    let mark = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    // The text of bytes is no shorter than they are, so of a long name its beginning says all that is shown.
    let seen = name.get(..MAX_LABEL_BYTES + 4).unwrap_or(name);
    let mut text: String = String::from_utf8_lossy(seen).chars().map(mark).collect();
    if text.len() > MAX_LABEL_BYTES {
        let mut cut = MAX_LABEL_BYTES - "~0123456789abcdef".len();
        while !text.is_char_boundary(cut) {
            cut -= 1;
        }
        text.truncate(cut);
        text.push_str(&format!("~{:016x}", xxh3_64(name)));
    }
    text
}

/// A name without the white space around it, if it is one.
fn trimmed_name(name: &[u8]) -> Option<&[u8]> {
    let name = name.trim_ascii();
    (!name.is_empty()).then_some(name)
}

/// The text of a string or a number.
fn text(raw: RawValue<'_>) -> Option<Cow<'_, [u8]>> {
    if !raw.whole {
        return None;
    }
    let Some(string) = raw.string() else {
        let is_number = matches!(raw.first(), b'-' | b'0'..=b'9');
        return is_number.then_some(Cow::Borrowed(raw.bytes));
    };
    if memchr::memchr(b'\\', string).is_none() {
        return trimmed_name(string).map(Cow::Borrowed);
    }
    trimmed_name(unescape(string).as_bytes()).map(|name| Cow::Owned(name.to_vec()))
}

/// The session in Claude Code's `user_id`: `user_…_account_…_session_{uuid}`, or an object as text.
fn claude_code(user: &[u8]) -> Option<Vec<u8>> {
    const MARK: &[u8] = b"_session_";
    if user.first() == Some(&b'{') {
        let object = JsonCursor::new(user).object(&["session_id"]);
        return text(object.get(0).ok().flatten()?).map(Cow::into_owned);
    }
    let at = memchr::memmem::rfind(user, MARK)?;
    trimmed_name(&user[at + MARK.len()..]).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    const BODY: &str = r#"{"model":"m","messages":[],"#;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn find(path: Option<&str>, headers: &HeaderMap, body: &str, model: &str) -> Option<Session> {
        let mut scanner = Scanner::new();
        scanner.scan(body.as_bytes());
        let body = Some((body.as_bytes(), &scanner));
        SessionLookup { path, headers, body, model }
            .session(&SessionConfig::default())
            .map(|(session, _)| session)
    }

    /// The session of a name.
    fn named(name: &str, source: SessionOrigin) -> Option<Session> {
        find(Some(name), &HeaderMap::new(), "", "m").map(|session| Session { source, ..session })
    }

    fn in_body(fields: &str) -> Option<Session> {
        find(None, &HeaderMap::new(), &format!("{BODY}{fields}}}"), "m")
    }

    #[test]
    fn the_first_place_that_names_a_session_counts() {
        let all =
            headers(&[("x-rllm-session-id", "h2"), ("x-session-id", "h1"), ("cookie", "vllm_lb_session=c")]);
        let body = r#"{"user":"u","session_id":"b"}"#;
        let without = |name| {
            let mut fewer = all.clone();
            fewer.remove(name);
            fewer
        };
        let cookie = headers(&[("cookie", "vllm_lb_session=c")]);
        for (path, headers, body, name, source) in [
            (Some("p"), &all, body, "p", SessionOrigin::Path),
            (Some(""), &all, body, "h1", SessionOrigin::Header),
            (None, &without("x-session-id"), body, "h2", SessionOrigin::Header),
            (None, &cookie, body, "b", SessionOrigin::Body),
            (None, &cookie, r#"{"user":"u"}"#, "u", SessionOrigin::Body),
            (None, &cookie, "{}", "c", SessionOrigin::Cookie),
        ] {
            let expected = named(name, source);
            assert!(expected.is_some());
            assert_eq!(find(path, headers, body, "m"), expected, "{path:?} {headers:?} {body}");
        }
        assert_eq!(find(None, &HeaderMap::new(), "{}", "m"), None);
        let no_body = SessionLookup { path: None, headers: &HeaderMap::new(), body: None, model: "m" };
        assert_eq!(no_body.session(&SessionConfig::default()), None);
    }

    #[test]
    fn only_what_the_configuration_lists_is_looked_at() {
        let headers = headers(&[("x-session-id", "h"), ("x-mine", "mine"), ("cookie", "sid=c")]);
        let mut scanner = Scanner::new();
        let body = br#"{"session_id":"b","metadata":{"chat":"m"}}"#;
        scanner.scan(body);
        let request =
            SessionLookup { path: None, headers: &headers, body: Some((body, &scanner)), model: "m" };
        let nothing =
            SessionConfig { headers: vec![], body: vec![], cookie: None, ..SessionConfig::default() };
        assert_eq!(request.session(&nothing), None);
        let session = |sessions: &SessionConfig| request.session(sessions).map(|(session, _)| session);
        for (sessions, name, source) in [
            (
                SessionConfig { headers: vec!["x-mine".into()], ..nothing.clone() },
                "mine",
                SessionOrigin::Header,
            ),
            (
                SessionConfig { body: vec!["metadata.chat".into()], ..nothing.clone() },
                "m",
                SessionOrigin::Body,
            ),
            (SessionConfig { cookie: Some("sid".into()), ..nothing.clone() }, "c", SessionOrigin::Cookie),
        ] {
            assert_eq!(session(&sessions), named(name, source), "{sessions:?}");
        }
    }

    #[test]
    fn a_session_is_told_as_it_is_written_as_far_as_it_can_be_printed() {
        let headers = headers(&[("x-session-id", " sess-1 ")]);
        let request = SessionLookup { path: None, headers: &headers, body: None, model: "m" };
        assert_eq!(request.session(&SessionConfig::default()).unwrap().1, "sess-1");
        for (name, told) in [
            (&b"a b/\xc3\xa9"[..], "a b/\u{e9}"),
            (b"a\nb\x1b[1m", "a\u{fffd}b\u{fffd}[1m"),
            (b"\xff", "\u{fffd}"),
        ] {
            assert_eq!(printable(name), told);
        }
        let long = "\u{e9}".repeat(100);
        assert_ne!(printable(format!("{long}1").as_bytes()), printable(format!("{long}2").as_bytes()));
        assert_eq!(printable("x".repeat(MAX_LABEL_BYTES).as_bytes()), "x".repeat(MAX_LABEL_BYTES));
    }

    #[test]
    fn fields_of_a_body() {
        for (fields, name) in [
            (r#""session_id":"a""#, Some("a")),
            (r#""session_id":" a ""#, Some("a")),
            (r#""session_id":"a\u00e9\n""#, Some("a\u{e9}")),
            (r#""s\u0065ssion_id":"a""#, Some("a")),
            (r#""session_id":17"#, Some("17")),
            (r#""session_id":"a","session_id":"b""#, Some("b")),
            (r#""session_id":"""#, None),
            (r#""session_id":"  ""#, None),
            (r#""session_id":null"#, None),
            (r#""session_id":true"#, None),
            (r#""session_id":["a"]"#, None),
            (r#""session_id":"","prompt_cache_key":"k""#, Some("k")),
            (r#""prompt_cache_key":"k","user":"u""#, Some("k")),
            (r#""metadata":{"x":1,"session_id":"s"},"user":"u""#, Some("s")),
            (r#""metadata":{"session_id":{"session_id":"s"}},"user":"u""#, Some("u")),
            (r#""metadata":{"rllm":{"session_id":"s"}}"#, None),
            (r#""metadata":"session_id","user":"u""#, Some("u")),
            (r#""metadata":null"#, None),
            (r#""metadata":{"user_id":"user_1f_account__session_0b-5"}"#, Some("0b-5")),
            (r#""metadata":{"user_id":"user_1f_account__session_"},"user":"u""#, Some("u")),
            (r#""metadata":{"user_id":"somebody"},"user":"u""#, Some("u")),
            (r#""metadata":{"user_id":"a_session_b","session_id":"s"}"#, Some("s")),
            (r#""metadata":{"user_id":"{\"device_id\":\"d\",\"session_id\":\"s\"}"}"#, Some("s")),
            (r#""metadata":{"user_id":"{\"session_id\":"}"#, None),
            (r#""messages":[{"session_id":"no"}]"#, None),
        ] {
            let expected = name.and_then(|name| named(name, SessionOrigin::Body));
            assert_eq!(in_body(fields), expected, "{fields}");
        }
    }

    #[test]
    fn a_field_that_is_cut_is_none() {
        let body = r#"{"session_id":"abc"}"#;
        for end in 0..body.len() - 1 {
            assert_eq!(find(None, &HeaderMap::new(), &body[..end], "m"), None, "{end}");
        }
    }

    #[test]
    fn cookies() {
        for (line, name) in [
            ("vllm_lb_session=a", Some("a")),
            ("b=1; vllm_lb_session=a=b; c", Some("a=b")),
            (" vllm_lb_session = a ;", Some("a")),
            ("vllm_lb_session_x=1", None),
            ("x_vllm_lb_session=1", None),
            ("vllm_lb_session=", None),
            ("vllm_lb_session", None),
            (";;=", None),
        ] {
            let expected = name.and_then(|name| named(name, SessionOrigin::Cookie));
            assert_eq!(find(None, &headers(&[("cookie", line)]), "{}", "m"), expected, "{line}");
        }
        let two = headers(&[("cookie", "a=1"), ("cookie", "vllm_lb_session=a")]);
        assert_eq!(find(None, &two, "{}", "m"), named("a", SessionOrigin::Cookie));
    }

    #[test]
    fn another_model_is_another_session_and_a_long_name_is_known_to_its_end() {
        let none = HeaderMap::new();
        assert_ne!(find(Some("a"), &none, "", "m"), find(Some("a"), &none, "", "n"));
        let long = "x".repeat(1 << 20);
        let longer = format!("{long}y");
        assert_ne!(named(&long, SessionOrigin::Path), named(&longer, SessionOrigin::Path));
        assert_eq!(
            named("a", SessionOrigin::Path).unwrap().key,
            9_143_808_475_024_823_649,
            "balancers must agree"
        );
        assert_eq!(key_of(b" a ", "m"), named("a", SessionOrigin::Header).unwrap().key);
    }

    proptest! {
        #[test]
        fn a_name_is_the_same_session_wherever_it_stands(name in "[a-zA-Z0-9_:/-]{1,40}") {
            let key = named(&name, SessionOrigin::Path).unwrap().key;
            let body = serde_json::json!({"prompt_cache_key": name}).to_string();
            for session in [
                find(None, &headers(&[("x-session-id", &name)]), "{}", "m"),
                find(None, &headers(&[("cookie", &format!("vllm_lb_session={name}"))]), "{}", "m"),
                find(None, &HeaderMap::new(), &body, "m"),
            ] {
                prop_assert_eq!(session.unwrap().key, key);
            }
        }

        #[test]
        fn what_is_told_is_short_and_told_the_same_again(name in any::<Vec<u8>>(), times in 1..40_usize) {
            let told = printable(&name.repeat(times));
            prop_assert!(told.len() <= MAX_LABEL_BYTES && !told.contains(char::is_control));
            prop_assert_eq!(printable(told.as_bytes()), told);
        }

        #[test]
        fn any_bytes_are_taken(body in any::<Vec<u8>>(), metadata in any::<String>()) {
            let tail = serde_json::json!({"metadata": {"user_id": metadata}}).to_string();
            for body in [body.as_slice(), tail.as_bytes()] {
                let mut scanner = Scanner::new();
                scanner.scan(body);
                let body = Some((body, &scanner));
                let headers = HeaderMap::new();
                let lookup = SessionLookup { path: None, headers: &headers, body, model: "" };
                lookup.session(&SessionConfig::default());
            }
        }
    }
}
