//! Finds vLLM's API route of a request, and the balancer's policy for it.
//!
//! The balancer looks like one vLLM to a client, so methods and paths match as in FastAPI, with its 404, 405
//! and 307. Three rules are stricter: a path with broken percent escapes, or with an escaped control
//! character, is rejected; so is one with `.` or `..` as a segment, which an upstream may resolve to another
//! path than the matched one; and a denied route answers as if it did not exist.
//!
//! Never: choose an upstream, read a body, interpret a path beyond a comparison of bytes.

mod api;
mod table;

use std::borrow::Cow;
use std::sync::Arc;

pub use self::api::{Api, ErrorStyle, ModelLocation};
use self::table::{API_ROUTES, ApiRouteRow, PolicyRule, fit};
pub use self::table::{AggregateKind, OwnAnswer};
use crate::config::types::{Passthrough, PassthroughTarget};

/// The way in which a request is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPolicy {
    /// To one upstream that serves the model; with `prefix`, by the cached blocks of the prompt, too.
    Route { prefix: bool },
    /// To the upstream that made the response of this id.
    Sticky { id: String },
    /// The balancer answers with a summary of all upstreams' answers.
    Aggregate(AggregateKind),
    /// To every upstream.
    FanOut,
    /// To this upstream only, as configured.
    Upstream(Arc<str>),
    /// The balancer answers itself.
    Answer(OwnAnswer),
    /// 404 `{"detail":"Not Found"}`, as if it did not exist.
    Deny,
}

/// The API of a path, and what the balancer does with its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiRoute {
    pub api: Api,
    pub policy: PathPolicy,
}

/// The result of matching a method and a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    Route(ApiRoute),
    /// 404 `{"detail":"Not Found"}`
    NotFound,
    /// 405 `{"detail":"Method Not Allowed"}` with this `allow` header.
    MethodNotAllowed {
        allow: &'static str,
    },
    /// 307 with an empty body to this path, decoded: see [`location`].
    Redirect {
        to: String,
    },
}

/// The API's paths, with the configured passthrough paths.
#[derive(Clone, Debug, Default)]
pub struct PathTable {
    passthrough: Vec<(String, PathPolicy)>,
}

impl PathTable {
    pub fn new(passthrough: &[Passthrough]) -> Self {
        let policy = |to: &PassthroughTarget| match to {
            PassthroughTarget::All => PathPolicy::FanOut,
            PassthroughTarget::Upstream(name) => PathPolicy::Upstream(name.as_str().into()),
        };
        PathTable {
            passthrough: passthrough.iter().map(|item| (item.path.clone(), policy(&item.to))).collect(),
        }
    }

    /// The route of a method and a decoded path without its query.
    pub fn find(&self, method: &str, path: &str) -> PathMatch {
        match self.match_path(method, path) {
            PathMatch::NotFound if path != "/" => self.with_other_slash(method, path),
            found => found,
        }
    }

    /// Redirects a path that matches except for its last slash, whether or not the method fits.
    fn with_other_slash(&self, method: &str, path: &str) -> PathMatch {
        let to = match path.strip_suffix('/') {
            Some(_) => path.trim_end_matches('/').to_owned(),
            None => format!("{path}/"),
        };
        match self.match_path(method, &to) {
            PathMatch::NotFound | PathMatch::Route(ApiRoute { policy: PathPolicy::Deny, .. }) => {
                PathMatch::NotFound
            }
            _ => PathMatch::Redirect { to },
        }
    }

    fn match_path(&self, method: &str, path: &str) -> PathMatch {
        let mut found = PathMatch::NotFound;
        let mut known = false;
        for row in API_ROUTES {
            let Some(inside) = fit(row.path, path) else {
                continue;
            };
            known = true;
            let policy = self.policy(row, path, inside);
            if row.verb.allows(method) {
                return PathMatch::Route(ApiRoute { api: row.api, policy });
            }
            if found == PathMatch::NotFound && policy != PathPolicy::Deny {
                found = PathMatch::MethodNotAllowed { allow: row.verb.allow() };
            }
        }
        // A plugin's path: its methods are unknown.
        match self.passthrough_policy(path) {
            Some(policy) if !known => {
                PathMatch::Route(ApiRoute { api: Api::Control, policy: policy.clone() })
            }
            _ => found,
        }
    }

    fn policy(&self, row: &ApiRouteRow, path: &str, inside: &str) -> PathPolicy {
        match row.rule {
            PolicyRule::Prefix => PathPolicy::Route { prefix: true },
            PolicyRule::Least => PathPolicy::Route { prefix: false },
            PolicyRule::Sticky => PathPolicy::Sticky { id: inside.to_owned() },
            PolicyRule::Aggregate(what) => PathPolicy::Aggregate(what),
            PolicyRule::FanOut => PathPolicy::FanOut,
            PolicyRule::Answer(what) => PathPolicy::Answer(what),
            PolicyRule::Deny => self.passthrough_policy(path).cloned().unwrap_or(PathPolicy::Deny),
        }
    }

    fn passthrough_policy(&self, path: &str) -> Option<&PathPolicy> {
        self.passthrough.iter().find(|(pattern, _)| fit(pattern, path).is_some()).map(|(_, policy)| policy)
    }
}

/// The path of vLLM's API that a request's path fits, with names for what differs: `/v1/responses/{id}`. A
/// session in the path is left out.
pub fn template(path: &str) -> Option<&'static str> {
    let path = of_session(path).map_or(path, |(_, rest)| rest);
    API_ROUTES.iter().map(|row| row.path).find(|pattern| fit(pattern, path).is_some())
}

/// A path with `query`, in which the model is replaced.
pub fn with_model(path: &str, query: &str, model: &str) -> String {
    let mut out = format!("{path}?model=");
    for byte in model.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("model=")) {
        out.push('&');
        out.push_str(pair);
    }
    out
}

/// The session in a path, and the path without it: `/sessions/{id}/v1/…` is `/v1/…`. The path comes without
/// its query; an id may contain slashes and ends before the first `/v1`.
pub fn of_session(path: &str) -> Option<(Cow<'_, str>, &str)> {
    let Some(inside) = path.strip_prefix("/sessions/") else {
        return of_rollout(path).map(|(id, rest)| (Cow::Borrowed(id), rest));
    };
    let ends = |at: &usize| *at > 0 && is_versioned(&inside[*at..]);
    let at = inside.match_indices("/v1").map(|(at, _)| at).find(ends)?;
    let (id, rest) = inside.split_at(at);
    Some((decode(id)?, rest))
}

/// The rollout in a path of NeMo Gym's model servers, and the path without it:
/// `/ng-rollout/{id}/v1/…` and `/ng-rollout/{id}/training-token-capture/v1/…` are `/v1/…`.
fn of_rollout(path: &str) -> Option<(&str, &str)> {
    let inside = path.strip_prefix("/ng-rollout/")?;
    let (id, rest) = inside.split_at(inside.find('/')?);
    let rest = rest.strip_prefix("/training-token-capture").unwrap_or(rest);
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let is_id = id.starts_with(|first: char| first.is_ascii_alphanumeric()) && id.bytes().all(is_part);
    (is_id && is_versioned(rest)).then_some((id, rest))
}

/// Whether the first segment of a path is `v1`.
fn is_versioned(path: &str) -> bool {
    path.strip_prefix("/v1").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The absolute `location` of a redirect. `host` is the request's `host` header, `query` its unchanged query.
/// A path or host can contain any bytes, so bytes that could end the header or the URL are escaped.
pub fn location(https: bool, host: &str, path: &str, query: Option<&str>) -> String {
    let mut url = String::from(if https { "https://" } else { "http://" });
    escape_into(&mut url, host, b":[]%");
    url.push_str(&escape_path(path));
    if let Some(query) = query.filter(|query| !query.is_empty()) {
        url.push('?');
        escape_into(&mut url, query, b"/:@!$&'()*+,;=?%[]");
    }
    url
}

/// Escapes any text as a path of a URL.
pub fn escape_path(path: &str) -> String {
    let mut escaped = String::with_capacity(path.len());
    escape_into(&mut escaped, path, b"/:@!$&'()*+,;=");
    escaped
}

fn escape_into(url: &mut String, text: &str, safe: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || safe.contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push('%');
            url.push(char::from(HEX[usize::from(byte >> 4)]));
            url.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

/// Decodes a path for matching. `None`: broken escapes, invalid UTF-8, control characters, or `.` and `..`
/// segments; no route of vLLM has any of these.
pub fn decode(path: &str) -> Option<Cow<'_, str>> {
    let decoded = if path.contains('%') { Cow::Owned(decode_escapes(path)?) } else { Cow::Borrowed(path) };
    let is_plain =
        !decoded.chars().any(char::is_control) && !decoded.split('/').any(|part| part == "." || part == "..");
    is_plain.then_some(decoded)
}

/// Decodes percent escapes; `None` when they are broken or the result is not UTF-8.
pub fn decode_escapes(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let value = digit()? << 4 | digit()?;
        decoded.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests;
