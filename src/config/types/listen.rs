//! The listeners: where clients and operators connect.

use std::fmt;
use std::path::PathBuf;

use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::setting::{
    SettingRow, SettingsTable, maybe, optional_section, path, row, secret, text, value,
};
use crate::config::values::{ReadResult, is_host, unix_path};

/// Where a socket listens: `host:port`, or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    Tcp(String),
    Unix(PathBuf),
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => f.write_str(address),
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// One listener for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub address: ListenAddress,
    pub tls: Option<ListenTls>,
}

/// The certificate that a listener shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// The listener for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    pub address: ListenAddress,
    /// With a token, admin calls need `Authorization: Bearer`.
    pub token: Option<Secret>,
}

// === impl ListenAddress ===

impl ListenAddress {
    /// Parses `host:port` or `unix:/path`.
    pub fn parse(text: &str) -> ReadResult<Self> {
        let remedy = "write host:port, [::]:port or unix:/path";
        if text.is_empty() {
            return Err(format!("must not be empty: {remedy}"));
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path =
                unix_path(path).ok_or_else(|| format!("{} is no unix socket: {remedy}", seen(text)))?;
            return Ok(ListenAddress::Unix(path));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if is_host(host) => (host, port),
            _ => return Err(format!("{} is no address: {remedy}", seen(text))),
        };
        match port.parse::<u16>() {
            Ok(number) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                Ok(ListenAddress::Tcp(format!("{host}:{number}")))
            }
            _ => Err(format!("{} has no valid port: 0 to 65535, 0 lets the system choose", seen(text))),
        }
    }

    /// Whether several listeners may have the address: with port 0 the system gives each another port.
    pub fn is_shareable(&self) -> bool {
        matches!(self, ListenAddress::Tcp(address) if address.ends_with(":0"))
    }
}

// === impl Listen ===

impl Listen {
    /// A listener without TLS.
    pub fn plain(address: ListenAddress) -> Self {
        Listen { address, tls: None }
    }
}

impl Default for Listen {
    fn default() -> Self {
        Listen::plain(ListenAddress::Tcp("0.0.0.0:8000".into()))
    }
}

impl SettingsTable for Listen {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "address",
            "Address of the listener: host:port, [::]:port or unix:/path; port 0 lets the system choose.",
            &value(|listen: &mut Self| &mut listen.address, text("address", ListenAddress::parse)),
        ),
        row(
            "tls",
            "Certificate of the listener, which brings HTTPS and HTTP/2 by ALPN.",
            &optional_section(|listen: &mut Self| &mut listen.tls),
        ),
    ];

    fn defaults() -> Self {
        Listen::default()
    }
}

// === impl ListenTls ===

impl SettingsTable for ListenTls {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "certificate",
            "PEM file with the certificate and its chain; read again each minute and by a reload.",
            &value(|tls: &mut Self| &mut tls.certificate, path()),
        )
        .required(),
        row(
            "key",
            "PEM file with the key of the certificate.",
            &value(|tls: &mut Self| &mut tls.key, path()),
        )
        .required(),
    ];

    fn defaults() -> Self {
        ListenTls { certificate: PathBuf::new(), key: PathBuf::new() }
    }
}

// === impl AdminConfig ===

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { address: ListenAddress::Tcp("127.0.0.1:9090".into()), token: None }
    }
}

impl SettingsTable for AdminConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "address",
            "Address of the admin listener; keep it away from clients.",
            &value(|admin: &mut Self| &mut admin.address, text("address", ListenAddress::parse)),
        )
        .restart(),
        row(
            "token",
            "Token that calls of the admin API must send as `Authorization: Bearer`.",
            &value(|admin: &mut Self| &mut admin.token, maybe(secret())),
        )
        .at_once(),
    ];

    fn defaults() -> Self {
        AdminConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_addresses() {
        for text in ["0.0.0.0:8000", "localhost:0", "[::]:8000", "gpu-0.lan:80"] {
            assert_eq!(ListenAddress::parse(text), Ok(ListenAddress::Tcp(text.into())), "{text}");
        }
        for text in ["unix:/run/lb.sock", "unix:///run/lb.sock"] {
            assert_eq!(ListenAddress::parse(text), Ok(ListenAddress::Unix("/run/lb.sock".into())), "{text}");
        }
        for text in
            ["", "8000", ":8000", "*:8000", "::1:80", "a b:1", "h:", "h:+1", "h:65536", "unix:", "unix:x"]
        {
            assert!(ListenAddress::parse(text).is_err(), "{text}");
        }
    }
}
