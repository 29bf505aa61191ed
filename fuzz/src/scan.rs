//! `prompt::scan`: facts do not depend on how a body arrives, and are serde_json's where that can read it.

use serde_json::{Map, Value};
use vllm_lb::prompt::scan::{BodyField, ScanFacts, ScanProgress, Scanner};

use super::{cuts, json};

const FIELDS: [(BodyField, &str); 9] = [
    (BodyField::Model, "model"),
    (BodyField::Stream, "stream"),
    (BodyField::RequestId, "request_id"),
    (BodyField::PreviousResponseId, "previous_response_id"),
    (BodyField::KvTransferParams, "kv_transfer_params"),
    (BodyField::Messages, "messages"),
    (BodyField::Prompt, "prompt"),
    (BodyField::Input, "input"),
    (BodyField::Tools, "tools"),
];

pub fn run(data: &[u8]) {
    let scanner = scanned(data);
    let facts = scanner.facts(data);
    for way in cuts::ways(data) {
        let mut growing = Scanner::new();
        for piece in way {
            let seen = &data[..piece.end];
            growing.scan(seen);
            assert_eq!(growing.facts(seen), scanned(seen).facts(seen), "cut at {}", piece.end);
        }
        assert_eq!(growing.facts(data), facts);
    }
    if let Some(object) = json::object(data) {
        agrees(&facts, &object);
        for (field, name) in FIELDS {
            let span = scanner.span(field).map(|span| &data[span]);
            let value = span.map(|value| serde_json::from_slice::<Value>(value).expect("a span is a value"));
            assert_eq!(value.as_ref(), object.get(name), "{name}");
        }
    }
}

fn scanned(data: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.scan(data);
    scanner
}

fn agrees(facts: &ScanFacts<'_>, object: &Map<String, Value>) {
    assert_eq!(facts.state, ScanProgress::Complete);
    let model = object.get("model").and_then(Value::as_str).filter(|name| !name.is_empty());
    assert_eq!(facts.model.name(), model);
    assert_eq!(facts.stream, object.get("stream").is_some_and(is_true));
    assert_eq!(facts.background, object.get("background").is_some_and(is_true));
    assert_eq!(facts.without_store, object.get("store") == Some(&Value::Bool(false)));
    let previous = object.get("previous_response_id").and_then(Value::as_str);
    assert_eq!(facts.previous_response_id.as_deref(), previous);
    for (field, name) in FIELDS {
        assert_eq!(facts.has(field), object.get(name).is_some_and(|value| !value.is_null()), "{name}");
    }
}

/// As pydantic reads a boolean.
fn is_true(value: &Value) -> bool {
    match value {
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() == Some(1.0),
        Value::String(word) => {
            ["true", "1", "yes", "on", "y", "t"].contains(&word.to_ascii_lowercase().as_str())
        }
        _ => false,
    }
}
