//! What was sent, taken back, forgotten and counted, through the one door.

use super::*;
use crate::pick::Candidate;

/// Blocks of 100 bytes.
fn state() -> Arc<State> {
    State::new(PrefixIndex { blocks: 1000, block_bytes: 100 }, 7)
}

fn asked(chain: &[u64]) -> Asked {
    let seen = chain.len() as u64 * 100 + 40;
    Asked { model: Some("m".into()), chain: chain.to_vec(), seen, ..Asked::default() }
}

fn present(id: usize) -> Present<'static> {
    Present { id, name: "u", incarnation: 0, cache_tokens: None, model: Some("m") }
}

/// What upstreams 0 to 2 hold of the prompt, in blocks and tokens that are left to prefill.
fn weigh(state: &State, asked: &Asked) -> Vec<(u64, u64)> {
    let tokens = state.prompt(asked).tokens;
    let stranger = |index| Candidate {
        index,
        backlog: 0,
        missing: tokens,
        active: 0,
        context: 0,
        weight: 1.0,
        astray: 0,
        cold: tokens,
        hit: 0,
        uncached: tokens,
    };
    let mut candidates: Vec<Candidate> = (0..3).map(stranger).collect();
    state.weigh(asked, 2.0, &mut Hits::default(), &mut candidates, |candidate| candidate.index);
    candidates.iter().map(|candidate| (candidate.hit, candidate.uncached)).collect()
}

#[test]
fn what_was_sent_is_held_by_whom_it_was_sent_to() {
    let state = state();
    assert!(state.learn(&asked(&[1, 2]), 1).is_some());
    // 340 bytes are 85 tokens, a block is 25.
    assert_eq!(weigh(&state, &asked(&[1, 2, 3])), [(0, 85), (2, 35), (0, 85)]);
    assert_eq!(weigh(&state, &asked(&[4])), [(0, 35); 3]);
}

#[test]
fn what_never_arrived_is_taken_back() {
    let state = state();
    let prompt = asked(&[1, 2]);
    let receipt = state.learn(&prompt, 0).unwrap();
    state.take_back(&prompt, 0, receipt);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn a_restart_or_a_leave_is_forgotten() {
    let state = state();
    state.follow(&[present(0), present(1)]);
    let prompt = asked(&[1, 2]);
    assert!(state.learn(&prompt, 0).is_some() && state.learn(&prompt, 1).is_some());
    state.follow(&[present(0), present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(2, 10), (2, 10)]);
    state.follow(&[Present { incarnation: 1, ..present(0) }, present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(0, 60), (2, 10)]);
    state.follow(&[Present { incarnation: 1, ..present(0) }, present(2)]);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn an_upstream_holds_no_more_than_its_engines_cache() {
    let state = state();
    // A hundred tokens are four blocks.
    state.follow(&[Present { cache_tokens: Some(100), ..present(0) }]);
    assert!(state.learn(&asked(&[1, 2]), 0).is_some() && state.learn(&asked(&[3, 4, 5, 6]), 0).is_some());
    assert_eq!(weigh(&state, &asked(&[1, 2]))[0].0, 0);
    assert_eq!(weigh(&state, &asked(&[3, 4, 5, 6]))[0].0, 4);
}

#[test]
fn tokens_are_counted_as_answers_say() {
    let state = state();
    let prompt = asked(&[1, 2]);
    (0..2000).for_each(|_| state.counted(&prompt, 120));
    // Two bytes are a token: there were 120 of 240 bytes.
    let tokens = state.prompt(&prompt);
    assert!((119..=121).contains(&tokens.tokens), "{tokens:?}");
    let ids = Asked { family: Family::Tokens, ..asked(&[1, 2]) };
    assert_eq!(state.prompt(&ids).tokens, 60, "ids need no estimate");
    assert_eq!(state.prompt(&Asked { model: None, ..asked(&[1, 2]) }).tokens, 60);
}

#[test]
fn who_holds_all_that_was_seen_holds_what_it_was_sent_behind_it() {
    let state = state();
    let whole = asked(&[1, 2, 3, 4]);
    state.learn(&asked(&[1, 2]), 1);
    state.learn_rest(&whole, 2, 1);
    assert_eq!(weigh(&state, &whole)[1], (4, 10));
    let cut = Asked { unseen: 400, ..asked(&[1, 2]) };
    // Of 160 tokens it holds two blocks that were seen, and two behind them.
    assert_eq!(weigh(&state, &cut)[..2], [(0, 160), (2, 60)]);
    let other = Asked { unseen: 400, ..asked(&[1, 9]) };
    assert_eq!(weigh(&state, &other)[1], (1, 135));
}

#[test]
fn an_engine_that_holds_far_less_than_is_believed_loses_the_oldest() {
    let state = state();
    for block in 0..10 {
        state.learn(&asked(&[block * 10 + 1, block * 10 + 2]), 0);
    }
    (0..40).for_each(|_| state.compared(0, "u", 10_000, 0));
    assert_eq!(weigh(&state, &asked(&[1, 2]))[0].0, 0);
    assert_eq!(weigh(&state, &asked(&[91, 92]))[0].0, 2);
    assert!(state.learn(&asked(&(200..230).collect::<Vec<u64>>()), 0).is_some());
    assert_eq!(weigh(&state, &asked(&(200..230).collect::<Vec<u64>>()))[0].0, 30, "its limit is as before");
}
