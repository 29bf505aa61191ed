//! The keys of the file: the one table that the reader, its messages and the manual's test go by.
//!
//! A key is written as a pattern: `upstreams[].tls.ca` is the `ca` in the `tls` of any upstream.

/// The maps of the file and the keys that each of them may hold, in the manual's order.
pub const SECTIONS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "listen",
            "admin",
            "redis",
            "redis_options",
            "upstreams",
            "routes",
            "balance",
            "peek",
            "health",
            "breaker",
            "timeouts",
            "retry",
            "queue",
            "limits",
            "trusted_proxies",
            "threads",
            "passthrough",
            "upgrade_socket",
            "sessions",
            "traces",
            "log",
            "shutdown",
            "expose",
        ],
    ),
    ("listen", &["address", "tls"]),
    ("listen.tls", &["certificate", "key"]),
    ("listen[]", &["address", "tls"]),
    ("listen[].tls", &["certificate", "key"]),
    ("admin", &["address", "token"]),
    ("redis_options", &["interval", "prefix", "gauge_ttl", "stream_length"]),
    ("upstreams[]", &["url", "gym", "every", "name", "models", "weight", "api_key", "max_active", "tls"]),
    ("upstreams[].tls", &["ca", "verify", "sni"]),
    (
        "routes[]",
        &[
            "model",
            "path",
            "header",
            "to",
            "upstreams",
            "headers",
            "response_headers",
            "body",
            "token_ids",
            "think_tags",
            "overflow",
            "responses",
            "messages",
            "metadata_overrides",
            "api_key",
            "timeouts",
            "retry",
        ],
    ),
    ("routes[].headers", &["set", "remove"]),
    ("routes[].response_headers", &["set", "remove"]),
    ("routes[].body", &["defaults", "overrides", "remove", "roles"]),
    ("routes[].timeouts", &["connect", "first_byte", "idle", "total"]),
    ("routes[].retry", &["attempts", "backoff", "max_backoff", "budget", "on"]),
    (
        "balance",
        &[
            "preset",
            "backlog",
            "missing",
            "stall",
            "share",
            "active",
            "context",
            "index_blocks",
            "block_bytes",
        ],
    ),
    ("peek", &["bytes", "max_body", "memory"]),
    ("health", &["path", "interval", "timeout", "fall", "rise", "metrics"]),
    ("breaker", &["failures", "window", "open", "max_open", "max_ejected"]),
    ("timeouts", &["connect", "first_byte", "idle", "total"]),
    ("retry", &["attempts", "backoff", "max_backoff", "budget", "on"]),
    ("queue", &["size", "wait"]),
    ("limits", &["connections", "header_bytes"]),
    ("passthrough[]", &["path", "to"]),
    ("sessions", &["headers", "body", "cookie", "subagents", "bonus", "ttl"]),
    ("traces", &["store", "memory", "capture", "keep", "max_bytes", "queue", "sync", "cumulative"]),
    ("log", &["format", "level", "bodies", "truncate"]),
    ("shutdown", &["grace", "drain"]),
];

/// Other names for keys of a route, which NeMo Gym's model servers have for the same.
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

/// Settings of NeMo Gym's model servers that are always on: `true` says so, `false` cannot be had.
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

/// The settings of theirs for audio files, by how their names begin.
const AUDIO_FILES: &str = "routes[].audio_";

/// What a message says of them.
const NO_AUDIO_FILES: &str =
    "cannot be had: the balancer reads no audio files, send them as input_audio or audio_url";

/// Keys that hold a map whose keys are the user's own.
pub const FREE: &[&str] = &["header", "set", "defaults", "overrides", "roles"];

/// What the contract names and this version cannot do yet. Refused, never accepted and ignored; an
/// entry leaves this list together with the change that brings the feature. `key=value` is one value
/// of a key that is there.
pub const LATER: &[&str] = &["upstreams[].dns", "upstreams[].kubernetes"];

/// What a message says of everything in `LATER`.
pub const NOT_AVAILABLE: &str = "not available yet";

/// The keys of a map, by its pattern.
pub fn of(section: &str) -> &'static [&'static str] {
    SECTIONS.iter().find(|(name, _)| *name == section).map_or(&[], |(_, keys)| keys)
}

/// Why there is no such key, where another program has it.
pub fn why_absent(pattern: &str) -> Option<&'static str> {
    pattern.starts_with(AUDIO_FILES).then_some(NO_AUDIO_FILES)
}

/// Does this pattern stand for another key, or for what is always so?
pub fn is_alias(pattern: &str) -> bool {
    ALIASES.iter().chain(ALWAYS_ON).any(|(alias, _)| *alias == pattern)
}

/// Is this key, or `key=value`, one that comes later?
pub fn is_later(pattern: &str) -> bool {
    LATER.contains(&pattern)
}

/// The allowed word that was most likely meant, if one is close.
pub fn closest<'a>(word: &str, allowed: &[&'a str]) -> Option<&'a str> {
    let near = |candidate: &&&str| (distance(word, candidate), candidate.len());
    let best = allowed.iter().min_by_key(near)?;
    // One letter in four: among shorter words everything is near to everything.
    let limit = word.chars().count().max(best.chars().count()) / 4;
    (distance(word, best) <= limit).then_some(*best)
}

/// Single letters to insert, remove, replace or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().take(64).collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            let mut cost = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_word() {
        let allowed = ["health", "listen", "log", "limits", "threads"];
        let table = [
            ("helth", Some("health")),
            ("haelth", Some("health")),
            ("lsiten", Some("listen")),
            ("limit", Some("limits")),
            ("thread", Some("threads")),
            ("logs", Some("log")),
            ("colour", None),
            ("x", None),
            ("", None),
        ];
        for (word, wanted) in table {
            assert_eq!(closest(word, &allowed), wanted, "{word}");
        }
    }

    #[test]
    fn nothing_is_both_there_and_later() {
        for (section, keys) in SECTIONS {
            for key in *keys {
                let pattern =
                    if section.is_empty() { (*key).to_string() } else { format!("{section}.{key}") };
                // Routes are read and checked, and refused until requests go by them.
                assert!(!is_later(&pattern), "{pattern}");
            }
        }
    }
}
