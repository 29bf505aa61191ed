//! The machine on a virtual clock, by tables: a script of events on the left, the state on the right.

use proptest::prelude::*;

use super::*;

fn rules() -> BreakerRules {
    let breaker = Breaker {
        failures: 3,
        window: Duration::from_secs(10),
        open: Duration::from_secs(5),
        max_open: Duration::from_secs(15),
        ..Breaker::default()
    };
    BreakerRules { health: Health { rise: 2, fall: 3, ..Health::default() }, breaker }
}

/// A machine with a clock, and the counts of answers: begun ones, and good ones.
struct MachineBench {
    machine: BreakerMachine,
    rules: BreakerRules,
    now: Instant,
    answers: u64,
    good: u64,
    /// When it began.
    start: Instant,
}

impl MachineBench {
    fn new() -> Self {
        let now = Instant::now();
        MachineBench {
            machine: BreakerMachine::new(now),
            rules: rules(),
            now,
            answers: 0,
            good: 0,
            start: now,
        }
    }

    fn ready() -> Self {
        let mut bench = MachineBench::new();
        bench.play("+ +");
        assert_eq!(bench.status().state, UpstreamState::Ready);
        bench
    }

    /// Words of a script: `+` a good probe, `-` a silent one, `x` a refused one, `!` one answered with 503;
    /// `refuse`, `timeout`, `fail`, `answer`, `error` (of the client), `abort`, `leave` of requests that were
    /// placed just now; `old`, `lost`, `late`: a failure, a timeout and an answer of one that was placed
    /// before all trips; `begin` a good answer that is counted and not reported, `head` one that only began;
    /// `dead` a request's report that the engine is dead, `restart` the metrics' report of a new process;
    /// `drain`, `undrain`; a number advances the clock by so many seconds.
    fn step(&mut self, word: &str) {
        let (answers, now) = (self.answers, self.now);
        let mut probe = |found| self.machine.probed(found, answers, now, &self.rules);
        match word {
            "+" => probe(Ok(())),
            "-" => probe(Err(ProbeMiss::Silent)),
            "x" => probe(Err(ProbeMiss::Refused)),
            "!" => probe(Err(ProbeMiss::Wrong)),
            "refuse" => self.signal(UpstreamSignal::Unreached { refused: true, placed: now }),
            "timeout" => self.signal(UpstreamSignal::Unreached { refused: false, placed: now }),
            "lost" => self.signal(UpstreamSignal::Unreached { refused: false, placed: self.start }),
            "fail" => self.signal(UpstreamSignal::Failed { placed: now }),
            "old" => self.signal(UpstreamSignal::Failed { placed: self.start }),
            "answer" => self.answered(true, now),
            "error" => self.answered(false, now),
            "late" => self.answered(true, self.start),
            "begin" => (self.answers, self.good) = (self.answers + 1, self.good + 1),
            "head" => self.answers += 1,
            "abort" => self.signal(UpstreamSignal::GaveUp),
            "leave" => self.signal(UpstreamSignal::ShuttingDown),
            "dead" => self.signal(UpstreamSignal::EngineDead),
            "restart" => self.machine.restarted(),
            "drain" => self.machine.drain(true, now),
            "undrain" => self.machine.drain(false, now),
            seconds => self.now += Duration::from_secs_f64(seconds.parse().expect(seconds)),
        }
    }

    fn signal(&mut self, signal: UpstreamSignal) {
        self.machine.signalled(signal, self.good, self.now, &self.rules);
    }

    fn answered(&mut self, passed: bool, placed: Instant) {
        (self.answers, self.good) = (self.answers + 1, self.good + 1);
        self.signal(UpstreamSignal::Answered { passed, placed });
    }

    fn play(&mut self, script: &str) -> UpstreamStatus {
        script.split_whitespace().for_each(|word| self.step(word));
        self.status()
    }

    fn status(&self) -> UpstreamStatus {
        self.machine.status(&self.rules)
    }

    fn admits(&self) -> Admits {
        self.status().admits(self.now)
    }
}

/// Scripts that start from ready: the state afterwards, and what it admits.
const TABLE: &[(&str, UpstreamState, Admits)] = &[
    // Probes.
    ("-", UpstreamState::Suspect, Admits::All),
    ("- +", UpstreamState::Ready, Admits::All),
    ("- -", UpstreamState::Suspect, Admits::All),
    ("- - -", UpstreamState::Down, Admits::None),
    ("- - + -", UpstreamState::Suspect, Admits::All),
    ("- - - +", UpstreamState::Down, Admits::None),
    ("- - - + - +", UpstreamState::Down, Admits::None),
    ("- - - + +", UpstreamState::Ready, Admits::All),
    ("!", UpstreamState::Suspect, Admits::Last),
    ("! ! !", UpstreamState::Down, Admits::None),
    ("x", UpstreamState::Suspect, Admits::Last),
    ("x x", UpstreamState::Down, Admits::None),
    ("x + x", UpstreamState::Suspect, Admits::Last),
    // A busy engine that answers requests while its probes time out is never ejected.
    ("begin - begin - begin - begin - begin -", UpstreamState::Ready, Admits::All),
    ("begin - - -", UpstreamState::Suspect, Admits::All),
    ("begin - - - -", UpstreamState::Down, Admits::None),
    ("begin x begin x", UpstreamState::Down, Admits::None),
    // Requests that do not reach the upstream.
    ("refuse", UpstreamState::Suspect, Admits::Last),
    ("refuse x", UpstreamState::Down, Admits::None),
    ("refuse -", UpstreamState::Suspect, Admits::All),
    ("refuse +", UpstreamState::Ready, Admits::All),
    ("refuse + x", UpstreamState::Suspect, Admits::Last),
    ("refuse answer", UpstreamState::Suspect, Admits::All),
    ("refuse refuse refuse refuse", UpstreamState::Suspect, Admits::Last),
    ("timeout", UpstreamState::Suspect, Admits::All),
    ("timeout timeout timeout", UpstreamState::Tripped, Admits::None),
    // The breaker.
    ("fail fail", UpstreamState::Ready, Admits::All),
    ("fail fail fail", UpstreamState::Tripped, Admits::None),
    ("fail 6 fail 6 fail", UpstreamState::Ready, Admits::All),
    ("fail 4 fail 4 fail", UpstreamState::Tripped, Admits::None),
    ("fail begin fail begin fail begin fail", UpstreamState::Tripped, Admits::None),
    ("fail begin begin fail begin begin fail begin begin fail", UpstreamState::Ready, Admits::All),
    ("- fail fail fail", UpstreamState::Tripped, Admits::None),
    ("fail fail fail + + + +", UpstreamState::Tripped, Admits::None),
    ("fail fail fail answer", UpstreamState::Tripped, Admits::None),
    ("fail fail fail fail fail 5", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 + +", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 answer", UpstreamState::Ready, Admits::All),
    ("fail fail fail 5 fail 5", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 fail 10", UpstreamState::Tripped, Admits::One),
    ("old old old", UpstreamState::Tripped, Admits::None),
    // The head of a stream that fails at its first event is no answer.
    ("head fail head fail head fail", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 head", UpstreamState::Tripped, Admits::One),
    // Only a request from behind the end of the trip tests it, and only by a success or a failure.
    ("fail fail fail 5 late", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 error", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 error answer", UpstreamState::Ready, Admits::All),
    ("fail fail fail 5 lost", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 timeout 5", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 old", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 old old fail 10", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 fail 10 refuse 14", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 fail 10 refuse 15", UpstreamState::Tripped, Admits::One),
    ("fail fail fail 5 fail 10 answer fail fail fail 5", UpstreamState::Tripped, Admits::One),
    // Failed probes do not end a trip; only the end of the process does.
    ("fail fail fail - - - + + ", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 - - -", UpstreamState::Tripped, Admits::None),
    ("fail fail fail 5 - - - +", UpstreamState::Tripped, Admits::One),
    ("fail fail fail x x", UpstreamState::Down, Admits::None),
    ("fail fail fail x x + +", UpstreamState::Ready, Admits::All),
    // The upstream announces its shutdown.
    ("leave", UpstreamState::Draining, Admits::None),
    ("leave fail fail fail refuse answer", UpstreamState::Draining, Admits::None),
    ("leave + + +", UpstreamState::Draining, Admits::None),
    ("leave x", UpstreamState::Down, Admits::None),
    ("leave x + +", UpstreamState::Ready, Admits::All),
    ("leave - - -", UpstreamState::Down, Admits::None),
    ("leave + 15 +", UpstreamState::Ready, Admits::All),
    ("leave 14 +", UpstreamState::Draining, Admits::None),
    ("fail fail fail leave", UpstreamState::Draining, Admits::None),
    // The upstream aborts requests, which clients can cause: it keeps its requests until a probe fails.
    ("abort", UpstreamState::Suspect, Admits::All),
    ("abort abort abort abort", UpstreamState::Suspect, Admits::All),
    ("abort +", UpstreamState::Ready, Admits::All),
    ("abort x", UpstreamState::Suspect, Admits::Last),
    ("abort x x", UpstreamState::Down, Admits::None),
    ("abort !", UpstreamState::Suspect, Admits::Last),
    ("abort ! ! !", UpstreamState::Down, Admits::None),
    ("abort leave", UpstreamState::Draining, Admits::None),
    ("leave abort", UpstreamState::Draining, Admits::None),
    ("x x abort", UpstreamState::Down, Admits::None),
    ("fail fail fail abort 5", UpstreamState::Tripped, Admits::One),
    // Its engine is dead: good probes count only after evidence of a new process.
    ("dead", UpstreamState::Down, Admits::None),
    ("dead + + + answer", UpstreamState::Down, Admits::None),
    ("dead + 29 + + + +", UpstreamState::Down, Admits::None),
    ("dead x +", UpstreamState::Down, Admits::None),
    ("dead x + +", UpstreamState::Ready, Admits::All),
    ("dead + restart +", UpstreamState::Down, Admits::None),
    ("dead + restart + +", UpstreamState::Ready, Admits::All),
    ("dead - + + + - ! ! + + +", UpstreamState::Down, Admits::None),
    // Good probes count again after 30 seconds.
    ("dead 30 +", UpstreamState::Down, Admits::None),
    ("dead 30 + +", UpstreamState::Ready, Admits::All),
    ("dead 29 + 1 + - +", UpstreamState::Down, Admits::None),
    ("dead 20 dead 10 + +", UpstreamState::Ready, Admits::All),
    ("dead x + + dead + +", UpstreamState::Down, Admits::None),
    ("restart dead + +", UpstreamState::Down, Admits::None),
    ("- dead + +", UpstreamState::Down, Admits::None),
    ("x x dead + +", UpstreamState::Down, Admits::None),
    ("fail fail fail dead 10 answer + +", UpstreamState::Down, Admits::None),
    ("fail fail fail dead x + +", UpstreamState::Ready, Admits::All),
    ("leave dead x + +", UpstreamState::Ready, Admits::All),
    ("leave dead 15 + +", UpstreamState::Down, Admits::None),
    ("dead leave abort fail refuse", UpstreamState::Down, Admits::None),
    ("drain dead x + +", UpstreamState::Draining, Admits::None),
    ("drain dead undrain + +", UpstreamState::Down, Admits::None),
    // The operator's drain hides the rest until it is taken back.
    ("drain", UpstreamState::Draining, Admits::None),
    ("drain 60 + + answer", UpstreamState::Draining, Admits::None),
    ("drain x x", UpstreamState::Draining, Admits::None),
    ("drain undrain", UpstreamState::Ready, Admits::All),
    ("drain x x undrain", UpstreamState::Down, Admits::None),
    ("drain x x + + undrain", UpstreamState::Ready, Admits::All),
    ("drain fail fail fail undrain", UpstreamState::Tripped, Admits::None),
    ("drain leave undrain", UpstreamState::Draining, Admits::None),
    ("drain drain undrain", UpstreamState::Ready, Admits::All),
];

#[test]
fn moves_between_states_by_probes_and_signals() {
    for (script, state, admits) in TABLE {
        let mut bench = MachineBench::ready();
        let status = bench.play(script);
        assert_eq!((status.state, bench.admits()), (*state, *admits), "{script}");
    }
}

/// Where the metrics are not read, any failed probe is evidence that the process has ended.
#[test]
fn keeps_a_dead_engine_down_until_a_probe_fails_when_metrics_are_not_read() {
    for (script, state) in [
        ("dead + + +", UpstreamState::Down),
        ("dead - + +", UpstreamState::Ready),
        ("dead + ! + +", UpstreamState::Ready),
        ("dead ! +", UpstreamState::Down),
        ("dead x + +", UpstreamState::Ready),
        ("! dead + +", UpstreamState::Down),
        ("dead 30 + +", UpstreamState::Ready),
    ] {
        let mut bench = MachineBench::ready();
        bench.rules.health.metrics = false;
        assert_eq!(bench.play(script).state, state, "{script}");
    }
}

#[test]
fn reports_a_gone_upstream_during_a_drain_and_during_a_trip() {
    let table = [
        ("", false),
        ("- -", false),
        ("- - -", true),
        ("x x", true),
        ("x x + +", false),
        ("leave", false),
        ("leave x", true),
        ("drain", false),
        ("drain x", false),
        ("drain x x", true),
        ("x x drain", true),
        ("drain - - -", true),
        ("drain - - - + +", false),
        ("drain x x undrain", true),
        ("dead", true),
        ("dead + +", true),
        ("drain dead", true),
        ("dead x + +", false),
        ("fail fail fail", false),
        ("fail fail fail - -", false),
        ("fail fail fail - - -", true),
        ("fail fail fail - - - +", false),
        ("fail fail fail drain - - -", true),
    ];
    for (script, gone) in table {
        assert_eq!(MachineBench::ready().play(script).gone, gone, "{script}");
    }
    assert!(!MachineBench::new().play("- - - x x").gone, "never reached");
    assert!(!MachineBench::new().play("dead").gone, "never reached");
}

#[test]
fn admits_nothing_from_an_unknown_upstream_until_it_rises() {
    for (script, state) in [
        ("", UpstreamState::Unknown),
        ("+", UpstreamState::Unknown),
        ("+ +", UpstreamState::Ready),
        ("- + - +", UpstreamState::Unknown),
        ("x x x x", UpstreamState::Unknown),
        ("fail fail fail leave refuse answer", UpstreamState::Unknown),
    ] {
        assert_eq!(MachineBench::new().play(script).state, state, "{script}");
    }
}

#[test]
fn starts_at_a_tenth_of_its_weight_after_coming_back_and_is_warm_after_ten_seconds() {
    let table = [
        ("", 1.0),
        ("x x + +", 0.1),
        ("x x + + 0.5", 0.1),
        ("x x + + 5", 0.5),
        ("x x + + 5 - +", 0.5),
        ("x x + + 10", 1.0),
        ("x x + + 60", 1.0),
        ("fail fail fail 5 answer", 0.1),
        ("leave + 15 +", 0.1),
        ("drain 5 undrain", 1.0),
        ("- - +", 1.0),
    ];
    for (script, warmth) in table {
        let mut bench = MachineBench::ready();
        let status = bench.play(script);
        assert!((status.warmth(bench.now) - warmth).abs() < 1e-9, "{script}");
    }
    // At the start an upstream counts as warm; one that comes up between probes is cold.
    for (script, warmth) in [("+ +", 1.0), ("x x + +", 0.1), ("x x + 5 +", 0.5)] {
        let mut bench = MachineBench::new();
        let status = bench.play(script);
        assert!((status.warmth(bench.now) - warmth).abs() < 1e-9, "{script}");
    }
}

/// The state after a drain was as old as before the drain.
#[test]
fn a_state_that_a_drain_hid_begins_with_the_end_of_the_drain() {
    let table = [
        ("40", 40),
        ("40 undrain", 40),
        ("40 drain", 0),
        ("40 drain 3 drain 2", 5),
        ("40 drain 3 undrain", 0),
        ("40 drain 3 undrain 2 undrain 1", 3),
        ("40 drain 3 undrain 2 drain 1", 1),
        ("40 drain 3 undrain 2 -", 0),
        ("drain 2 x x 4 undrain 1", 1),
    ];
    for (script, seconds) in table {
        let mut bench = MachineBench::ready();
        let status = bench.play(script);
        assert_eq!(bench.now - status.since, Duration::from_secs(seconds), "{script}");
    }
    let mut bench = MachineBench::ready();
    let tripped = bench.now;
    let status = bench.play("fail fail fail 1 drain 1 undrain");
    assert_eq!((status.state, status.since), (UpstreamState::Tripped, bench.now));
    assert_eq!(status.trip_end(), Some(tripped + Duration::from_secs(5)), "a drain does not prolong a trip");
}

#[test]
fn opens_at_the_end_of_a_trip() {
    let mut bench = MachineBench::ready();
    assert_eq!(bench.machine.opens(), None);
    let tripped = bench.now;
    bench.play("fail fail fail");
    assert_eq!(bench.machine.opens(), Some(tripped + Duration::from_secs(5)));
    assert!(bench.machine.counts_answers() && !bench.machine.is_uncertain());
}

proptest! {
    /// In any order of events: a trip ends early only with the process, an operator's drain ends only by the
    /// operator, and only open states admit requests.
    #[test]
    fn keeps_its_invariants_in_any_order_of_events(
        words in prop::collection::vec(prop::sample::select(vec![
            "+", "+", "-", "x", "!", "refuse", "timeout", "fail", "fail", "fail", "answer", "begin", "abort",
            "leave", "drain", "undrain", "dead", "restart", "0.5", "3", "20",
        ]), 0..120),
    ) {
        let mut bench = MachineBench::new();
        let mut drained = false;
        let mut shut: Option<Instant> = None;
        for word in words {
            let before = bench.machine.clone();
            bench.step(word);
            drained = match word { "drain" => true, "undrain" => false, _ => drained };
            prop_assert_eq!(drained && bench.status().state != UpstreamState::Draining, false, "{}", word);
            if before.state == UpstreamState::Tripped && bench.machine.state == UpstreamState::Ready {
                prop_assert_eq!(word, "answer");
                prop_assert!(shut.is_some_and(|opens| bench.now >= opens));
            }
            shut = bench.machine.opens();
            let open = bench.admits() != Admits::None;
            let open_states = [UpstreamState::Ready, UpstreamState::Suspect, UpstreamState::Tripped];
            let may = open_states.contains(&bench.machine.state);
            prop_assert!(!open || (may && !drained), "{:?}", bench.status());
            prop_assert!(bench.machine.failures.len() <= 3);
            prop_assert!(bench.machine.open <= bench.rules.breaker.max_open);
        }
    }
}
