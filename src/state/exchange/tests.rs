//! Messages are decoded as they were encoded, and damaged ones do no harm.

use super::encoding::put_part;
use super::wire::{put_hash, put_number};
use super::*;
use proptest::prelude::*;

/// The gauges of each upstream, by its name.
type Rows = Vec<(String, [u64; 3])>;

/// Upstream, parent, depth, blocks and end.
type Chain = (String, Option<u64>, u64, Vec<u64>, Option<u64>);

/// A message's contents, owned.
#[derive(Clone, Debug)]
struct OwnedMessage {
    head: (u64, u64),
    who: Option<(String, String)>,
    gauges: Option<(bool, Rows)>,
    fingerprint: Option<u64>,
    chains: Vec<Chain>,
    take_backs: Vec<Chain>,
    bound: Vec<(bool, String, String)>,
    chain_requests: Vec<(u64, String, u64)>,
    marks: (bool, bool),
}

impl OwnedMessage {
    fn message(&self) -> Message<'_> {
        let gauges = |[active, backlog, context]: [u64; 3]| SiblingLoad { active, backlog, context };
        let mut message = Message::new(self.head.0, self.head.1);
        message.who = self.who.as_ref().map(|(name, address)| BalancerInfo { name, address });
        if let Some((whole, rows)) = &self.gauges {
            let rows = rows.iter().map(|(name, numbers)| (name.as_str(), gauges(*numbers)));
            message.gauges = Some(GaugeUpdate { whole: *whole, rows: rows.collect() });
        }
        message.fingerprint = self.fingerprint;
        for (upstream, parent, depth, hashes, end) in &self.chains {
            let (hashes, parent, depth) = (Cow::Borrowed(&hashes[..]), *parent, *depth);
            message.chains.push(ChainUpdate { upstream, parent, depth, hashes, end: *end });
        }
        for (upstream, parent, _, hashes, end) in &self.take_backs {
            let hashes = Cow::Borrowed(&hashes[..]);
            message.take_backs.push(TakeBack { upstream, parent: *parent, hashes, end: *end });
        }
        for (session, key, upstream) in &self.bound {
            let kind = if *session { Binding::Session } else { Binding::Response };
            message.bound.push(BindingUpdate { kind, key, upstream, number: key.len() as u64 * 1000 });
        }
        for (balancer, upstream, hash) in &self.chain_requests {
            message.chain_requests.push(ChainRequest { balancer: *balancer, upstream, hash: *hash });
        }
        (message.members, message.leaving) = self.marks;
        message
    }
}

fn messages() -> impl Strategy<Value = OwnedMessage> {
    let name = || "[a-c:]{0,3}|\\PC{0,12}";
    let hashes = || prop::collection::vec(any::<u64>(), 0..20);
    let chain = || (name(), any::<Option<u64>>(), any::<u64>(), hashes(), any::<Option<u64>>());
    let gauges = (any::<bool>(), prop::collection::vec((name(), any::<[u64; 3]>()), 0..6));
    (
        any::<(u64, u64)>(),
        prop::option::of((name(), name())),
        prop::option::of(gauges),
        (any::<Option<u64>>(), prop::collection::vec(chain(), 0..6), prop::collection::vec(chain(), 0..6)),
        prop::collection::vec((any::<bool>(), name(), name()), 0..6),
        prop::collection::vec((any::<u64>(), name(), any::<u64>()), 0..4),
        any::<(bool, bool)>(),
    )
        .prop_map(|(head, who, gauges, chains, bound, chain_requests, marks)| OwnedMessage {
            head,
            who,
            gauges,
            fingerprint: chains.0,
            chains: chains.1,
            take_backs: chains.2,
            bound,
            chain_requests,
            marks,
        })
}

/// Returns the memory of a message beside the bytes from which it was decoded.
fn weight(message: &Message<'_>) -> usize {
    let rows = message.gauges.as_ref().map_or(0, |update| update.rows.capacity() * 40);
    let chains = message.chains.iter().map(|chain| chain.hashes.len() * 8).sum::<usize>()
        + message.chains.capacity() * size_of::<ChainUpdate<'_>>();
    let take_backs = message.take_backs.iter().map(|chain| chain.hashes.len() * 8).sum::<usize>()
        + message.take_backs.capacity() * size_of::<TakeBack<'_>>();
    rows + chains + take_backs + message.bound.capacity() * 40
}

proptest! {
    #[test]
    fn decodes_what_was_encoded(given in messages()) {
        let message = given.message();
        let bytes = message.encode();
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    #[test]
    fn bounds_memory_on_random_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..300), valid: bool) {
        if let Some(first) = bytes.first_mut().filter(|_| valid) {
            *first = VERSION;
        }
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert!(weight(&message) <= 4096 + 64 * bytes.len());
        }
    }

    /// A message with bytes changed, cut off or appended.
    #[test]
    fn bounds_memory_on_damaged_messages(
        given in messages(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        more in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut bytes = given.message().encode();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        bytes.extend(more);
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert!(weight(&message) <= 4096 + 64 * bytes.len());
        }
    }

    /// Parts of a newer version, before or after the known ones.
    #[test]
    fn skips_unknown_parts(
        given in messages(),
        kind in 13u64..,
        part in prop::collection::vec(any::<u8>(), 0..40),
        first: bool,
    ) {
        let message = given.message();
        let bytes = message.encode();
        let mut news = Vec::new();
        put_part(&mut news, kind, &part);
        let mut head = vec![VERSION];
        put_hash(&mut head, message.balancer);
        put_number(&mut head, message.sequence);
        let at = if first { head.len() } else { bytes.len() };
        let newer = [&bytes[..at], &news, &bytes[at..]].concat();
        prop_assert_eq!(Message::decode(&newer), Ok(message));
    }
}

#[test]
fn encodes_a_tail_in_few_bytes() {
    let mut message = Message::new(7, 300);
    let hashes: Vec<u64> = (0..6).collect();
    for _ in 0..20 {
        let hashes = Cow::Borrowed(&hashes[..]);
        let (upstream, parent) = ("gpu-0:8000", Some(1));
        message.chains.push(ChainUpdate { upstream, parent, depth: 300, hashes, end: None });
    }
    let update = GaugeUpdate {
        whole: true,
        rows: vec![("gpu-0:8000", SiblingLoad { active: 9, backlog: 1500, context: 40_000 })],
    };
    message.gauges = Some(update);
    let bytes = message.encode().len();
    assert!(bytes < 20 * 60 + 50, "{bytes} bytes");
}

#[test]
fn rejects_another_version_and_too_long_or_damaged_messages() {
    let mut bytes = Message::new(1, 2).encode();
    assert_eq!(bytes.len(), 10);
    bytes[0] = 2;
    assert_eq!(Message::decode(&bytes), Err(MessageError::Version(2)));
    assert_eq!(Message::decode(&vec![VERSION; MAX_MESSAGE_BYTES + 1]), Err(MessageError::TooLong));
    assert_eq!(Message::decode(&[]), Err(MessageError::Broken));
    let mut message = Message::new(1, 2);
    message.chain_requests.push(ChainRequest { balancer: 1, upstream: "a", hash: 2 });
    let bytes = message.encode();
    for cut in 1..bytes.len() {
        // Cut between two parts it is a valid message with fewer parts.
        if let Ok(read) = Message::decode(&bytes[..cut]) {
            assert!(read.chain_requests.is_empty(), "{cut}");
        }
    }
}

#[test]
fn skips_a_binding_of_an_unknown_kind() {
    let mut message = Message::new(1, 2);
    message.bound.push(BindingUpdate { kind: Binding::Session, key: "k", upstream: "a", number: 3 });
    message.bound.push(BindingUpdate { kind: Binding::Response, key: "r", upstream: "a", number: 3 });
    let mut bytes = message.encode();
    let at = bytes.windows(3).position(|window| window == [1, 1, b'k']).expect("is there");
    bytes[at] = 9;
    assert_eq!(Message::decode(&bytes).expect("is readable").bound, message.bound[1..]);
}

/// What the first releases write: all their parts.
const FIRST_RELEASE_ALL: &[u8] = include_bytes!("../../../fuzz/seeds/exchange/everything");

/// What they write at most intervals.
const FIRST_RELEASE_GAUGES: &[u8] = include_bytes!("../../../fuzz/seeds/exchange/gauges");

const FIRST_RELEASE_LEAVING: &[u8] = include_bytes!("../../../fuzz/seeds/exchange/leaving");

/// The message of `FIRST_RELEASE_ALL`.
fn message_of_the_first_release() -> Message<'static> {
    let load = |active, backlog, context| SiblingLoad { active, backlog, context };
    let rows = vec![("a:1", load(3, 4000, 123_456)), ("b:2", load(0, 0, 0))];
    let chain = |upstream, parent, hashes: &[u64], end| ChainUpdate {
        upstream,
        parent,
        depth: 0,
        hashes: hashes.to_vec().into(),
        end,
    };
    Message {
        who: Some(BalancerInfo { name: "lb-1", address: "10.0.0.1:8000" }),
        gauges: Some(GaugeUpdate { whole: true, rows }),
        chains: vec![chain("a:1", None, &[1, u64::MAX, 3], Some(9)), chain("b:2", Some(3), &[5], None)],
        bound: vec![
            BindingUpdate { kind: Binding::Session, key: "s", upstream: "a:1", number: 300 },
            BindingUpdate { kind: Binding::Response, key: "resp_1", upstream: "b:2", number: 1 },
        ],
        chain_requests: vec![ChainRequest { balancer: 8, upstream: "a:1", hash: 77 }],
        members: true,
        leaving: true,
        ..Message::new(7, 1)
    }
}

#[test]
fn reads_messages_of_the_first_release() {
    let all = message_of_the_first_release();
    assert_eq!(Message::decode(FIRST_RELEASE_ALL).as_ref(), Ok(&all));
    let gauges = Message { who: all.who, gauges: all.gauges, ..Message::new(7, 1) };
    assert_eq!(Message::decode(FIRST_RELEASE_GAUGES), Ok(gauges));
    let leaving = Message { leaving: true, ..Message::new(u64::MAX, 300) };
    assert_eq!(Message::decode(FIRST_RELEASE_LEAVING), Ok(leaving));
}

/// Returns the head of a message and its parts, as the first releases read them: kind and bytes.
fn parts(bytes: &[u8]) -> (&[u8], Vec<(u64, &[u8])>) {
    let (head, rest) = bytes.split_at(10);
    let (mut reader, mut parts) = (wire::WireReader::new(rest), Vec::new());
    while !reader.is_empty() {
        parts.push(reader.number().zip(reader.bytes()).expect("has whole parts"));
    }
    (head, parts)
}

#[test]
fn writes_everything_but_chains_as_the_first_release_did() {
    let mut message = message_of_the_first_release();
    let gauges = Message { who: message.who, gauges: message.gauges.clone(), ..Message::new(7, 1) };
    assert_eq!(gauges.encode(), FIRST_RELEASE_GAUGES);
    assert_eq!(Message { leaving: true, ..Message::new(u64::MAX, 300) }.encode(), FIRST_RELEASE_LEAVING);
    // Chains, fingerprints and take-backs are parts that the first releases skip.
    message.fingerprint = Some(3);
    message.take_backs.push(TakeBack { upstream: "b:2", parent: None, hashes: vec![4].into(), end: None });
    let written = message.encode();
    let (head, mut parts_now) = parts(&written);
    parts_now.retain(|(kind, _)| *kind < 9);
    let (first_head, mut parts_then) = parts(FIRST_RELEASE_ALL);
    parts_then.retain(|(kind, _)| *kind != 4);
    assert_eq!((head, parts_now), (first_head, parts_then));
}

/// Balancers of later releases read these bytes.
#[test]
fn writes_chains_in_their_form() {
    let chains = include_bytes!("../../../fuzz/seeds/exchange/chains");
    let chain = |upstream, parent, depth, hashes: &[u64], end| ChainUpdate {
        upstream,
        parent,
        depth,
        hashes: hashes.to_vec().into(),
        end,
    };
    let message = Message {
        fingerprint: Some(0x0123_4567_89AB_CDEF),
        chains: vec![chain("a:1", Some(3), 300, &[5, u64::MAX], Some(9)), chain("b:2", None, 0, &[6], None)],
        take_backs: vec![TakeBack { upstream: "b:2", parent: Some(3), hashes: vec![5].into(), end: None }],
        ..Message::new(7, 1)
    };
    assert_eq!(message.encode(), chains);
    assert_eq!(Message::decode(chains), Ok(message));
}
