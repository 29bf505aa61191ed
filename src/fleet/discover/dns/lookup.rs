//! Asks DNS servers, with the names of `/etc/hosts` and the search domains of `/etc/resolv.conf`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::RData;
use hickory_resolver::{Resolver, TokioResolver, system_conf};

use super::super::source::{FailureReason, SourceFailure};

/// The longest wait for one answer, before the question is sent again.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(2);

/// Asks DNS servers.
pub(super) struct NameLookup {
    resolver: TokioResolver,
}

/// What one family of addresses of a name is.
#[derive(Debug)]
pub(super) enum FoundAddresses {
    /// Addresses, and the time for which they hold.
    Found(BTreeSet<IpAddr>, Duration),
    /// An answer without addresses.
    Missing(SourceFailure),
    /// No answer.
    Failed(SourceFailure),
}

/// The target of an SRV record.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServiceTarget {
    pub host: String,
    pub port: u16,
    pub priority: u16,
    pub weight: u16,
}

// === impl NameLookup ===

impl NameLookup {
    /// Builds a resolver for these servers; without any, for those of `/etc/resolv.conf`. The files are read
    /// each time, since they change while a balancer runs.
    pub(super) async fn new(servers: &[SocketAddr]) -> Result<Self, SourceFailure> {
        let servers = servers.to_vec();
        let unusable = |what: String| {
            SourceFailure::new(FailureReason::Unreachable, format!("/etc/resolv.conf: {what}"))
        };
        let built = tokio::task::spawn_blocking(move || build(&servers)).await;
        let resolver = built.map_err(|error| unusable(error.to_string()))?;
        Ok(NameLookup { resolver: resolver.map_err(|error| unusable(error.to_string()))? })
    }

    /// Looks up the IPv4 and the IPv6 addresses of a host.
    pub(super) async fn addresses(&self, host: &str) -> [FoundAddresses; 2] {
        let (four, six) = tokio::join!(self.resolver.ipv4_lookup(host), self.resolver.ipv6_lookup(host));
        [found(four), found(six)]
    }

    /// Looks up the targets of SRV records, and the time for which they hold.
    pub(super) async fn services(&self, name: &str) -> Result<(Vec<ServiceTarget>, Duration), SourceFailure> {
        let lookup = self.resolver.srv_lookup(name).await.map_err(|error| failure(&error).0)?;
        let target = |data: &RData| match data {
            // The root as a target says that there is no such service.
            RData::SRV(srv) if !srv.target.is_root() => Some(ServiceTarget {
                host: srv.target.to_ascii(),
                port: srv.port,
                priority: srv.priority,
                weight: srv.weight,
            }),
            _ => None,
        };
        let targets: Vec<ServiceTarget> =
            lookup.answers().iter().filter_map(|record| target(&record.data)).collect();
        if targets.is_empty() {
            return Err(SourceFailure::new(FailureReason::Empty, "the name has no SRV record with a target"));
        }
        Ok((targets, ttl(&lookup)))
    }
}

fn build(servers: &[SocketAddr]) -> Result<TokioResolver, NetError> {
    let (mut config, mut options) = match system_conf::read_system_conf() {
        Ok(system) => system,
        Err(error) if servers.is_empty() => return Err(error),
        Err(_) => (ResolverConfig::from_name_servers(Vec::new()), ResolverOpts::default()),
    };
    if !servers.is_empty() {
        config.name_servers = servers.iter().map(name_server).collect();
    }
    // The domain of this machine's name is for files without search domains.
    if !config.search.is_empty() {
        config.domain = None;
    }
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Always;
    options.timeout = options.timeout.min(MAX_ANSWER_TIME);
    // Large answers fit one packet.
    options.edns0 = true;
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build()
}

/// A server that is asked over UDP, and over TCP where the answer does not fit.
fn name_server(address: &SocketAddr) -> NameServerConfig {
    let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
    connections.iter_mut().for_each(|connection| connection.port = address.port());
    NameServerConfig::new(address.ip(), true, connections)
}

/// Returns the least TTL of an answer.
fn ttl(lookup: &Lookup) -> Duration {
    let least = lookup.answers().iter().map(|record| record.ttl).min();
    Duration::from_secs(least.unwrap_or(0).into())
}

fn found(lookup: Result<Lookup, NetError>) -> FoundAddresses {
    let lookup = match lookup.map_err(|error| failure(&error)) {
        Ok(lookup) => lookup,
        Err((why, true)) => return FoundAddresses::Missing(why),
        Err((why, false)) => return FoundAddresses::Failed(why),
    };
    let addresses: BTreeSet<IpAddr> =
        lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
    if addresses.is_empty() {
        return FoundAddresses::Missing(no_address());
    }
    FoundAddresses::Found(addresses, ttl(&lookup))
}

fn no_address() -> SourceFailure {
    SourceFailure::new(FailureReason::Empty, "the name has no address")
}

/// Returns the failure, and whether a server answered that there are no records.
fn failure(error: &NetError) -> (SourceFailure, bool) {
    let code = match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => Some(none.response_code),
        NetError::Dns(DnsError::ResponseCode(code)) => Some(*code),
        _ => None,
    };
    let (reason, text) = match (code, error) {
        (Some(ResponseCode::NoError), _) => return (no_address(), true),
        (Some(ResponseCode::NXDomain), _) => {
            return (SourceFailure::new(FailureReason::Empty, "the name does not exist (NXDOMAIN)"), true);
        }
        (Some(code), _) => (FailureReason::Refused, format!("the DNS server answered: {code}")),
        (None, NetError::Timeout) => (FailureReason::Timeout, "no DNS server answered in time".into()),
        (None, NetError::Proto(error)) => {
            (FailureReason::Invalid, format!("invalid DNS answer or name: {error}"))
        }
        (None, other) => (FailureReason::Unreachable, format!("no DNS server answered: {other}")),
    };
    (SourceFailure::new(reason, text), false)
}
