//! The session of a request: the key that connects the turns of a conversation.
//!
//! A client may name it in four places; the first one that holds a name counts: the path
//! (`/sessions/{id}/v1/…`), the headers, the fields of the body and the cookie that the configuration lists,
//! in the order of its lists. The same name in another place is the same session. Claude Code writes its
//! session into `metadata.user_id`, which is read where `metadata.session_id` is configured and missing.
//!
//! The key is a hash of the name and the model: an agent may use two models in one session, and their
//! caches have nothing in common. It is the same in every balancer. A name has no length limit; empty names
//! and names that the cut of a body goes through are ignored.
//!
//! An agent may start others, which work beside it:
//!
//! | client | session | subagent |
//! | --- | --- | --- |
//! | Claude Code | `x-claude-code-session-id`, one for all | `x-claude-code-agent-id`, not of the first one |
//! | Codex | `session-id`, one for all | `thread-id`, of the first agent the same as its session |
//! | OpenCode | `x-session-affinity`, of each agent its own | `x-parent-session-id`, the session above it |
//!
//! With `sessions.subagents: own` the name of the subagent is part of the key; with `follow` the key is that
//! of the agent above it.
//!
//! Records and totals show a label: the name as far as it can be printed, cut to a bound, the same for all
//! agents that share it.
//!
//! Never: keep or report a name unchanged.

mod cookie;
mod name;

use std::borrow::Cow;

use http::{HeaderMap, HeaderName};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::scan::{BodyField, Scanner};
use crate::config::types::{SessionConfig, SubagentSessions};
use crate::json::RawValue;
use cookie::CookiePattern;
use name::{member, text, trimmed_name};

/// The longest name that is its own label, in bytes.
pub(crate) const MAX_LABEL_BYTES: usize = 128;

/// The session of the agent that started the one that calls, as OpenCode sends it.
const PARENT_HEADER: &str = "x-parent-session-id";

/// The agent of a session that several agents share, as Claude Code and Codex send it.
const AGENT_HEADERS: [&str; 2] = ["x-claude-code-agent-id", "thread-id"];

/// The configured locations of session names, prepared for the lookup.
#[derive(Clone, Debug)]
pub(crate) struct SessionPlaces {
    headers: Vec<HeaderName>,
    fields: Vec<FieldPath>,
    cookies: Vec<CookiePattern>,
    /// The headers that distinguish the agents of a session; empty when all agents share one session.
    agents: Vec<HeaderName>,
}

/// A field of the body: one at the top, or one within objects.
#[derive(Clone, Debug)]
struct FieldPath {
    top: BodyField,
    inner: Vec<String>,
    /// Where it is missing, the session counts that Claude Code writes into `metadata.user_id`.
    or_claude_code: bool,
}

/// The parts of a request that may name its session.
#[derive(Clone, Copy)]
pub(crate) struct SessionLookup<'a> {
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

/// The location of a session's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionOrigin {
    Path,
    Header,
    Body,
    Cookie,
}

// === impl SessionOrigin ===

impl SessionOrigin {
    /// The name in logs and decisions.
    pub fn label(self) -> &'static str {
        match self {
            SessionOrigin::Path => "path",
            SessionOrigin::Header => "header",
            SessionOrigin::Body => "body",
            SessionOrigin::Cookie => "cookie",
        }
    }

    /// Whether this location takes precedence over the body.
    pub fn is_before_body(self) -> bool {
        matches!(self, SessionOrigin::Path | SessionOrigin::Header)
    }
}

// === impl SessionPlaces ===

impl SessionPlaces {
    pub(crate) fn new(sessions: &SessionConfig) -> Self {
        let name = |name: &str| HeaderName::from_bytes(name.as_bytes()).ok();
        let follow = sessions.subagents == SubagentSessions::Follow;
        // The session above the caller's counts before the caller's own.
        let parent = [PARENT_HEADER].into_iter().filter(|_| follow && !sessions.headers.is_empty());
        let headers = parent.chain(sessions.headers.iter().map(String::as_str)).filter_map(name).collect();
        let agents = AGENT_HEADERS.into_iter().filter(|_| !follow).filter_map(name).collect();
        SessionPlaces {
            headers,
            fields: sessions.body.iter().filter_map(|text| FieldPath::new(text)).collect(),
            cookies: sessions.cookies.iter().map(|text| CookiePattern::new(text)).collect(),
            agents,
        }
    }
}

// === impl FieldPath ===

impl FieldPath {
    /// Dots separate the objects around a field; `None`: the scanner does not know the first name.
    fn new(text: &str) -> Option<Self> {
        let mut names = text.split('.');
        let top = BodyField::of_key(names.next()?.as_bytes())?;
        let inner = names.map(str::to_string).collect();
        Some(FieldPath { top, inner, or_claude_code: text == "metadata.session_id" })
    }
}

// === impl SessionLookup ===

impl<'a> SessionLookup<'a> {
    /// The session that the request names, if any, and its label.
    pub(crate) fn session(&self, places: &SessionPlaces) -> Option<(Session, String)> {
        let (name, source) = self.name(places)?;
        let mut key = key_of(&name, self.model);
        // Codex calls the first agent by the name of its session.
        if let Some(agent) = self.header(&places.agents).filter(|agent| *agent != &*name) {
            key = xxh3_64_with_seed(agent, key);
        }
        Some((Session { key, source }, printable(&name)))
    }

    fn name(&self, places: &SessionPlaces) -> Option<(Cow<'a, [u8]>, SessionOrigin)> {
        let borrowed = |source| move |name: &'a [u8]| (Cow::Borrowed(name), source);
        let path = || self.path.map(str::as_bytes).and_then(trimmed_name).map(borrowed(SessionOrigin::Path));
        let header = || self.header(&places.headers).map(borrowed(SessionOrigin::Header));
        let body = || places.fields.iter().find_map(|field| self.field(field));
        let body = || body().map(|name| (name, SessionOrigin::Body));
        let cookie = || cookie::session(self.headers, &places.cookies);
        let cookie = || cookie().map(|name| (name, SessionOrigin::Cookie));
        path().or_else(header).or_else(body).or_else(cookie)
    }

    /// The first value of the first of these headers.
    fn header(&self, names: &[HeaderName]) -> Option<&'a [u8]> {
        let values =
            |name| self.headers.get_all(name).iter().find_map(|value| trimmed_name(value.as_bytes()));
        names.iter().find_map(values)
    }

    fn field(&self, path: &FieldPath) -> Option<Cow<'a, [u8]>> {
        let (body, scanner) = self.body?;
        let top = RawValue { bytes: body.get(scanner.span(path.top)?)?, whole: true };
        let own = path.inner.iter().try_fold(top, |object, name| member(object, name)).and_then(text);
        if own.is_some() || !path.or_claude_code {
            return own;
        }
        claude_code(&text(member(top, "user_id")?)?).map(Cow::Owned)
    }
}

/// The key of the session of this name, for requests of this model. A name counts without the white space
/// around it.
pub(crate) fn key_of(name: &[u8], model: &str) -> u64 {
    xxh3_64_with_seed(name.trim_ascii(), xxh3_64(model.as_bytes()))
}

/// The label of a session: unprintable characters are shown as `\u{fffd}`, and a long name as its beginning
/// with a hash of the whole name. The label of a label is the same label.
pub(crate) fn printable(name: &[u8]) -> String {
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

/// The session in Claude Code's `user_id`: `user_…_account_…_session_{uuid}`, or an object as text.
fn claude_code(user: &[u8]) -> Option<Vec<u8>> {
    const MARK: &[u8] = b"_session_";
    if user.first() == Some(&b'{') {
        let object = RawValue { bytes: user, whole: true };
        return text(member(object, "session_id")?).map(Cow::into_owned);
    }
    let at = memchr::memmem::rfind(user, MARK)?;
    trimmed_name(&user[at + MARK.len()..]).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests;
