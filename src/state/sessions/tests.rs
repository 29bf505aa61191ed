//! Tests of session bindings: expiry, limits, and threads beside each other.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const HOUR: u64 = 3_600_000;

/// Spreads small numbers as a hash would.
fn key(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn bound(upstream: usize, tokens: u64) -> Option<SessionBinding> {
    Some(SessionBinding { upstream, tokens })
}

#[test]
fn finds_the_last_upstream_of_a_session_until_it_expires() {
    let sessions = Sessions::new(100, HOUR);
    assert_eq!(sessions.find(1, 0), None);
    sessions.bind(1, 7, 500, 10);
    sessions.bind(2, 8, 600, 10);
    sessions.bind(1, 9, 700, 20);
    assert_eq!(sessions.find(1, 20 + HOUR), bound(9, 700));
    assert_eq!(sessions.find(1, 21 + HOUR), None);
    assert_eq!(sessions.find(2, 10 + HOUR), bound(8, 600));
    assert_eq!(sessions.len(), 2);
    sessions.set_ttl(5);
    assert_eq!((sessions.find(1, 25), sessions.find(1, 26)), (bound(9, 700), None));
    assert_eq!(sessions.find(1, 0), bound(9, 700), "a time before the session was bound");
}

#[test]
fn restores_the_previous_binding_when_a_request_did_not_arrive() {
    let sessions = Sessions::new(100, HOUR);
    sessions.bind(1, 7, 500, 0);
    sessions.bind(1, 8, 900, 1);
    sessions.unbind(1, 8, bound(7, 500));
    assert_eq!(sessions.find(1, 1), bound(7, 500));
    sessions.unbind(1, 8, None);
    assert_eq!(sessions.find(1, 1), bound(7, 500), "the session was bound elsewhere meanwhile");
    sessions.unbind(1, 7, None);
    assert_eq!(sessions.find(1, 1), bound(7, 0), "no tokens are held there");
    sessions.unbind(2, 7, None);
    assert_eq!(sessions.find(2, 1), None);
}

#[test]
fn a_forgotten_session_starts_anew() {
    let sessions = Sessions::new(100, HOUR);
    sessions.bind(1, 7, 500, 0);
    sessions.bind(2, 8, 600, 0);
    assert_eq!((sessions.forget(1), sessions.forget(3)), (true, false));
    assert_eq!((sessions.find(1, 0), sessions.find(2, 0)), (None, bound(8, 600)));
    sessions.unbind(1, 7, bound(9, 100));
    assert_eq!((sessions.find(1, 0), sessions.len()), (None, 1), "a request that was in flight");
    sessions.bind(1, 6, 10, 1);
    assert_eq!((sessions.find(1, 1), sessions.len()), (bound(6, 10), 2));
}

#[test]
fn keeps_no_session_with_a_limit_of_zero() {
    let sessions = Sessions::new(0, HOUR);
    sessions.bind(1, 7, 500, 0);
    assert_eq!((sessions.find(1, 0), sessions.is_empty()), (None, true));
}

#[test]
fn fills_the_limit_and_never_exceeds_it() {
    let sessions = Sessions::new(64_000, HOUR);
    (0..200_000).for_each(|n| sessions.bind(key(n), 1, n, n));
    assert!((60_000..=64_000).contains(&sessions.len()), "{}", sessions.len());
    assert!((190_000..200_000).all(|n| sessions.find(key(n), n) == bound(1, n)));
    assert!((0..100_000).all(|n| sessions.find(key(n), n).is_none()));
}

#[test]
fn threads_find_the_sessions_that_they_bound() {
    let sessions = Arc::new(Sessions::new(100_000, HOUR));
    let run = |thread: u64| {
        let sessions = sessions.clone();
        move || {
            for round in 0..2000 {
                let mine = key(thread * 1000 + round % 100);
                sessions.bind(mine, thread as usize, round, round);
                assert_eq!(sessions.find(mine, round), bound(thread as usize, round));
                // Every reader sees complete entries, whichever thread wrote them.
                sessions.bind(key(7), thread as usize, thread * 3, round);
                let shared = sessions.find(key(7), round).unwrap();
                assert_eq!(shared.tokens, shared.upstream as u64 * 3);
            }
        }
    };
    let threads: Vec<_> = (1..9).map(|thread| std::thread::spawn(run(thread))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(sessions.len(), 801);
}

/// The sessions as a list, in the order of their last requests.
#[derive(Default)]
struct SessionModel(Vec<(u64, SessionBinding, u64)>);

impl SessionModel {
    fn bind(&mut self, key: u64, bound: SessionBinding, now: u64, limit: usize) {
        self.0.retain(|(known, ..)| *known != key);
        self.0.push((key, bound, now));
        if self.0.len() > limit {
            self.0.remove(0);
        }
    }

    fn find(&self, key: u64, now: u64, ttl: u64) -> Option<SessionBinding> {
        let (_, bound, at) = self.0.iter().find(|(known, ..)| *known == key)?;
        (now - at <= ttl).then_some(*bound)
    }
}

proptest! {
    #[test]
    fn a_shard_keeps_what_a_list_keeps(
        limit in 1usize..8,
        ttl in 0u64..30,
        calls in prop::collection::vec((0u64..12, 0usize..4, 0u64..1000, 0u64..5, 0..5), 0..120),
    ) {
        let sessions = Sessions::with_shards(limit, ttl, 1);
        let mut model = SessionModel::default();
        let mut now = 0;
        for (number, upstream, tokens, pause, call) in calls {
            now += pause;
            if call == 0 {
                let before = model.find(key(number), now, ttl);
                sessions.unbind(key(number), upstream, before);
                let entry = model.0.iter_mut().find(|(known, ..)| *known == key(number));
                if let Some((_, bound, _)) = entry.filter(|(_, bound, _)| bound.upstream == upstream) {
                    *bound = before.unwrap_or(SessionBinding { upstream, tokens: 0 });
                }
            } else if call == 1 {
                sessions.forget(key(number));
                model.0.retain(|(known, ..)| *known != key(number));
            } else {
                sessions.bind(key(number), upstream, tokens, now);
                model.bind(key(number), SessionBinding { upstream, tokens }, now, limit);
            }
            prop_assert_eq!(sessions.len(), model.0.len());
            for number in 0..12 {
                let expected = model.find(key(number), now, ttl);
                prop_assert_eq!(sessions.find(key(number), now), expected);
            }
        }
    }
}
