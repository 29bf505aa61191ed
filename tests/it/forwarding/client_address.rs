//! The address of a request's client in its log record, behind proxies and behind clients that lie.

use crate::common::body::{chat, stream};
use crate::common::wire::{JSON, request};
use crate::common::{Balancer, EngineServer, Options, config, engine, eventually, logs, loopback, upstreams};
use vllm_lb::config::types::{Config, TrustedProxies, TrustedProxy};

/// The field `client` of the record of a request with these fields.
async fn client_of(balancer: &Balancer, id: &str, forwarded: &[&str]) -> String {
    client_with(balancer, id, forwarded, &chat("sim")).await
}

async fn client_with(balancer: &Balancer, id: &str, forwarded: &[&str], body: &str) -> String {
    let mut headers = vec![JSON, ("x-request-id", id)];
    headers.extend(forwarded.iter().map(|value| ("x-forwarded-for", *value)));
    let asked = request("POST", "/v1/chat/completions", &headers, body.as_bytes());
    balancer.ask(asked).await.expect(200);
    let wanted = format!("request done id={id} client=");
    eventually("the request is logged", async || {
        let found = logs::all().into_iter().find_map(|line| Some(line.split_once(&wanted)?.1.to_string()));
        found.map(|rest| rest.split_once(" method=").map_or(String::new(), |(client, _)| client.to_string()))
    })
    .await
}

async fn trusting(trusted: TrustedProxies) -> (EngineServer, Balancer) {
    let engine = engine(Options::default()).await;
    let config = Config { trusted_proxies: trusted, ..config(upstreams([&engine])) };
    let balancer = Balancer::ready(config).await;
    (engine, balancer)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_client_cannot_choose_its_address_in_the_log() {
    let other = TrustedProxies::new([TrustedProxy::parse("10.0.0.0/8").expect("is a network")]);
    for trusted in [TrustedProxies::default(), other] {
        let (_engine, balancer) = trusting(trusted).await;
        for (number, forged) in ["203.0.113.7", "10.0.0.1, 203.0.113.7", "10.0.0.1"].iter().enumerate() {
            let id = format!("forged-{number}-{}", balancer.address());
            let client = client_of(&balancer, &id, &[forged]).await;
            assert!(client.starts_with("127.0.0.1:"), "{forged}: {client}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_of_a_trusted_proxy_is_logged() {
    let (_engine, balancer) = trusting(loopback()).await;
    let commas = format!("203.0.113.7{}", ",".repeat(60 << 10));
    let table: [(&[&str], &str); 8] = [
        (&["203.0.113.7"], "203.0.113.7"),
        // The proxy before the balancer has added the address on the right.
        (&["1.1.1.1, 203.0.113.7"], "203.0.113.7"),
        (&["1.1.1.1", "203.0.113.7, 127.0.0.2", "127.0.0.3"], "203.0.113.7"),
        (&["2001:db8::7"], "2001:db8::7"),
        (&["1.1.1.1, unknown, 127.0.0.2"], "127.0.0.2"),
        (&[], "127.0.0.1:"),
        (&["1.1.1.1, not an address"], "127.0.0.1:"),
        (&[&commas], "127.0.0.1:"),
    ];
    for (number, (forwarded, wanted)) in table.into_iter().enumerate() {
        let client = client_of(&balancer, &format!("proxied-{number}"), forwarded).await;
        let is_peer = wanted.ends_with("1:") && client.starts_with(wanted);
        assert!(client == wanted || is_peer, "{wanted}: {client}");
    }
}

/// Regression: the fields of a stream's request are freed with the head of its answer, and its record named
/// the proxy.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_behind_a_proxy_is_logged_for_streams_too() {
    let (_engine, balancer) = trusting(loopback()).await;
    let client = client_with(&balancer, "proxied-stream", &["203.0.113.7"], &stream("sim", 3)).await;
    assert_eq!(client, "203.0.113.7");
}
