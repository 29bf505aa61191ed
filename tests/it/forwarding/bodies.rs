//! Every kind of body, in every way of sending it, arrives byte for byte, and leaves the connection
//! usable; what is too large, too slow or too much at once is refused so that the client can read why.

use std::time::Duration;

use crate::common::body::{Place, assert_arrived, chat, padded};
use crate::common::h2::H2;
use crate::common::wire::{self, Answer, CHUNKED, JSON, Wire, chunk, head};
use crate::common::{Balancer, EngineServer, h2, serving};
use bytes::Bytes;
use vllm_lb::config::types::Peek;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Around what pingora reads at once and keeps for itself, and around what is peeked.
const SIZES: [usize; 9] = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 128 * KIB, 300 * KIB, MIB, 16 * MIB];

const CHAT: &str = "/v1/chat/completions";

/// The model of padded bodies. Where it comes last, another upstream serves another.
const MODEL: &str = "wanted";

/// How a body is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Length,
    Chunked,
    /// In odd pieces, each of which leaves at once.
    Dribbled,
    DribbledChunks,
    /// `expect: 100-continue`, and nothing of the body before the balancer asks for it.
    Expect,
}

struct Stand {
    engines: Vec<EngineServer>,
    balancer: Balancer,
    place: Place,
}

// === impl Stand ===

impl Stand {
    async fn new(place: Place) -> Self {
        let engines = match place {
            Place::First => vec![serving(&[MODEL]).await],
            Place::Last => vec![serving(&["other"]).await, serving(&[MODEL]).await],
        };
        let balancer = Balancer::over(&engines).await;
        Stand { engines, balancer, place }
    }

    /// Bodies of all sizes that can name their model where they have to.
    fn bodies(&self) -> impl Iterator<Item = Bytes> {
        let place = self.place;
        let sizes = SIZES.into_iter().filter(move |size| place == Place::First || *size > 1);
        sizes.map(move |size| padded(size, MODEL, place))
    }

    /// Checks an answer, and that the engine has the body whose request carried this path.
    fn check(&self, answer: Answer, path: &str, body: &[u8]) {
        answer.expect(if body.len() > 1 { 200 } else { 400 });
        let engine = self.engines.last().expect("each stand has engines");
        let requests = engine.requests();
        let of_case: Vec<_> = requests.iter().filter(|recorded| recorded.path == path).collect();
        assert_eq!(of_case.len(), 1, "{path} arrived once");
        assert_arrived(of_case[0], body);
    }
}

/// Sizes that are no multiples of anything.
fn odd_pieces(mut body: Bytes) -> impl Iterator<Item = Bytes> {
    let mut sizes = [1, 997, 8_191, 40_009, 70_001].into_iter().cycle();
    std::iter::from_fn(move || {
        let most = sizes.next()?.min(body.len());
        (most > 0).then(|| body.split_to(most))
    })
}

async fn send(client: &mut Wire, path: &str, body: &Bytes, way: Way) {
    let length = body.len().to_string();
    let length = ("content-length", length.as_str());
    let start = |framing: &[(&str, &str)]| head("POST", path, &[&[JSON], framing].concat());
    match way {
        Way::Length => client.send([&start(&[length])[..], body].concat()).await,
        Way::Chunked => {
            let mut whole = start(&[CHUNKED]);
            body.chunks(100_000).for_each(|piece| whole.extend(chunk(piece)));
            whole.extend(chunk(b""));
            client.send(whole).await;
        }
        Way::Dribbled => {
            client.send(start(&[length])).await;
            for piece in odd_pieces(body.clone()) {
                client.send(piece).await;
            }
        }
        Way::DribbledChunks => {
            client.send(start(&[CHUNKED])).await;
            for piece in odd_pieces(body.clone()) {
                client.send(chunk(&piece)).await;
            }
            client.send(chunk(b"")).await;
        }
        Way::Expect => {
            client.send(start(&[length, ("expect", "100-continue")])).await;
            if !body.is_empty() {
                let leave = client.any_head().await.expect("leave to send the body comes");
                assert_eq!(leave.status, 100);
            }
            client.send(body).await;
        }
    }
}

/// Sends bodies of all sizes, and after each a second request on the same connection.
async fn all_sizes_arrive(way: Way, place: Place) {
    let stand = Stand::new(place).await;
    for body in stand.bodies() {
        let mut client = stand.balancer.client().await;
        let path = format!("{CHAT}?size={}", body.len());
        send(&mut client, &path, &body, way).await;
        let answer = client.answer().await;
        assert_ne!(answer.header("connection"), "close", "the connection is kept");
        stand.check(answer, &path, &body);
        client.ask(wire::post(CHAT, chat(MODEL))).await.expect(200);
        assert_eq!(client.left(), b"");
    }
    stand.balancer.until_idle().await;
}

async fn all_sizes_arrive_by_h2(with_length: bool, place: Place) {
    let stand = Stand::new(place).await;
    let mut client = H2::connect(stand.balancer.address()).await;
    for body in stand.bodies() {
        let path = format!("{CHAT}?size={}", body.len());
        let mut request = h2::post(&path);
        if with_length {
            request.headers_mut().insert("content-length", body.len().into());
        }
        let mut pieces: Vec<Bytes> = odd_pieces(body.clone()).collect();
        if pieces.is_empty() && !with_length {
            // The end comes by itself: the head could not tell that there is no body.
            pieces.push(Bytes::new());
        }
        let answer = client.ask(request, &pieces).await;
        stand.check(answer, &path, &body);
        client.ask(h2::post(CHAT), &[Bytes::from(chat(MODEL))]).await.expect(200);
    }
    stand.balancer.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_known_length_arrive() {
    all_sizes_arrive(Way::Length, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_known_length_arrive_where_the_model_comes_last() {
    all_sizes_arrive(Way::Length, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunked_bodies_arrive() {
    all_sizes_arrive(Way::Chunked, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunked_bodies_arrive_where_the_model_comes_last() {
    all_sizes_arrive(Way::Chunked, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dribbled_bodies_arrive() {
    all_sizes_arrive(Way::Dribbled, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dribbled_bodies_arrive_where_the_model_comes_last() {
    all_sizes_arrive(Way::Dribbled, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dribbled_chunks_arrive() {
    all_sizes_arrive(Way::DribbledChunks, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dribbled_chunks_arrive_where_the_model_comes_last() {
    all_sizes_arrive(Way::DribbledChunks, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_behind_expect_get_100_and_arrive() {
    all_sizes_arrive(Way::Expect, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_behind_expect_arrive_where_the_model_comes_last() {
    all_sizes_arrive(Way::Expect, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_bodies_with_a_length_arrive() {
    all_sizes_arrive_by_h2(true, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_bodies_with_a_length_arrive_where_the_model_comes_last() {
    all_sizes_arrive_by_h2(true, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_bodies_without_a_length_arrive() {
    all_sizes_arrive_by_h2(false, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_bodies_without_a_length_arrive_where_the_model_comes_last() {
    all_sizes_arrive_by_h2(false, Place::Last).await;
}

// === too large ===

/// More than `peek.max_body` allows.
const HUGE: usize = 100 * MIB;

/// A huge body in pieces, so that it is never held whole.
fn huge(place: Place) -> Vec<Bytes> {
    let frame = padded(64 * KIB, MODEL, place);
    let at = frame.len() / 2;
    let filling = Bytes::from(vec![b'x'; MIB]);
    let mut pieces = vec![frame.slice(..at)];
    pieces.extend(std::iter::repeat_n(filling.clone(), HUGE / MIB - 1));
    pieces.push(filling.slice(frame.len()..));
    pieces.push(frame.slice(at..));
    pieces
}

/// Sends all of it before reading, as simple clients do, and then reads the refusal.
async fn huge_is_refused(way: Way, place: Place) {
    let engines = match place {
        Place::First => vec![serving(&[MODEL]).await],
        Place::Last => vec![serving(&["other"]).await, serving(&[MODEL]).await],
    };
    let mut config = crate::common::config(crate::common::upstreams(&engines));
    // What is reserved beyond the largest body would be refused with another status.
    config.peek.memory = config.peek.max_body;
    let balancer = Balancer::ready(config).await;
    let mut client = balancer.client().await;
    let length = HUGE.to_string();
    let framing = if way == Way::Chunked { CHUNKED } else { ("content-length", length.as_str()) };
    client.send(head("POST", CHAT, &[JSON, framing])).await;
    let pieces = huge(place);
    assert_eq!(pieces.iter().map(Bytes::len).sum::<usize>(), HUGE);
    for piece in pieces {
        let piece = if way == Way::Chunked { Bytes::from(chunk(&piece)) } else { piece };
        client.send(piece).await;
    }
    if way == Way::Chunked {
        client.send(chunk(b"")).await;
    }
    let answer = client.answer().await.expect(413);
    let error = &answer.json()["error"];
    assert_eq!(error["message"], "The request body is larger than the limit of 67108864 bytes.");
    assert_eq!((&error["type"], &error["code"]), (&"BadRequestError".into(), &413.into()));
    assert!(error["param"].is_null());
    for engine in &engines {
        assert_eq!(engine.stats().received, 0, "no engine sees a whole body");
    }
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
    balancer.ask(wire::post(CHAT, chat(MODEL))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_length_is_refused() {
    huge_is_refused(Way::Length, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_length_is_refused_where_the_model_comes_last() {
    huge_is_refused(Way::Length, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_chunks_are_refused() {
    huge_is_refused(Way::Chunked, Place::First).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_chunks_are_refused_where_the_model_comes_last() {
    huge_is_refused(Way::Chunked, Place::Last).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_body_is_refused_on_http2_too() {
    let engines = [serving(&["other"]).await, serving(&[MODEL]).await];
    let mut config = crate::common::config(crate::common::upstreams(&engines));
    config.peek = Peek { bytes: 64 << 10, max_body: 1 << 20, memory: 1 << 20 };
    let balancer = Balancer::ready(config).await;
    for (place, with_length) in
        [(Place::First, true), (Place::First, false), (Place::Last, true), (Place::Last, false)]
    {
        let mut client = H2::connect(balancer.address()).await;
        let body = padded(3 * MIB, MODEL, place);
        let mut request = h2::post(CHAT);
        if with_length {
            request.headers_mut().insert("content-length", body.len().into());
        }
        let mut asked = client.begin(request, false).await;
        // The refusal may be faster.
        drop(asked.body.send_data(body, true));
        let answer = asked.answer().await.expect(413);
        assert_eq!(answer.json()["error"]["code"], 413, "{place:?} {with_length}");
    }
    assert_eq!(engines[1].stats().received, 0);
    balancer.until_idle().await;
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_body_that_is_allowed_arrives() {
    let engine = serving(&[MODEL]).await;
    let mut config = crate::common::config(crate::common::upstreams([&engine]));
    config.peek = Peek { bytes: 64 << 10, max_body: 1 << 20, memory: 1 << 20 };
    let balancer = Balancer::ready(config).await;
    for way in [Way::Length, Way::Chunked] {
        for (size, status) in [(MIB, 200), (MIB + 1, 413)] {
            let mut client = balancer.client().await;
            let body = padded(size, MODEL, Place::First);
            send(&mut client, CHAT, &body, way).await;
            client.answer().await.expect(status);
        }
    }
    assert_eq!(engine.stats().received, 2);
}

// === too slow, too many ===

/// The balancer's patience is half a minute: all kinds of slow clients wait for its end together, also those
/// of calls to all upstreams and of the admin API.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_body_is_a_request_timeout() {
    let engines = [serving(&["other"]).await, serving(&[MODEL]).await];
    let balancer = Balancer::over(&engines).await;
    let patience = Duration::from_secs(60);
    let by_http1 = async |framing: (&str, &str), beginning: Vec<u8>| {
        let mut client = balancer.client().await;
        client.patience = patience;
        client.send(head("POST", CHAT, &[JSON, framing])).await;
        client.send(beginning).await;
        let answer = client.answer().await.expect(408);
        assert_eq!(answer.json()["error"]["code"], 408);
        assert_eq!(answer.header("connection"), "close");
        assert_eq!(client.rest().await, b""[..], "the connection ends");
    };
    let by_http2 = async {
        let mut client = H2::connect(balancer.address()).await;
        let mut asked = client.begin(h2::post(CHAT), false).await;
        asked.body.send_data(Bytes::from_static(b"{"), false).expect("the stream is open");
        let answer = tokio::time::timeout(patience, asked.answer).await.expect("an answer comes in time");
        assert_eq!(answer.expect("an answer comes").status(), 408);
    };
    let call = async |address: &str, path: &str| {
        let mut client = Wire::connect(address).await;
        client.patience = patience;
        client.send(head("POST", path, &[JSON, ("host", address), ("content-length", "100")])).await;
        client.send(b"{").await;
        client.answer().await.expect(408);
    };
    tokio::join!(
        by_http1(("content-length", "1000"), Vec::new()),
        by_http1(("content-length", "1000"), b"{\"messages\":[".to_vec()),
        by_http1(CHUNKED, chunk(b"{\"messages\":[")),
        by_http2,
        call(balancer.address(), "/inference/v1/abort_requests"),
        call(&balancer.running.admin, "/admin/upstreams"),
    );
    assert_eq!(engines.iter().map(|engine| engine.stats().received).sum::<u64>(), 0);
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
    balancer.ask(wire::post(CHAT, chat(MODEL))).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_beyond_the_memory_limit_are_refused_until_memory_is_free() {
    let engine = serving(&[MODEL]).await;
    let mut config = crate::common::config(crate::common::upstreams([&engine]));
    config.peek.memory = 256 << 10;
    let balancer = Balancer::ready(config).await;
    let large = padded(200 * KIB, MODEL, Place::First);
    let length = large.len().to_string();
    let mut holder = balancer.client().await;
    holder.send(head("POST", CHAT, &[JSON, ("content-length", &length)])).await;
    // What is announced and not sent takes nothing.
    holder.send(large.slice(..KIB)).await;
    balancer.until_metric("vllm_lb_peeked_bytes", 1_024.0).await;
    holder.send(large.slice(KIB..199 * KIB)).await;
    balancer.until_metric("vllm_lb_peeked_bytes", large.len() as f64).await;

    let refused = balancer.ask(wire::post(CHAT, &large)).await.expect(503);
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(refused.json()["error"]["code"], 503);
    balancer.ask(wire::post(CHAT, chat(MODEL))).await.expect(200);

    holder.send(large.slice(199 * KIB..)).await;
    holder.answer().await.expect(200);
    balancer.until_metric("vllm_lb_peeked_bytes", 0.0).await;
    balancer.ask(wire::post(CHAT, &large)).await.expect(200);
}
