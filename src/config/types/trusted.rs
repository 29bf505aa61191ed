//! The proxies whose forwarding headers are kept.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::problem::seen;
use crate::config::values::ReadResult;

/// The bits in front of the IPv4 address in an IPv4-mapped IPv6 address.
const MAPPED_BITS: u8 = 96;

/// The networks of the proxies in front of the balancer.
///
/// The headers `x-forwarded-*` and `x-data-parallel-rank` of a client outside of them are replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    networks: Vec<IpNetwork>,
    unix: bool,
}

/// One item of `trusted_proxies`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustedProxy {
    IpNetwork(IpNetwork),
    /// Every client that connects to a unix socket.
    Unix,
}

/// The addresses with the same leading bits. An IPv4-mapped network is kept as the IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpNetwork {
    /// The bits after the prefix are 0.
    base: IpAddr,
    prefix: u8,
}

// === impl TrustedProxies ===

impl TrustedProxies {
    pub fn new(proxies: impl IntoIterator<Item = TrustedProxy>) -> Self {
        let mut all = TrustedProxies::default();
        for proxy in proxies {
            match proxy {
                TrustedProxy::IpNetwork(network) => all.networks.push(network),
                TrustedProxy::Unix => all.unix = true,
            }
        }
        all
    }

    /// Whether a client at this address is trusted. A listener on `[::]` sees IPv4 clients at IPv4-mapped
    /// addresses: these are compared with the IPv4 networks.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(address))
    }

    /// Whether clients of unix sockets are trusted.
    pub fn contains_unix(&self) -> bool {
        self.unix
    }

    /// The items as the file would hold them.
    pub fn names(&self) -> Vec<String> {
        let unix = self.unix.then(|| "unix".to_string());
        self.networks.iter().map(IpNetwork::to_string).chain(unix).collect()
    }
}

// === impl TrustedProxy ===

impl TrustedProxy {
    /// Parses an address, a network in CIDR form, or `unix`.
    pub fn parse(text: &str) -> ReadResult<Self> {
        if text == "unix" {
            return Ok(TrustedProxy::Unix);
        }
        let bad =
            || format!("{} is no network: write 10.0.0.0/8, 10.0.0.7, fd00::/8, ::1 or unix", seen(text));
        let (address, prefix) =
            text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            None => whole,
            Some(bits) if bits.bytes().all(|byte| byte.is_ascii_digit()) => {
                bits.parse().map_err(|_| bad())?
            }
            Some(_) => return Err(bad()),
        };
        let network = IpNetwork::new(address, prefix).ok_or_else(bad)?;
        // A typing error here would trust other networks than intended.
        if !network.begins_with(address) {
            return Err(format!("{} has bits after its prefix: write {network}", seen(text)));
        }
        Ok(TrustedProxy::IpNetwork(network))
    }
}

// === impl IpNetwork ===

impl IpNetwork {
    /// The network of the first `prefix` bits of an address. `None` when the address has fewer bits.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V6(v6) if prefix >= MAPPED_BITS && v6.to_ipv4_mapped().is_some() => {
                return IpNetwork::new(address.to_canonical(), prefix - MAPPED_BITS);
            }
            other => other,
        };
        (prefix <= width(address)).then(|| IpNetwork { base: masked(address, prefix), prefix })
    }

    /// Whether this is the network's first address.
    pub fn begins_with(&self, address: IpAddr) -> bool {
        let canonical = if self.base.is_ipv4() { address.to_canonical() } else { address };
        self.base == canonical
    }

    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.base.is_ipv4() && masked(address, self.prefix) == self.base
    }
}

impl fmt::Display for IpNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == width(self.base) {
            true => write!(f, "{}", self.base),
            false => write!(f, "{}/{}", self.base, self.prefix),
        }
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address with all bits after the prefix at 0.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(u32::from(32 - prefix)).unwrap_or(0);
            (v4 & Ipv4Addr::from_bits(mask)).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(u32::from(128 - prefix)).unwrap_or(0);
            (v6 & Ipv6Addr::from_bits(mask)).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_networks() {
        let table = [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.7", "10.0.0.7"),
            ("10.0.0.7/32", "10.0.0.7"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
            ("::1", "::1"),
            ("FD00:0:0::/8", "fd00::/8"),
            ("2001:db8::/127", "2001:db8::/127"),
            ("::ffff:10.1.0.0/112", "10.1.0.0/16"),
            ("::ffff:10.1.0.7", "10.1.0.7"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/80", "::/80"),
        ];
        for (text, shown) in table {
            let Ok(TrustedProxy::IpNetwork(network)) = TrustedProxy::parse(text) else { panic!("{text}") };
            assert_eq!(network.to_string(), shown, "{text}");
            assert_eq!(TrustedProxy::parse(shown), Ok(TrustedProxy::IpNetwork(network)), "{text}");
        }
        assert_eq!(TrustedProxy::parse("unix"), Ok(TrustedProxy::Unix));
        for text in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "::/256",
            "10/8",
            "10.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
            "010.0.0.0/8",
            "10.0.0.0 /8",
            "[::1]",
            "fe80::1%eth0",
            "localhost",
            "*",
            "Unix",
            "unix:/x",
            "10.0.0.0/999999999999",
            "::ffff:10.0.0.0/129",
            "10.0.0.1/8",
            "fd00::1/64",
            "::ffff:10.0.0.0/90",
        ] {
            assert!(TrustedProxy::parse(text).is_err(), "{text}");
        }
        let wide = TrustedProxy::parse("10.0.0.1/8").expect_err("has bits after its prefix");
        assert_eq!(wide, "\"10.0.0.1/8\" has bits after its prefix: write 10.0.0.0/8");
    }

    #[test]
    fn a_network_contains_the_addresses_with_its_leading_bits() {
        let table = [
            (&["10.0.0.0/8"][..], "10.255.0.1", true),
            (&["10.0.0.0/8"], "11.0.0.0", false),
            (&["10.0.0.0/8"], "::ffff:10.1.2.3", true),
            (&["::ffff:10.0.0.0/104"], "10.1.2.3", true),
            (&["10.0.0.7"], "10.0.0.7", true),
            (&["10.0.0.7"], "10.0.0.6", false),
            (&["10.0.0.0/31", "192.168.0.0/16"], "192.168.9.9", true),
            (&["0.0.0.0/0"], "203.0.113.9", true),
            (&["0.0.0.0/0"], "2001:db8::1", false),
            (&["::/0"], "2001:db8::1", true),
            // All of IPv6 contains no IPv4 address.
            (&["::/0"], "203.0.113.9", false),
            (&["::/0"], "::ffff:203.0.113.9", false),
            (&["fd00::/8"], "fdff::1", true),
            (&["fd00::/8"], "fe00::1", false),
            (&["::1"], "::1", true),
            // The deprecated IPv4-compatible form is an IPv6 address like any other.
            (&["127.0.0.1"], "::127.0.0.1", false),
            (&["unix"], "127.0.0.1", false),
            (&[], "127.0.0.1", false),
        ];
        for (networks, address, wanted) in table {
            let networks = networks.iter().map(|text| TrustedProxy::parse(text).expect(text));
            let proxies = TrustedProxies::new(networks);
            let address = address.parse().expect("is an address");
            assert_eq!(proxies.contains(address), wanted, "{address} in {:?}", proxies.names());
        }
    }
}
