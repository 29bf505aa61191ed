//! The clients that the balancer believes when they say where a request came from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The bits in front of the IPv4 address in an IPv4-mapped IPv6 address.
const MAPPED_BITS: u8 = 96;

/// The networks of the proxies in front of the balancer.
///
/// The headers `x-forwarded-*` and `x-data-parallel-rank` of a client outside of them are replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    networks: Vec<Network>,
    unix: bool,
}

/// One item of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustedProxy {
    Network(Network),
    /// Every client of a unix socket.
    Unix,
}

/// The addresses that share their leading bits. An IPv4-mapped network is kept as the IPv4 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
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
                TrustedProxy::Network(network) => all.networks.push(network),
                TrustedProxy::Unix => all.unix = true,
            }
        }
        all
    }

    /// Whether a client at this address is believed. A listener on `[::]` sees IPv4 clients at IPv4-mapped
    /// addresses: these are compared with the IPv4 networks.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(address))
    }

    /// Whether the clients of unix sockets are believed.
    pub fn contains_unix(&self) -> bool {
        self.unix
    }

    /// The items as the file may hold them.
    pub fn names(&self) -> Vec<String> {
        let unix = self.unix.then(|| "unix".to_string());
        self.networks.iter().map(Network::to_string).chain(unix).collect()
    }
}

// === impl Network ===

impl Network {
    /// The network of the first `prefix` bits of an address. `None` when the address has fewer bits.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V6(v6) if prefix >= MAPPED_BITS && v6.to_ipv4_mapped().is_some() => {
                return Network::new(address.to_canonical(), prefix - MAPPED_BITS);
            }
            other => other,
        };
        (prefix <= width(address)).then(|| Network { base: masked(address, prefix), prefix })
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

impl fmt::Display for Network {
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
