//! Messages are decoded as they were encoded, and damaged ones do no harm.

use super::*;
use proptest::prelude::*;

/// The gauges of each upstream, by its name.
type Rows = Vec<(String, [u64; 3])>;

/// Upstream, parent, blocks and end.
type Chain = (String, Option<u64>, Vec<u64>, Option<u64>);

/// A message's contents, owned.
#[derive(Clone, Debug)]
struct OwnedMessage {
    head: (u64, u64),
    who: Option<(String, String)>,
    gauges: Option<(bool, Rows)>,
    chains: Vec<Chain>,
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
        for (upstream, parent, hashes, end) in &self.chains {
            let hashes = Cow::Borrowed(&hashes[..]);
            message.chains.push(ChainUpdate { upstream, parent: *parent, hashes, end: *end });
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
    let hashes = prop::collection::vec(any::<u64>(), 0..20);
    let chains = (name(), any::<Option<u64>>(), hashes, any::<Option<u64>>());
    let gauges = (any::<bool>(), prop::collection::vec((name(), any::<[u64; 3]>()), 0..6));
    (
        any::<(u64, u64)>(),
        prop::option::of((name(), name())),
        prop::option::of(gauges),
        prop::collection::vec(chains, 0..6),
        prop::collection::vec((any::<bool>(), name(), name()), 0..6),
        prop::collection::vec((any::<u64>(), name(), any::<u64>()), 0..4),
        any::<(bool, bool)>(),
    )
        .prop_map(|(head, who, gauges, chains, bound, chain_requests, marks)| OwnedMessage {
            head,
            who,
            gauges,
            chains,
            bound,
            chain_requests,
            marks,
        })
}

/// Returns the memory of a message beside the bytes from which it was decoded.
fn weight(message: &Message<'_>) -> usize {
    let rows = message.gauges.as_ref().map_or(0, |update| update.rows.capacity() * 40);
    let hashes: usize = message.chains.iter().map(|chains| chains.hashes.len() * 8).sum();
    rows + hashes + message.chains.capacity() * size_of::<ChainUpdate<'_>>() + message.bound.capacity() * 40
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
        kind in 9u64..,
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
        message.chains.push(ChainUpdate { upstream: "gpu-0:8000", parent: Some(1), hashes, end: None });
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
