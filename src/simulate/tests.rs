//! Small replays, whose whole course is known.

use super::load::{Conversation, ConversationTurn};
use super::*;
use crate::config::types::Preset;
use crate::simulate::shapes::Shape;

const BLOCK: usize = 512;

const WORK: ReplayPolicy = ReplayPolicy::Preset(Preset::Work);

fn setup(upstreams: usize, seed: u64) -> Setup {
    Setup {
        upstreams,
        balancers: 1,
        open: false,
        interval: Some(0.02),
        cache_tokens: 2000 * BLOCK,
        speed: 1.0,
        seed,
    }
}

/// A conversation that begins with so many tokens of a kind's, and goes on with its own.
fn session(start: f64, kind: u64, common: usize, number: u64, turns: Vec<ConversationTurn>) -> Conversation {
    let said = turns.last().map_or(0, |last| last.prompt + last.output);
    let name = |block: usize| match block < common / BLOCK {
        true => kind << 48 | (block as u64 + 1),
        false => kind << 48 | (number + 1) << 20 | (block as u64 + 1),
    };
    let chain = (0..said / BLOCK).map(name).collect();
    let opening = Some(1 << 60 | kind << 48 | number);
    Conversation { start, chain, opening, turns, rewrites: Vec::new() }
}

fn once(prompt: usize, output: usize) -> Vec<ConversationTurn> {
    vec![ConversationTurn { wait: 0.0, prompt, output }]
}

fn replayed<'a>(load: &'a Workload, setup: Setup, policy: ReplayPolicy) -> Replay<'a> {
    let mut replay = Replay::new(load, setup, policy).expect("there is room");
    replay.run();
    replay
}

/// Where each turn of each session went.
fn places(replay: &Replay<'_>) -> Vec<Vec<usize>> {
    let mut places: Vec<Vec<usize>> =
        replay.load.sessions.iter().map(|of| vec![usize::MAX; of.turns.len()]).collect();
    for flight in &replay.flights {
        places[flight.session][flight.turn] = flight.placed.upstream;
    }
    places
}

/// How many of these sessions each upstream had.
fn counted(replay: &Replay<'_>, sessions: std::ops::Range<usize>) -> Vec<usize> {
    let mut got = vec![0; replay.setup.upstreams];
    places(replay)[sessions].iter().flatten().for_each(|upstream| got[*upstream] += 1);
    got
}

fn most(got: &[usize]) -> usize {
    got.iter().copied().max().unwrap_or(0)
}

/// Twelve conversations of four turns.
fn chatter() -> Workload {
    let turn = |turn: usize| ConversationTurn { wait: 2.0, prompt: 3000 + 1000 * turn, output: 50 };
    let one = |number: u64| {
        session(number as f64 * 0.1, number % 2, 2048, number, (0..4).map(turn).collect::<Vec<_>>())
    };
    Workload { block: BLOCK, sessions: (0..12).map(one).collect() }
}

#[test]
fn every_request_ends_and_no_gauge_stays_up() {
    let load = chatter();
    for policy in ReplayPolicy::ALL {
        for (balancers, interval, open) in
            [(1, None, false), (3, None, true), (3, Some(0.02), false), (2, Some(0.5), true)]
        {
            let setup = Setup { balancers, interval, open, ..setup(3, 5) };
            let replay = replayed(&load, setup, policy);
            assert_eq!((replay.lives.len(), replay.refused), (48, 0), "{policy:?}");
            let gauges = replay.balancers.iter().flat_map(ReplayBalancer::gauges);
            assert!(gauges.into_iter().all(|gauges| *gauges == ReplayLoad::default()), "{policy:?}");
            assert!(places(&replay).iter().flatten().all(|place| *place < 3));
        }
    }
}

#[test]
fn the_seed_decides_everything() {
    let load = chatter();
    for policy in ReplayPolicy::ALL {
        let row = |seed| run(&load, Setup { balancers: 2, ..setup(3, seed) }, policy).expect("there is room");
        assert_eq!(row(1), row(1));
        assert_eq!((row(1).policy, row(1).requests), (policy.name().to_owned(), 48));
    }
    let work = |seed| places(&replayed(&load, setup(3, seed), WORK));
    assert!((2..20).any(|seed| work(seed) != work(1)), "equals are drawn from");
}

#[test]
fn a_prompt_larger_than_the_cache_is_refused_and_the_conversation_goes_on() {
    let turn = |prompt| ConversationTurn { wait: 1.0, prompt, output: 5 };
    let sessions = vec![session(0.0, 1, 0, 1, vec![turn(600), turn(90_000), turn(91_000)])];
    let load = Workload { block: BLOCK, sessions };
    let replay = replayed(&load, Setup { cache_tokens: 50 * BLOCK, ..setup(2, 1) }, WORK);
    assert_eq!((replay.lives.len(), replay.refused), (1, 2));
    assert!(replay.balancers[0].gauges().iter().all(|gauges| *gauges == ReplayLoad::default()));
}

#[test]
fn a_turn_waits_for_the_answer_before_unless_turns_come_by_the_clock() {
    let turn = |prompt| ConversationTurn { wait: 2.0, prompt, output: 100 };
    let load = Workload { block: BLOCK, sessions: vec![session(1.0, 1, 0, 1, vec![turn(8000), turn(9000)])] };
    let second = |open| replayed(&load, Setup { open, ..setup(1, 1) }, WORK).lives[1];
    // A second of prefill and one of decoding lie in between.
    let arrived = |open: bool| {
        let replay = replayed(&load, Setup { open, ..setup(1, 1) }, WORK);
        let ends: Vec<f64> = replay.lives.iter().map(|life| life.end).collect();
        ends[0]
    };
    assert!((2.0..2.2).contains(&arrived(false)), "{}", arrived(false));
    assert!(second(false).cached == 15 * BLOCK && second(true).cached == 15 * BLOCK);
}

/// Thirty-two requests at once with one prefix that nobody has seen, before any has its first token: it is
/// neither prefilled for each of them nor by one engine for all.
#[test]
fn a_burst_is_spread_by_what_prefilling_again_costs() {
    // Tokens in common, and other conversations before; engines in use, the most requests on one, and how
    // often the prefix was prefilled, as the sum of what was prefilled.
    let table = [
        ((2000, 0), (8, 4, 14)),
        ((16_000, 0), (8, 4, 13)),
        ((64_000, 0), (8, 4, 9)),
        ((2000, 300), (8, 4, 14)),
        ((16_000, 300), (8, 11, 11)),
        ((64_000, 300), (7, 17, 8)),
    ];
    let mut all = Vec::new();
    for ((common, before), _) in table {
        let other = |number: u64| session(number as f64 * 0.05, 2, 0, number, once(1500, 20));
        let burst = |number: u64| session(500.0, 1, common, number, once(common + 100, 100));
        let sessions = (0..before).map(other).chain((0..32).map(burst)).collect();
        let load = Workload { block: BLOCK, sessions };
        let replay = replayed(&load, setup(8, 7), WORK);
        let got = counted(&replay, before as usize..before as usize + 32);
        let engines = got.iter().filter(|got| **got > 0).count();
        let burst = replay.lives.iter().filter(|life| life.prompt == common + 100);
        let prefilled: usize = burst.map(|life| life.prompt - 100 - life.cached.min(common)).sum();
        let seen = (engines, most(&got), prefilled.div_ceil(common));
        all.push(((common, before), seen));
    }
    assert_eq!(all, table);
}

/// One system prompt of all, one of sixteen engines that is warm by one conversation, and a hundred new ones
/// of so many tokens of their own, so many a second, again and again: the most of each hundred on one engine.
fn gravity(rate: f64, (own, output): (usize, usize), hundreds: usize, seed: u64) -> Vec<usize> {
    let common = 10_000;
    let new = |number: usize| {
        let start = if number == 0 { 0.0 } else { 1000.0 + number as f64 / rate };
        session(start, 1, common, number as u64, once(common + own, output))
    };
    let load = Workload { block: BLOCK, sessions: (0..1 + 100 * hundreds).map(new).collect() };
    let replay = replayed(&load, setup(16, seed), WORK);
    (0..hundreds).map(|hundred| most(&counted(&replay, 1 + 100 * hundred..101 + 100 * hundred))).collect()
}

/// Of a hundred, one of sixteen engines has a share of 6.25.
const TWICE_ITS_SHARE: usize = 12;

#[test]
fn a_system_prompt_of_all_does_not_draw_all_to_who_holds_it() {
    for (rate, length, seed) in
        [(1.0, (500, 300), 1), (3.0, (500, 300), 2), (3.0, (50, 1000), 3), (10.0, (1500, 300), 4)]
    {
        let got = gravity(rate, length, 1, seed);
        assert!(got[0] <= TWICE_ITS_SHARE, "{rate} a second of {length:?}: {got:?}");
    }
}

/// Where a hundred come before anybody else has prefilled the prompt once, who has it is done sooner with
/// each, and gets more of them; as soon as the others have it too, all get as many.
#[test]
fn in_a_rush_who_is_warm_gets_more_only_until_others_are() {
    let got = gravity(50.0, (500, 300), 3, 1);
    assert!(got[0] <= 20 && most(&got[1..]) <= TWICE_ITS_SHARE, "{got:?}");
}

/// Ten conversations side by side, ten turns each, with one system prompt, on four engines.
#[test]
fn conversations_stay_where_their_cache_is_and_use_all_engines() {
    for seed in 0..4 {
        let mut dice = Dice::of(seed, 77);
        let mut one = |number: u64| {
            let mut turn = |turn: usize| ConversationTurn {
                wait: 4.0 + 16.0 * dice.unit(),
                prompt: 4000 + 1500 * turn,
                output: 200,
            };
            let turns: Vec<ConversationTurn> = (0..10).map(&mut turn).collect();
            session(3.0 * dice.unit(), 1, 2560, number, turns)
        };
        let load = Workload { block: BLOCK, sessions: (0..10).map(&mut one).collect() };
        let replay = replayed(&load, setup(4, seed), WORK);
        let turns = places(&replay);
        assert!(turns.iter().all(|at| at.iter().all(|engine| *engine == at[0])), "{turns:?}");
        let on = |engine: usize| turns.iter().filter(|at| at[0] == engine).count();
        assert!((0..4).all(|engine| (2..=3).contains(&on(engine))), "{turns:?}");
    }
}

/// Balancers that share nothing send a conversation's turns anywhere; who hears of each other keeps it.
#[test]
fn balancers_that_hear_of_each_other_are_as_one() {
    let turn = |turn: usize| ConversationTurn { wait: 2.0, prompt: 3000 + 1000 * turn, output: 20 };
    let one = |number: u64| session(number as f64 * 0.1, 1, 2048, number, (0..10).map(turn).collect());
    let load = Workload { block: BLOCK, sessions: (0..12).map(one).collect() };
    let hits = |balancers, interval| {
        let setup = Setup { balancers, interval, ..setup(4, 3) };
        run(&load, setup, WORK).expect("there is room").hits
    };
    let (one, shared, alone) = (hits(1, None), hits(4, Some(0.02)), hits(4, None));
    assert!(shared > one - 0.02 && alone < one - 0.15, "{one} {shared} {alone}");
}

#[test]
fn more_upstreams_than_there_is_room_for_are_none() {
    let load = Workload { block: BLOCK, sessions: Vec::new() };
    assert!(run(&load, setup(5000, 1), WORK).is_none());
    assert_eq!(run(&load, setup(2, 1), WORK).expect("there is room").requests, 0);
    assert!(Shape::ALL.iter().all(|shape| shape.load(1).block == BLOCK));
}
