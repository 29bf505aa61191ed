//! The TLS settings of connections to upstreams.

use std::path::PathBuf;

use crate::config::problem::seen;
use crate::config::setting::{SettingRow, SettingsTable, maybe, path, row, switch, text, value};
use crate::config::values::{ReadResult, is_host};

/// TLS towards upstreams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// PEM file with the authorities to trust in place of the system's.
    pub ca: Option<PathBuf>,
    pub verify: bool,
    /// Name sent and checked; the URL's host unless given.
    pub sni: Option<String>,
}

impl Default for UpstreamTls {
    fn default() -> Self {
        UpstreamTls { ca: None, verify: true, sni: None }
    }
}

// === impl UpstreamTls ===

impl SettingsTable for UpstreamTls {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "ca",
            "PEM file with the authorities to trust in place of the system's; a reload reads it again.",
            &value(|tls: &mut Self| &mut tls.ca, maybe(path())),
        ),
        row(
            "verify",
            "Whether the certificate is checked; false is for tests.",
            &value(|tls: &mut Self| &mut tls.verify, switch()),
        ),
        row(
            "sni",
            "Server name that is sent and that the certificate must have, in place of the URL's host.",
            &value(|tls: &mut Self| &mut tls.sni, maybe(text("host name", server_name))),
        ),
    ];

    fn defaults() -> Self {
        UpstreamTls::default()
    }
}

fn server_name(text: &str) -> ReadResult<String> {
    if is_host(text) && !text.starts_with('[') {
        return Ok(text.into());
    }
    Err(format!("{} is no host name", seen(text)))
}
