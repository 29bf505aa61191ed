//! Tests of `scan`: what is read is what serde reads, wherever the body is cut.

mod properties;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::Value as Json;

use super::*;

fn scanned(body: &[u8]) -> Scanner {
    let mut scanner = Scanner::new();
    scanner.scan(body);
    scanner
}

fn facts(body: &str) -> ScanFacts<'_> {
    scanned(body.as_bytes()).facts(body.as_bytes())
}

fn named(name: &str) -> ModelField<'_> {
    ModelField::Named(name.into())
}

#[test]
fn reads_the_model_like_vllm() {
    for (body, model) in [
        (r#"{"model":"llama"}"#, named("llama")),
        (r#"{"model":"a\/b\"c"}"#, named("a/b\"c")),
        (r#"{"mod\u0065l":"escaped key"}"#, named("escaped key")),
        (r#"{"model":"\ud83d\ude00"}"#, named("😀")),
        (r#"{"model":"first","model":"last"}"#, named("last")),
        (r#"{"model":"first","model":null}"#, ModelField::Absent),
        (r#"{"model":""}"#, ModelField::Absent),
        (r#"{"model":null}"#, ModelField::Absent),
        (r#"{"model":7}"#, ModelField::NotAString),
        (r#"{"model":["llama"]}"#, ModelField::NotAString),
        (r#"{"x":{"model":"nested"},"messages":[{"model":"nested"}]}"#, ModelField::Absent),
        (r#"{"x":"\"model\":\"no\"","model":"yes"}"#, named("yes")),
        (r#"{"x":"\\","model":"yes"}"#, named("yes")),
        (r#"{"x":["\\\"]","}"],"model":"yes"}"#, named("yes")),
        ("\u{feff} {\r\n\t\"model\" :\t\"bom\"\n} ", named("bom")),
        (r#"["model","llama"]"#, ModelField::Absent),
        ("{}", ModelField::Absent),
    ] {
        let facts = facts(body);
        assert_eq!(facts.model, model, "{body}");
        assert_eq!(facts.state, ScanProgress::Complete, "{body}");
    }
}

#[test]
fn reports_the_offset_of_invalid_json() {
    for (body, offset) in [
        ("nope{", None),
        ("model=llama", Some(0)),
        (" <html>", Some(1)),
        (r#"{"model":"a"} x"#, Some(14)),
        (r#"{"model":"a"}{"#, Some(13)),
        (r#"{"a":1,}"#, Some(7)),
        (r#"{,"a":1}"#, Some(1)),
        (r#"{"a" 1}"#, Some(5)),
        (r#"{"a":tru}"#, Some(5)),
        (r#"{"a":1 2}"#, Some(7)),
        (r#"{"a":}"#, Some(5)),
        (r#"{'a':1}"#, Some(1)),
        (r#"{"a":NaN,"b":-Infinity,"c":Infinity,"d":1e-5}"#, None),
    ] {
        let expected = offset.map_or(ScanProgress::Complete, ScanProgress::Malformed);
        assert_eq!(facts(body).state, expected, "{body}");
    }
    assert_eq!(facts(r#"{"model":"a","x":?"#).model, named("a"));
}

#[test]
fn reads_the_facts_before_a_cut() {
    for (body, model, prompt_bytes) in [
        ("", ModelField::Absent, 0),
        ("\u{feff}", ModelField::Absent, 0),
        (r#"{"model":"lla"#, ModelField::Absent, 0),
        (r#"{"model":"llama""#, named("llama"), 0),
        (r#"{"model":"llama","prompt":"twelve bytes"#, named("llama"), 12),
        (r#"{"prompt":["one","tw"#, ModelField::Absent, 5),
        (r#"{"prompt":[10,200"#, ModelField::Absent, 8),
        (r#"{"prompt":"old","prompt":"newer"#, ModelField::Absent, 5),
    ] {
        let facts = facts(body);
        assert_eq!((facts.model, facts.prompt_bytes), (model, prompt_bytes), "{body}");
        assert_eq!(facts.state, ScanProgress::Cut, "{body}");
    }
    assert!(facts(r#"{"messages":[{"role"#).has(BodyField::Messages));
    assert!(!facts(r#"{"messages":nul"#).has(BodyField::Messages));
}

#[test]
fn reads_the_other_facts() {
    let body = r#"{"stream":true,"messages":[],"documents":null,"kv_transfer_params":null,
        "previous_response_id":"resp_\u0031","request_id":"r"}"#;
    let told = facts(body);
    assert!(told.stream && told.has(BodyField::Messages) && told.has(BodyField::RequestId));
    assert!(!told.has(BodyField::Documents) && !told.kv_transfer());
    assert_eq!(told.previous_response_id.as_deref(), Some("resp_1"));
    assert!(facts(r#"{"kv_transfer_params":{}}"#).kv_transfer());
    assert!(facts(r#"{"ec_transfer_params":{"a":1}}"#).kv_transfer());
    for (stream, truth) in [("1", true), ("\"true\"", true), ("\"on\"", true), ("0", false), ("[1]", false)] {
        assert_eq!(facts(&format!(r#"{{"stream":{stream}}}"#)).stream, truth, "{stream}");
    }
    let span = scanned(body.as_bytes()).span(BodyField::RequestId).unwrap();
    assert_eq!(&body[span], r#""r""#);
}

#[test]
fn reports_a_value_before_it_is_complete() {
    for (body, seen) in [
        (r#"{"prompt":"ab"}"#, Some((r#""ab""#, true))),
        (r#"{"prompt":"ab"#, Some((r#""ab"#, false))),
        (r#"{"prompt": [1,{"a":"b]"#, Some((r#"[1,{"a":"b]"#, false))),
        (r#"{"prompt":["a"],"prompt":["b"#, Some((r#"["b"#, false))),
        (r#"{"prompt":["a"],"prompt":nul"#, Some((r#"["a"]"#, true))),
        (r#"{"prompt":nul"#, None),
        (r#"{"prompt""#, None),
    ] {
        let found = scanned(body.as_bytes()).seen(BodyField::Prompt);
        assert_eq!(found.map(|(range, whole)| (&body[range], whole)), seen, "{body}");
    }
}

#[test]
fn counts_the_prompt() {
    for (body, bytes) in [
        (r#"{"messages":[{"role":"user","content":"hello"}]}"#, 4 + 4 + 7 + 5),
        (r#"{"prompt":[[1,-2.5e+3],[300]]}"#, 12),
        (r#"{"input":7,"user":"not prompt","stop":["nor this"]}"#, 4),
        (r#"{"messages":[true,null,false]}"#, 0),
        (r#"{"system":"ab","instructions":"cd","query":"ef"}"#, 6),
    ] {
        assert_eq!(facts(body).prompt_bytes, bytes, "{body}");
    }
    let image = format!(r#"{{"input":["data:image/png;base64,{}"]}}"#, "A".repeat(100_000));
    assert_eq!(facts(&image).prompt_bytes, MEDIA_WEIGHT_BYTES);
}

#[test]
fn accepts_any_depth() {
    let deep = format!(r#"{{"x":{}{},"model":"m"}}"#, "[".repeat(1_000_000), "]".repeat(1_000_000));
    assert_eq!(facts(&deep).model, named("m"));
}

#[test]
fn does_not_panic_on_a_buffer_that_shrank() {
    let body = br#"{"model":"llama","prompt":"more"#;
    let mut scanner = scanned(body);
    for end in 0..body.len() {
        scanner.facts(&body[..end]);
        scanner.scan(&body[..end]);
    }
}
