//! What runs of `sessions:`, with its defaults.

use std::time::Duration;

use crate::names::SESSION_COOKIE;

/// Where requests say which session they belong to, and what that is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionConfig {
    /// Header names in small letters, the first that is there counts.
    pub headers: Vec<String>,
    /// Fields of the body: one of [`FIELDS`](Self::FIELDS), or one inside of [`OBJECTS`](Self::OBJECTS), with
    /// dots between the names.
    pub body: Vec<String>,
    /// Names of cookies, in which `*` stands for any text.
    pub cookies: Vec<String>,
    pub subagents: SubagentSessions,
    /// How much the prompt tokens that the session's last upstream holds weigh against going elsewhere.
    pub bonus: f64,
    /// How long after its last request a session is known.
    pub ttl: Duration,
}

/// The session of the requests of an agent that another agent has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubagentSessions {
    /// One of its own.
    Own,
    /// That of the agent that started it.
    Follow,
}

// === impl SessionConfig ===

impl SessionConfig {
    /// The fields that are looked at in a body.
    pub const FIELDS: [&'static str; 3] = ["session_id", "prompt_cache_key", "user"];
    /// The objects of a body in which fields may name a session.
    pub const OBJECTS: [&'static str; 3] = ["metadata", "rllm", "session_params"];
    /// The most names of a field, with those of the objects around it.
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

// === impl SubagentSessions ===

impl SubagentSessions {
    pub const NAMES: [&'static str; 2] = ["own", "follow"];

    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    pub fn parse(name: &str) -> Option<Self> {
        [SubagentSessions::Own, SubagentSessions::Follow].into_iter().find(|known| known.name() == name)
    }
}
