//! What runs of `sessions:`, with its defaults.

use std::time::Duration;

use crate::names::SESSION_COOKIE;

/// Where requests say which session they belong to, and what that is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionConfig {
    /// Header names in small letters, the first that is there counts.
    pub headers: Vec<String>,
    /// Fields of the body: one of [`FIELDS`](Self::FIELDS), or one inside of `metadata`.
    pub body: Vec<String>,
    pub cookie: Option<String>,
    /// How much the prompt tokens that the session's last upstream holds weigh against going elsewhere.
    pub bonus: f64,
    /// How long after its last request a session is known.
    pub ttl: Duration,
}

impl SessionConfig {
    /// The fields that are looked at in a body, beside those inside of `metadata`.
    pub const FIELDS: [&'static str; 3] = ["session_id", "prompt_cache_key", "user"];
}

impl Default for SessionConfig {
    fn default() -> Self {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        SessionConfig {
            headers: texts(&["x-session-id", "x-rllm-session-id", "x-dynamo-session-id"]),
            body: texts(&["session_id", "prompt_cache_key", "metadata.session_id", "user"]),
            cookie: Some(SESSION_COOKIE.into()),
            bonus: 1.0,
            ttl: Duration::from_secs(3600),
        }
    }
}
