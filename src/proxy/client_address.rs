//! The address of a request's client for its log record and its span.
//!
//! It is the address of the connection. Where a trusted proxy has made the connection, it is the right-most
//! address in `x-forwarded-for` that is not a trusted proxy's. What stands left of it comes from a client,
//! which may have invented it.
//!
//! Never: an address that an untrusted client has named; a choice that depends on the address.

use std::fmt::{self, Display};
use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use pingora::protocols::l4::socket::SocketAddr as PeerAddress;

use super::settings::ProxySettings;
use crate::config::types::TrustedProxies;
use crate::names::X_FORWARDED_FOR;

/// The largest number of entries of `x-forwarded-for` that are read, from the right.
const MAX_READ_HOPS: usize = 64;

/// The client of a request. It is looked for when it is written, since most requests are not logged.
pub(super) struct ClientAddress<'a> {
    pub peer: Option<&'a PeerAddress>,
    pub headers: &'a HeaderMap,
    pub settings: &'a ProxySettings,
}

impl Display for ClientAddress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_trusted = self.settings.trusts(self.peer);
        let forwarded = is_trusted.then(|| forwarded_client(self.headers, &self.settings.trusted_proxies));
        match (forwarded.flatten(), self.peer) {
            (Some(address), _) => address.fmt(f),
            (None, Some(peer)) => peer.fmt(f),
            (None, None) => Ok(()),
        }
    }
}

/// Returns the right-most address that is not a trusted proxy's. Where all entries that can be read are of
/// trusted proxies, the left-most of these is the client. An entry that is no address ends the search: the
/// proxy that wrote it hides its client.
fn forwarded_client(headers: &HeaderMap, trusted: &TrustedProxies) -> Option<IpAddr> {
    let fields = headers.get_all(X_FORWARDED_FOR).iter().rev();
    let hops = fields.flat_map(|field| field.as_bytes().rsplit(|byte| *byte == b','));
    let mut client = None;
    for hop in hops.map(<[u8]>::trim_ascii).take(MAX_READ_HOPS).filter(|hop| !hop.is_empty()) {
        let Some(address) = hop_address(hop) else { break };
        client = Some(address);
        if !trusted.contains(address) {
            break;
        }
    }
    client
}

/// Parses an address, as it is or with a port.
fn hop_address(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().or_else(|_| text.parse().map(|address: SocketAddr| address.ip()));
    address.ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::config::types::TrustedProxy;

    fn client(fields: &[&str]) -> Option<String> {
        let networks = ["10.0.0.0/8", "fd00::/8"].map(|text| TrustedProxy::parse(text).expect(text));
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(X_FORWARDED_FOR, HeaderValue::from_str(field).expect(field));
        }
        forwarded_client(&headers, &TrustedProxies::new(networks)).map(|address| address.to_string())
    }

    #[test]
    fn the_client_is_the_right_most_address_that_is_no_trusted_proxys() {
        let table: &[(&[&str], Option<&str>)] = &[
            (&[], None),
            (&["203.0.113.7"], Some("203.0.113.7")),
            (&["203.0.113.7, 10.0.0.1"], Some("203.0.113.7")),
            (&["203.0.113.7", "10.0.0.1,10.0.0.2"], Some("203.0.113.7")),
            // What a client has sent stands on the left.
            (&["1.1.1.1, 203.0.113.7"], Some("203.0.113.7")),
            (&["1.1.1.1", "203.0.113.7, 10.0.0.1"], Some("203.0.113.7")),
            (&["10.0.0.9, 203.0.113.7, 10.0.0.1"], Some("203.0.113.7")),
            // All are trusted.
            (&["10.0.0.1, 10.0.0.2"], Some("10.0.0.1")),
            // With ports, in brackets, mapped.
            (&["203.0.113.7:4711, 10.0.0.1:80"], Some("203.0.113.7")),
            (&["[2001:db8::1]:4711,[fd00::1]"], Some("2001:db8::1")),
            (&["2001:db8::1, fd00::1"], Some("2001:db8::1")),
            (&["::ffff:203.0.113.7, ::ffff:10.0.0.1"], Some("203.0.113.7")),
            // Empty entries do not count.
            (&[" ,203.0.113.7 ,, ", ""], Some("203.0.113.7")),
            (&["", ",,,"], None),
        ];
        for (fields, wanted) in table {
            assert_eq!(client(fields).as_deref(), *wanted, "{fields:?}");
        }
    }

    #[test]
    fn an_entry_that_is_no_address_hides_what_is_left_of_it() {
        for garbage in
            ["unknown", "_hidden", "203.0.113", "203.0.113.7:x", "[::1", "1.1.1.1 2.2.2.2", "\"a\""]
        {
            assert_eq!(client(&[garbage]), None, "{garbage}");
            assert_eq!(client(&["1.1.1.1", garbage]), None, "{garbage}");
            assert_eq!(client(&[&format!("1.1.1.1, {garbage}, 10.0.0.1")]).as_deref(), Some("10.0.0.1"));
        }
        let mut headers = HeaderMap::new();
        headers.append(X_FORWARDED_FOR, HeaderValue::from_bytes(b"1.1.1.1, \xff\xfe").expect("is a value"));
        assert_eq!(forwarded_client(&headers, &TrustedProxies::default()), None);
    }

    #[test]
    fn a_long_field_is_read_in_part() {
        assert_eq!(client(&[&format!("203.0.113.7{}", ",".repeat(64 << 10))]), None);
        let proxies = vec!["10.0.0.1"; 5000].join(",");
        assert_eq!(client(&[&format!("203.0.113.7,{proxies}")]).as_deref(), Some("10.0.0.1"));
        let commas = ",".repeat(64 << 10);
        assert_eq!(client(&[&format!("{commas}203.0.113.7, 10.0.0.1")]).as_deref(), Some("203.0.113.7"));
    }
}
