//! Keys and overviews, and what is shown after them.

use super::*;
use crate::top::document::{TopCandidate, TopModel, TopTimes};

/// An upstream with this name and these requests in flight.
fn upstream(name: &str, active: u64) -> TopUpstream {
    TopUpstream { name: name.into(), state: "ready".into(), active, ..TopUpstream::default() }
}

fn document(time: f64, upstreams: Vec<TopUpstream>) -> TopDocument {
    TopDocument {
        time,
        balancer: Default::default(),
        totals: Default::default(),
        upstreams,
        models: vec![TopModel::default()],
        siblings: Default::default(),
        decisions: Vec::new(),
    }
}

fn showing(upstreams: Vec<TopUpstream>) -> TopState {
    let mut state = TopState::new("http://lb:9090".into());
    state.apply(document(1.0, upstreams));
    state
}

fn names(state: &TopState) -> Vec<&str> {
    state.rows().iter().map(|row| row.name.as_str()).collect()
}

fn selected(state: &TopState) -> Option<&str> {
    let rows = state.rows();
    state.selected_place(&rows).map(|place| rows[place].name.as_str())
}

fn press(state: &mut TopState, keys: &str) -> Option<TopCommand> {
    let mut command = None;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            '\u{8}' => KeyCode::Backspace,
            other => KeyCode::Char(other),
        };
        command = state.press(code, false);
    }
    command
}

#[test]
fn the_selection_stays_on_its_upstream() {
    let mut state = showing(vec![upstream("b", 1), upstream("a", 3), upstream("c", 2)]);
    assert_eq!(selected(&state), Some("b"), "the first one, before any key");
    press(&mut state, "j");
    assert_eq!(selected(&state), Some("a"));
    press(&mut state, "s");
    assert_eq!((state.order, names(&state)), (TableOrder::Name, vec!["a", "b", "c"]));
    assert_eq!(selected(&state), Some("a"));
    press(&mut state, "k");
    assert_eq!(selected(&state), Some("a"), "it is the first one");
    press(&mut state, "Gj");
    assert_eq!(selected(&state), Some("c"), "it is the last one");
    state.press(KeyCode::PageUp, false);
    assert_eq!(selected(&state), Some("a"));
    press(&mut state, "j");
    state.apply(document(2.0, vec![upstream("a", 0), upstream("c", 0)]));
    assert_eq!(selected(&state), Some("a"), "the selected one is gone");
    state.apply(document(3.0, Vec::new()));
    assert_eq!(selected(&state), None);
    press(&mut state, "jkGg");
}

#[test]
fn each_order_begins_with_what_its_reader_looks_for() {
    let mut down = upstream("down", 0);
    down.state = "down".into();
    let mut slow = upstream("slow", 1);
    slow.first_byte_ms = Some(TopTimes { p50: 900.0, p90: 950.0, p99: None });
    let mut long = upstream("long", 2);
    long.backlog = 5000;
    let mut quick = upstream("quick", 9);
    quick.requests = 10;
    let all = vec![slow, long, quick, down];
    let mut state = showing(all.clone());
    let mut later = all;
    later[2].requests = 30;
    state.apply(document(2.0, later));
    let mut firsts = Vec::new();
    for _ in 0..7 {
        press(&mut state, "s");
        firsts.push((state.order.label(), names(&state)[0].to_string()));
    }
    let expected = [
        ("name", "down"),
        ("state", "down"),
        ("active", "quick"),
        ("backlog", "long"),
        ("first byte", "slow"),
        ("req/s", "quick"),
        ("fleet", "slow"),
    ];
    assert_eq!(firsts, expected.map(|(order, first)| (order, first.to_string())));
}

#[test]
fn a_filter_hides_other_rows_while_it_is_typed() {
    let mut other = upstream("gpu-1", 0);
    other.models = vec!["Qwen3".into()];
    let mut state = showing(vec![upstream("gpu-0", 0), other, upstream("cpu", 0)]);
    press(&mut state, "/GPU");
    assert_eq!(names(&state), ["gpu-0", "gpu-1"]);
    press(&mut state, "q\u{8}-1\n");
    assert_eq!((names(&state), &state.mode), (vec!["gpu-1"], &TopMode::Table), "q is a letter there");
    press(&mut state, "\u{1b}");
    assert_eq!(names(&state).len(), 3);
    press(&mut state, "/qwen");
    assert_eq!(names(&state), ["gpu-1"], "also by model");
    press(&mut state, "\u{1b}");
    assert_eq!((names(&state).len(), state.filter.as_str()), (3, ""));
    press(&mut state, &format!("/{}", "x".repeat(500)));
    assert!(state.filter.len() <= MAX_FILTER_CHARS);
}

#[test]
fn a_drain_needs_a_confirmation() {
    let mut drained = upstream("b", 0);
    drained.drained = true;
    let mut state = showing(vec![upstream("a", 0), drained]);
    let command = |drain, name: &str| Some(TopCommand::Drain { upstream: name.into(), drain });
    for refusal in ["dn", "d\u{1b}", "d\n", "dqqn"] {
        assert_eq!(press(&mut state, refusal), None, "{refusal:?}");
        assert_eq!(state.mode, TopMode::Table);
    }
    assert_eq!(press(&mut state, "dy"), command(true, "a"));
    assert_eq!(press(&mut state, "u"), None);
    assert_eq!(state.notice.as_deref(), Some("a is not drained by an operator"));
    assert_eq!(press(&mut state, "juY"), command(false, "b"));
    assert_eq!(press(&mut state, "dy"), None, "it is drained already");
    let mut empty = showing(Vec::new());
    assert_eq!(press(&mut empty, "dyuy"), None);
}

#[test]
fn quits_by_q_and_by_control_c_in_every_mode() {
    for before in ["", "/abc", "d", "?"] {
        let mut state = showing(vec![upstream("a", 0)]);
        press(&mut state, before);
        assert_eq!(state.press(KeyCode::Char('c'), true), Some(TopCommand::Quit), "{before}");
    }
    let mut state = showing(vec![upstream("a", 0)]);
    assert_eq!(press(&mut state, "?q"), None, "the first key closes the help");
    assert_eq!(press(&mut state, "q"), Some(TopCommand::Quit));
}

#[test]
fn a_lost_connection_keeps_its_time_and_the_last_overview() {
    let mut state = showing(vec![upstream("a", 0)]);
    let seconds = Duration::from_secs;
    state.set_time(seconds(10));
    state.lose("refused".into());
    state.set_time(seconds(15));
    state.lose("silent".into());
    assert_eq!(state.link, LinkState::Lost { error: "silent".into(), since: seconds(10) });
    assert_eq!(names(&state), ["a"]);
    state.apply(document(20.0, vec![upstream("a", 0)]));
    assert_eq!(state.link, LinkState::Live);
}

#[test]
fn choices_are_kept_once_whether_they_are_repeated_or_not() {
    let decision = |number: u64| TopDecision {
        time: number as f64,
        id: number.to_string(),
        candidates: vec![TopCandidate::default()],
        ..TopDecision::default()
    };
    let mut state = showing(Vec::new());
    let ids = |state: &TopState| -> Vec<String> {
        state.decisions.iter().map(|decision| decision.id.clone()).collect()
    };
    for latest in [&[2, 1][..], &[3, 2, 1], &[5, 4], &[]] {
        let mut next = document(2.0, Vec::new());
        next.decisions = latest.iter().map(|number| decision(*number)).collect();
        state.apply(next);
    }
    assert_eq!(ids(&state), ["5", "4", "3", "2", "1"]);
    let mut next = document(3.0, Vec::new());
    next.decisions = (6..500).rev().map(decision).collect();
    state.apply(next);
    assert_eq!((state.decisions.len(), ids(&state)[0].as_str()), (MAX_KEPT_DECISIONS, "499"));
}

#[test]
fn numbers_of_upstreams_that_left_are_dropped() {
    let mut state = TopState::new("a".into());
    for round in 0..50 {
        let name = format!("gpu-{round}");
        state.apply(document(f64::from(round), vec![upstream(&name, 0), upstream("stays", 0)]));
    }
    assert_eq!(state.upstreams.len(), 2);
}
