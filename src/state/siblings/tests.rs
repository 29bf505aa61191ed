//! Tests of what two balancers learn from each other, without Redis between them.

use std::sync::Arc;
use std::time::Duration;

use super::super::exchange::{Message, Outbox};
use super::super::{PromptLookup, State, TrackedUpstream};
use super::*;
use crate::config::types::PrefixIndex;
use crate::observe::Observer;
use crate::prompt::session::{self, Session, SessionOrigin};

const HOUR: Duration = Duration::from_secs(3600);

/// Two balancers with different ids for the same upstreams.
fn pair() -> [(Arc<State>, Arc<Outbox>); 2] {
    [[0, 1], [5, 3]].map(|ids| {
        let outbox = Arc::<Outbox>::default();
        let config = PrefixIndex { blocks: Some(1000), block_bytes: 100 };
        let state = State::new(config, HOUR, 7, Some(outbox.clone()), Observer::default());
        let names = ["a", "b"].into_iter().zip(ids);
        let present =
            |(name, id)| TrackedUpstream { id, name, incarnation: 0, cache_tokens: None, model: None };
        state.follow_fleet(&names.map(present).collect::<Vec<_>>());
        (state, outbox)
    })
}

fn lookup(chain: &[u64], session: Option<u64>) -> PromptLookup {
    let session = session.map(|key| Session { key, source: SessionOrigin::Header });
    PromptLookup { chain: chain.to_vec(), seen: 100 * chain.len() as u64, session, ..PromptLookup::default() }
}

/// Applies the events of one balancer at the other. Returns the number of blocks.
fn carry(from: &Outbox, to: &State) -> usize {
    let events = from.take(usize::MAX);
    let mut message = Message::default();
    events.iter().for_each(|event| event.fill(&mut message));
    for chain in &message.chains {
        assert!(to.apply_chain(chain));
    }
    message.take_backs.iter().for_each(|chain| to.apply_take_back(chain));
    message.bound.iter().for_each(|bound| to.apply_binding(bound, Instant::now()));
    message.chains.iter().map(|chain| chain.hashes.len()).sum()
}

#[test]
fn shares_a_conversation_by_its_tails() {
    let [(one, ours), (other, theirs)] = pair();
    one.learn(&lookup(&[1, 2, 3], Some(9)), 1, Instant::now());
    assert_eq!(carry(&ours, &other), 3);
    assert_eq!(other.chain_to("b", 3), Some(vec![1, 2, 3]));
    assert_eq!(other.sessions.find(9, 0).map(|bound| bound.upstream), Some(3));
    other.learn(&lookup(&[1, 2, 3, 4], Some(9)), 3, Instant::now());
    assert_eq!(carry(&theirs, &one), 1, "one block is new");
    assert_eq!((one.chain_to("b", 4), one.chain_to("a", 4)), (Some(vec![1, 2, 3, 4]), None));
    one.learn_rest(&lookup(&[1, 2, 3, 4, 5, 6], None), 4, 1, None);
    assert_eq!(carry(&ours, &other), 2);
    assert_eq!(other.chain_to("b", 6), Some(vec![1, 2, 3, 4, 5, 6]));
}

#[test]
fn undoes_a_request_that_never_arrived_at_both_balancers() {
    let [(one, ours), (other, _)] = pair();
    let holds = |state: &State, hash| state.chain_to("b", hash).is_some();
    let opened = |chain: &[u64], end| PromptLookup { end, ..lookup(chain, None) };
    let first = one.learn(&opened(&[1, 2], Some(7)), 1, Instant::now());
    carry(&ours, &other);
    assert!(holds(&other, 2) && other.size().pairs == 3);
    let longer = lookup(&[1, 2, 3, 4], None);
    let second = one.learn(&longer, 1, Instant::now());
    carry(&ours, &other);
    assert!(holds(&other, 4));
    other.learn(&lookup(&[1, 2, 3], None), 3, Instant::now());
    one.take_back(&longer, 1, second);
    carry(&ours, &other);
    assert!(holds(&other, 3) && !holds(&other, 4), "its own request has sent the third block");
    assert!(holds(&one, 2) && !holds(&one, 3));
    one.take_back(&opened(&[1, 2], Some(7)), 1, first);
    carry(&ours, &other);
    assert_eq!(other.size().pairs, 3, "the ending is gone, the blocks were sent again");
    assert_eq!(ours.take(usize::MAX), []);
}

#[test]
fn ignores_what_is_taken_back_at_unknown_upstreams() {
    let [(one, ours), _] = pair();
    let lost = one.learn(&lookup(&[1, 2], None), 1, Instant::now());
    ours.take(usize::MAX);
    let taken = |upstream, hashes: &[u64]| exchange::TakeBack {
        upstream,
        parent: None,
        hashes: hashes.to_vec().into(),
        end: Some(9),
    };
    for chain in [taken("x", &[1, 2]), taken("a", &[1, 2]), taken("b", &[3, 4]), taken("b", &[])] {
        one.apply_take_back(&chain);
        assert_eq!(one.chain_to("b", 2), Some(vec![1, 2]), "{chain:?}");
    }
    one.take_back(&lookup(&[1, 2], None), 1, lost);
    assert_eq!((one.chain_to("b", 2), one.size().pairs), (None, 0));
}

#[test]
fn forgets_an_ended_session_at_both_balancers() {
    let [(one, ours), (other, _)] = pair();
    let key = session::key_of(b"s", "m");
    one.learn(&lookup(&[], Some(key)), 1, Instant::now());
    carry(&ours, &other);
    assert_eq!(other.sessions.len(), 1);
    one.forget_session("s", ["", "m"]);
    assert!(one.sessions.is_empty());
    carry(&ours, &other);
    assert!(other.sessions.is_empty());
}

#[test]
fn ignores_unknown_upstreams_and_invalid_keys() {
    let [(one, ours), _] = pair();
    let tail = |upstream| exchange::ChainUpdate {
        upstream,
        parent: Some(7),
        depth: 1,
        hashes: vec![8].into(),
        end: None,
    };
    assert!(one.apply_chain(&tail("x")), "an unknown upstream needs no chain");
    assert!(!one.apply_chain(&tail("a")));
    let bound = |key, kind| exchange::BindingUpdate { kind, key, upstream: "a", number: 5 };
    one.apply_binding(&bound("no number", Binding::Session), Instant::now());
    one.apply_binding(
        &exchange::BindingUpdate { upstream: "x", ..bound("a", Binding::Response) },
        Instant::now(),
    );
    assert!(one.sessions.is_empty() && one.responses.is_empty());
    // This upstream has no name yet.
    one.learn(&lookup(&[1], None), 17, Instant::now());
    assert_eq!(ours.take(usize::MAX), []);
}

#[test]
fn shares_the_origin_of_a_response_and_stores_it_by_key() {
    let [(one, ours), (other, _)] = pair();
    one.keep_response("mine", ResponseOrigin { upstream: 1, name: 7 }, Instant::now());
    let events = ours.take(usize::MAX);
    assert!(matches!(&events[..], [OutboxEvent::Bound { kind: Binding::Response, keep: true, .. }]));
    let mut message = Message::default();
    events.iter().for_each(|event| event.fill(&mut message));
    message.bound.iter().for_each(|bound| other.apply_binding(bound, Instant::now()));
    assert_eq!(other.response("mine", Instant::now()), Some(ResponseOrigin { upstream: 3, name: 7 }));
    assert!(other.sessions.is_empty());
}

#[test]
fn raises_jitter_with_the_age_of_the_reports() {
    let [(state, _), _] = pair();
    for (age, jitter) in [(0.0, 0.0), (0.02, 0.008), (0.25, 0.1), (0.5, 0.2), (3.0, 0.2)] {
        state.set_siblings_age(age);
        assert!((state.jitter() - jitter).abs() < 1e-9, "{age}");
    }
}

/// Also a request without a chain or a session raises the load, which siblings must see.
#[tokio::test(start_paused = true)]
async fn each_sent_request_wakes_the_publisher() {
    let [(state, outbox), _] = pair();
    for lookup in [PromptLookup::default(), lookup(&[1, 2], None), lookup(&[1, 2], Some(9))] {
        state.learn(&lookup, 1, Instant::now());
        tokio::time::timeout(HOUR, outbox.wait_for_request()).await.expect("a request was sent");
    }
    assert!(tokio::time::timeout(HOUR, outbox.wait_for_request()).await.is_err(), "no request was sent");
}
