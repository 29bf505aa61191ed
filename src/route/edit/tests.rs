//! Tests of `edit`: bodies above the limits, and work that is linear in the body's length.

use proptest::prelude::*;
use proptest::sample::select;

use super::super::virtual_models::RouteTable;
use super::*;
use crate::config::check::check;
use crate::json::work::WORK;
use crate::route::translate::TranslatedApi;

const ROUTES: &str = "
  - model: chat
    to: served
    think_tags: true
    metadata_overrides: true
    body:
      defaults: {temperature: 1, chat_template_kwargs: {thinking: true, a: 1}}
      overrides: {seed: 7, extra: {inner: {b: 1}}}
      remove: [logit_bias, a, 'tools[].function.strict', 'tools[].strict']
      roles: {developer: system}
  - {model: plain, to: served, body: {overrides: {seed: 7}}}
  - {model: response, to: served, responses: chat}";

fn edit(model: &str) -> BodyEdit {
    let text = format!("upstreams: [http://a]\nroutes: {ROUTES}\n");
    let config = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let table = RouteTable::new(&config.routes);
    let plan = table.plan(Some(model), "/", &http::HeaderMap::new()).unwrap();
    let translation = (model == "response").then(|| ChatTranslation::new(TranslatedApi::Responses));
    BodyEdit { plan, upstream_dialect: BodyDialect::Chat, form: None, translation, scanner: None }
}

/// So many times the same, with commas between.
fn list(item: &str, count: usize) -> String {
    vec![item; count].join(",")
}

#[test]
fn runs_on_another_thread() {
    fn carried<T: Send + 'static>(_: &T) {}
    let edit = edit("chat");
    carried(&edit);
    let edited = std::thread::spawn(move || edit.run(&Bytes::from_static(br#"{"model":"chat"}"#))).join();
    let edited = edited.unwrap().unwrap();
    carried(&edited);
    let body: serde_json::Value = serde_json::from_slice(&edited.body.unwrap()).unwrap();
    assert_eq!((&body["model"], &body["seed"]), (&"served".into(), &7.into()));
    let json = BodyEdit { scanner: Some(Scanner::new()), ..self::edit("plain") };
    assert_eq!(json.run(&Bytes::from_static(b"{\0}\0")).unwrap_err(), wide());
}

#[test]
fn moves_large_edits_off_the_serving_thread() {
    for (model, most) in [("plain", 256 << 10), ("chat", 32 << 10), ("response", 32 << 10)] {
        assert!(!edit(model).leaves_worker(most) && edit(model).leaves_worker(most + 1), "{model}");
    }
}

#[test]
fn rejects_bodies_that_are_too_large_to_be_edited() {
    let member = r#""b":1"#;
    let message = |message: &str, count: usize| format!(r#"{{"messages":[{}]}}"#, list(message, count));
    let extra = |bytes: usize| format!(r#"{{"metadata":{{"extra_body":"{}"}}}}"#, "x".repeat(bytes - 2));
    for (model, body, why) in [
        ("plain", format!("{{{}}}", list(member, 10_000)), None),
        ("plain", format!("{{{}}}", list(member, 10_001)), Some("10000 members")),
        ("plain", format!("{{\"{}\":1}}", "k".repeat(1 << 20)), Some("1024 bytes")),
        ("chat", format!("{{\"extra\":{{{}}}}}", list(member, 10_001)), Some("10000 members")),
        ("chat", format!("{{\"other\":{{{}}}}}", list(member, 10_001)), None),
        ("chat", message(&format!("{{{}}}", list(member, 10_001)), 1), Some("10000 members")),
        ("chat", message(r#"{"role":"developer"}"#, 100_000), None),
        ("chat", message(r#"{"role":"developer"}"#, 100_001), Some("100000 places")),
        ("chat", message(r#"{"role":"user"}"#, 100_001), None),
        ("chat", format!(r#"{{"tools":[{}]}}"#, list(r#"{"strict":1}"#, 90_000)), None),
        ("chat", format!(r#"{{"tools":[{}]}}"#, list(r#"{"strict":1}"#, 100_001)), Some("100000 places")),
        ("chat", format!(r#"{{"tools":[{{{}}}]}}"#, list(member, 10_001)), Some("10000 members")),
        ("chat", format!("{{\"metadata\":{{{}}}}}", list(member, 10_001)), Some("10000 members")),
        ("chat", extra(16 << 10), None),
        ("chat", extra((16 << 10) + 1), Some("limit of 16384 bytes")),
        ("response", format!(r#"{{"input":[{}]}}"#, list("1", 100_001)), Some("100000 values")),
    ] {
        let begin: String = body.chars().take(40).collect();
        match (edit(model).run(&Bytes::from(body)), why) {
            (Err(Reject::Field { message, .. }), Some(why)) => assert!(message.contains(why), "{message}"),
            (edited, why) => assert!(edited.is_ok() && why.is_none(), "{begin} {:?}", edited.err()),
        }
    }
}

/// Shapes of bodies: the beginning, the repeated part, and the end.
const SHAPES: [(&str, &str, &str); 24] = [
    (r#"{"tools":["#, r#"{"strict":1},"#, "1]}"),
    (r#"{"tools":["#, r#"{"strict":1,"strict":1,"function":{"a":1,"strict":{"strict":1}}},"#, "{}]}"),
    (r#"{"tools":["#, r#"{"function":{"strict":1 1}},"#, "!]}"),
    (r#"{"tools":["#, r#"[{"function":[{"#, ""),
    ("{", r#""a":1,"#, r#""z":1}"#),
    ("{", r#""seed":{},"#, r#""z":1}"#),
    ("{", r#""\u0061":1,"#, r#""z":1}"#),
    ("{", r#""messages":[{"role":"developer"}],"#, r#""z":1}"#),
    ("{", r#""messages":[{"role":"assistant","content":"<think>a</think>"}],"#, r#""z":1}"#),
    (r#"{"b":"#, "[", ""),
    (r#"{"messages":"#, "[", ""),
    (r#"{"messages":"#, r#"{"messages":"#, ""),
    (r#"{"b":""#, "\\\"", r#""}"#),
    (r#"{"b":["#, r#"1,"",{},"#, "1]}"),
    (r#"{"messages":["#, r#"{"role":"developer","content":[]},"#, "1]}"),
    (r#"{"messages":["#, r#"{"role":"developer"},"#, "!]}"),
    (r#"{"messages":["#, r#"[{"role":"developer"}],"#, "1]}"),
    (r#"{"messages":["#, r#"{"a":1 1},"#, "1]}"),
    (r#"{"messages":[{"role":"assistant","content":""#, "<think></think>", r#""}]}"#),
    (r#"{"messages":[{"role":"assistant","content":""#, "<think>", r#""}]}"#),
    (
        r#"{"messages":[{"role":"assistant","content":["#,
        r#"{"type":"text","text":"<think>a</think>b"},"#,
        "1]}]}",
    ),
    (r#"{"messages":[{"role":"assistant","content":["#, r#"{"type":"text","text":"<think>"},"#, "!]}]}"),
    (r#"{"extra":{"inner":{"#, r#""b":1,"#, r#""b":2}}}"#),
    (r#"{"metadata":{"extra_body":"{\"a\":1}"},"chat_template_kwargs":{"#, r#""a":1,"#, r#""b":2}}"#),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Members are compared with rules, keys and values are walked: all together, a few times each byte.
    #[test]
    fn work_is_linear_in_the_body(shape in select(SHAPES.to_vec()), bytes in 1_usize..200_000) {
        let (before, again, behind) = shape;
        let count = bytes / again.len() + 1;
        let body = Bytes::from([before, &again.repeat(count), behind].concat());
        WORK.set(0);
        let length = body.len();
        drop(edit("chat").run(&body));
        prop_assert!(WORK.get() <= 12 * length as u64, "{} of {length}: {shape:?}", WORK.get());
    }

    /// A route's rules come from a request here, as many as its metadata have room for.
    #[test]
    fn work_does_not_depend_on_the_number_of_rules(rules in 1_usize..1000, members in 1_usize..9000) {
        let rule = |index: usize| format!("\\\"k{index:03}\\\":1");
        let extra = (0..rules).map(rule).collect::<Vec<_>>().join(",");
        let member = |index: usize| format!("\"k{index:03}\":2");
        let members = (0..members).map(member).collect::<Vec<_>>().join(",");
        let body = Bytes::from(format!(r#"{{"metadata":{{"extra_body":"{{{extra}}}"}},{members}}}"#));
        WORK.set(0);
        prop_assert!(edit("chat").run(&body).is_ok());
        prop_assert!(WORK.get() <= 12 * body.len() as u64, "{} of {}", WORK.get(), body.len());
    }
}
