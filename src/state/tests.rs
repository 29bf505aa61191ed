//! What was sent, taken back, forgotten and counted, through the one door.

use super::*;
use crate::observe::Observer;
use crate::prompt::session::SessionOrigin;

const HOUR: Duration = Duration::from_secs(3600);

/// Blocks of 100 bytes.
fn state() -> Arc<State> {
    State::new(PrefixIndex { blocks: 1000, block_bytes: 100 }, HOUR, 7, None, Observer::default())
}

fn learn(state: &State, asked: &PromptLookup, id: usize) -> LearnedChain {
    state.learn(asked, id, Instant::now())
}

fn asked(chain: &[u64]) -> PromptLookup {
    let seen = chain.len() as u64 * 100 + 40;
    PromptLookup { model: Some("m".into()), chain: chain.to_vec(), seen, ..PromptLookup::default() }
}

fn present(id: usize) -> TrackedUpstream<'static> {
    TrackedUpstream { id, name: "u", incarnation: 0, cache_tokens: None, model: Some("m") }
}

/// Upstreams 0 to 2.
fn candidates(state: &State, asked: &PromptLookup) -> Vec<Candidate> {
    let tokens = state.prompt(asked).tokens;
    let stranger = |index| Candidate {
        index,
        backlog: 0,
        missing: tokens,
        active: 0,
        context: 0,
        weight: 1.0,
        session_penalty: 0,
        cold: tokens,
        hit: 0,
        uncached: tokens,
    };
    let mut candidates: Vec<Candidate> = (0..3).map(stranger).collect();
    state.weigh(asked, 2.0, &mut Hits::default(), &mut candidates, |candidate| candidate.index);
    state.add_session_penalty(asked, 0.5, Instant::now(), &mut candidates, |candidate| candidate.index);
    candidates
}

/// What upstreams 0 to 2 hold of the prompt, in blocks, and the tokens that are left to prefill.
fn weigh(state: &State, asked: &PromptLookup) -> Vec<(u64, u64)> {
    candidates(state, asked).iter().map(|candidate| (candidate.hit, candidate.uncached)).collect()
}

fn session_penalty(state: &State, asked: &PromptLookup) -> Vec<u64> {
    candidates(state, asked).iter().map(|candidate| candidate.session_penalty).collect()
}

#[test]
fn what_was_sent_is_held_by_whom_it_was_sent_to() {
    let state = state();
    learn(&state, &asked(&[1, 2]), 1);
    // 340 bytes are 85 tokens, a block is 25.
    assert_eq!(weigh(&state, &asked(&[1, 2, 3])), [(0, 85), (2, 35), (0, 85)]);
    assert_eq!(weigh(&state, &asked(&[4])), [(0, 35); 3]);
}

#[test]
fn what_never_arrived_is_taken_back() {
    let state = state();
    let prompt = asked(&[1, 2]);
    let learnt = learn(&state, &prompt, 0);
    state.take_back(&prompt, 0, learnt);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn a_restart_or_a_leave_is_forgotten() {
    let state = state();
    state.follow(&[present(0), present(1)]);
    let prompt = asked(&[1, 2]);
    learn(&state, &prompt, 0);
    learn(&state, &prompt, 1);
    state.follow(&[present(0), present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(2, 10), (2, 10)]);
    state.follow(&[TrackedUpstream { incarnation: 1, ..present(0) }, present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(0, 60), (2, 10)]);
    state.follow(&[TrackedUpstream { incarnation: 1, ..present(0) }, present(2)]);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn an_upstream_holds_no_more_than_its_engines_cache() {
    let state = state();
    // A hundred tokens are four blocks.
    state.follow(&[TrackedUpstream { cache_tokens: Some(100), ..present(0) }]);
    learn(&state, &asked(&[1, 2]), 0);
    learn(&state, &asked(&[3, 4, 5, 6]), 0);
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
    let ids = PromptLookup { family: PromptFamily::Tokens, ..asked(&[1, 2]) };
    assert_eq!(state.prompt(&ids).tokens, 60, "ids need no estimate");
    assert_eq!(state.prompt(&PromptLookup { model: None, ..asked(&[1, 2]) }).tokens, 60);
}

#[test]
fn who_holds_all_that_was_seen_holds_what_it_was_sent_behind_it() {
    let state = state();
    let whole = asked(&[1, 2, 3, 4]);
    learn(&state, &asked(&[1, 2]), 1);
    state.learn_rest(&whole, 2, 1, None);
    assert_eq!(weigh(&state, &whole)[1], (4, 10));
    let cut = PromptLookup { unseen: 400, ..asked(&[1, 2]) };
    // Of 160 tokens it holds two blocks that were seen, and two behind them.
    assert_eq!(weigh(&state, &cut)[..2], [(0, 160), (2, 60)]);
    let other = PromptLookup { unseen: 400, ..asked(&[1, 9]) };
    assert_eq!(weigh(&state, &other)[1], (1, 135));
}

#[test]
fn an_engine_that_holds_far_less_than_is_believed_loses_the_oldest() {
    let state = state();
    for block in 0..10 {
        learn(&state, &asked(&[block * 10 + 1, block * 10 + 2]), 0);
    }
    (0..40).for_each(|_| state.compared(0, "u", 10_000, 0));
    assert_eq!(weigh(&state, &asked(&[1, 2]))[0].0, 0);
    assert_eq!(weigh(&state, &asked(&[91, 92]))[0].0, 2);
    learn(&state, &asked(&(200..230).collect::<Vec<u64>>()), 0);
    assert_eq!(weigh(&state, &asked(&(200..230).collect::<Vec<u64>>()))[0].0, 30, "its limit is as before");
}

#[test]
fn a_session_loses_elsewhere_half_of_what_is_held_where_it_was() {
    let state = state();
    let session = Some(Session { key: 7, source: SessionOrigin::Header });
    let turn = |chain: &[u64]| PromptLookup { session, ..asked(chain) };
    assert_eq!(session_penalty(&state, &turn(&[1, 2])), [0; 3]);
    learn(&state, &turn(&[1, 2]), 1);
    // Two blocks are fifty tokens.
    assert_eq!(session_penalty(&state, &turn(&[1, 2, 3, 4])), [25, 0, 25]);
    assert_eq!(session_penalty(&state, &asked(&[1, 2, 3, 4])), [0; 3], "another session");
    learn(&state, &asked(&[1, 2]), 0);
    assert_eq!(session_penalty(&state, &turn(&[1, 2, 3, 4])), [0, 0, 25], "who holds as much loses nothing");
    let opaque = PromptLookup { chain: Vec::new(), ..turn(&[1, 2, 3, 4]) };
    assert_eq!(session_penalty(&state, &opaque), [30, 0, 30], "its last prompt had sixty tokens");
    let lost = learn(&state, &turn(&[1, 2, 3]), 2);
    assert_eq!(session_penalty(&state, &opaque), [42, 42, 0]);
    state.take_back(&turn(&[1, 2, 3]), 2, lost);
    assert_eq!(session_penalty(&state, &opaque), [30, 0, 30], "it never arrived");
    let later = Instant::now() + 2 * HOUR;
    let mut there = candidates(&state, &asked(&[1, 2]));
    state.add_session_penalty(&opaque, 0.5, later, &mut there, |candidate| candidate.index);
    assert!(there.iter().all(|candidate| candidate.session_penalty == 0), "too long ago");
}

#[test]
fn a_session_that_has_ended_is_drawn_nowhere() {
    let state = state();
    let named = |model: &str| {
        let key = session::key_of(b"harbor/hello:0", model);
        let session = Some(Session { key, source: SessionOrigin::Path });
        PromptLookup { session, ..asked(&[1, 2]) }
    };
    for model in ["m", "n"] {
        learn(&state, &named(model), 1);
    }
    let opaque = |model: &str| PromptLookup { chain: Vec::new(), ..named(model) };
    assert_eq!(session_penalty(&state, &opaque("m")), [30, 0, 30]);
    state.forget_session("another", ["m", "n"]);
    assert_eq!(session_penalty(&state, &opaque("m")), [30, 0, 30]);
    state.forget_session("harbor/hello:0", ["m", ""]);
    assert_eq!(session_penalty(&state, &opaque("m")), [0; 3]);
    assert_eq!(session_penalty(&state, &opaque("n")), [30, 0, 30], "another model's session");
}

/// An engine that counts in its own way drew conversations away from the upstreams that held them.
#[test]
fn false_counts_move_no_session() {
    let state =
        State::new(PrefixIndex { blocks: 10_000, block_bytes: 100 }, HOUR, 7, None, Observer::default());
    let present = [0, 1, 2].map(|id| TrackedUpstream { cache_tokens: Some(20_000), ..present(id) });
    state.follow(&present);
    let chain = |key: u64, turn: u64| (0..20 * turn).map(|block| key << 32 | block).collect::<Vec<u64>>();
    for turn in 1..=6 {
        for key in 0..12 {
            let session = Some(Session { key, source: SessionOrigin::Header });
            let prompt = PromptLookup { session, ..asked(&chain(key, turn)) };
            let home = key as usize % 3;
            if turn > 1 {
                let held = 20 * (turn - 1);
                for (id, candidate) in candidates(&state, &prompt).iter().enumerate() {
                    let held = if id == home { held } else { 0 };
                    let expected = (held, prompt.seen / 4 - held * 25);
                    let seen = (candidate.hit, candidate.uncached);
                    assert_eq!(seen, expected, "turn {turn} of session {key} at upstream {id}");
                    assert_eq!(candidate.session_penalty > 0, id != home);
                }
            }
            learn(&state, &prompt, home);
            for tokens in [1, 5, prompt.seen * 3, u64::MAX] {
                state.counted(&prompt, tokens);
            }
        }
        state.follow(&present);
    }
}

#[test]
fn a_count_is_judged_by_the_bytes_of_its_prompt() {
    let state = state();
    let prompt = asked(&[1, 2]);
    let fits = |tokens| state.can_have(&prompt, tokens);
    // 240 bytes.
    let found = [0, 14, 15, 60, 240, 241, u64::MAX].map(fits);
    assert_eq!(found, [false, false, true, true, true, false, false]);
    let ids = PromptLookup { family: PromptFamily::Tokens, ..asked(&[1, 2]) };
    assert!(state.can_have(&ids, 5) && state.can_have(&PromptLookup { unseen: 1, ..asked(&[1]) }, 5));
}
