//! Looks up the addresses of a DNS name, or its SRV records, whenever their TTL ends.
//!
//! Each address is an engine, which is connected to by its address; requests and certificates carry the
//! name. An answer without addresses (NXDOMAIN, or no record) counts as a failure, as SERVFAIL and silence
//! do: the balancer keeps the last list. A DNS server answers so after a scaling to zero, and after a bad
//! reload of its zone; in both cases the probes of the balancer find the engines that are gone. Where only
//! one of the two families of addresses fails, or one target of SRV records, its last addresses stay beside
//! the new ones.
//!
//! Of SRV records only those with the lowest priority count. Their weights become factors of the source's
//! weight, 1 for the least of them: Kubernetes divides 100 by the number of its pods, so that sums and means
//! would change all upstreams with each pod.

mod lookup;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};

use super::engine::{DiscoveredEngine, FoundEngine};
use super::source::{FailureReason, SourceFailure, SourceReporter};
use super::{POLL_TIMEOUT, UNANSWERED_POLL_INTERVAL};
use crate::config::types::{DnsLookup, DnsName, UpstreamUrl};
use lookup::{FoundAddresses, NameLookup, ServiceTarget};

/// The least interval between two lookups, whatever the TTL.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// The largest number of addresses of one name, and of SRV records.
const MAX_ADDRESSES: usize = 1024;

/// The number of targets of SRV records that are looked up at once.
const MAX_CONCURRENT_TARGETS: usize = 16;

/// The weight of an SRV record with weight 0 beside heavier ones, as a share of the least of those: RFC 2782
/// gives it a very small chance.
const ZERO_WEIGHT_SHARE: f64 = 0.01;

/// An address and port, and the factor of its weight.
#[derive(Clone, Debug, PartialEq)]
struct DnsEndpoint {
    address: IpAddr,
    port: u16,
    weight: f64,
}

/// The addresses that each host had last, by family: IPv4, IPv6.
type KnownAddresses = BTreeMap<String, [BTreeSet<IpAddr>; 2]>;

/// Looks the name up until dropped.
pub(super) async fn follow(lookup: &DnsLookup, every: Duration, mut reporter: SourceReporter) {
    let mut known = KnownAddresses::new();
    let mut answered = None;
    loop {
        match find(lookup, &mut known, POLL_TIMEOUT).await {
            Ok((engines, ttl)) => {
                answered = Some(interval(ttl, every));
                if !reporter.listed(engines).await {
                    return;
                }
            }
            Err(failure) => reporter.failed(&failure),
        }
        tokio::time::sleep(answered.unwrap_or(UNANSWERED_POLL_INTERVAL)).await;
    }
}

/// Looks the name up once.
pub(super) async fn poll(
    lookup: &DnsLookup,
    limit: Duration,
) -> Result<Vec<DiscoveredEngine>, SourceFailure> {
    find(lookup, &mut KnownAddresses::new(), limit).await.map(|(engines, _)| engines)
}

/// Returns the time until the next lookup.
fn interval(ttl: Duration, every: Duration) -> Duration {
    ttl.min(every).max(MIN_INTERVAL)
}

/// Returns the engines of the name, and the time for which the answer holds.
async fn find(
    lookup: &DnsLookup,
    known: &mut KnownAddresses,
    limit: Duration,
) -> Result<(Vec<DiscoveredEngine>, Duration), SourceFailure> {
    let found = tokio::time::timeout(limit, endpoints(lookup, known)).await;
    let late = || SourceFailure::new(FailureReason::Timeout, format!("no answer within {limit:?}"));
    let (endpoints, ttl) = found.unwrap_or_else(|_| Err(late()))?;
    Ok((counted(engines(&lookup.name, endpoints))?, ttl))
}

/// Rejects a list without engines, and one with too many.
fn counted(engines: Vec<DiscoveredEngine>) -> Result<Vec<DiscoveredEngine>, SourceFailure> {
    match engines.len() {
        0 => {
            let text = "the name has no address of a machine: the resolver blocks it";
            Err(SourceFailure::new(FailureReason::Empty, text))
        }
        1..=MAX_ADDRESSES => Ok(engines),
        count => {
            let text = format!("the name has {count} addresses: {MAX_ADDRESSES} is the most");
            Err(SourceFailure::new(FailureReason::Invalid, text))
        }
    }
}

async fn endpoints(
    lookup: &DnsLookup,
    known: &mut KnownAddresses,
) -> Result<(Vec<DnsEndpoint>, Duration), SourceFailure> {
    let resolver = NameLookup::new(&lookup.servers).await?;
    let UpstreamUrl { host, port, .. } = &lookup.name.url;
    if !lookup.name.srv {
        let found = resolver.addresses(host).await;
        let (addresses, ttl) = merge(known.entry(host.clone()).or_default(), found)?;
        let endpoint = |address| DnsEndpoint { address, port: *port, weight: 1.0 };
        return Ok((addresses.into_iter().map(endpoint).collect(), ttl));
    }
    let (targets, ttl) = resolver.services(host).await?;
    let targets = weighted(targets);
    if targets.len() > MAX_ADDRESSES {
        let text = format!("the name has {} SRV records: {MAX_ADDRESSES} is the most", targets.len());
        return Err(SourceFailure::new(FailureReason::Invalid, text));
    }
    service_endpoints(&resolver, targets, ttl, known).await
}

/// Looks up the addresses of the targets of SRV records.
async fn service_endpoints(
    resolver: &NameLookup,
    targets: Vec<(ServiceTarget, f64)>,
    ttl: Duration,
    known: &mut KnownAddresses,
) -> Result<(Vec<DnsEndpoint>, Duration), SourceFailure> {
    let hosts: BTreeSet<String> = targets.iter().map(|(target, _)| target.host.clone()).collect();
    known.retain(|host, _| hosts.contains(host));
    let lookups = hosts.into_iter().map(async |host: String| {
        let found = resolver.addresses(&host).await;
        (host, found)
    });
    let found: Vec<_> = stream::iter(lookups).buffer_unordered(MAX_CONCURRENT_TARGETS).collect().await;
    let (mut addresses, mut least, mut failure) = (BTreeMap::new(), ttl, None);
    for (host, found) in found {
        let known = known.entry(host.clone()).or_default();
        match merge(known, found) {
            Ok((found, ttl)) => {
                least = least.min(ttl);
                addresses.insert(host, found);
            }
            // The records still name the target, which had these addresses.
            Err(_) if known.iter().any(|family| !family.is_empty()) => {
                addresses.insert(host, known.iter().flatten().copied().collect());
            }
            Err(why) => failure = Some(why),
        }
    }
    let mut endpoints = Vec::new();
    for (target, weight) in &targets {
        for address in addresses.get(&target.host).into_iter().flatten() {
            endpoints.push(DnsEndpoint { address: *address, port: target.port, weight: *weight });
        }
    }
    match failure {
        Some(failure) if endpoints.is_empty() => Err(failure),
        _ => Ok((endpoints, least)),
    }
}

/// Merges what was found of both families into what is known. Returns all addresses, and how long they hold.
fn merge(
    known: &mut [BTreeSet<IpAddr>; 2],
    found: [FoundAddresses; 2],
) -> Result<(BTreeSet<IpAddr>, Duration), SourceFailure> {
    use FoundAddresses::{Failed, Missing};
    let found = match found {
        // A failure says more than an answer without addresses.
        [Failed(why), Missing(_) | Failed(_)] | [Missing(_), Failed(why)] => return Err(why),
        [Missing(why), Missing(_)] => return Err(why),
        found => found,
    };
    let mut least = Duration::MAX;
    for (known, found) in known.iter_mut().zip(found) {
        match found {
            FoundAddresses::Found(addresses, ttl) => {
                least = least.min(ttl);
                *known = addresses;
            }
            Missing(_) => known.clear(),
            Failed(_) => {}
        }
    }
    Ok((known.iter().flatten().copied().collect(), least))
}

/// Returns the targets with the lowest priority, and the factors of their weights.
fn weighted(targets: Vec<ServiceTarget>) -> Vec<(ServiceTarget, f64)> {
    let lowest = targets.iter().map(|target| target.priority).min();
    let chosen = targets.into_iter().filter(|target| Some(target.priority) == lowest);
    let chosen: Vec<ServiceTarget> = chosen.collect();
    let least = chosen.iter().map(|target| target.weight).filter(|weight| *weight > 0).min();
    let factor = |weight: u16| match least {
        None => 1.0,
        Some(_) if weight == 0 => ZERO_WEIGHT_SHARE,
        Some(least) => f64::from(weight) / f64::from(least),
    };
    chosen.into_iter().map(|target| (target.clone(), factor(target.weight))).collect()
}

/// Returns an engine for each endpoint, in an order that does not depend on that of the answer.
fn engines(name: &DnsName, mut endpoints: Vec<DnsEndpoint>) -> Vec<DiscoveredEngine> {
    endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.port));
    endpoints.dedup_by_key(|endpoint| (endpoint.address, endpoint.port));
    // Some resolvers block a name by an address that would lead to this machine.
    endpoints.retain(|endpoint| !endpoint.address.to_canonical().is_unspecified());
    let engine = |endpoint: DnsEndpoint| {
        let url = UpstreamUrl { host: endpoint.address.to_string(), port: endpoint.port, ..name.url.clone() };
        let host = Some(name.tls_host().to_string());
        FoundEngine { weight: endpoint.weight, host, ..FoundEngine::at(url) }.into()
    };
    endpoints.into_iter().map(engine).collect()
}

#[cfg(test)]
mod tests;
