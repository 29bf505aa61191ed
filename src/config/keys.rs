//! The keys of the file: those of the table of settings and their other names.
//!
//! A key is written as a pattern: `upstreams[].tls.ca` is the `ca` in the `tls` of any upstream.

use super::setting::{KeyRow, describe};
use super::types::Config;

/// Other names for keys of a route, as NeMo Gym's model servers name the same settings.
pub const ALIASES: &[(&str, &str)] = &[
    ("routes[].chat_template_kwargs", "routes[].body.defaults.chat_template_kwargs"),
    ("routes[].extra_body", "routes[].body.defaults"),
    ("routes[].sampling_overrides", "routes[].body.overrides"),
    ("routes[].default_headers", "routes[].headers.set"),
    ("routes[].return_token_id_information", "routes[].token_ids"),
    ("routes[].uses_reasoning_parser", "routes[].think_tags"),
    ("routes[].replace_developer_role_with_system", "routes[].body.roles"),
    ("routes[].is_responses_native", "routes[].responses"),
];

/// Settings of NeMo Gym's model servers that a route always has: `true` is accepted, `false` is rejected.
pub const ALWAYS_ON: &[(&str, &str)] = &[
    (
        "routes[].uses_interleaved_reasoning",
        "cannot be false: reasoning of earlier turns goes to the upstream as the client sends it",
    ),
    (
        "routes[].sequential_reasoning_allowed",
        "cannot be false: a request whose last turn is reasoning alone goes to the upstream",
    ),
];

/// The beginning of the names of NeMo Gym's settings for audio files.
const AUDIO_FILES: &str = "routes[].audio_";

/// The message for settings for audio files.
const NO_AUDIO_FILES: &str =
    "cannot be had: the balancer reads no audio files, send them as input_audio or audio_url";

/// Every key that holds a value, in the order of the manual.
pub fn all() -> Vec<KeyRow> {
    let mut rows = Vec::new();
    describe::<Config>(&mut rows);
    rows
}

/// The last segments of the keys that hold maps of the user's own keys.
pub fn free() -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    all().iter().filter(|row| row.is_free).map(|row| last(&row.path)).collect()
}

/// The reason why a key of another program is not supported.
pub fn why_absent(pattern: &str) -> Option<&'static str> {
    pattern.starts_with(AUDIO_FILES).then_some(NO_AUDIO_FILES)
}

/// Whether the pattern is another name for a key, or a setting that is always on.
pub fn is_alias(pattern: &str) -> bool {
    ALIASES.iter().chain(ALWAYS_ON).any(|(alias, _)| *alias == pattern)
}
