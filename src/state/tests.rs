//! The memory of a balancer: learning, undoing, forgetting and counting.

use super::*;
use crate::observe::Observer;
use crate::pick::forecast::terms::ForecastTerms;
use crate::prompt::chain::thinning::expected_beyond;
use crate::prompt::session::SessionOrigin;

const HOUR: Duration = Duration::from_secs(3600);

/// Blocks of 100 bytes.
fn state() -> Arc<State> {
    State::new(PrefixIndex { blocks: Some(1000), block_bytes: 100 }, HOUR, 7, None, Observer::default())
}

fn learn(state: &State, lookup: &PromptLookup, id: usize) -> LearnedChain {
    state.learn(lookup, id, Instant::now())
}

fn lookup(chain: &[u64]) -> PromptLookup {
    let seen = chain.len() as u64 * 100 + 40;
    PromptLookup { model: Some("m".into()), chain: chain.to_vec(), seen, ..PromptLookup::default() }
}

fn present(id: usize) -> TrackedUpstream<'static> {
    TrackedUpstream { id, name: "u", incarnation: 0, cache_tokens: None, model: Some("m") }
}

/// Upstreams 0 to 2.
fn candidates(state: &State, lookup: &PromptLookup) -> Vec<Candidate> {
    let tokens = state.prompt(lookup).tokens;
    let empty = |index| Candidate {
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
        own_backlog: 0,
        head_millis: 0,
        terms: ForecastTerms::default(),
    };
    let mut candidates: Vec<Candidate> = (0..3).map(empty).collect();
    state.weigh(lookup, 2.0, &mut Hits::default(), &mut candidates, |candidate| candidate.index);
    state.add_session_penalty(lookup, 0.5, Instant::now(), &mut candidates, |candidate| candidate.index);
    candidates
}

/// Returns the blocks of the prompt that upstreams 0 to 2 hold, and the tokens that are left to prefill.
fn weigh(state: &State, lookup: &PromptLookup) -> Vec<(u64, u64)> {
    candidates(state, lookup).iter().map(|candidate| (candidate.hit, candidate.uncached)).collect()
}

fn session_penalty(state: &State, lookup: &PromptLookup) -> Vec<u64> {
    candidates(state, lookup).iter().map(|candidate| candidate.session_penalty).collect()
}

#[test]
fn an_upstream_holds_the_prompt_that_it_was_sent() {
    let state = state();
    learn(&state, &lookup(&[1, 2]), 1);
    // 340 bytes are 85 tokens, a block is 25.
    assert_eq!(weigh(&state, &lookup(&[1, 2, 3])), [(0, 85), (2, 35), (0, 85)]);
    assert_eq!(weigh(&state, &lookup(&[4])), [(0, 35); 3]);
}

#[test]
fn undoes_a_request_that_never_arrived() {
    let state = state();
    let prompt = lookup(&[1, 2]);
    let learned = learn(&state, &prompt, 0);
    state.take_back(&prompt, 0, learned);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn forgets_an_upstream_that_restarts_or_leaves() {
    let state = state();
    state.follow_fleet(&[present(0), present(1)]);
    let prompt = lookup(&[1, 2]);
    learn(&state, &prompt, 0);
    learn(&state, &prompt, 1);
    state.follow_fleet(&[present(0), present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(2, 10), (2, 10)]);
    state.follow_fleet(&[TrackedUpstream { incarnation: 1, ..present(0) }, present(1)]);
    assert_eq!(weigh(&state, &prompt)[..2], [(0, 60), (2, 10)]);
    state.follow_fleet(&[TrackedUpstream { incarnation: 1, ..present(0) }, present(2)]);
    assert_eq!(weigh(&state, &prompt), [(0, 60); 3]);
}

#[test]
fn limits_an_upstream_to_its_engines_cache() {
    let state = state();
    // A hundred tokens are four blocks.
    state.follow_fleet(&[TrackedUpstream { cache_tokens: Some(100), ..present(0) }]);
    learn(&state, &lookup(&[1, 2]), 0);
    learn(&state, &lookup(&[3, 4, 5, 6]), 0);
    assert_eq!(weigh(&state, &lookup(&[1, 2]))[0].0, 0);
    assert_eq!(weigh(&state, &lookup(&[3, 4, 5, 6]))[0].0, 4);
}

#[test]
fn learns_tokens_from_answers() {
    let state = state();
    let prompt = lookup(&[1, 2]);
    (0..2000).for_each(|_| state.learn_token_count(&prompt, 120));
    // Two bytes are a token: there were 120 of 240 bytes.
    let tokens = state.prompt(&prompt);
    assert!((119..=121).contains(&tokens.tokens), "{tokens:?}");
    let ids = PromptLookup { family: PromptFamily::Tokens, ..lookup(&[1, 2]) };
    assert_eq!(state.prompt(&ids).tokens, 60, "ids need no estimate");
    assert_eq!(state.prompt(&PromptLookup { model: None, ..lookup(&[1, 2]) }).tokens, 60);
}

#[test]
fn counts_the_tail_behind_the_part_that_was_read() {
    let state = state();
    let whole = lookup(&[1, 2, 3, 4]);
    learn(&state, &lookup(&[1, 2]), 1);
    state.learn_rest(&whole, 2, 1, None);
    assert_eq!(weigh(&state, &whole)[1], (4, 10));
    let cut = PromptLookup { unseen: 400, ..lookup(&[1, 2]) };
    // Of 160 tokens the upstream holds two blocks that were read, and two behind them.
    assert_eq!(weigh(&state, &cut)[..2], [(0, 160), (2, 60)]);
    let other = PromptLookup { unseen: 400, ..lookup(&[1, 9]) };
    assert_eq!(weigh(&state, &other)[1], (1, 135));
}

#[test]
fn evicts_the_oldest_blocks_of_an_engine_that_holds_far_less_than_predicted() {
    let state = state();
    for block in 0..10 {
        learn(&state, &lookup(&[block * 10 + 1, block * 10 + 2]), 0);
    }
    (0..40).for_each(|_| state.compare_cached_tokens(0, "u", 10_000, 0));
    assert_eq!(weigh(&state, &lookup(&[1, 2]))[0].0, 0);
    assert_eq!(weigh(&state, &lookup(&[91, 92]))[0].0, 2);
    learn(&state, &lookup(&(200..230).collect::<Vec<u64>>()), 0);
    assert_eq!(weigh(&state, &lookup(&(200..230).collect::<Vec<u64>>()))[0].0, 30, "the limit is unchanged");
}

#[test]
fn penalises_other_upstreams_by_half_of_the_sessions_held_tokens() {
    let state = state();
    let session = Some(Session { key: 7, source: SessionOrigin::Header });
    let turn = |chain: &[u64]| PromptLookup { session, ..lookup(chain) };
    assert_eq!(session_penalty(&state, &turn(&[1, 2])), [0; 3]);
    learn(&state, &turn(&[1, 2]), 1);
    // Two blocks are fifty tokens.
    assert_eq!(session_penalty(&state, &turn(&[1, 2, 3, 4])), [25, 0, 25]);
    assert_eq!(session_penalty(&state, &lookup(&[1, 2, 3, 4])), [0; 3], "another session");
    learn(&state, &lookup(&[1, 2]), 0);
    assert_eq!(
        session_penalty(&state, &turn(&[1, 2, 3, 4])),
        [0, 0, 25],
        "no penalty for an upstream that holds as much"
    );
    let opaque = PromptLookup { chain: Vec::new(), ..turn(&[1, 2, 3, 4]) };
    assert_eq!(session_penalty(&state, &opaque), [30, 0, 30], "the last prompt had sixty tokens");
    let lost = learn(&state, &turn(&[1, 2, 3]), 2);
    assert_eq!(session_penalty(&state, &opaque), [42, 42, 0]);
    state.take_back(&turn(&[1, 2, 3]), 2, lost);
    assert_eq!(session_penalty(&state, &opaque), [30, 0, 30], "the request never arrived");
    let later = Instant::now() + 2 * HOUR;
    let mut there = candidates(&state, &lookup(&[1, 2]));
    state.add_session_penalty(&opaque, 0.5, later, &mut there, |candidate| candidate.index);
    assert!(there.iter().all(|candidate| candidate.session_penalty == 0), "too long ago");
}

#[test]
fn a_session_that_has_ended_has_no_penalty() {
    let state = state();
    let named = |model: &str| {
        let key = session::key_of(b"harbor/hello:0", model);
        let session = Some(Session { key, source: SessionOrigin::Path });
        PromptLookup { session, ..lookup(&[1, 2]) }
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
    let state = State::new(
        PrefixIndex { blocks: Some(10_000), block_bytes: 100 },
        HOUR,
        7,
        None,
        Observer::default(),
    );
    let present = [0, 1, 2].map(|id| TrackedUpstream { cache_tokens: Some(20_000), ..present(id) });
    state.follow_fleet(&present);
    let chain = |key: u64, turn: u64| (0..20 * turn).map(|block| key << 32 | block).collect::<Vec<u64>>();
    for turn in 1..=6 {
        for key in 0..12 {
            let session = Some(Session { key, source: SessionOrigin::Header });
            let prompt = PromptLookup { session, ..lookup(&chain(key, turn)) };
            let home = key as usize % 3;
            if turn > 1 {
                // Of a long prompt the index stores every eighth block.
                let stored = last_stored(20 * (turn as usize - 1));
                let held = (stored + expected_beyond(stored, prompt.chain.len() - stored)) as u64;
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
                state.learn_token_count(&prompt, tokens);
            }
        }
        state.follow_fleet(&present);
    }
}

#[test]
fn checks_a_count_against_the_bytes_of_its_prompt() {
    let state = state();
    let prompt = lookup(&[1, 2]);
    let fits = |tokens| state.is_plausible_count(&prompt, tokens);
    // 240 bytes.
    let found = [0, 14, 15, 60, 240, 241, u64::MAX].map(fits);
    assert_eq!(found, [false, false, true, true, true, false, false]);
    let ids = PromptLookup { family: PromptFamily::Tokens, ..lookup(&[1, 2]) };
    assert!(
        state.is_plausible_count(&ids, 5)
            && state.is_plausible_count(&PromptLookup { unseen: 1, ..lookup(&[1]) }, 5)
    );
}

#[test]
fn derives_the_limit_of_the_index_from_the_caches_unless_it_is_set() {
    let derived = |blocks: Option<usize>, cache_tokens: &[Option<u64>]| {
        let config = PrefixIndex { blocks, block_bytes: 100 };
        let state = State::new(config, HOUR, 7, None, Observer::default());
        let all: Vec<TrackedUpstream<'_>> = (0..)
            .zip(cache_tokens)
            .map(|(id, tokens)| TrackedUpstream { cache_tokens: *tokens, ..present(id) })
            .collect();
        state.follow_fleet(&all);
        state.index.limit_of_all()
    };
    assert_eq!(derived(None, &[]), DEFAULT_INDEX_BLOCKS);
    assert_eq!(derived(None, &[None]), DEFAULT_INDEX_BLOCKS);
    // A hundred million tokens are four million blocks.
    assert_eq!(derived(None, &[Some(100_000_000), None]), 10_000_000);
    assert_eq!(derived(None, &[Some(u64::MAX)]), MAX_INDEX_BLOCKS);
    assert_eq!(derived(Some(70), &[Some(100_000_000)]), 70);
}

#[test]
fn numbers_the_groups_of_a_bounded_number_of_models() {
    let mut upstreams = IndexedUpstreams::default();
    let names: Vec<String> = (0..300).map(|number| format!("model-{number}")).collect();
    let groups: Vec<usize> = names.iter().map(|name| upstreams.group(Some(name))).collect();
    assert_eq!((groups[0], groups[254], groups[255], upstreams.group(None)), (1, 255, 0, 0));
    assert_eq!(upstreams.group(Some("model-3")), 4);
    assert_eq!(upstreams.groups.len(), prefix_index::MAX_GROUP);
}

#[test]
fn follows_a_fleet_of_which_most_is_replaced() {
    let state = state();
    let names: Vec<String> = (0..900).map(|id| format!("u{id}")).collect();
    let fleet = |ids: std::ops::Range<usize>| -> Vec<TrackedUpstream<'_>> {
        ids.map(|id| TrackedUpstream { name: &names[id], ..present(id) }).collect()
    };
    state.follow_fleet(&fleet(0..600));
    let prompt = lookup(&[1, 2]);
    for id in [5, 590] {
        learn(&state, &prompt, id);
    }
    state.follow_fleet(&fleet(580..900));
    let places = state.places.load();
    assert_eq!((places.id("u5"), places.slot(5), places.id("u590")), (None, None, Some(590)));
    assert_eq!((580..900).filter(|id| places.slot(*id).is_some()).count(), 320);
    let held = |id: usize| state.index.held(places.slot(id).expect("the upstream has a slot"));
    assert_eq!((held(590), held(580), held(899)), (2, 0, 0));
}
