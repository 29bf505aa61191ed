//! Where requests name their session, and what a session is worth.

use std::time::Duration;

use serde_json::{Value, json};

use crate::config::problem::seen;
use crate::config::setting::{
    MapSource, NamedChoice, SettingRow, SettingsTable, ValueForm, choice, duration, number, row, texts, value,
};
use crate::config::values::{DAY, ReadResult, SECOND, header_name};
use crate::names::SESSION_COOKIE;

/// The places in which requests name their session, and the weight of a session in a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionConfig {
    /// Header names in lower case; the first that is present counts.
    pub headers: Vec<String>,
    /// Fields of the body: one of [`FIELDS`](Self::FIELDS), or one inside of [`OBJECTS`](Self::OBJECTS), with
    /// dots between the names.
    pub body: Vec<String>,
    /// Names of cookies, in which `*` stands for any text.
    pub cookies: Vec<String>,
    pub subagents: SubagentSessions,
    /// The cost of leaving the last upstream, for each prompt token that only that upstream holds.
    pub bonus: f64,
    /// How long a session is remembered after its last request.
    pub ttl: Duration,
}

/// The session of an agent that another agent has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubagentSessions {
    /// A session of its own.
    Own,
    /// The session of the agent that started it.
    Follow,
}

// === impl SessionConfig ===

impl SessionConfig {
    /// The fields of a body that may name a session.
    pub const FIELDS: [&'static str; 3] = ["session_id", "prompt_cache_key", "user"];
    /// The objects of a body in which fields may name a session.
    pub const OBJECTS: [&'static str; 3] = ["metadata", "rllm", "session_params"];
    /// The most names in the path of a field, objects included.
    pub const MAX_DEPTH: usize = 3;
}

impl Default for SessionConfig {
    fn default() -> Self {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        SessionConfig {
            headers: texts(&[
                "x-session-id",
                "x-rllm-session-id",
                "x-dynamo-session-id",
                "x-claude-code-session-id",
                "x-session-affinity",
                "session-id",
                "session_id",
            ]),
            body: texts(&[
                "metadata.rllm.session_id",
                "rllm.session_id",
                "session_params.session_id",
                "session_id",
                "prompt_cache_key",
                "metadata.session_id",
                "user",
            ]),
            cookies: texts(&[SESSION_COOKIE, "*___*"]),
            subagents: SubagentSessions::Own,
            bonus: 1.0,
            ttl: Duration::from_secs(3600),
        }
    }
}

impl SettingsTable for SessionConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "headers",
            "Headers that name a session; the first that is present counts.",
            &value(|sessions: &mut Self| &mut sessions.headers, texts("list of header names", header_name)),
        ),
        row(
            "body",
            "Fields of the body that name a session; the first that is present counts.",
            &value(|sessions: &mut Self| &mut sessions.body, texts("list of fields", session_field)),
        ),
        row(
            "cookie",
            "Cookies that name a session: a name, a list, or none; `*` stands for any text.",
            &value(|sessions: &mut Self| &mut sessions.cookies, CookiesForm),
        ),
        row(
            "subagents",
            "Whether an agent that another agent started has a session of its own or follows that agent.",
            &value(|sessions: &mut Self| &mut sessions.subagents, choice()),
        ),
        row(
            "bonus",
            "Cost of leaving the last upstream, for each prompt token that only that upstream holds.",
            &value(|sessions: &mut Self| &mut sessions.bonus, number(0.0, 1000.0)),
        ),
        row(
            "ttl",
            "Time after its last request for which a session is remembered.",
            &value(|sessions: &mut Self| &mut sessions.ttl, duration(SECOND, DAY.saturating_mul(7))),
        ),
    ];

    fn defaults() -> Self {
        SessionConfig::default()
    }
}

fn session_field(text: &str) -> ReadResult<String> {
    let mut names = text.split('.');
    let outer = names.next().unwrap_or_default();
    let inner: Vec<&str> = names.collect();
    let is_inner = || !inner.is_empty() && inner.len() < SessionConfig::MAX_DEPTH;
    let is_known = match SessionConfig::OBJECTS.contains(&outer) {
        true => is_inner() && inner.iter().all(|name| !name.is_empty()),
        false => inner.is_empty() && SessionConfig::FIELDS.contains(&outer),
    };
    if is_known {
        return Ok(text.to_string());
    }
    let (fields, objects) = (SessionConfig::FIELDS.join(", "), SessionConfig::OBJECTS.join(", "));
    let text = seen(text);
    Err(format!(
        "{text} is no field that may name a session: known are {fields}, and NAME or NAME.NAME in {objects}"
    ))
}

// === impl CookiesForm ===

/// A name, a list of names, or `none`.
struct CookiesForm;

impl ValueForm<Vec<String>> for CookiesForm {
    fn kind(&self) -> &'static str {
        "cookie name, or list of these"
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut Vec<String>) {
        if from.is_list(key) {
            return texts(self.kind(), cookie_name).read(key, from, into);
        }
        from.text(key, &mut |text| {
            *into = if text == "none" { Vec::new() } else { vec![cookie_name(text)?] };
            Ok(())
        });
    }

    fn show(&self, cookies: &Vec<String>) -> Value {
        match cookies.as_slice() {
            [] => json!("none"),
            [name] => json!(name),
            names => json!(names),
        }
    }
}

/// Parses the name of a cookie; `*`, which names may hold, stands for any text.
fn cookie_name(text: &str) -> ReadResult<String> {
    header_name(text).map(|_| text.to_string())
}

// === impl SubagentSessions ===

impl NamedChoice for SubagentSessions {
    const NAMES: &'static [&'static str] = &["own", "follow"];
    const VALUES: &'static [Self] = &[SubagentSessions::Own, SubagentSessions::Follow];
}
