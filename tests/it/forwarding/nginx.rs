//! A real nginx with `docker/nginx.conf` before two balancers: what that file promises is so. Addresses and
//! paths are all that is changed of it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::common::body::{Place, assert_arrived, chat, events, padded, stream};
use crate::common::ports::reserved_address;
use crate::common::process::{Process, Setup};
use crate::common::raw::Raw;
use crate::common::wire::{self, Answer, CHUNKED, JSON, Wire, chunk, get, head, post, request};
use crate::common::{
    Balancer, EngineServer, InjectedFault, config, engine, eventually, paced, upstream, upstreams,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use vllm_lb::config::types::{Config, Peek};

const CHAT: &str = "/v1/chat/completions";

/// So slow that a stream never ends while its test runs.
const ENDLESS: Duration = Duration::from_millis(50);

const EXAMPLE: &str = include_str!("../../../docker/nginx.conf");

/// In place of docker/keys.map: clients without a key, and one with a key, all without limits.
/// tests/sdk/test_compose.py is about keys and limits.
const KEYS: &str = "\"\" batch-test;\nsk-of-a-client batch-test;\n";

// === nginx ===

/// A process, which does not outlive its test.
struct Nginx {
    child: Child,
    folder: TempDir,
    address: String,
}

/// The example with addresses of balancers, and with paths that any user can write.
fn adapted(folder: &Path, address: &str, balancers: [&str; 2]) -> String {
    let folder = folder.display();
    let mut text = EXAMPLE.to_string();
    for (theirs, ours) in [
        ("listen 8000;", format!("listen {address};")),
        ("server balancer-1:8000 ", format!("server {} ", balancers[0])),
        ("server balancer-2:8000 ", format!("server {} ", balancers[1])),
        ("/run/nginx.pid", format!("{folder}/nginx.pid")),
        ("/var/log/nginx/", format!("{folder}/")),
        ("\nhttp {\n", format!("\nhttp {{\n{}", temporary(&folder.to_string()))),
    ] {
        assert!(text.contains(theirs), "{theirs:?} stands in docker/nginx.conf");
        text = text.replace(theirs, &ours);
    }
    text
}

/// Folders that a package compiles in, and that only its user can write.
fn temporary(folder: &str) -> String {
    let kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    kinds.map(|kind| format!("    {kind}_temp_path {folder}/{kind};\n")).concat()
}

/// Starts it in the foreground, unless it is not there.
fn spawn(program: &str, folder: &Path) -> Option<Child> {
    let log = std::fs::File::create(folder.join("output")).expect("the folder can be written");
    let mut command = Command::new(program);
    // One process: as root, nginx runs its workers as another user, without the right to write here.
    command.args(["-g", "daemon off; master_process off;", "-p"]).arg(folder);
    command.arg("-e").arg(folder.join("error.log")).arg("-c").arg(folder.join("nginx.conf"));
    command.stdin(Stdio::null()).stderr(Stdio::from(log)).spawn().ok()
}

// === impl Nginx ===

impl Nginx {
    /// Before these two; answers when it takes connections.
    async fn before(balancers: [&str; 2]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = reserved_address();
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, adapted(folder.path(), &address, balancers))
            .expect("the folder can be written");
        std::fs::write(folder.path().join("keys.map"), KEYS).expect("the folder can be written");
        // Debian keeps it where only root looks.
        let child = ["nginx", "/usr/sbin/nginx"].iter().find_map(|program| spawn(program, folder.path()));
        let child = child.expect("nginx is installed: ./dev setup does it");
        let mut nginx = Nginx { child, folder, address };
        eventually("nginx listens", async || {
            let ended = nginx.child.try_wait().expect("its own child can be waited for");
            assert_eq!(ended, None, "nginx ended");
            TcpStream::connect(&nginx.address).await.ok()
        })
        .await;
        nginx
    }

    async fn client(&self) -> Wire {
        Wire::connect(&self.address).await
    }

    /// One request on a connection of its own.
    async fn ask(&self, request: impl AsRef<[u8]>) -> Answer {
        self.client().await.ask(request).await
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            let logs = ["output", "error.log", "access.log"].map(|name| self.log(name));
            eprintln!("the logs of nginx:\n{}", logs.join("\n"));
        }
    }
}

/// Two balancers over the same engines, and nginx before them.
struct Stand {
    balancers: [Balancer; 2],
    nginx: Nginx,
}

// === impl Stand ===

impl Stand {
    async fn over(engine: &EngineServer) -> Self {
        // As docker/lb.yaml: nginx is believed.
        let trusting =
            || Config { trusted_proxies: crate::common::loopback(), ..config(upstreams([engine])) };
        let balancers = [Balancer::ready(trusting()).await, Balancer::ready(trusting()).await];
        let nginx = Nginx::before([balancers[0].address(), balancers[1].address()]).await;
        Stand { balancers, nginx }
    }

    async fn until_idle(&self) {
        for balancer in &self.balancers {
            balancer.until_idle().await;
        }
    }
}

// === streams and bodies ===

/// The engine stops dead after so many events, so that none of them can have waited for the next.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_goes_out_before_the_next_is_made() {
    let engine = engine(Default::default()).await;
    let stand = Stand::over(&engine).await;
    for made in 2..=5 {
        engine.set_fault(InjectedFault::StallStream { events: made }).await;
        let mut client = stand.nginx.client().await;
        client.send(post(CHAT, stream("sim", 20))).await;
        let head = client.head().await;
        assert_eq!(head.headers["content-type"], "text/event-stream; charset=utf-8");
        let (mut framing, mut seen) = (head.framing, 0);
        while seen < made {
            let piece = client.piece(&mut framing).await.expect("the stream goes on");
            seen += events(&piece.expect("and has not ended")).len();
        }
        assert_eq!(seen, made);
    }
    stand.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_comes_whole_and_a_client_that_leaves_frees_the_engine() {
    let engine = paced(ENDLESS).await;
    let stand = Stand::over(&engine).await;
    let answer = stand.nginx.ask(post(CHAT, stream("sim", 5))).await.expect(200);
    assert!(answer.text().ends_with("data: [DONE]\n\n") && answer.pieces.len() > 3, "{answer:?}");

    let mut client = stand.nginx.client().await;
    client.send(post(CHAT, stream("sim", 30_000))).await;
    let mut framing = client.head().await.framing;
    client.piece(&mut framing).await.expect("the stream goes on").expect("and has not ended");
    assert_eq!(engine.stats().running, 1);
    drop(client);
    engine.wait_until("the engine is free", |stats| stats.running == 0 && stats.aborted == 1).await;

    let mut client = stand.nginx.client().await;
    client.send(post(CHAT, chat("sim").replace("\"max_tokens\":3", "\"max_tokens\":30000"))).await;
    engine.wait_until("it runs", |stats| stats.running == 1).await;
    drop(client);
    engine.wait_until("the engine is free", |stats| stats.running == 0 && stats.aborted == 2).await;
    stand.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_pass_as_they_come_and_larger_ones_are_413() {
    let engine = engine(Default::default()).await;
    let stand = Stand::over(&engine).await;
    let body = padded(20 << 20, "sim", Place::First);
    stand.nginx.ask(post(CHAT, &body)).await.expect(200);
    assert_arrived(engine.requests().last().expect("it is there"), &body);

    // A balancer holds a part of a body before the rest is sent.
    let mut client = stand.nginx.client().await;
    client.send(head("POST", CHAT, &[JSON, CHUNKED])).await;
    let (part, rest) = body.split_at(1 << 20);
    client.send(chunk(part)).await;
    eventually("a balancer has a part of it", async || {
        let mut held = 0.0;
        for balancer in &stand.balancers {
            held += balancer.metric("vllm_lb_peeked_bytes").await;
        }
        (held > 900_000.0).then_some(())
    })
    .await;
    client.send(chunk(rest)).await;
    client.ask(chunk(b"")).await.expect(200);
    assert_arrived(engine.requests().last().expect("it is there"), &body);

    let most = Peek::default().max_body;
    assert!(EXAMPLE.contains(&format!("client_max_body_size {}m;", most >> 20)), "as peek.max_body");
    let length = (most + 1).to_string();
    let refused = stand.nginx.ask(head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
    assert_eq!(refused.expect(413).json()["error"]["code"], 413);
    assert_eq!(engine.stats().received, 2);
}

/// With buffering, nginx takes all that a balancer has for a client that does not keep up, and writes it to
/// disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_clients_answer_is_buffered_by_the_balancer() {
    let long = "x".repeat(32 << 20);
    let balancer =
        Raw::start(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{long}", long.len())).await;
    let nginx = Nginx::before([balancer.address(), balancer.address()]).await;
    let answer = nginx.ask(post(CHAT, stream("sim", 5))).await.expect(200);
    assert_eq!((answer.body.len(), balancer.heads().len()), (long.len(), 1));
    let log = nginx.log("error.log");
    assert!(!log.contains("temporary file"), "{log}");
}

// === connections ===

/// What goes to a balancer through here is counted by its connections.
async fn counted(balancer: &Balancer, count: Arc<AtomicUsize>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port is there");
    let address = listener.local_addr().expect("it is bound").to_string();
    let to = balancer.address().to_string();
    tokio::spawn(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            let mut there = wire::tcp(&to).await;
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut here, &mut there).await });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_the_balancers_are_kept() {
    let engine = engine(Default::default()).await;
    let balancers = [Balancer::over([&engine]).await, Balancer::over([&engine]).await];
    let count = Arc::new(AtomicUsize::new(0));
    let [one, other] =
        [counted(&balancers[0], count.clone()).await, counted(&balancers[1], count.clone()).await];
    let nginx = Nginx::before([&one, &other]).await;
    for _ in 0..20 {
        // Each on a connection of its own to nginx.
        nginx.ask(post(CHAT, chat("sim"))).await.expect(200);
        nginx.ask(post(CHAT, stream("sim", 3))).await.expect(200);
        nginx.ask(get("/v1/models")).await.expect(200);
    }
    assert_eq!(engine.stats().received, 40);
    assert_eq!(count.load(Ordering::Relaxed), 2, "one to each balancer");
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_forwards_client_addresses_and_websockets() {
    let engine = engine(Default::default()).await;
    let stand = Stand::over(&engine).await;
    stand.nginx.ask(post(CHAT, chat("sim"))).await.expect(200);
    let seen = engine.requests().pop().expect("it is there");
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1, 127.0.0.1"), "the client, and nginx");
    assert_eq!(seen.header("x-forwarded-proto"), Some("http"));
    assert_eq!(seen.header("x-forwarded-host"), Some("balancer.test"));

    let mut client = stand.nginx.client().await;
    let headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    client.send(request("GET", "/v1/realtime?model=sim", &headers, b"")).await;
    let head = client.any_head().await.expect("an answer comes");
    assert_eq!((head.status, &head.headers["upgrade"]), (101, &"websocket".parse().unwrap()));
    // A short text frame: its kind, its length, its text.
    let frame = client.exactly(2).await;
    assert!(frame[0] == 0x81 && frame[1] < 126, "{frame:?}");
    let text = client.exactly(usize::from(frame[1])).await;
    assert!(String::from_utf8_lossy(&text).contains("session.created"), "{text:?}");
    drop(client);
    stand.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_reach_engines_with_an_id_and_without_the_key_of_the_client() {
    let engine = engine(Default::default()).await;
    let stand = Stand::over(&engine).await;
    let key = ("authorization", "Bearer sk-of-a-client");
    for (id, key) in [(None, key), (Some("chosen-by-the-client"), ("x-api-key", "sk-of-a-client"))] {
        let headers: Vec<_> = [JSON, key].into_iter().chain(id.map(|id| ("x-request-id", id))).collect();
        stand.nginx.ask(request("POST", CHAT, &headers, chat("sim").as_bytes())).await.expect(200);
        let seen = engine.requests().pop().expect("it is there");
        assert_eq!((seen.header("authorization"), seen.header("x-api-key")), (None, None));
        let forwarded = seen.header("x-request-id").expect("each request has an id").to_string();
        assert_eq!(forwarded.len(), id.map_or(32, str::len), "{forwarded}");
        let end = format!("client \"batch-test\", id \"{forwarded}\"\n");
        let log = eventually("the request is in the access log", async || {
            Some(stand.nginx.log("access.log")).filter(|log| log.ends_with(&end))
        })
        .await;
        assert!(!log.contains("sk-of-a-client"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_upgrades_are_not_passed_on() {
    let balancer = Raw::start("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let nginx = Nginx::before([balancer.address(), balancer.address()]).await;
    let headers = [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "")];
    nginx.ask(request("GET", CHAT, &headers, b"")).await.expect(200);
    let heads = balancer.heads().concat().to_lowercase();
    assert!(
        heads.starts_with("get ") && !heads.contains("upgrade") && !heads.contains("connection"),
        "{heads}"
    );
}

// === what balancers say ===

#[tokio::test(flavor = "multi_thread")]
async fn a_429_passes_unchanged_and_ejects_no_balancer() {
    let engine = paced(ENDLESS).await;
    let mut narrow = config(upstreams([&engine]));
    narrow.upstreams[0].max_active = Some(1);
    narrow.queue.size = 0;
    let balancers = [Balancer::ready(narrow.clone()).await, Balancer::ready(narrow).await];
    let nginx = Nginx::before([balancers[0].address(), balancers[1].address()]).await;
    let mut running = Vec::new();
    for balancer in &balancers {
        let mut client = balancer.client().await;
        client.send(post(CHAT, stream("sim", 30_000))).await;
        balancer.until_active(1).await;
        running.push(client);
    }
    // Oftener than there are balancers: none of them is left alone for it.
    for _ in 0..4 {
        let direct = balancers[0].ask(post(CHAT, chat("sim"))).await.expect(429);
        let answer = nginx.ask(post(CHAT, chat("sim"))).await.expect(429);
        assert!((1..=60).contains(&answer.header("retry-after").parse::<u64>().unwrap()), "{answer:?}");
        assert_eq!(answer.json()["error"]["type"], "RateLimitError");
        for name in ["content-type", "content-length", "x-should-retry"] {
            assert_eq!(answer.headers.get(name), direct.headers.get(name), "{name}");
        }
    }
    assert_eq!(engine.stats().received, 2, "each was asked once, by its balancer");
    drop(running);
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_is_healthy_while_one_balancer_is() {
    let engine = engine(Default::default()).await;
    let well = Balancer::over([&engine]).await;
    let gone = format!("http://{}", reserved_address());
    let without = Balancer::start(config(vec![upstream(&gone)])).await;
    without.ask(get("/health")).await.expect(503);
    let nginx = Nginx::before([without.address(), well.address()]).await;
    for _ in 0..6 {
        nginx.ask(get("/health")).await.expect(200);
    }
    let nginx = Nginx::before([without.address(), without.address()]).await;
    for _ in 0..4 {
        nginx.ask(get("/health")).await.expect(503);
    }
    // A 503 of a balancer ejects no balancer: the balancers answer it themselves.
    let answer = nginx.ask(get("/v1/models")).await.expect(503);
    assert_eq!(answer.json()["error"]["type"], "ServiceUnavailableError");
}

// === balancers that die ===

/// Two balancers as processes of their own, and nginx before them.
async fn processes(engine: &EngineServer) -> ([Setup; 2], Vec<Process>, Nginx) {
    let setups = [Setup::over([engine], ""), Setup::over([engine], "")];
    let processes = vec![setups[0].start().await, setups[1].start().await];
    let nginx = Nginx::before([&processes[0].addresses[0], &processes[1].addresses[0]]).await;
    (setups, processes, nginx)
}

/// Kills the balancer by which the one request is in flight.
async fn kill_the_one_that_works(processes: &mut Vec<Process>) {
    let works = async |process: &Process| {
        let page = process.admin("/metrics").await.expect(200);
        let mut lines = page.text().lines();
        lines.any(|line| line.starts_with("vllm_lb_upstream_active{") && line.ends_with(" 1"))
    };
    let at = eventually("one of them has a request", async || {
        for (at, process) in processes.iter().enumerate() {
            if works(process).await {
                return Some(at);
            }
        }
        None
    })
    .await;
    drop(processes.remove(at));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_whose_balancer_dies_is_not_sent_twice() {
    let engine = engine(Default::default()).await;
    let (_setups, mut processes, nginx) = processes(&engine).await;
    engine.set_fault_for(1, InjectedFault::StallHeaders).await;
    let mut client = nginx.client().await;
    client.send(post(CHAT, chat("sim"))).await;
    engine.wait_until("it is there", |stats| stats.received == 1).await;
    kill_the_one_that_works(&mut processes).await;
    let answer = client.answer().await.expect(502);
    assert_eq!(answer.json()["error"]["code"], 502);
    assert_eq!(engine.stats().received, 1);

    // Later requests succeed: nginx sends unsent ones to the other balancer, POST or not.
    for _ in 0..6 {
        nginx.ask(post(CHAT, chat("sim"))).await.expect(200);
        nginx.ask(get("/v1/models")).await.expect(200);
    }
    assert_eq!(engine.stats().received, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_whose_balancer_dies_goes_to_the_other() {
    let engine = engine(Default::default()).await;
    let (_setups, mut processes, nginx) = processes(&engine).await;
    engine.set_fault_for(1, InjectedFault::StallHeaders).await;
    let mut client = nginx.client().await;
    client.send(get("/v1/responses/resp_1")).await;
    engine.wait_until("it is there", |stats| stats.received == 1).await;
    kill_the_one_that_works(&mut processes).await;
    // It is the engine that says so.
    client.answer().await.expect(404);
    assert_eq!(engine.stats().received, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_cannot_be_sent_goes_to_the_other() {
    let engine = engine(Default::default()).await;
    let (_setups, mut processes, nginx) = processes(&engine).await;
    drop(processes.remove(0));
    for number in 1..=4 {
        nginx.ask(post(CHAT, chat("sim"))).await.expect(200);
        assert_eq!(engine.stats().received, number);
    }
    drop(processes);
    assert_eq!(nginx.ask(post(CHAT, chat("sim"))).await.expect(502).json()["error"]["code"], 502);
}

/// Regression: nginx refused the example once its groups were taken out of their comment.
#[test]
fn the_groups_of_the_example_can_be_used() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = adapted(folder.path(), "127.0.0.1:1", ["127.0.0.1:2", "127.0.0.1:3"]);
    let (before, rest) = text.split_once("    #map $http_x_session_id").expect("the groups begin with it");
    let (groups, behind) = rest.split_once("\n\n").expect("an empty line ends them");
    let groups = groups.replace("\n    #", "\n    ");
    std::fs::write(
        folder.path().join("nginx.conf"),
        format!("{before}    map $http_x_session_id{groups}\n\n{behind}"),
    )
    .expect("the folder can be written");
    std::fs::write(folder.path().join("keys.map"), KEYS).expect("the folder can be written");
    let check = |program: &&str| {
        let mut command = Command::new(program);
        command.arg("-t").arg("-p").arg(folder.path()).arg("-e").arg(folder.path().join("error.log"));
        command.arg("-c").arg(folder.path().join("nginx.conf")).output().ok()
    };
    let checked = ["nginx", "/usr/sbin/nginx"].iter().find_map(check).expect("nginx is installed");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}
