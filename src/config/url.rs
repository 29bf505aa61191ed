//! URLs of upstreams: `http://host:port`, `https://host/prefix`, `unix:/path`.
//!
//! A trailing `/v1` is accepted and dropped, since base URLs of clients have it. User and password are
//! rejected, and masked in the message.

use std::path::PathBuf;

use super::problem::seen;
use super::values::{ReadResult, is_host, unix_path};

const REMEDY: &str = "write http://host:port, https://host:port or unix:/path";

/// The URL of an upstream, without a trailing `/v1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UpstreamUrl {
    pub https: bool,
    pub host: String,
    pub port: u16,
    /// The unix socket to connect to, in place of host and port.
    pub unix: Option<PathBuf>,
    /// The prefix of every path, such as `/team-a`, or `""`.
    pub prefix: String,
}

impl UpstreamUrl {
    /// `host:port`, with brackets around an IPv6 address; for a unix socket its path.
    pub fn authority(&self) -> String {
        match &self.unix {
            Some(path) => path.display().to_string(),
            None if self.host.contains(':') => format!("[{}]:{}", self.host, self.port),
            None => format!("{}:{}", self.host, self.port),
        }
    }

    /// The URL as the file would hold it.
    pub fn display(&self) -> String {
        match &self.unix {
            Some(path) => format!("unix:{}", path.display()),
            None => {
                let scheme = if self.https { "https" } else { "http" };
                format!("{scheme}://{}{}", self.authority(), self.prefix)
            }
        }
    }
}

/// Parses the URL of an upstream.
pub fn upstream(text: &str) -> ReadResult<UpstreamUrl> {
    if text.trim().is_empty() {
        return Err(format!("must not be empty: {REMEDY}"));
    }
    if let Some(path) = text.strip_prefix("unix:") {
        let path =
            unix_path(path).ok_or_else(|| format!("{} is no unix socket: {REMEDY}", seen(&masked(text))))?;
        let (host, prefix) = ("localhost".into(), String::new());
        return Ok(UpstreamUrl { https: false, host, port: 80, unix: Some(path), prefix });
    }
    let (https, rest) = scheme(text)?;
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err(format!("{} holds a user or password: use api_key", seen(&masked(text))));
    }
    let (host, port) = host_and_port(authority).map_err(|what| format!("{} {what}", seen(&masked(text))))?;
    let prefix = prefix(path).map_err(|what| format!("{} {what}", seen(&masked(text))))?;
    Ok(UpstreamUrl { https, host, port: port.unwrap_or(if https { 443 } else { 80 }), unix: None, prefix })
}

fn scheme(text: &str) -> ReadResult<(bool, &str)> {
    match text.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => Ok((false, rest)),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => Ok((true, rest)),
        Some(_) => Err(format!("{} has an unknown scheme: {REMEDY}", seen(&masked(text)))),
        None => Err(format!("{} has no scheme: {REMEDY}", seen(&masked(text)))),
    }
}

/// Parses the host, without brackets and in lower case, and the port if there is one.
pub(super) fn host_and_port(authority: &str) -> Result<(String, Option<u16>), &'static str> {
    let after_brackets = authority.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match authority[after_brackets..].rfind(':') {
        Some(colon) => {
            let colon = after_brackets + colon;
            (&authority[..colon], Some(&authority[colon + 1..]))
        }
        None => (authority, None),
    };
    if host.is_empty() || !is_host(host) {
        return Err("has no valid host: a name, an IPv4 address, or an IPv6 address in brackets");
    }
    let port = match port {
        None => None,
        Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            match digits.parse::<u16>() {
                Ok(port) if port > 0 => Some(port),
                _ => return Err("has no valid port: 1 to 65535"),
            }
        }
        Some(_) => return Err("has no valid port: 1 to 65535"),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    Ok((bare.to_ascii_lowercase(), port))
}

fn prefix(path: &str) -> Result<String, &'static str> {
    if path.contains(['?', '#']) {
        return Err("must end with its path: take the query or fragment away");
    }
    if !path.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("has characters that a path cannot hold: percent-encode them");
    }
    let path = path.trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path);
    Ok(path.trim_end_matches('/').to_string())
}

/// The text of a URL with user and password masked.
pub fn masked(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    // A password may hold an unescaped slash or `@`, so everything up to the last `@` is masked.
    match text[start..].rfind('@') {
        Some(at) => format!("{}***{}", &text[..start], &text[start + at..]),
        None => text.to_string(),
    }
}

/// Decodes percent-encoding; `None` where it is invalid or not UTF-8.
pub fn decoded(written: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(written.len());
    let mut rest = written.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = after.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parses_urls() {
        let table = [
            ("http://vllm-0:8000", "http://vllm-0:8000"),
            ("http://vllm-0:8000/", "http://vllm-0:8000"),
            ("http://vllm-0:8000/v1", "http://vllm-0:8000"),
            ("http://vllm-0:8000/v1/", "http://vllm-0:8000"),
            ("http://vllm-0", "http://vllm-0:80"),
            ("HTTPS://VLLM-0", "https://vllm-0:443"),
            ("https://gw.lan/team-a/v1", "https://gw.lan:443/team-a"),
            ("http://gw.lan/v1/team-a", "http://gw.lan:80/v1/team-a"),
            ("http://[::1]:8000/v1", "http://[::1]:8000"),
            ("http://[fe80::1]", "http://[fe80::1]:80"),
            ("http://a/xv1", "http://a:80/xv1"),
            ("unix:/run/vllm.sock", "unix:/run/vllm.sock"),
            ("unix:///run/vllm.sock", "unix:/run/vllm.sock"),
        ];
        for (text, wanted) in table {
            assert_eq!(upstream(text).map(|url| url.display()), Ok(wanted.to_string()), "{text}");
        }
    }

    #[test]
    fn decodes_percent_encoding() {
        let table = [
            ("gpu-1", Some("gpu-1")),
            ("[::1]:8000", Some("[::1]:8000")),
            ("%5B%3a%3A1%5D%3A8000", Some("[::1]:8000")),
            ("/run/vllm.sock", Some("/run/vllm.sock")),
            ("%2Frun%2Fvllm.sock", Some("/run/vllm.sock")),
            ("100%25", Some("100%")),
            ("%", None),
            ("%2", None),
            ("%+1", None),
            ("%zz", None),
            ("%ff", None),
        ];
        for (written, name) in table {
            assert_eq!(decoded(written).as_deref(), name, "{written}");
        }
    }

    #[test]
    fn rejects_mistakes() {
        let table = [
            "",
            " ",
            "gpu-0:8000",
            "ftp://a",
            "http://",
            "http:///v1",
            "http://:80",
            "http://a:0",
            "http://a:",
            "http://a:65536",
            "http://a:+1",
            "http://::1:80",
            "http://[::1",
            "http://a b",
            "http://a/b c",
            "http://a?x=1",
            "http://a/#f",
            "unix:run.sock",
            "unix:",
            "http://a..b",
            "http://a:80:90",
            "http://[::1]x:1",
        ];
        for text in table {
            assert!(upstream(text).is_err(), "{text}");
        }
    }

    #[test]
    fn never_shows_a_password() {
        for text in [
            "http://u:hunter2@a",
            "ftp://hunter2@a",
            "u:hunter2@a",
            "http://u:hunt/hunter2@a",
            "x://u:p@hunter2@a",
        ] {
            let message = upstream(text).expect_err(text);
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn parses_what_it_shows(text in "https?://[a-z]{1,3}(:[0-9]{1,5})?(/[a-z0-9]{0,2}){0,3}") {
            if let Ok(url) = upstream(&text) {
                // Of /v1/v1, each parse drops one.
                if !url.prefix.ends_with("/v1") {
                    prop_assert_eq!(upstream(&url.display()), Ok(url));
                }
            }
        }

        #[test]
        fn never_panics(text in "(http://|unix:|redis://)?\\PC{0,20}") {
            let _ = (upstream(&text), masked(&text));
        }
    }
}
