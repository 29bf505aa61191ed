//! The machine on a virtual clock, by table: a script of signs on the left, the states on the right.

use proptest::prelude::*;

use super::*;

fn rules() -> Rules {
    let breaker = Breaker {
        failures: 3,
        window: Duration::from_secs(10),
        open: Duration::from_secs(5),
        max_open: Duration::from_secs(15),
        ..Breaker::default()
    };
    Rules { health: Health { rise: 2, fall: 3, ..Health::default() }, breaker }
}

/// A machine with a clock, and the count of answers.
struct Bench {
    machine: Machine,
    rules: Rules,
    now: Instant,
    answers: u64,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Bench { machine: Machine::new(now), rules: rules(), now, answers: 0 }
    }

    fn ready() -> Self {
        let mut bench = Bench::new();
        bench.play("+ +");
        assert_eq!(bench.standing().state, State::Ready);
        bench
    }

    /// Words of a script: `+` a good probe, `-` a silent one, `x` a refused one, `!` one that says 503;
    /// `refuse`, `timeout`, `fail`, `answer`, `begin` (counted, not told), `abort`, `leave` of requests;
    /// `dead` a request's word that the engine is, `restart` the metrics' word that the process is another;
    /// `drain`, `undrain`; a number lets so many seconds pass.
    fn step(&mut self, word: &str) {
        let (answers, now) = (self.answers, self.now);
        let mut probe = |found| self.machine.probed(found, answers, now, &self.rules);
        match word {
            "+" => probe(Ok(())),
            "-" => probe(Err(Miss::Silent)),
            "x" => probe(Err(Miss::Refused)),
            "!" => probe(Err(Miss::Wrong)),
            "refuse" => self.see(Sign::Unreached { refused: true }),
            "timeout" => self.see(Sign::Unreached { refused: false }),
            "fail" => self.see(Sign::Failed),
            "answer" => {
                self.answers += 1;
                self.see(Sign::Answered);
            }
            "begin" => self.answers += 1,
            "abort" => self.see(Sign::GaveUp),
            "leave" => self.see(Sign::Leaving),
            "dead" => self.see(Sign::EngineDead),
            "restart" => self.machine.restarted(),
            "drain" => self.machine.drain(true, now),
            "undrain" => self.machine.drain(false, now),
            seconds => self.now += Duration::from_secs_f64(seconds.parse().expect(seconds)),
        }
    }

    fn see(&mut self, sign: Sign) {
        self.machine.seen(sign, self.answers, self.now, &self.rules);
    }

    fn play(&mut self, script: &str) -> Standing {
        script.split_whitespace().for_each(|word| self.step(word));
        self.standing()
    }

    fn standing(&self) -> Standing {
        self.machine.standing(&self.rules)
    }

    fn admits(&self) -> Admits {
        self.standing().admits(self.now)
    }
}

/// From ready, after a script: state and what it admits.
const TABLE: &[(&str, State, Admits)] = &[
    // Probes.
    ("-", State::Suspect, Admits::All),
    ("- +", State::Ready, Admits::All),
    ("- -", State::Suspect, Admits::All),
    ("- - -", State::Down, Admits::None),
    ("- - + -", State::Suspect, Admits::All),
    ("- - - +", State::Down, Admits::None),
    ("- - - + - +", State::Down, Admits::None),
    ("- - - + +", State::Ready, Admits::All),
    ("!", State::Suspect, Admits::Last),
    ("! ! !", State::Down, Admits::None),
    ("x", State::Suspect, Admits::Last),
    ("x x", State::Down, Admits::None),
    ("x + x", State::Suspect, Admits::Last),
    // A busy engine that answers requests while its probes time out is never ejected.
    ("begin - begin - begin - begin - begin -", State::Ready, Admits::All),
    ("begin - - -", State::Suspect, Admits::All),
    ("begin - - - -", State::Down, Admits::None),
    ("begin x begin x", State::Down, Admits::None),
    // Requests that do not reach it.
    ("refuse", State::Suspect, Admits::Last),
    ("refuse x", State::Down, Admits::None),
    ("refuse -", State::Suspect, Admits::All),
    ("refuse +", State::Ready, Admits::All),
    ("refuse + x", State::Suspect, Admits::Last),
    ("refuse answer", State::Suspect, Admits::All),
    ("refuse refuse refuse refuse", State::Suspect, Admits::Last),
    ("timeout", State::Suspect, Admits::All),
    ("timeout timeout timeout", State::Tripped, Admits::None),
    // The breaker.
    ("fail fail", State::Ready, Admits::All),
    ("fail fail fail", State::Tripped, Admits::None),
    ("fail 6 fail 6 fail", State::Ready, Admits::All),
    ("fail 4 fail 4 fail", State::Tripped, Admits::None),
    ("fail begin fail begin fail begin fail", State::Tripped, Admits::None),
    ("fail begin begin fail begin begin fail begin begin fail", State::Ready, Admits::All),
    ("- fail fail fail", State::Tripped, Admits::None),
    ("fail fail fail + + + +", State::Tripped, Admits::None),
    ("fail fail fail answer", State::Tripped, Admits::None),
    ("fail fail fail fail fail 5", State::Tripped, Admits::One),
    ("fail fail fail 5 + +", State::Tripped, Admits::One),
    ("fail fail fail 5 answer", State::Ready, Admits::All),
    ("fail fail fail 5 fail 5", State::Tripped, Admits::None),
    ("fail fail fail 5 fail 10", State::Tripped, Admits::One),
    ("fail fail fail 5 fail 10 refuse 14", State::Tripped, Admits::None),
    ("fail fail fail 5 fail 10 refuse 15", State::Tripped, Admits::One),
    ("fail fail fail 5 fail 10 answer fail fail fail 5", State::Tripped, Admits::One),
    // Neither is a trip over because probes were lost in between, only with the process itself.
    ("fail fail fail - - - + + ", State::Tripped, Admits::None),
    ("fail fail fail 5 - - -", State::Tripped, Admits::None),
    ("fail fail fail 5 - - - +", State::Tripped, Admits::One),
    ("fail fail fail x x", State::Down, Admits::None),
    ("fail fail fail x x + +", State::Ready, Admits::All),
    // It says that it is leaving.
    ("leave", State::Draining, Admits::None),
    ("leave fail fail fail refuse answer", State::Draining, Admits::None),
    ("leave + + +", State::Draining, Admits::None),
    ("leave x", State::Down, Admits::None),
    ("leave x + +", State::Ready, Admits::All),
    ("leave - - -", State::Down, Admits::None),
    ("leave + 15 +", State::Ready, Admits::All),
    ("leave 14 +", State::Draining, Admits::None),
    ("fail fail fail leave", State::Draining, Admits::None),
    // It gave requests up: clients can have that done, and nothing is taken from it before a probe fails.
    ("abort", State::Suspect, Admits::All),
    ("abort abort abort abort", State::Suspect, Admits::All),
    ("abort +", State::Ready, Admits::All),
    ("abort x", State::Suspect, Admits::Last),
    ("abort x x", State::Down, Admits::None),
    ("abort !", State::Suspect, Admits::Last),
    ("abort ! ! !", State::Down, Admits::None),
    ("abort leave", State::Draining, Admits::None),
    ("leave abort", State::Draining, Admits::None),
    ("x x abort", State::Down, Admits::None),
    ("fail fail fail abort 5", State::Tripped, Admits::One),
    // Its engine is dead: good probes mean nothing before another process has shown.
    ("dead", State::Down, Admits::None),
    ("dead + + + answer", State::Down, Admits::None),
    ("dead + 29 + + + +", State::Down, Admits::None),
    ("dead x +", State::Down, Admits::None),
    ("dead x + +", State::Ready, Admits::All),
    ("dead + restart +", State::Down, Admits::None),
    ("dead + restart + +", State::Ready, Admits::All),
    ("dead - + + + - ! ! + + +", State::Down, Admits::None),
    // Not for ever.
    ("dead 30 +", State::Down, Admits::None),
    ("dead 30 + +", State::Ready, Admits::All),
    ("dead 29 + 1 + - +", State::Down, Admits::None),
    ("dead 20 dead 10 + +", State::Ready, Admits::All),
    ("dead x + + dead + +", State::Down, Admits::None),
    ("restart dead + +", State::Down, Admits::None),
    ("- dead + +", State::Down, Admits::None),
    ("x x dead + +", State::Down, Admits::None),
    ("fail fail fail dead 10 answer + +", State::Down, Admits::None),
    ("fail fail fail dead x + +", State::Ready, Admits::All),
    ("leave dead x + +", State::Ready, Admits::All),
    ("leave dead 15 + +", State::Down, Admits::None),
    ("dead leave abort fail refuse", State::Down, Admits::None),
    ("drain dead x + +", State::Draining, Admits::None),
    ("drain dead undrain + +", State::Down, Admits::None),
    // The operator's drain hides the rest until it is taken back.
    ("drain", State::Draining, Admits::None),
    ("drain 60 + + answer", State::Draining, Admits::None),
    ("drain x x", State::Draining, Admits::None),
    ("drain undrain", State::Ready, Admits::All),
    ("drain x x undrain", State::Down, Admits::None),
    ("drain x x + + undrain", State::Ready, Admits::All),
    ("drain fail fail fail undrain", State::Tripped, Admits::None),
    ("drain leave undrain", State::Draining, Admits::None),
    ("drain drain undrain", State::Ready, Admits::All),
];

#[test]
fn a_state_follows_from_what_was_seen() {
    for (script, state, admits) in TABLE {
        let mut bench = Bench::ready();
        let standing = bench.play(script);
        assert_eq!((standing.state, bench.admits()), (*state, *admits), "{script}");
    }
}

/// Where the metrics are not read, any failed probe is a sign that the process has ended.
#[test]
fn without_metrics_a_dead_engine_is_down_until_a_probe_failed() {
    for (script, state) in [
        ("dead + + +", State::Down),
        ("dead - + +", State::Ready),
        ("dead + ! + +", State::Ready),
        ("dead ! +", State::Down),
        ("dead x + +", State::Ready),
        ("! dead + +", State::Down),
        ("dead 30 + +", State::Ready),
    ] {
        let mut bench = Bench::ready();
        bench.rules.health.metrics = false;
        assert_eq!(bench.play(script).state, state, "{script}");
    }
}

#[test]
fn that_it_is_gone_shows_through_a_drain_and_through_a_trip() {
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
        assert_eq!(Bench::ready().play(script).gone, gone, "{script}");
    }
    assert!(!Bench::new().play("- - - x x").gone, "it was never there");
    assert!(!Bench::new().play("dead").gone, "it was never there");
}

#[test]
fn an_unknown_upstream_admits_nothing_until_it_rises() {
    for (script, state) in [
        ("", State::Unknown),
        ("+", State::Unknown),
        ("+ +", State::Ready),
        ("- + - +", State::Unknown),
        ("x x x x", State::Unknown),
        ("fail fail fail leave refuse answer", State::Unknown),
    ] {
        assert_eq!(Bench::new().play(script).state, state, "{script}");
    }
}

#[test]
fn who_comes_back_begins_with_a_tenth_and_is_warm_after_ten_seconds() {
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
        let mut bench = Bench::ready();
        let standing = bench.play(script);
        assert!((standing.warmth(bench.now) - warmth).abs() < 1e-9, "{script}");
    }
    // At the start nobody knows better; one that comes up while we look on is cold.
    for (script, warmth) in [("+ +", 1.0), ("x x + +", 0.1), ("x x + 5 +", 0.5)] {
        let mut bench = Bench::new();
        let standing = bench.play(script);
        assert!((standing.warmth(bench.now) - warmth).abs() < 1e-9, "{script}");
    }
}

#[test]
fn what_is_to_come_by_itself_is_the_end_of_a_trip() {
    let mut bench = Bench::ready();
    assert_eq!(bench.machine.opens(), None);
    let tripped = bench.now;
    bench.play("fail fail fail");
    assert_eq!(bench.machine.opens(), Some(tripped + Duration::from_secs(5)));
    assert!(bench.machine.wants_answers() && !bench.machine.is_uncertain());
}

proptest! {
    /// Whatever happens: a trip never ends before its time but with the process, an operator's drain never
    /// by itself, and nothing is let through where nothing may be.
    #[test]
    fn promises_hold_in_any_order(
        words in prop::collection::vec(prop::sample::select(vec![
            "+", "+", "-", "x", "!", "refuse", "timeout", "fail", "fail", "fail", "answer", "begin", "abort",
            "leave", "drain", "undrain", "dead", "restart", "0.5", "3", "20",
        ]), 0..120),
    ) {
        let mut bench = Bench::new();
        let mut drained = false;
        let mut shut: Option<Instant> = None;
        for word in words {
            let before = bench.machine.clone();
            bench.step(word);
            drained = match word { "drain" => true, "undrain" => false, _ => drained };
            prop_assert_eq!(drained && bench.standing().state != State::Draining, false, "{}", word);
            if before.state == State::Tripped && bench.machine.state == State::Ready {
                prop_assert_eq!(word, "answer");
                prop_assert!(shut.is_some_and(|opens| bench.now >= opens));
            }
            shut = bench.machine.opens();
            let open = bench.admits() != Admits::None;
            let may = matches!(bench.machine.state, State::Ready | State::Suspect | State::Tripped);
            prop_assert!(!open || (may && !drained), "{:?}", bench.standing());
            prop_assert!(bench.machine.failures.len() <= 3);
            prop_assert!(bench.machine.open <= bench.rules.breaker.max_open);
        }
    }
}
