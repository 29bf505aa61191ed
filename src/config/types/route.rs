//! A route: the requests it matches, where they go, and what is changed on the way.

use serde_json::{Map, Value};

use super::retry::Retry;
use super::timeouts::Timeouts;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::setting::{
    NamedChoice, SettingRow, SettingsTable, choice, maybe, maybe_texts, object, pairs, partly_masked_pairs,
    row, secret, section, switch, text, texts, value,
};
use crate::config::values::{ReadResult, plain, url_path};

/// A route of the file: a virtual model.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteConfig {
    /// The requested model, exactly or with `*`; `None` matches every request.
    pub model: Option<String>,
    pub path: Option<String>,
    /// Headers that must all be present and equal; names are in lower case.
    pub header: Vec<(String, String)>,
    /// The name by which the upstreams serve the model.
    pub to: Option<String>,
    /// The names of the upstreams that may be chosen; `None` is all.
    pub upstreams: Option<Vec<String>>,
    pub headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    pub body: BodyEdits,
    /// Whether token ids and log-probabilities are requested and put on the message.
    pub token_ids: bool,
    /// Whether reasoning stands in the content, between `<think>` and `</think>`.
    pub think_tags: bool,
    pub overflow: OverflowPolicy,
    /// The form in which a request to `/v1/responses` is forwarded.
    pub responses: UpstreamForm,
    /// The form in which a request to `/v1/messages`, or for the count of its tokens, is forwarded.
    pub messages: UpstreamForm,
    /// Whether JSON in `metadata.chat_template_kwargs` and `metadata.extra_body` goes before `body.defaults`.
    pub metadata_overrides: bool,
    /// Sent as `Authorization: Bearer` in place of the client's and of the upstream's.
    pub api_key: Option<Secret>,
    /// Complete: keys that the route does not set have the values of `timeouts`.
    pub timeouts: Timeouts,
    /// Complete: keys that the route does not set have the values of `retry`.
    pub retry: Retry,
}

impl RouteConfig {
    /// A route that matches every request and changes nothing.
    pub fn new(timeouts: Timeouts, retry: Retry) -> Self {
        RouteConfig {
            model: None,
            path: None,
            header: Vec::new(),
            to: None,
            upstreams: None,
            headers: HeaderEdits::default(),
            response_headers: HeaderEdits::default(),
            body: BodyEdits::default(),
            token_ids: false,
            think_tags: false,
            overflow: OverflowPolicy::Error,
            responses: UpstreamForm::Native,
            messages: UpstreamForm::Native,
            metadata_overrides: false,
            api_key: None,
            timeouts,
            retry,
        }
    }

    /// The name of the route in logs and metrics; `index` is its place in the configuration.
    pub fn name(&self, index: usize) -> String {
        self.model.clone().or_else(|| self.path.clone()).unwrap_or_else(|| format!("routes[{index}]"))
    }
}

/// Headers to set, in place of all of the same name, and names to remove; names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub set: Vec<(String, String)>,
    pub remove: Vec<String>,
}

/// Changes of the JSON of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BodyEdits {
    /// Fields for requests that do not have them.
    pub defaults: Map<String, Value>,
    /// A merge patch (RFC 7396), which goes before the fields of the request; null removes.
    pub overrides: Map<String, Value>,
    /// Fields that never reach the upstream.
    pub remove: Vec<String>,
    /// Roles of messages: the role of the request, and the role that replaces it.
    pub roles: Vec<(String, String)>,
}

/// The answer to a prompt that is longer than the model's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverflowPolicy {
    /// The 400 of the upstream.
    Error,
    /// An empty answer with the finish reason `length`.
    Length,
}

/// The form in which requests that are no chats are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamForm {
    /// As the client sends them.
    Native,
    /// As a chat, whose answer is translated into the client's form.
    Chat,
}

impl NamedChoice for UpstreamForm {
    const NAMES: &'static [&'static str] = &["native", "chat"];
    const VALUES: &'static [Self] = &[UpstreamForm::Native, UpstreamForm::Chat];
}

impl NamedChoice for OverflowPolicy {
    const NAMES: &'static [&'static str] = &["error", "length"];
    const VALUES: &'static [Self] = &[OverflowPolicy::Error, OverflowPolicy::Length];
}

// === impl RouteConfig ===

impl SettingsTable for RouteConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "model",
            "Model that the client requests, exactly or with `*` for any characters; any by default.",
            &value(|route: &mut Self| &mut route.model, maybe(text("model name", plain))),
        ),
        row(
            "path",
            "Path of the request, exactly, without query; any by default.",
            &value(|route: &mut Self| &mut route.path, maybe(text("URL path", url_path))),
        ),
        row(
            "header",
            "Headers that must all be present with these values.",
            &value(
                |route: &mut Self| &mut route.header,
                partly_masked_pairs("map of header values", matched_header, shown_header),
            ),
        ),
        row(
            "to",
            "Name by which the upstreams serve the model; the answer carries the client's name.",
            &value(|route: &mut Self| &mut route.to, maybe(text("model name", plain))),
        ),
        row(
            "upstreams",
            "Names of the upstreams that may get the requests; by default all that serve the model.",
            &value(
                |route: &mut Self| &mut route.upstreams,
                maybe_texts("list of upstream names", plain).not_empty("leave the key out for all upstreams"),
            ),
        ),
        row("headers", "Headers towards the upstream.", &section(|route: &mut Self| &mut route.headers)),
        row(
            "response_headers",
            "Headers towards the client.",
            &section(|route: &mut Self| &mut route.response_headers),
        ),
        row("body", "Changes of the request's body.", &section(|route: &mut Self| &mut route.body)),
        row(
            "token_ids",
            "Whether token ids and log-probabilities are requested and put on the messages of a chat.",
            &value(|route: &mut Self| &mut route.token_ids, switch()),
        ),
        row(
            "think_tags",
            "Whether the reasoning of a chat stands in its content, between `<think>` and `</think>`.",
            &value(|route: &mut Self| &mut route.think_tags, switch()),
        ),
        row(
            "overflow",
            "Answer to a prompt longer than the context: the upstream's error, or an empty answer.",
            &value(|route: &mut Self| &mut route.overflow, choice()),
        ),
        row(
            "responses",
            "Whether requests to /v1/responses go to the upstreams as they are or as chats.",
            &value(|route: &mut Self| &mut route.responses, choice()),
        ),
        row(
            "messages",
            "Whether requests to /v1/messages go to the upstreams as they are or as chats.",
            &value(|route: &mut Self| &mut route.messages, choice()),
        ),
        row(
            "metadata_overrides",
            "Whether JSON in metadata.chat_template_kwargs and metadata.extra_body is applied.",
            &value(|route: &mut Self| &mut route.metadata_overrides, switch()),
        ),
        row(
            "api_key",
            "Key that is sent as `Authorization: Bearer` in place of the client's and the upstream's.",
            &value(|route: &mut Self| &mut route.api_key, maybe(secret())),
        ),
        row(
            "timeouts",
            "Time limits of the route; each begins with the value of `timeouts`.",
            &section(|route: &mut Self| &mut route.timeouts),
        ),
        row(
            "retry",
            "Retries of the route; each key begins with the value of `retry`.",
            &section(|route: &mut Self| &mut route.retry),
        ),
    ];

    fn defaults() -> Self {
        RouteConfig::new(Timeouts::default(), Retry::default())
    }
}

// === impl HeaderEdits ===

/// Headers that frame a message or belong to one connection; only the balancer sets them.
const FRAMING_HEADERS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Words in the name of a header with a masked value.
const SECRET_WORDS: [&str; 5] = ["auth", "key", "token", "secret", "cookie"];

impl SettingsTable for HeaderEdits {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "set",
            "Headers that are set, in place of those of the same name.",
            &value(
                |edits: &mut Self| &mut edits.set,
                partly_masked_pairs("map of header values", changed_header, shown_header),
            ),
        ),
        row(
            "remove",
            "Headers that are removed.",
            &value(|edits: &mut Self| &mut edits.remove, texts("list of header names", changeable_name)),
        ),
    ];

    fn defaults() -> Self {
        HeaderEdits::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        if let Some((name, _)) = self.set.iter().find(|(name, _)| self.remove.contains(name)) {
            report("remove", format!("{} is in set too", seen(name)));
        }
    }
}

/// Parses a header that is only compared, and so may have any name.
fn matched_header(name: &str, value: &str) -> ReadResult<(String, String)> {
    Ok((header_name(name)?, header_value(value)?))
}

/// Parses a header that is set.
pub fn changed_header(name: &str, value: &str) -> ReadResult<(String, String)> {
    Ok((changeable_name(name)?, header_value(value)?))
}

/// The value of a header, masked where the name says that it is secret.
fn shown_header(name: &str, value: &str) -> String {
    let is_secret = SECRET_WORDS.iter().any(|word| name.contains(word));
    if is_secret { Secret::new(value).to_string() } else { value.to_owned() }
}

fn header_name(text: &str) -> ReadResult<String> {
    match http::HeaderName::from_bytes(text.as_bytes()) {
        Ok(name) => Ok(name.as_str().to_owned()),
        Err(_) => Err(format!("{} is no name of a header", seen(text))),
    }
}

fn changeable_name(text: &str) -> ReadResult<String> {
    let name = header_name(text)?;
    if FRAMING_HEADERS.contains(&name.as_str()) {
        return Err(format!("{} is the balancer's own and cannot be changed", seen(text)));
    }
    Ok(name)
}

/// Parses a value; the message does not show it, since it may be a key.
fn header_value(text: &str) -> ReadResult<String> {
    let clean = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if !clean || text.trim() != text {
        return Err("must be visible ASCII characters, with blanks only between them".into());
    }
    Ok(text.to_owned())
}

// === impl BodyEdits ===

/// The most steps of a path to a field that is removed.
const MAX_PATH_STEPS: usize = 8;

impl SettingsTable for BodyEdits {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "defaults",
            "Fields of the request where the client gives none, merged into maps key by key.",
            &value(|body: &mut Self| &mut body.defaults, object()),
        ),
        row(
            "overrides",
            "Fields of the request whatever the client gives, as a merge patch (RFC 7396).",
            &value(|body: &mut Self| &mut body.overrides, object()),
        ),
        row(
            "remove",
            "Fields, or paths such as tools[].strict, that the upstream does not get.",
            &value(|body: &mut Self| &mut body.remove, texts("list of fields", field_path)),
        ),
        row(
            "roles",
            "Roles of messages, and the roles that replace them.",
            &value(
                |body: &mut Self| &mut body.roles,
                pairs("map of roles", |from, to| Ok((from.to_owned(), to.to_owned()))),
            ),
        ),
    ];

    fn defaults() -> Self {
        BodyEdits::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        let chain = self.roles.iter().find(|(_, to)| self.roles.iter().any(|(from, _)| from == to));
        if let Some((from, to)) = chain {
            let (from, to) = (seen(from), seen(to));
            report("roles", format!("{from} becomes {to}, which becomes another: write what is meant"));
        }
    }
}

/// Parses a field of a body, or a path to one: `a.b` into a map, `a[].b` into every item of a list.
fn field_path(text: &str) -> ReadResult<String> {
    let path = plain(text)?;
    let mut steps: Vec<&str> = text.split('.').collect();
    let field = steps.pop().unwrap_or_default();
    let keys = steps.iter().map(|step| step.strip_suffix("[]").unwrap_or(step)).chain([field]);
    let is_key = |key: &str| !key.is_empty() && !key.contains(['[', ']']);
    if steps.len() >= MAX_PATH_STEPS || !keys.clone().all(is_key) {
        return Err(format!(
            "{} is neither a field nor a path to one, as a.b or tools[].strict, of {MAX_PATH_STEPS} steps at \
             most",
            seen(text)
        ));
    }
    if ["messages", "input"].contains(&keys.clone().next().unwrap_or_default()) && !steps.is_empty() {
        return Err(format!(
            "{} leads into the client's messages, which only body.roles changes",
            seen(text)
        ));
    }
    Ok(path)
}
