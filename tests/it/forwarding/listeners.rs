//! Listeners and connections to upstreams: TLS, HTTP/2, unix sockets; and the stop, which waits for requests
//! in flight and for nothing else.

use std::io::{Read, Write};
use std::time::Duration;

use crate::common::body::{chat, events, stream};
use crate::common::certs::Certs;
use crate::common::h2::{self, H2};
use crate::common::raw::Raw;
use crate::common::wire::{Wire, get, post};
use crate::common::{
    Balancer, EngineServer, Options, PATIENCE, config, engine, eventually, listen, logs, paced, upstream,
    upstreams,
};
use bytes::Bytes;
use tokio::net::{TcpStream, UnixListener};
use vllm_lb::app;
use vllm_lb::config::types::{Config, Listen, ListenAddress, UpstreamTls};

const CHAT: &str = "/v1/chat/completions";

/// So slow that a test sees a stream at work, and so short that it waits for its end.
const PACE: Duration = Duration::from_millis(30);

fn tls(certs: &Certs) -> Listen {
    Listen { tls: Some(certs.listen()), ..listen("127.0.0.1:0") }
}

fn unix(path: &std::path::Path) -> Listen {
    Listen { address: ListenAddress::Unix(path.to_path_buf()), tls: None }
}

async fn serves(client: &mut Wire) {
    for _ in 0..2 {
        client.ask(post(CHAT, chat("sim"))).await.expect(200);
        assert!(client.ask(post(CHAT, stream("sim", 5))).await.expect(200).text().contains("[DONE]"));
    }
}

async fn serves_h2(client: &mut H2) {
    for body in [chat("sim"), stream("sim", 5)] {
        client.ask(h2::post(CHAT), &[Bytes::from(body)]).await.expect(200);
    }
}

// === ways in ===

#[tokio::test(flavor = "multi_thread")]
async fn tls_clients_choose_between_both_protocols() {
    let (certs, engine) = (Certs::new(), engine(Options::default()).await);
    let mut config = config(upstreams([&engine]));
    config.listen = vec![tls(&certs)];
    let balancer = Balancer::ready(config).await;
    for (offered, chosen) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["http/1.1", "h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&["h2"], Some("h2")),
        (&[], None),
    ] {
        let stream = certs.connect(balancer.address(), offered).await;
        let agreed =
            stream.get_ref().1.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
        assert_eq!(agreed.as_deref(), chosen, "{offered:?}");
        match chosen {
            Some("h2") => serves_h2(&mut H2::over(stream).await).await,
            _ => serves(&mut Wire::over(stream)).await,
        }
    }
    let arrived = engine.requests();
    assert!(arrived.iter().all(|recorded| recorded.header("x-forwarded-proto") == Some("https")));
    let mut client = Wire::over(certs.connect(balancer.address(), &["http/1.1"]).await);
    let redirect = client.ask(get("/v1/models/")).await.expect(307);
    assert_eq!(redirect.header("location"), "https://balancer.test/v1/models");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_client_on_a_tls_port_is_disconnected() {
    let (certs, engine) = (Certs::new(), engine(Options::default()).await);
    let mut config = config(upstreams([&engine]));
    config.listen = vec![tls(&certs)];
    let balancer = Balancer::ready(config).await;
    let mut plain = Wire::connect(balancer.address()).await;
    plain.send(post(CHAT, chat("sim"))).await;
    let said = plain.rest().await;
    assert!(!said.starts_with(b"HTTP/"), "{said:?}");
    serves(&mut Wire::over(certs.connect(balancer.address(), &["http/1.1"]).await)).await;
    balancer.until_metric("vllm_lb_handshake_failures_total", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_protocols_are_served_without_tls_on_one_port() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let mut by_http1 = balancer.client().await;
    let mut by_http2 = H2::connect(balancer.address()).await;
    serves(&mut by_http1).await;
    serves_h2(&mut by_http2).await;
    serves(&mut by_http1).await;
    let many = (0..20).map(async |_| {
        let mut client = H2::connect(balancer.address()).await;
        serves_h2(&mut client).await;
    });
    futures_util::future::join_all(many).await;
}

/// Shorter than HTTP/2's greeting, as the checks of other balancers are.
#[tokio::test(flavor = "multi_thread")]
async fn the_shortest_requests_are_answered() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    for (request, status) in [("GET / HTTP/1.0\r\n\r\n", 404), ("GET /ping HTTP/1.0\r\n\r\n", 200)] {
        let mut client = balancer.client().await;
        client.ask(request).await.expect(status);
    }
}

/// HTTP/2's greeting may come in any number of pieces, and what only begins like it is HTTP/1.1.
#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_is_detected_in_any_number_of_pieces() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let mut client = balancer.client().await;
    for byte in greeting.iter().chain(&settings) {
        client.send([*byte]).await;
    }
    let frame = client.exactly(9).await;
    assert_eq!((frame[3], &frame[5..9]), (4, &[0; 4][..]), "its settings come first");
    let mut client = balancer.client().await;
    for byte in get("/version") {
        client.send([byte]).await;
    }
    client.answer().await.expect(200);
    let mut client = balancer.client().await;
    client.send("P").await;
    client.send(&post(CHAT, chat("sim"))[1..]).await;
    client.answer().await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_http2_connection_do_not_wait_for_each_other() {
    let slow = paced(PACE).await;
    let balancer = Balancer::over([&slow]).await;
    let mut client = H2::connect(balancer.address()).await;
    let mut asked = client.begin(h2::post(CHAT), false).await;
    asked.body.send_data(Bytes::from(stream("sim", 30_000)), true).expect("the stream is open");
    let mut endless = asked.answer.await.expect("an answer comes").into_body();
    for _ in 0..3 {
        client.ask(h2::post("/v1/models"), &[]).await.expect(405);
        client.ask(h2::post(CHAT), &[Bytes::from(chat("sim"))]).await.expect(200);
    }
    endless.data().await.expect("the first goes on").expect("and is not broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_served_and_cleaned_up() {
    let engine = engine(Options::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lb.sock");
    let mut config = config(upstreams([&engine]));
    config.listen = vec![unix(&path)];
    // What a crashed process leaves behind: a socket without a listener.
    drop(UnixListener::bind(&path).unwrap());
    let balancer = Balancer::ready(config.clone()).await;
    assert_eq!(balancer.address(), format!("unix:{}", path.display()));
    serves(&mut balancer.client().await).await;
    let taken = app::start(config).await.err().expect("the socket is in use");
    assert!(taken.contains("lb.sock") && taken.starts_with("cannot listen on"), "{taken}");
    serves(&mut balancer.client().await).await;
    balancer.stop().await;
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn several_listeners_are_served_at_once() {
    let (certs, engine) = (Certs::new(), engine(Options::default()).await);
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(upstreams([&engine]));
    let path = directory.path().join("lb.sock");
    config.listen = vec![listen("127.0.0.1:0"), tls(&certs), unix(&path), listen("[::1]:0")];
    let balancer = Balancer::ready(config).await;
    let addresses = balancer.running.addresses.clone();
    serves(&mut Wire::connect(&addresses[0]).await).await;
    serves(&mut Wire::over(certs.connect(&addresses[1], &[]).await)).await;
    serves(&mut Wire::connect(&addresses[2]).await).await;
    serves(&mut Wire::connect(&addresses[3]).await).await;
    balancer.stop().await;
    for address in [&addresses[0], &addresses[1], &addresses[3]] {
        assert!(TcpStream::connect(address).await.is_err(), "{address} still listens");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_an_error_that_names_it() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let mut config = config(upstreams([&engine]));
    config.listen = vec![listen(balancer.address())];
    let error = app::start(config).await.err().expect("the port is taken");
    assert!(error.contains(balancer.address()), "{error}");
}

// === ways out ===

/// An engine with TLS, and an upstream for it that trusts as told.
async fn secure(certs: &Certs, trust: UpstreamTls) -> (EngineServer, Config) {
    let engine = EngineServer::start_tls(Options::default(), &certs.certificate, &certs.key)
        .await
        .expect("the certificate is one");
    let mut config = config(upstreams([&engine]));
    config.upstreams[0].tls = trust;
    (engine, config)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_is_reached_by_tls_with_an_authority_of_its_own() {
    let certs = Certs::new();
    let trust = UpstreamTls { ca: Some(certs.authority()), ..UpstreamTls::default() };
    for sni in [None, Some("localhost".to_string())] {
        let (_engine, config) = secure(&certs, UpstreamTls { sni, ..trust.clone() }).await;
        let balancer = Balancer::ready(config).await;
        serves(&mut balancer.client().await).await;
        serves_h2(&mut H2::connect(balancer.address()).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_certificate_is_not_verified_when_disabled() {
    let trust = UpstreamTls { verify: false, ..UpstreamTls::default() };
    let (_engine, config) = secure(&Certs::new(), trust).await;
    serves(&mut Balancer::ready(config).await.client().await).await;
}

/// Waits until a probe failed, and gives its reason.
async fn reason(balancer: &Balancer) -> String {
    let name = balancer.running.fleet.snapshot().entries[0].upstream.name().to_string();
    let mine = |line: &String| line.contains("does not answer") && line.contains(&name);
    let reason = eventually("a probe fails", async || logs::all().into_iter().find(mine)).await;
    balancer.until_ready(0).await;
    balancer.ask(post(CHAT, chat("sim"))).await.expect(503);
    reason
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_upstream_is_never_ready_and_the_log_has_the_reason() {
    let (certs, others) = (Certs::new(), Certs::new());
    let wrong_authority = UpstreamTls { ca: Some(others.authority()), ..UpstreamTls::default() };
    let (_engine, config) = secure(&certs, wrong_authority).await;
    let why = reason(&Balancer::start(config).await).await;
    assert!(why.contains("cannot connect: invalid peer certificate"), "{why}");

    let system = UpstreamTls::default();
    let (_engine, config) = secure(&certs, system).await;
    let why = reason(&Balancer::start(config).await).await;
    assert!(why.contains("certificate"), "{why}");

    let trust = UpstreamTls { ca: Some(certs.authority()), sni: Some("other.test".into()), verify: true };
    let (_engine, config) = secure(&certs, trust).await;
    let why = reason(&Balancer::start(config).await).await;
    assert!(why.contains("certificate") && why.contains("other.test"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn https_to_a_plain_upstream_is_logged() {
    let engine = engine(Options::default()).await;
    let config = config(vec![upstream(&engine.url().replace("http://", "https://"))]);
    let why = reason(&Balancer::start(config).await).await;
    assert!(why.contains("cannot connect"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_is_reached_by_a_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let engine = EngineServer::start_unix(directory.path().join("engine.sock"), Options::default()).unwrap();
    let balancer = Balancer::over([&engine]).await;
    serves(&mut balancer.client().await).await;
    serves_h2(&mut H2::connect(balancer.address()).await).await;
    assert!(engine.requests().iter().all(|recorded| recorded.header("host") == Some("localhost")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_below_a_prefix_gets_it_before_every_path() {
    let raw = Raw::start("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    let balancer = Balancer::ready(config(vec![raw.upstream_below("/team-a/v1")])).await;
    balancer.ask(post("/v1/chat/completions?x=y", chat("sim"))).await.expect(200);
    assert!(
        raw.posts()[0].starts_with("POST /team-a/v1/chat/completions?x=y HTTP/1.1\r\n"),
        "{:?}",
        raw.heads()
    );
}

// === the end ===

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_streams_only() {
    let engine = paced(PACE).await;
    let balancer = Balancer::over([&engine]).await;
    let address = balancer.address().to_string();
    let mut idle = balancer.client().await;
    idle.ask(get("/version")).await.expect(200);
    let mut silent = balancer.client().await;
    let idle_h2 = H2::connect(&address).await;
    let mut busy = balancer.client().await;
    busy.send(post(CHAT, stream("sim", 120))).await;
    let head = busy.head().await;
    let mut busy_h2 = H2::connect(&address).await;
    let mut asked = busy_h2.begin(h2::post(CHAT), false).await;
    asked.body.send_data(Bytes::from(stream("sim", 120)), true).expect("the stream is open");
    engine.wait_until("both streams run", |stats| stats.running == 2).await;

    let stopping = tokio::spawn(balancer.running.stop(Duration::from_secs(600)));
    assert_eq!(idle.rest().await, b""[..], "an idle connection ends");
    assert_eq!(silent.rest().await, b""[..], "one without any request too");
    idle_h2.closed().await;
    assert!(TcpStream::connect(&address).await.is_err(), "nobody new is taken");
    assert!(!stopping.is_finished(), "the streams go on");

    let answer = busy.body(head).await.expect(200);
    assert!(answer.text().ends_with("data: [DONE]\n\n"));
    assert_eq!(busy.rest().await, b""[..], "its connection ends with it");
    let answer = asked.answer().await.expect(200);
    assert_eq!(events(&answer.body).last().map(String::as_str), Some("data: [DONE]"));
    let cut = tokio::time::timeout(PATIENCE, stopping).await.expect("it ends with the last request");
    assert_eq!(cut.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_without_requests_is_immediate() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let mut client = balancer.client().await;
    serves(&mut client).await;
    assert_eq!(balancer.running.stop(Duration::from_secs(600)).await, 0);
    engine.wait_until("nothing is left open", |stats| stats.connections == 0).await;
}

/// One thread: the balancer accepts nothing before this test waits.
#[tokio::test]
async fn a_stop_serves_what_waits_in_the_backlog() {
    let engine = engine(Options::default()).await;
    let balancer = Balancer::over([&engine]).await;
    let waiting = [(); 3].map(|()| {
        let mut client = std::net::TcpStream::connect(balancer.address()).expect("the kernel accepts");
        client.write_all(&get("/version")).expect("the kernel takes it");
        client
    });
    assert_eq!(balancer.running.stop(Duration::from_secs(600)).await, 0);
    for mut client in waiting {
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer, and no reset");
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_cuts_requests_after_its_grace() {
    let engine = paced(PACE).await;
    let balancer = Balancer::over([&engine]).await;
    let mut client = balancer.client().await;
    client.send(post(CHAT, stream("sim", 30_000))).await;
    let head = client.head().await;
    assert_eq!(balancer.running.stop(Duration::from_millis(200)).await, 1);
    assert!(!client.body(head).await.whole, "a stream that was cut does not look finished");
    engine.wait_until("the engine is free", |stats| stats.running == 0).await;
}
