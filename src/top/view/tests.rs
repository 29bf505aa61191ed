//! Screens, drawn into a buffer.

use std::time::Duration;

use ratatui::crossterm::event::KeyCode;
use serde_json::{Value, json};

use super::*;
use crate::top::document::TopDocument;

fn upstream(number: usize, second: u64) -> Value {
    json!({
        "name": format!("gpu-{number}"), "url": "http://gpu", "state": "ready", "reason": null,
        "drained": false, "weight": 1.0, "models": ["llama"], "active": number, "active_elsewhere": 0,
        "queued": 2, "backlog": 12_345, "context": 0, "kv_usage": 0.42, "requests": 10 * second,
        "failures": 0, "predicted_tokens": 700 * second, "reported_tokens": 600 * second,
        "compared_tokens": 1000 * second, "prompt_tokens": 2000 * second,
        "first_byte_ms": {"p50": 81.0, "p90": 240.6}, "sight": "exact",
        "a_key_of_a_later_release": [1, 2, 3],
    })
}

/// An overview of a busy balancer, so many seconds after its start.
fn overview(count: usize, second: u64) -> Value {
    json!({
        "time": 1_790_000_000.0 + second as f64,
        "balancer": {"id": "a", "name": "host-a", "version": "0.1.0", "started": 1_789_990_000.0,
            "ready": true, "leaving": false},
        "totals": {"requests": 1234 * second, "errors": 2 * second, "rejects": 3, "retries": 4,
            "in_flight": 85, "queued": 6, "connections": 12, "prompt_tokens": 20_000 * second,
            "output_tokens": 4000 * second, "predicted_tokens": 7000 * second,
            "reported_tokens": 6000 * second, "compared_tokens": 10_000 * second,
            "first_byte_ms": {"p50": 80.0, "p90": 240.0, "p99": 1800.0}, "memory_bytes": 125_829_120},
        "upstreams": (0..count).map(|number| upstream(number, second)).collect::<Vec<_>>(),
        "models": [{"name": "llama", "upstreams": count, "ready": count, "requests": 9000,
            "prompt_tokens": 1000, "cached_tokens": 600, "output_tokens": 5000}],
        "siblings": {"enabled": true, "redis_up": true,
            "balancers": [{"id": "b", "name": "host-b", "age_ms": 12.0, "in_flight": 7}]},
        "decisions": [{"time": 1_790_000_000.5, "id": "req-9", "model": "llama", "attempt": 1,
            "session": null, "prompt_tokens": 900, "blocks": 14, "reason": "prefix", "upstream": "gpu-0",
            "of": count, "candidates": [
                {"upstream": "gpu-0", "cost": 123.4, "hit": 12, "missing": 120, "backlog": 0, "active": 2,
                    "forecast_ms": 81.6},
                {"upstream": "gpu-1", "cost": 4567.8, "hit": 0, "missing": 900, "backlog": 0, "active": 1},
            ]}],
    })
}

fn state(count: usize) -> TopState {
    let mut state = TopState::new("http://lb:9090".into());
    for second in [1, 2] {
        let document: TopDocument = serde_json::from_value(overview(count, second)).expect("is an overview");
        state.apply(document);
    }
    state
}

fn screen(state: &mut TopState, columns: u16, rows: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
    lines(terminal.draw(|frame| draw(frame, state)).unwrap().buffer)
}

#[track_caller]
fn holds(screen: &str, texts: &[&str]) {
    for text in texts {
        assert!(screen.contains(text), "{text:?} is not in\n{screen}");
    }
}

#[test]
fn a_screen_of_80_by_24_shows_what_matters() {
    let screen = screen(&mut state(4), 80, 24);
    assert!(screen.lines().all(|line| line.chars().count() <= 80));
    holds(&screen, &["vllm-lb 0.1.0", "host-a", "ready", "up 2h 46m", "14:13:22", "live"]);
    holds(&screen, &["req/s 1.2k", "in flight 85", "queued 6", "errors/s 2.0", "rejects 3", "retries 4"]);
    holds(&screen, &["in 20.0k", "out 4.0k", "hits 60% of 70%", "80ms/240ms/1.8s", "mem 120MiB"]);
    holds(&screen, &["UPSTREAMS 4 of 4 ready", "BACKLOG", "gpu-3", "exact", "12.3k", "42%", "60%", "241ms"]);
    holds(&screen, &["MODELS llama 4/4", "SIBLINGS 1 other", "DECISIONS", "prefix", "hit 12/14", "cost 123"]);
    holds(&screen, &["before gpu-1 4.6k", "q quit"]);
    let row = screen.lines().find(|line| line.starts_with("gpu-3")).expect("it has a row");
    assert!(row.trim_end().ends_with("10.0"), "requests for each second: {row}");
}

#[test]
fn a_large_screen_has_trends_and_panels() {
    let screen = screen(&mut state(4), 140, 40);
    holds(&screen, &["TREND", "█", "llama ", "4/4 requests 9.0k", "cached 60%", "host-b", "in flight 7"]);
    holds(&screen, &["heard 12ms ago", "missing 120", "active 2", "forecast 82ms", "id req-9"]);
}

#[test]
fn the_selected_row_of_200_is_visible() {
    let mut state = state(200);
    holds(&screen(&mut state, 80, 24), &["200 of 200 ready", "gpu-0 "]);
    for (key, name) in [(KeyCode::End, "gpu-199"), (KeyCode::PageUp, "gpu-189"), (KeyCode::Home, "gpu-0 ")] {
        state.press(key, false);
        holds(&screen(&mut state, 80, 24), &[name]);
        // A smaller window than before.
        holds(&screen(&mut state, 60, 18), &[name]);
    }
}

#[test]
fn any_size_can_be_drawn() {
    let mut states = [state(200), state(0), TopState::new("http://lb:9090".into())];
    states[0].press(KeyCode::Char('?'), false);
    for state in &mut states {
        for (columns, rows) in [(1, 1), (2, 50), (200, 2), (10, 5), (79, 17), (300, 100)] {
            screen(state, columns, rows);
        }
    }
}

#[test]
fn a_lost_connection_is_shown_over_the_last_overview() {
    let mut state = state(2);
    state.lose("connection refused".into());
    state.set_time(Duration::from_secs(75));
    holds(&screen(&mut state, 120, 24), &["lost for 1m 15s: connection refused", "gpu-1"]);
    let mut first = TopState::new("http://lb:9090".into());
    holds(&screen(&mut first, 80, 24), &["http://lb:9090", "connecting"]);
    first.lose("no route".into());
    holds(&screen(&mut first, 80, 24), &["lost for 0s: no route"]);
}

#[test]
fn questions_and_filters_stand_in_the_last_line() {
    let mut state = state(3);
    state.press(KeyCode::Char('d'), false);
    holds(&screen(&mut state, 80, 24), &["Drain gpu-0: no new requests go to it. y yes  n no"]);
    state.press(KeyCode::Char('y'), false);
    state.notify("gpu-0 is drained".into());
    holds(&screen(&mut state, 80, 24), &["gpu-0 is drained"]);
    for key in "/gpu-2".chars() {
        state.press(KeyCode::Char(key), false);
    }
    let filtered = screen(&mut state, 80, 24);
    holds(&filtered, &["/gpu-2█", "filter \"gpu-2\": 1"]);
    assert!(!filtered.contains("\ngpu-1"), "{filtered}");
    state.press(KeyCode::Enter, false);
    state.press(KeyCode::Char('?'), false);
    holds(&screen(&mut state, 80, 24), &["Help", "BACKLOG", "any key closes it"]);
}

#[test]
fn the_numbers_of_a_model_are_whole() {
    let mut document = overview(2, 1);
    document["models"][0] = json!({"name": "an-organisation/a-model-with-a-long-name-70B", "upstreams": 64,
        "ready": 64, "requests": 99_900_000_000_u64, "prompt_tokens": 99_900_000_000_u64,
        "cached_tokens": 99_900_000_000_u64, "output_tokens": 99_900_000_000_u64});
    let mut state = TopState::new("a".into());
    state.apply(serde_json::from_value(document).expect("is an overview"));
    for columns in [110, 120, 200] {
        let screen = screen(&mut state, columns, 40);
        holds(&screen, &["an-organ", "64/64", "requests 99.9G", "cached 100%", "out 99.9G"]);
    }
}

#[test]
fn unknown_values_are_no_numbers() {
    let mut document = overview(1, 1);
    for key in ["kv_usage", "first_byte_ms", "queued", "sight"] {
        document["upstreams"][0][key] = Value::Null;
    }
    document["upstreams"][0]["compared_tokens"] = 0.into();
    document["totals"]["first_byte_ms"] = Value::Null;
    document["totals"]["memory_bytes"] = Value::Null;
    let mut state = TopState::new("a".into());
    state.apply(serde_json::from_value(document).expect("is an overview"));
    let screen = screen(&mut state, 120, 24);
    holds(&screen, &["req/s –", "–/–/–", "mem –"]);
    let row = screen.lines().find(|line| line.starts_with("gpu-0")).expect("it has a row");
    assert_eq!(row.matches('–').count(), 7, "{row}");
}

#[test]
fn the_text_has_a_row_for_each_upstream() {
    let text = text(&mut state(150), Some(100));
    assert_eq!(text.lines().filter(|line| line.starts_with("gpu-")).count(), 150, "{text}");
    assert!(text.lines().all(|line| line == line.trim_end()) && text.ends_with('\n'));
    holds(&text, &["MODELS", "DECISIONS", "gpu-149"]);
}

#[test]
fn a_text_without_a_width_has_whole_lines() {
    let mut document = overview(3, 1);
    let [host, model, sibling] = [
        "gpu-17.cluster.local:8000".repeat(3),
        "organisation/a-model-70B".repeat(4),
        "vllm-lb-7d9f8-".repeat(5),
    ];
    let id = "chatcmpl-".repeat(28);
    document["upstreams"][1]["name"] = host.clone().into();
    document["models"][0]["name"] = model.clone().into();
    document["siblings"]["balancers"][0]["name"] = sibling.clone().into();
    let decision = &mut document["decisions"][0];
    (decision["id"], decision["upstream"]) = (id.clone().into(), host.clone().into());
    decision["candidates"][0]["upstream"] = host.clone().into();
    decision["candidates"][1]["upstream"] = format!("{host}1").into();
    let mut state = TopState::new("a".into());
    state.apply(serde_json::from_value(document).expect("is an overview"));
    let whole = text(&mut state, None);
    let other = format!("before {host}1 4.6k");
    holds(&whole, &[&format!("\n{host} "), &format!("\n{model} 3/3 requests"), &other]);
    holds(&whole, &[&format!("{sibling} in flight 7 heard 12ms ago\n"), &format!("id {id}\n")]);
    assert!(whole.lines().all(|line| line == line.trim_end()), "{whole}");
    let cut = text(&mut state, Some(60));
    assert!(cut.lines().all(|line| line.chars().count() <= 60) && !cut.contains(&id), "{cut}");
    // Short names need no more columns than before.
    let short = text(&mut self::state(3), None);
    let rule = short.lines().find(|line| line.starts_with("UPSTREAMS")).map(|line| line.chars().count());
    assert_eq!(rule, Some(120), "{short}");
    assert!(text(&mut TopState::new("a".into()), None).contains("connecting"));
}

/// The table had a word of its own for an upstream that an operator drains.
#[test]
fn the_state_of_a_drained_upstream_is_the_one_of_the_api() {
    let mut document = overview(2, 1);
    (document["upstreams"][0]["drained"], document["upstreams"][0]["state"]) =
        (true.into(), "draining".into());
    let mut state = TopState::new("a".into());
    state.apply(serde_json::from_value(document).expect("is an overview"));
    let screen = screen(&mut state, 80, 24);
    let row = screen.lines().find(|line| line.starts_with("gpu-0")).expect("it has a row");
    assert!(row.contains(" draining "), "{row}");
    assert!(!screen.contains("drained"), "{screen}");
}

/// Regression: the name of a model that a client had sent reached the terminal as it was.
#[test]
fn whole_lines_hold_nothing_that_controls_a_terminal() {
    let mut document = overview(2, 1);
    document["decisions"][0]["model"] =
        "m\u{1b}]0;x\u{7}\u{1b}[31m\n12:00:00 gpu-9\r\u{9b}2J\u{202e}é".into();
    let mut state = TopState::new("a".into());
    state.apply(serde_json::from_value(document).expect("is an overview"));
    let whole = text(&mut state, None);
    holds(&whole, &["model m]0;x[31m12:00:00 gpu-92Jé  id "]);
    assert!(!whole.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{whole:?}");
}
