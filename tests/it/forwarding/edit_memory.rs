//! The memory of an edit is known before it is made: the largest that this process ever was while it edited a
//! body, beside what it was before, is held against what was to be reserved.

#![cfg(target_os = "linux")]

use std::fs;

use crate::common::own_process::in_own_process;
use bytes::Bytes;
use http::HeaderMap;
use vllm_lb::config::check::check;
use vllm_lb::route::dialect::BodyDialect;
use vllm_lb::route::edit::{BodyEdit, EditedBody};
use vllm_lb::route::translate::{ChatTranslation, TranslatedApi};
use vllm_lb::route::virtual_models::RouteTable;

const SIZE: usize = 6 << 20;

/// What a process takes and gives back on its own account.
const NOISE: u64 = 1 << 20;

const ROUTES: &str = "
  - model: chat
    to: served
    think_tags: true
    metadata_overrides: true
    body:
      defaults: {temperature: 1, chat_template_kwargs: {thinking: true}}
      overrides: {seed: 7, extra: {inner: {b: 1}}}
      remove: [a]
      roles: {d: a-name-that-is-longer-than-the-other}
  - {model: plain, to: served, body: {overrides: {seed: 7}, remove: [a]}}
  - {model: response, to: served, responses: chat}
  - {model: message, to: served, messages: chat}";

fn edit(model: &str) -> BodyEdit {
    let text = format!("upstreams: [http://a]\nroutes: {ROUTES}\n");
    let config = check(&text, &|_| None).expect("is a configuration");
    let plan = RouteTable::new(&config.routes).plan(Some(model), "/", &HeaderMap::new()).expect("a route");
    let translation = match model {
        "response" => Some(ChatTranslation::new(TranslatedApi::Responses)),
        "message" => Some(ChatTranslation::new(TranslatedApi::Messages)),
        _ => None,
    };
    BodyEdit { plan, upstream_dialect: BodyDialect::Chat, form: None, translation, scanner: None }
}

/// Bytes that the process has in memory now, and had at the most.
fn resident() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has it");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("is there");
        line.trim_end_matches("kB").trim().parse::<u64>().expect("a number") << 10
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// Edits a body, and compares what that took with what it may take.
fn holds(model: &str, body: String) -> Option<EditedBody> {
    let edit = edit(model);
    let body = Bytes::from(body);
    let needed = edit.memory_needed(body.len());
    assert!(body.len() <= SIZE, "{}", body.len());
    // From here on the most is counted anew.
    fs::write("/proc/self/clear_refs", "5").expect("a process may do so with itself");
    let (before, _) = resident();
    let edited = edit.run(&body);
    let took = resident().1.saturating_sub(before);
    assert!(took <= needed + NOISE, "{model}: took {took}, {needed} was said, of {}", body.len());
    edited.ok()
}

/// A body that is filled up with one piece.
fn filled(before: &str, again: &str, behind: &str, bytes: usize) -> String {
    let count = (bytes - before.len() - behind.len()) / again.len();
    [before, &again.repeat(count), behind].concat()
}

/// A list of so many.
fn counted(before: &str, again: &str, behind: &str, count: usize) -> String {
    [before, &again.repeat(count), behind].concat()
}

#[test]
fn of_members() {
    in_own_process(|| {
        let string = format!(r#""z":"{}"}}"#, "s".repeat(SIZE - 300_000));
        assert!(holds("plain", counted("{", r#""a":1,"#, r#""z":1}"#, 9_999)).is_some());
        assert!(holds("plain", counted("{", r#""a":1,"#, &string, 9_999)).is_some());
        assert!(holds("plain", counted("{", r#""\u0061\\\u0061":1,"#, &string, 9_999)).is_some());
        assert!(holds("plain", filled("{", r#""a":1,"#, r#""z":1}"#, SIZE)).is_none());
        let keys = format!(r#""{}":1,"#, "\\!".repeat(500));
        assert!(holds("plain", counted("{", &keys, r#""z":1}"#, 5_000)).is_some());
    });
}

#[test]
fn of_messages() {
    in_own_process(|| {
        let list = r#"{"messages":["#;
        assert!(holds("chat", counted(list, r#"{"role":"d"},"#, "1]}", 100_000)).is_some());
        assert!(holds("chat", filled(list, r#"{"role":"d"},"#, "1]}", SIZE)).is_none());
        assert!(holds("chat", filled(list, r#"{"a":1},"#, "1]}", SIZE)).is_some());
        assert!(holds("chat", filled("{", r#""messages":[{"role":"d"}],"#, r#""z":1}"#, 200_000)).is_some());
    });
}

#[test]
fn of_one_long_thought() {
    in_own_process(|| {
        let begin = r#"{"messages":[{"role":"assistant","content":"a<think>"#;
        assert!(holds("chat", filled(begin, "thought ", r#"</think>b"}]}"#, SIZE)).is_some());
    });
}

#[test]
fn of_one_long_thought_full_of_escapes() {
    in_own_process(|| {
        let begin = r#"{"messages":[{"role":"assistant","content":"a<think>"#;
        assert!(holds("chat", filled(begin, "\\n", r#"</think>b"}]}"#, SIZE)).is_some());
    });
}

#[test]
fn of_many_thoughts() {
    in_own_process(|| {
        let begin = r#"{"messages":[{"role":"assistant","content":""#;
        assert!(holds("chat", filled(begin, "<think></think>", r#""}]}"#, SIZE)).is_some());
        assert!(holds("chat", filled(begin, "<think>a</think>\\n", r#""}]}"#, SIZE)).is_some());
    });
}

#[test]
fn of_many_parts() {
    in_own_process(|| {
        let begin = r#"{"messages":[{"role":"assistant","content":["#;
        let part = r#"{"type":"text","text":"<think>a</think>b"},"#;
        assert!(holds("chat", counted(begin, part, "1]}]}", 90_000)).is_some());
        assert!(holds("chat", filled(begin, part, "1]}]}", SIZE)).is_none());
        assert!(holds("chat", filled(begin, r#"{"a":1},"#, r#"{"think>":1}]}]}"#, SIZE)).is_some());
    });
}

#[test]
fn of_many_messages_with_thoughts() {
    in_own_process(|| {
        let message = r#"{"role":"assistant","content":"<think></think>"},"#;
        assert!(holds("chat", counted(r#"{"messages":["#, message, "1]}", 40_000)).is_some());
    });
}

#[test]
fn of_metadata() {
    in_own_process(|| {
        let extra =
            |text: String| format!(r#"{{"metadata":{{"extra_body":"{}"}}}}"#, text.replace('"', "\\\""));
        let members: Vec<String> = (0..1500).map(|index| format!(r#""{index:x}":1"#)).collect();
        assert!(holds("chat", extra(format!("{{{}}}", members.join(",")))).is_some());
        let inner = filled("[", "1,", "1]", 14_000);
        let deep = [r#"{"":"#.repeat(100), inner, "}".repeat(100)].concat();
        assert!(holds("chat", extra(deep)).is_some());
    });
}

#[test]
fn of_translations() {
    in_own_process(|| {
        let input = r#"{"model":"response","input":["#;
        let text = r#"{"role":"user","content":""},"#;
        assert!(
            holds("response", counted(input, text, r#"{"role":"user","content":""}]}"#, 16_000)).is_some()
        );
        let parts = r#"{"model":"response","input":[{"role":"user","content":["#;
        assert!(holds("response", counted(parts, r#""","#, r#"""]}]}"#, 95_000)).is_some());
        assert!(holds("response", filled(parts, r#""","#, r#"""]}]}"#, SIZE)).is_none());
    });
}

#[test]
fn of_translated_fields() {
    in_own_process(|| {
        let members: Vec<String> = (0..45_000).map(|index| format!(r#""{index:x}":1"#)).collect();
        let tool = format!(r#"{{"model":"response","input":"a","metadata":{{{}}}}}"#, members.join(","));
        assert!(holds("response", tool).is_some());
    });
}

#[test]
fn of_translated_texts() {
    in_own_process(|| {
        let input = r#"{"model":"response","input":""#;
        assert!(holds("response", filled(input, "long ", r#""}"#, SIZE)).is_some());
        assert!(holds("response", filled(input, "\\n", r#""}"#, SIZE)).is_some());
    });
}

/// The blocks that grow most, as many as a body may have, and the texts that do.
#[test]
fn of_translated_messages() {
    in_own_process(|| {
        let list = r#"{"model":"message","max_tokens":9,"messages":["#;
        let user = [list, r#"{"role":"user","content":["#].concat();
        let assistant = [list, r#"{"role":"assistant","content":["#].concat();
        for (begin, again, last, behind) in [
            (list, r#"{"role":"user","content":""},"#, r#"{"role":"user","content":""}"#, "]}"),
            (&user, r#"{"type":"tool_result"},"#, r#"{"type":"tool_result"}"#, "]}]}"),
            (&user, r#"{"type":"text","text":"a"},"#, r#"{"type":"text","text":"a"}"#, "]}]}"),
            (
                &user,
                r#"{"type":"image","source":{"data":""}},"#,
                r#"{"type":"image","source":{"data":""}}"#,
                "]}]}",
            ),
            (
                &assistant,
                r#"{"type":"tool_use","id":"","name":""},"#,
                r#"{"type":"tool_use","id":"","name":""}"#,
                "]}]}",
            ),
        ] {
            // The limit counts brackets, colons and commas.
            let values = again.bytes().filter(|byte| b"{[:,".contains(byte)).count();
            let body = counted(begin, again, &[last, behind].concat(), 95_000 / values);
            assert!(holds("message", body).is_some(), "{again}");
        }
        let text = [list, r#"{"role":"user","content":""#].concat();
        assert!(holds("message", filled(&text, "long ", r#""}]}"#, SIZE)).is_some());
        assert!(holds("message", filled(&text, "\\n", r#""}]}"#, SIZE)).is_some());
        let input = [&*assistant, r#"{"type":"tool_use","id":"","name":"","input":{"a":""#].concat();
        assert!(holds("message", filled(&input, "\\\"", r#""}}]}]}"#, SIZE)).is_some());
    });
}
