//! A source of upstreams by a DNS name: each address of the name is an upstream. `http://host:port`, or
//! `srv+http://_http._tcp.host` for ports and weights from SRV records.

use std::net::{IpAddr, SocketAddr};

use crate::config::problem::seen;
use crate::config::url::{self, UpstreamUrl};
use crate::config::values::{ReadResult, is_host};

/// What the scheme of a URL begins with when SRV records give the ports.
const SRV_PREFIX: &str = "srv+";

/// The port of DNS servers.
const DNS_PORT: u16 = 53;

/// A DNS name, and the form of the URLs of its upstreams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsName {
    /// The URL of the upstreams, with the name in place of their addresses.
    pub url: UpstreamUrl,
    /// Ports and weights come from SRV records; the port of `url` has no meaning then.
    pub srv: bool,
}

// === impl DnsName ===

impl DnsName {
    /// Parses the name as the file holds it.
    pub fn parse(text: &str) -> ReadResult<Self> {
        let srv = text.get(..SRV_PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(SRV_PREFIX));
        let plain = if srv { &text[SRV_PREFIX.len()..] } else { text };
        let url = url::upstream(plain)?;
        let shown = || seen(&url::masked(text));
        if url.unix.is_some() {
            return Err(format!("{} is no DNS name: write http://host:port", shown()));
        }
        if url.host.parse::<IpAddr>().is_ok() {
            return Err(format!("{} has an address in place of a name: write it as url", shown()));
        }
        if srv && has_port(plain) {
            return Err(format!("{} has a port, and SRV records give the ports: leave it out", shown()));
        }
        let name = DnsName { url, srv };
        if srv && name.tls_host() == name.url.host.trim_end_matches('.') {
            let form = "write srv+http://_http._tcp.vllm.default.svc";
            return Err(format!("{} does not begin with _service._protocol: {form}", shown()));
        }
        Ok(name)
    }

    /// The name as the file would hold it.
    pub fn display(&self) -> String {
        let UpstreamUrl { https, ref host, ref prefix, .. } = self.url;
        match self.srv {
            true => format!("{SRV_PREFIX}{}://{host}{prefix}", if https { "https" } else { "http" }),
            false => self.url.display(),
        }
    }

    /// The host that certificates are for and that requests name: the name, of an SRV record without
    /// `_service._protocol`. The targets of records do not count, since DNS answers are not authentic.
    pub fn tls_host(&self) -> &str {
        let host = self.url.host.trim_end_matches('.');
        let mut labels = host.splitn(3, '.');
        match (labels.next(), labels.next(), labels.next()) {
            (Some(service), Some(protocol), Some(rest))
                if self.srv && service.starts_with('_') && protocol.starts_with('_') && !rest.is_empty() =>
            {
                rest
            }
            _ => host,
        }
    }
}

/// Whether the authority of a valid URL ends with a port.
fn has_port(text: &str) -> bool {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    url::host_and_port(authority).is_ok_and(|(_, port)| port.is_some())
}

/// Parses the address of a DNS server, with or without a port.
pub(super) fn dns_server(text: &str) -> ReadResult<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, DNS_PORT));
    }
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 => Ok(address),
        _ => Err(format!("{} is no address of a DNS server: write 10.0.0.2 or 10.0.0.2:53", seen(text))),
    }
}

/// Parses a name of Kubernetes: of a namespace, a service or a port.
pub(super) fn kubernetes_name(text: &str) -> ReadResult<String> {
    if is_host(text) && !text.starts_with('[') {
        return Ok(text.into());
    }
    Err(format!("{} is no name in Kubernetes: letters, digits and dashes", seen(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_names_and_shows_them_again() {
        let table = [
            ("http://vllm.default.svc:8000", "http://vllm.default.svc:8000", "vllm.default.svc"),
            ("http://vllm:8000/v1", "http://vllm:8000", "vllm"),
            ("https://VLLM/team/v1", "https://vllm:443/team", "vllm"),
            ("srv+http://_http._tcp.vllm.svc", "srv+http://_http._tcp.vllm.svc", "vllm.svc"),
            ("SRV+https://_api._tcp.vllm/x/v1", "srv+https://_api._tcp.vllm/x", "vllm"),
            ("http://vllm.svc.:8000", "http://vllm.svc.:8000", "vllm.svc"),
            // Without SRV records underscores have no meaning.
            ("http://_http._tcp.vllm:80", "http://_http._tcp.vllm:80", "_http._tcp.vllm"),
        ];
        for (text, shown, host) in table {
            let name = DnsName::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!((name.display().as_str(), name.tls_host()), (shown, host), "{text}");
            assert_eq!(DnsName::parse(&name.display()), Ok(name), "{text}");
        }
    }

    #[test]
    fn rejects_what_has_no_addresses_to_look_up() {
        let table = [
            ("vllm:8000", "has no scheme"),
            ("unix:/run/vllm.sock", "is no DNS name"),
            ("http://10.0.0.1:8000", "has an address in place of a name"),
            ("http://[::1]:8000", "has an address in place of a name"),
            ("srv+http://_http._tcp.vllm:8000", "has a port"),
            ("srv+http://vllm", "does not begin with _service._protocol"),
            ("srv+http://_http._tcp", "does not begin with _service._protocol"),
            ("srv+vllm", "has no scheme"),
            ("srv+", "must not be empty"),
            ("http://u:hunter2@vllm", "holds a user or password"),
        ];
        for (text, wanted) in table {
            let why = DnsName::parse(text).expect_err(text);
            assert!(why.contains(wanted) && !why.contains("hunter2"), "{text}: {why}");
        }
    }

    #[test]
    fn parses_the_addresses_of_dns_servers() {
        let table = [
            ("10.0.0.2", Some("10.0.0.2:53")),
            ("10.0.0.2:5353", Some("10.0.0.2:5353")),
            ("::1", Some("[::1]:53")),
            ("[::1]", Some("[::1]:53")),
            ("[::1]:5353", Some("[::1]:5353")),
            ("", None),
            ("dns.lan", None),
            ("10.0.0.2:0", None),
            ("10.0.0.2:99999", None),
        ];
        for (text, wanted) in table {
            let read = dns_server(text).ok().map(|address| address.to_string());
            assert_eq!(read.as_deref(), wanted, "{text}");
        }
    }
}
