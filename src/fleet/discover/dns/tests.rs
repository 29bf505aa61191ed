//! What follows from the answers of DNS servers.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|text| text.parse().expect("is an address")).collect()
}

fn found(addresses: &[&str], ttl: u64) -> FoundAddresses {
    FoundAddresses::Found(set(addresses), Duration::from_secs(ttl))
}

fn missing() -> FoundAddresses {
    FoundAddresses::Missing(SourceFailure::new(FailureReason::Empty, "NXDOMAIN"))
}

fn failed() -> FoundAddresses {
    FoundAddresses::Failed(SourceFailure::new(FailureReason::Timeout, "late"))
}

#[test]
fn a_family_that_fails_keeps_its_addresses_and_one_without_any_loses_them() {
    let mut known = [set(&["10.0.0.1"]), set(&["::1"])];
    let (four, six) = (["10.0.0.2", "10.0.0.3"], ["::2"]);
    let steps = [
        ((found(&four, 5), failed()), Ok((vec!["10.0.0.2", "10.0.0.3", "::1"], 5))),
        ((failed(), found(&six, 9)), Ok((vec!["10.0.0.2", "10.0.0.3", "::2"], 9))),
        ((missing(), failed()), Err(FailureReason::Timeout)),
        ((failed(), missing()), Err(FailureReason::Timeout)),
        ((missing(), missing()), Err(FailureReason::Empty)),
        ((missing(), found(&six, 9)), Ok((vec!["::2"], 9))),
        ((found(&["10.0.0.9"], 7), found(&six, 3)), Ok((vec!["10.0.0.9", "::2"], 3))),
    ];
    for ((four, six), wanted) in steps {
        let merged = merge(&mut known, [four, six]).map_err(|why| why.reason);
        let wanted = wanted.map(|(all, ttl)| (set(&all), Duration::from_secs(ttl)));
        assert_eq!(merged, wanted);
    }
}

fn target(host: &str, priority: u16, weight: u16) -> ServiceTarget {
    ServiceTarget { host: host.into(), port: 8000, priority, weight }
}

#[test]
fn the_lowest_priority_counts_and_the_least_weight_is_one() {
    let table = [
        (&[("a", 10, 33), ("b", 10, 33), ("c", 20, 1)][..], &[("a", 1.0), ("b", 1.0)][..]),
        (&[("a", 0, 10), ("b", 0, 25)], &[("a", 1.0), ("b", 2.5)]),
        (&[("a", 0, 0), ("b", 0, 0)], &[("a", 1.0), ("b", 1.0)]),
        (&[("a", 0, 0), ("b", 0, 4)], &[("a", ZERO_WEIGHT_SHARE), ("b", 1.0)]),
        (&[], &[]),
    ];
    for (records, wanted) in table {
        let targets = records.iter().map(|(host, priority, weight)| target(host, *priority, *weight));
        let weights = weighted(targets.collect());
        let shown: Vec<(&str, f64)> =
            weights.iter().map(|(target, weight)| (target.host.as_str(), *weight)).collect();
        assert_eq!(shown, wanted, "{records:?}");
    }
}

#[test]
fn an_engine_has_its_address_and_the_name() {
    let at =
        |address: &str, port| DnsEndpoint { address: address.parse().expect("is one"), port, weight: 2.0 };
    let name = DnsName::parse("srv+https://_api._tcp.vllm.svc/team").expect("is a name");
    let found = engines(&name, vec![at("::1", 2), at("10.0.0.1", 1), at("0.0.0.0", 1), at("10.0.0.1", 1)]);
    let shown: Vec<String> = found
        .iter()
        .map(|engine| match engine {
            DiscoveredEngine::Found(engine) => {
                format!("{} {} {:?}", engine.url.display(), engine.weight, engine.host)
            }
            DiscoveredEngine::Configured(config) => panic!("{config:?}"),
        })
        .collect();
    let wanted =
        ["https://10.0.0.1:1/team 2 Some(\"vllm.svc\")", "https://[::1]:2/team 2 Some(\"vllm.svc\")"];
    assert_eq!(shown, wanted);
}

/// A resolver that blocks a name answers with an address that no machine has. The last list has to stay.
#[test]
fn addresses_that_no_machine_has_are_no_list() {
    let name = DnsName::parse("http://vllm:8000").expect("is a name");
    let list = |addresses: &[&str]| {
        let endpoint = |address| DnsEndpoint { address, port: 8000, weight: 1.0 };
        counted(engines(&name, set(addresses).into_iter().map(endpoint).collect()))
    };
    for blocked in [&["0.0.0.0"][..], &["::"], &["0.0.0.0", "::"], &["::ffff:0.0.0.0"]] {
        assert_eq!(list(blocked).map_err(|why| why.reason), Err(FailureReason::Empty), "{blocked:?}");
    }
    assert_eq!(list(&["0.0.0.0", "10.0.0.1"]).map(|engines| engines.len()), Ok(1));
}

#[test]
fn asks_again_between_a_second_and_the_configured_interval() {
    let seconds = Duration::from_secs;
    let table = [(0, 10, 1), (5, 10, 5), (3600, 10, 10), (30, 30, 30)];
    for (ttl, every, wanted) in table {
        assert_eq!(interval(seconds(ttl), seconds(every)), seconds(wanted), "{ttl} {every}");
    }
    assert_eq!(interval(seconds(9), Duration::from_millis(100)), seconds(1));
}

proptest! {
    /// The order of an answer, and what it names twice, make no difference.
    #[test]
    fn lists_each_endpoint_once_in_one_order(numbers in vec((1..5_u8, 1..4_u16), 1..12)) {
        let name = DnsName::parse("http://vllm:8000").expect("is a name");
        let endpoints: Vec<DnsEndpoint> = numbers
            .iter()
            .map(|(last, port)| DnsEndpoint { address: [10, 0, 0, *last].into(), port: *port, weight: 1.0 })
            .collect();
        let mut turned = endpoints.clone();
        turned.reverse();
        let found = engines(&name, endpoints);
        prop_assert_eq!(&found, &engines(&name, turned));
        let distinct: BTreeSet<_> = numbers.into_iter().collect();
        prop_assert_eq!(found.len(), distinct.len());
    }
}
