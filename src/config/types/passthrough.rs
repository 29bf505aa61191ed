//! Control paths of vLLM that clients may call.

use std::fmt;

use crate::config::setting::{SettingRow, SettingsTable, row, text, value};
use crate::config::values::{ReadResult, plain, url_path};

/// The word for every upstream.
pub const ALL_UPSTREAMS: &str = "all";

/// A control path of vLLM that is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passthrough {
    pub path: String,
    pub to: PassthroughTarget,
}

/// The upstreams that get the requests of a passthrough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassthroughTarget {
    All,
    Upstream(String),
}

// === impl Passthrough ===

impl Passthrough {
    /// A path whose requests go to all upstreams.
    pub fn to_all(path: String) -> Self {
        Passthrough { path, to: PassthroughTarget::All }
    }
}

impl SettingsTable for Passthrough {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "path",
            "Path of vLLM that is let through, exactly.",
            &value(|passthrough: &mut Self| &mut passthrough.path, text("URL path", url_path)),
        )
        .required(),
        row(
            "to",
            "Upstream that gets the request, by name, or `all`.",
            &value(
                |passthrough: &mut Self| &mut passthrough.to,
                text("upstream name", PassthroughTarget::parse),
            ),
        ),
    ];

    fn defaults() -> Self {
        Passthrough::to_all(String::new())
    }
}

// === impl PassthroughTarget ===

impl PassthroughTarget {
    fn parse(text: &str) -> ReadResult<Self> {
        plain(text).map(|name| if name == ALL_UPSTREAMS { Self::All } else { Self::Upstream(name) })
    }
}

impl fmt::Display for PassthroughTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PassthroughTarget::All => ALL_UPSTREAMS,
            PassthroughTarget::Upstream(name) => name,
        })
    }
}
