//! Upstreams that a DNS name has: its addresses, or the targets of its SRV records.

use tokio::net::TcpListener;
use vllm_lb::config::types::{DiscoveryMethod, DnsLookup, DnsName};

use super::*;
use crate::common::PATIENCE;
use crate::common::dns::{A, AAAA, DnsAnswer, DnsServer, RecordData, SRV};

/// The name of the tests, with a final dot where no search domain may come behind it.
pub const NAME: &str = "vllm.test";

/// A source that asks this server for a name.
pub fn lookup(server: &DnsServer, written: &str) -> DiscoverySource {
    let name = DnsName::parse(written).unwrap_or_else(|why| panic!("{written}: {why}"));
    DiscoverySource::new(DiscoveryMethod::Dns(DnsLookup { name, servers: vec![server.address] }))
}

/// Engines with one port at the addresses 127.0.`net`.1 and so on: the records of a name have no ports.
pub async fn engines_at(net: u8, count: u8) -> (u16, Vec<EngineServer>) {
    loop {
        let first = TcpListener::bind((format!("127.0.{net}.1"), 0)).await.expect("a free port is there");
        let port = first.local_addr().expect("it is bound").port();
        let mut listeners = vec![first];
        for last in 2..=count {
            listeners.extend(TcpListener::bind((format!("127.0.{net}.{last}"), port)).await.ok());
        }
        if listeners.len() == usize::from(count) {
            let start = |listener| {
                let options = Options { timing: crate::common::Timing::instant(), ..Options::default() };
                EngineServer::start_on(listener, options).expect("a socket can be served")
            };
            return (port, listeners.into_iter().map(start).collect());
        }
    }
}

fn address(engine: &EngineServer) -> String {
    engine.address().ip().to_string()
}

/// Answers with the addresses of these engines.
fn say(server: &DnsServer, engines: &[EngineServer]) {
    let addresses: Vec<String> = engines.iter().map(address).collect();
    server.set_addresses(NAME, 1, addresses.iter().map(String::as_str));
}

async fn failures(balancer: &Balancer, reason: &str) -> f64 {
    let page = balancer.metrics();
    let of = |line: &&str| {
        line.starts_with("vllm_lb_discovery_failures_total{")
            && line.contains(&format!("reason=\"{reason}\""))
    };
    page.lines().filter(of).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_addresses_of_a_name_are_followed_and_no_request_notices() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(11, 3).await);
    let source = lookup(&server, &format!("http://{NAME}.:{port}/v1"));
    let balancer =
        Balancer::start(asking([DiscoverySource { weight: 2.0, max_active: Some(9), ..source }])).await;
    let missed = async || (failures(&balancer, "empty").await >= 1.0).then_some(());
    eventually("the name does not exist", missed).await;
    say(&server, &engines[..2]);
    until_ready(&balancer, &engines[..2]).await;
    let clients = Clients::start(&balancer, 4);
    for chosen in [&engines[1..], &engines[..1], &engines[..]] {
        say(&server, chosen);
        until_ready(&balancer, chosen).await;
        clients.until_more(20).await;
    }
    assert_eq!(clients.end().await, none());
    eventually("all are there", async || (balancer.loads().len() == 3).then_some(())).await;
    let host = format!("{NAME}:{port}");
    for engine in &engines {
        // Requests and probes carry the name.
        let all = [engine.requests(), engine.polls()].concat();
        let named = |recorded: &crate::common::Recorded| {
            recorded.headers.get("host").is_some_and(|value| value.as_bytes() == host.as_bytes())
        };
        assert!(!all.is_empty() && all.iter().all(named), "{all:?}");
        let row = admin(&balancer, "GET", &path(engine), Value::Null).await.expect(200).json();
        assert_eq!(row["source"], format!("dns http://{NAME}.:{port}"));
        assert_eq!((&row["weight"], &row["max_active"]), (&json!(2.0), &json!(9)), "{row}");
    }
    // Both families are asked for, over UDP.
    let asked = server.asked();
    let of = |kind: u16| asked.iter().any(|(name, of, tcp)| name == NAME && *of == kind && !tcp);
    assert!(of(A) && of(AAAA), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ttl_decides_when_a_name_is_looked_up_again() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(12, 1).await);
    // With a long TTL the interval decides.
    for (ttl, every) in [(1, Duration::from_secs(3600)), (3600, Duration::from_secs(1))] {
        server.set_addresses(NAME, ttl, ["127.0.12.1"]);
        let source = DiscoverySource { every, ..lookup(&server, &format!("http://{NAME}.:{port}")) };
        let balancer = Balancer::start(asking([source])).await;
        until_ready(&balancer, &engines).await;
        let begun = std::time::Instant::now();
        server.until_asked(NAME, A, 3).await;
        assert!(begun.elapsed() > Duration::from_millis(1500), "not more often than once a second");
        balancer.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_addresses_keeps_the_last_ones() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(13, 2).await);
    say(&server, &engines);
    let balancer = Balancer::start(asking([lookup(&server, &format!("http://{NAME}.:{port}"))])).await;
    until_ready(&balancer, &engines).await;
    let clients = Clients::start(&balancer, 2);
    let forged = DnsAnswer::WrongId(RecordData::addresses(["127.0.13.9"]));
    let troubles = [
        (DnsAnswer::Code(3), "empty"),
        (DnsAnswer::Records(1, Vec::new()), "empty"),
        (DnsAnswer::Code(2), "refused"),
        (DnsAnswer::Code(5), "refused"),
        (DnsAnswer::Silence, "timeout"),
        (forged, "timeout"),
        (DnsAnswer::Records(1, vec![RecordData::Alias("nowhere.test")]), "empty"),
    ];
    for (answer, reason) in troubles {
        let before = failures(&balancer, reason).await;
        server.set_both(NAME, &answer);
        let counted = async || (failures(&balancer, reason).await > before).then_some(());
        eventually(&format!("{answer:?} is {reason}"), counted).await;
        assert_eq!((ready(&balancer).len(), balancer.loads().len()), (2, 2), "{answer:?}");
    }
    clients.until_more(20).await;
    assert_eq!(clients.end().await, none());
    // One family that fails keeps its addresses beside the other's.
    server.set(NAME, A, DnsAnswer::Code(2));
    server.set(NAME, AAAA, DnsAnswer::Records(1, RecordData::addresses(["::1"])));
    let six = async || balancer.running.fleet.snapshot().by_name(&format!("[::1]:{port}")).map(|_| ());
    eventually("the IPv6 address is there", six).await;
    assert_eq!(balancer.loads().len(), 3);
    say(&server, &engines[..1]);
    until_ready(&balancer, &engines[..1]).await;
}

/// Two hundred addresses do not fit a packet: the answer over UDP is cut, and the one over TCP is whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_is_asked_for_over_tcp() {
    let server = DnsServer::start().await;
    let listener = TcpListener::bind("0.0.0.0:0").await.expect("a free port is there");
    let options = Options { timing: crate::common::Timing::instant(), ..Options::default() };
    let engine = EngineServer::start_on(listener, options).expect("a socket can be served");
    let addresses: Vec<String> = (1..=200).map(|last| format!("127.0.14.{last}")).collect();
    server.set_addresses(NAME, 30, addresses.iter().map(String::as_str));
    let source = lookup(&server, &format!("http://{NAME}.:{}", engine.address().port()));
    let mut config = asking([source]);
    (config.health.interval, config.health.timeout) = (PATIENCE, PATIENCE);
    let balancer = Balancer::start(config).await;
    balancer.until_ready(200).await;
    let asked = server.asked();
    assert!(asked.iter().any(|(_, kind, tcp)| *kind == A && *tcp), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_and_a_search_domain_lead_to_addresses() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(15, 1).await);
    let four = vec![RecordData::Alias("real.test"), RecordData::Address([127, 0, 15, 1].into())];
    server.set(NAME, A, DnsAnswer::Records(1, four));
    server.set(NAME, AAAA, DnsAnswer::Records(1, vec![RecordData::Alias("real.test")]));
    let balancer = Balancer::start(asking([lookup(&server, &format!("http://{NAME}:{port}"))])).await;
    until_ready(&balancer, &engines).await;
    // A name of /etc/hosts, of which the server knows nothing.
    let local = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let local = EngineServer::start_on(local, Options::default()).expect("a socket can be served");
    let source = lookup(&server, &format!("http://localhost:{}", local.address().port()));
    let balancer = Balancer::start(asking([source])).await;
    until_ready(&balancer, [&local]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn srv_records_give_ports_and_weights() {
    let (server, engines) = (DnsServer::start().await, engines(4).await);
    let service = "_http._tcp.vllm.test";
    let record = |priority, weight, engine: usize| RecordData::Service {
        priority,
        weight,
        port: engines[engine].address().port(),
        target: format!("engine-{engine}.test"),
    };
    for engine in 0..4 {
        server.set_addresses(&format!("engine-{engine}.test"), 1, ["127.0.0.1"]);
    }
    let say = |records: Vec<RecordData>| server.set(service, SRV, DnsAnswer::Records(1, records));
    say(vec![record(10, 20, 0), record(10, 50, 1), record(20, 90, 2)]);
    let source = lookup(&server, &format!("srv+http://{service}."));
    let balancer = Balancer::start(asking([DiscoverySource { weight: 4.0, ..source }])).await;
    until_ready(&balancer, &engines[..2]).await;
    let weights = || {
        let snapshot = balancer.running.fleet.snapshot();
        let weight = |engine| snapshot.by_name(&name(engine)).map(|entry| entry.upstream.config.weight);
        engines.iter().map(weight).collect::<Vec<_>>()
    };
    assert_eq!(weights(), [Some(4.0), Some(10.0), None, None]);
    balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
    let hosts: Vec<String> = engines[..2]
        .iter()
        .flat_map(EngineServer::requests)
        .filter_map(|request| Some(request.headers.get("host")?.to_str().ok()?.to_string()))
        .collect();
    assert!(hosts.len() == 1 && hosts[0].starts_with("vllm.test:"), "{hosts:?}");
    // Without the lowest priority the next one counts.
    say(vec![record(20, 1, 2), record(20, 1, 3)]);
    until_ready(&balancer, &engines[2..]).await;
    assert_eq!(weights()[2..], [Some(4.0), Some(4.0)]);
    // A target that cannot be looked up keeps its addresses while records name it.
    server.set_both("engine-2.test", &DnsAnswer::Code(2));
    say(vec![record(20, 1, 2), record(20, 1, 3), record(20, 1, 0)]);
    until_ready(&balancer, [&engines[0], &engines[2], &engines[3]]).await;
    // The root as a target, and no record: neither removes an upstream.
    for records in
        [Vec::new(), vec![RecordData::Service { priority: 0, weight: 0, port: 0, target: ".".into() }]]
    {
        let before = failures(&balancer, "empty").await;
        say(records);
        let counted = async || (failures(&balancer, "empty").await > before).then_some(());
        eventually("there is no service", counted).await;
        assert_eq!(balancer.loads().len(), 3);
    }
}

/// The connection goes to the address, and the certificate must be the name's.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_those_of_the_name_and_not_of_the_address() {
    let (server, certs) = (DnsServer::start().await, Certs::new());
    let engine = EngineServer::start_tls(Options::default(), &certs.certificate, &certs.key);
    let engine = engine.await.expect("a free port is there");
    server.set_addresses(NAME, 1, ["127.0.0.1"]);
    let proven = UpstreamTls { ca: Some(certs.authority()), ..UpstreamTls::default() };
    let port = engine.address().port();
    for (sni, is_trusted) in [(None, false), (Some("localhost"), true)] {
        let tls = UpstreamTls { sni: sni.map(str::to_string), ..proven.clone() };
        let source = DiscoverySource { tls, ..lookup(&server, &format!("https://{NAME}.:{port}")) };
        let balancer = Balancer::start(asking([source])).await;
        if is_trusted {
            until_ready(&balancer, [&engine]).await;
            balancer.ask(post(CHAT, chat("sim"))).await.expect(200);
        } else {
            let failed = async || (balancer.metric("vllm_lb_probe_failures_total").await > 2.0).then_some(());
            eventually("the certificate is not believed", failed).await;
            assert!(ready(&balancer).is_empty());
        }
        balancer.stop().await;
    }
}

/// A change of the configuration alone, and a server that does not answer: the last list gets the settings.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_gives_the_last_list_other_settings() {
    let (server, (port, engines)) = (DnsServer::start().await, engines_at(16, 2).await);
    say(&server, &engines);
    let config = |weight: f64| {
        let source = lookup(&server, &format!("http://{NAME}.:{port}"));
        asking([DiscoverySource { weight, ..source }])
    };
    let file = std::sync::Arc::new(std::sync::Mutex::new(config(1.0)));
    let read = file.clone();
    let load: vllm_lb::app::LoadConfig =
        std::sync::Arc::new(move || Ok((read.lock().expect("no test panics with it").clone(), Vec::new())));
    crate::common::logs::remember();
    let running = vllm_lb::app::start_with(config(1.0), load).await.expect("the balancer starts");
    let balancer = Balancer { running };
    until_ready(&balancer, &engines).await;
    server.set_both(NAME, &DnsAnswer::Code(2));
    *file.lock().expect("no test panics with it") = config(3.0);
    admin(&balancer, "POST", "/admin/reload", Value::Null).await.expect(200);
    let heavier = async || {
        let snapshot = balancer.running.fleet.snapshot();
        let all = snapshot.entries.iter().all(|entry| entry.upstream.config.weight == 3.0);
        (all && snapshot.entries.len() == 2).then_some(())
    };
    eventually("the weight is another", heavier).await;
}
