//! What is written is read, and whatever is read does no harm.

use super::*;
use proptest::prelude::*;

/// Of each upstream, by its name.
type Rows = Vec<(String, [u64; 3])>;

/// Upstream, parent, blocks and end.
type Chain = (String, Option<u64>, Vec<u64>, Option<u64>);

/// A message's contents, owned.
#[derive(Clone, Debug)]
struct OwnedMessage {
    head: (u64, u64),
    who: Option<(String, String)>,
    gauges: Option<(bool, Rows)>,
    learnt: Vec<Chain>,
    bound: Vec<(bool, String, String)>,
    asks: Vec<(u64, String, u64)>,
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
        for (upstream, parent, hashes, end) in &self.learnt {
            let hashes = Cow::Borrowed(&hashes[..]);
            message.learnt.push(ChainUpdate { upstream, parent: *parent, hashes, end: *end });
        }
        for (session, key, upstream) in &self.bound {
            let kind = if *session { Binding::Session } else { Binding::Response };
            message.bound.push(BindingUpdate { kind, key, upstream, number: key.len() as u64 * 1000 });
        }
        for (balancer, upstream, hash) in &self.asks {
            message.asks.push(ChainRequest { balancer: *balancer, upstream, hash: *hash });
        }
        (message.members, message.leaving) = self.marks;
        message
    }
}

fn given() -> impl Strategy<Value = OwnedMessage> {
    let name = || "[a-c:]{0,3}|\\PC{0,12}";
    let hashes = prop::collection::vec(any::<u64>(), 0..20);
    let learnt = (name(), any::<Option<u64>>(), hashes, any::<Option<u64>>());
    let gauges = (any::<bool>(), prop::collection::vec((name(), any::<[u64; 3]>()), 0..6));
    (
        any::<(u64, u64)>(),
        prop::option::of((name(), name())),
        prop::option::of(gauges),
        prop::collection::vec(learnt, 0..6),
        prop::collection::vec((any::<bool>(), name(), name()), 0..6),
        prop::collection::vec((any::<u64>(), name(), any::<u64>()), 0..4),
        any::<(bool, bool)>(),
    )
        .prop_map(|(head, who, gauges, learnt, bound, asks, marks)| OwnedMessage {
            head,
            who,
            gauges,
            learnt,
            bound,
            asks,
            marks,
        })
}

/// Memory that a message takes beside the bytes it was read from.
fn weight(message: &Message<'_>) -> usize {
    let rows = message.gauges.as_ref().map_or(0, |told| told.rows.capacity() * 40);
    let hashes: usize = message.learnt.iter().map(|learnt| learnt.hashes.len() * 8).sum();
    rows + hashes + message.learnt.capacity() * size_of::<ChainUpdate<'_>>() + message.bound.capacity() * 40
}

proptest! {
    #[test]
    fn what_is_written_is_read(given in given()) {
        let message = given.message();
        let bytes = message.encode();
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
    }

    #[test]
    fn garbage_does_no_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..300), valid: bool) {
        if let Some(first) = bytes.first_mut().filter(|_| valid) {
            *first = VERSION;
        }
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert!(weight(&message) <= 4096 + 64 * bytes.len());
        }
    }

    /// A message in which something was changed, cut off or put in.
    #[test]
    fn what_was_damaged_does_no_harm(
        given in given(),
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

    /// Parts that a newer balancer writes, anywhere among those that are known.
    #[test]
    fn what_is_not_known_is_passed_over(
        given in given(),
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
fn a_tail_takes_few_bytes() {
    let mut message = Message::new(7, 300);
    let hashes: Vec<u64> = (0..6).collect();
    for _ in 0..20 {
        let hashes = Cow::Borrowed(&hashes[..]);
        message.learnt.push(ChainUpdate { upstream: "gpu-0:8000", parent: Some(1), hashes, end: None });
    }
    let told = GaugeUpdate {
        whole: true,
        rows: vec![("gpu-0:8000", SiblingLoad { active: 9, backlog: 1500, context: 40_000 })],
    };
    message.gauges = Some(told);
    let bytes = message.encode().len();
    assert!(bytes < 20 * 60 + 50, "{bytes} bytes");
}

#[test]
fn another_version_and_too_much_are_told_apart() {
    let mut bytes = Message::new(1, 2).encode();
    assert_eq!(bytes.len(), 10);
    bytes[0] = 2;
    assert_eq!(Message::decode(&bytes), Err(MessageError::Version(2)));
    assert_eq!(Message::decode(&vec![VERSION; MAX_MESSAGE_BYTES + 1]), Err(MessageError::TooLong));
    assert_eq!(Message::decode(&[]), Err(MessageError::Broken));
    let mut message = Message::new(1, 2);
    message.asks.push(ChainRequest { balancer: 1, upstream: "a", hash: 2 });
    let bytes = message.encode();
    for cut in 1..bytes.len() {
        // Cut between two parts it is a message, and says less.
        if let Ok(read) = Message::decode(&bytes[..cut]) {
            assert!(read.asks.is_empty(), "{cut}");
        }
    }
}

#[test]
fn a_binding_of_a_new_kind_is_passed_over() {
    let mut message = Message::new(1, 2);
    message.bound.push(BindingUpdate { kind: Binding::Session, key: "k", upstream: "a", number: 3 });
    message.bound.push(BindingUpdate { kind: Binding::Response, key: "r", upstream: "a", number: 3 });
    let mut bytes = message.encode();
    let at = bytes.windows(3).position(|window| window == [1, 1, b'k']).expect("is there");
    bytes[at] = 9;
    assert_eq!(Message::decode(&bytes).expect("is readable").bound, message.bound[1..]);
}
