//! The certificates of connections to Redis, and the user of its sentinels.

use std::path::PathBuf;

use crate::config::secret::Secret;
use crate::config::setting::{SettingRow, SettingsTable, maybe, path, row, secret, text, value};
use crate::config::values::plain;

/// TLS towards Redis and its sentinels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RedisTls {
    /// PEM file with the authorities to trust in place of the system's.
    pub ca: Option<PathBuf>,
    /// PEM file with the certificate that this balancer shows.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// The user of the sentinels; that of the Redis stands in its URL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SentinelAccess {
    pub user: Option<String>,
    pub password: Option<Secret>,
}

// === impl RedisTls ===

impl SettingsTable for RedisTls {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "ca",
            "PEM file with the authorities to trust in place of the system's; read at each connection.",
            &value(|tls: &mut Self| &mut tls.ca, maybe(path())),
        ),
        row(
            "certificate",
            "PEM file with the certificate that the balancer shows; read at each connection.",
            &value(|tls: &mut Self| &mut tls.certificate, maybe(path())),
        ),
        row(
            "key",
            "PEM file with the key of the certificate.",
            &value(|tls: &mut Self| &mut tls.key, maybe(path())),
        ),
    ];

    fn defaults() -> Self {
        RedisTls::default()
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        match (&self.certificate, &self.key) {
            (Some(_), None) => report("certificate", "has no key beside it: name its file as key".into()),
            (None, Some(_)) => {
                report("key", "has no certificate beside it: name its file as certificate".into());
            }
            _ => {}
        }
    }
}

// === impl SentinelAccess ===

impl SettingsTable for SentinelAccess {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "user",
            "User at the sentinels.",
            &value(|sentinel: &mut Self| &mut sentinel.user, maybe(text("text", plain))),
        ),
        row(
            "password",
            "Password at the sentinels; that of the Redis stands in its URL.",
            &value(|sentinel: &mut Self| &mut sentinel.password, maybe(secret())),
        ),
    ];

    fn defaults() -> Self {
        SentinelAccess::default()
    }
}
