//! Tests of what is put into bodies: settings of a session, and the capture question.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Map, Value, json};

use super::super::*;
use crate::json::work::WORK;
use crate::prompt::scan::Scanner;
use crate::reject::Reject;
use crate::route::dialect::{ALL_DIALECTS, BodyDialect};
use crate::route::edit::wide;

fn params(params: Value) -> Map<String, Value> {
    params.as_object().cloned().unwrap()
}

fn edited(body: &str, set: Value, model: Option<&str>) -> Result<Option<String>, Reject> {
    let edited = session_edit(body.as_bytes(), &params(set), model)?;
    Ok(edited.map(|edited| String::from_utf8(edited).unwrap()))
}

#[test]
fn sessions_replace_or_add_top_level_members() {
    for (body, set, model, wanted) in [
        (r#"{"a": 1 ,"b":2}"#, json!({"a": 3}), None, Some(r#"{"a": 3 ,"b":2}"#)),
        (
            r#"{"a":1}"#,
            json!({"b": {"c": [1, null]}, "d": "\""}),
            None,
            Some(r#"{"a":1,"b":{"c":[1,null]},"d":"\""}"#),
        ),
        (r#"{"a":{"b":1}}"#, json!({"a": {"c": 2}}), None, Some(r#"{"a":{"c":2}}"#)),
        (r#"{"a":1}"#, json!({"a": null}), None, Some(r#"{"a":null}"#)),
        (r#"{"a":1,"a":2}"#, json!({"a": 3}), None, Some(r#"{"a":1,"a":3}"#)),
        (r#"{"\u0061":1}"#, json!({"a": 3}), None, Some(r#"{"\u0061":3}"#)),
        (r#"{"b":{"a":1}}"#, json!({"a": 3}), None, Some(r#"{"b":{"a":1},"a":3}"#)),
        (" { } \n", json!({"a": 3}), None, Some(" {\"a\":3 } \n")),
        ("\u{feff}{}", json!({"a": 3}), None, Some("\u{feff}{\"a\":3}")),
        (r#"{"model":"x","m":1}"#, json!({}), Some("é\""), Some(r#"{"model":"é\"","m":1}"#)),
        (r#"{"m":1}"#, json!({}), Some("y"), Some(r#"{"m":1,"model":"y"}"#)),
        (r#"{"model":"x"}"#, json!({"model": "z"}), Some("y"), Some(r#"{"model":"z"}"#)),
        (r#"{"model":7,"model":"x"}"#, json!({}), Some("y"), Some(r#"{"model":7,"model":"y"}"#)),
        (r#"{"model":"y","a":3}"#, json!({"a": 3}), Some("y"), None),
        (r#"{"a":1}"#, json!({}), None, None),
        (r#"["a"]"#, json!({"a": 3}), None, None),
        (r#"{"a":1"#, json!({"a": 3}), None, None),
        (r#"{"a":1} x"#, json!({"a": 3}), None, None),
        ("", json!({"a": 3}), Some("y"), None),
    ] {
        assert_eq!(edited(body, set.clone(), model), Ok(wanted.map(str::to_owned)), "{body} {set} {model:?}");
    }
}

#[test]
fn bodies_that_would_slip_past_a_session_are_refused() {
    let members = |count: usize| format!("{{{}}}", vec![r#""b":1"#; count].join(","));
    let key = format!("{{\"{}\":1}}", "k".repeat(1 << 20));
    for (body, why) in [
        (members(10_000), None),
        (members(10_001), Some("its session says: an object in it has more than 10000 members")),
        (key, Some("more than 1024 bytes")),
        (format!("{{\"b\":{}}}", members(10_001)), None),
    ] {
        match (edited(&body, json!({"a": 1}), None), why) {
            (Err(Reject::Field { param, message }), Some(why)) => {
                assert!(param == "body" && message.contains(why), "{message}");
            }
            (result, why) => assert!(matches!(result, Ok(Some(_))) && why.is_none()),
        }
    }
    let utf16: Vec<u8> = r#"{"model":"x"}"#.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(session_edit(&utf16, &Map::new(), Some("y")), Err(wide()));
    assert_eq!(session_edit(&utf16, &Map::new(), None), Ok(None));
}

fn question(body: &str, dialect: BodyDialect) -> Option<String> {
    let mut scanner = Scanner::new();
    scanner.scan(body.as_bytes());
    let question = capture_question(body.as_bytes(), Some(&scanner), dialect);
    assert_eq!(question, capture_question(body.as_bytes(), None, dialect), "{body}");
    question.map(|question| String::from_utf8(question.apply(body.as_bytes())).unwrap())
}

const BOTH: &str = r#","logprobs":true,"return_token_ids":true"#;
const LOGPROBS: &str = r#","logprobs":true"#;
const IDS: &str = r#","return_token_ids":true"#;

#[test]
fn absent_fields_are_requested() {
    for (members, chat, completions) in [
        (r#""messages":[]"#, BOTH, BOTH),
        (r#""stream":true"#, BOTH, BOTH),
        (r#""logprobs":false"#, IDS, IDS),
        (r#""logprobs":null"#, IDS, IDS),
        (r#""logprobs":3"#, IDS, IDS),
        (r#""return_token_ids":false"#, LOGPROBS, LOGPROBS),
        (r#""return_token_ids":null"#, LOGPROBS, LOGPROBS),
        (r#""return_token_ids":true,"logprobs":true"#, "", ""),
        (r#""\u006cogprobs":false"#, IDS, IDS),
        (r#""a":{"logprobs":false}"#, BOTH, BOTH),
        (r#""top_logprobs":0"#, BOTH, BOTH),
        (r#""top_logprobs":5"#, IDS, IDS),
        (r#""top_logprobs":null"#, IDS, IDS),
        (r#""logprob_token_ids":[5]"#, IDS, IDS),
        (r#""logprob_token_ids":null"#, BOTH, BOTH),
        (r#""use_beam_search":true"#, IDS, IDS),
        (r#""use_beam_search":false"#, BOTH, BOTH),
        (r#""echo":true"#, BOTH, ""),
        (r#""echo":1"#, BOTH, ""),
        (r#""echo":false"#, BOTH, BOTH),
        (r#""echo":true,"echo":null"#, BOTH, BOTH),
        ("", "", ""),
    ] {
        for space in ["", " \r\n\t"] {
            let body = format!("{space}{{{space}{members}{space}}}{space}");
            let with = |text: &str| {
                (!text.is_empty()).then(|| format!("{space}{{{space}{members}{space}{text}}}{space}"))
            };
            let completions = completions.replace(":true,", ":0,").replace("logprobs\":true", "logprobs\":0");
            assert_eq!(question(&body, BodyDialect::Chat), with(chat), "{body}");
            assert_eq!(question(&body, BodyDialect::Completions), with(&completions), "{body}");
            for dialect in [BodyDialect::Responses, BodyDialect::Messages, BodyDialect::Other] {
                assert_eq!(question(&body, dialect), None, "{body}");
            }
        }
    }
}

#[test]
fn bodies_that_cannot_be_followed_are_not_changed() {
    for body in ["", "[1]", r#"{"a":1"#, r#"{"a":1,}"#, r#"{"a":1} x"#, "{\0\"\0a\0"] {
        for dialect in ALL_DIALECTS {
            assert_eq!(question(body, dialect), None, "{body}");
        }
    }
}

/// Members that a question or an edit may look at.
fn members() -> impl Strategy<Value = String> {
    let known = vec![
        r#""messages":[{"role":"user","content":"logprobs \u2028 }"}]"#,
        r#""logprobs":false"#,
        r#""return_token_ids":null"#,
        r#""top_logprobs":2"#,
        r#""echo":true"#,
        r#""a":{"logprobs":[1,{}]}"#,
        r#""model":"m""#,
        r#""seed":1"#,
        r#""se\u0065d":{"x":"}"}"#,
    ];
    (prop::collection::vec(select(known), 0..8), "[ \n\t]{0,2}").prop_map(|(members, space)| {
        format!("{space}{{{space}{}{space}}}{space}", members.join(&format!("{space},{space}")))
    })
}

fn parsed(body: &[u8]) -> Map<String, Value> {
    serde_json::from_slice(body).unwrap()
}

proptest! {
    #[test]
    fn a_session_edit_is_that_of_parsed_bodies(
        body in members(),
        set in subsequence(vec![
            ("seed", json!(7)), ("model", json!("p")), ("logprobs", json!(true)), ("stop", json!(null)),
            ("messages", json!([{"é\"": "\u{2028}"}])), ("x", json!({"y": {}})),
        ], 0..=6).prop_shuffle(),
        model in select(vec![None, Some("pin"), Some("m")]),
    ) {
        let set: Map<String, Value> = set.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut wanted = parsed(body.as_bytes());
        let pin = model.map(|model| ("model".to_owned(), json!(model)));
        for (key, value) in pin.into_iter().chain(set.clone()) {
            wanted.insert(key, value);
        }
        let edited = session_edit(body.as_bytes(), &set, model).unwrap();
        let bytes = edited.as_deref().unwrap_or(body.as_bytes());
        prop_assert_eq!(parsed(bytes), wanted);
        prop_assert_eq!(session_edit(bytes, &set, model), Ok(None), "an edited body has nothing to edit");
        let params = serde_json::to_vec(&set).unwrap().len() + model.map_or(0, str::len);
        prop_assert!(bytes.len() as u64 <= memory_needed(body.len(), params));
    }

    #[test]
    fn a_question_adds_its_members_only(body in members(), chat in any::<bool>()) {
        let dialect = if chat { BodyDialect::Chat } else { BodyDialect::Completions };
        let Some(question) = capture_question(body.as_bytes(), None, dialect) else { return Ok(()) };
        let asked = question.apply(body.as_bytes());
        let (mut before, after) = (parsed(body.as_bytes()), parsed(&asked));
        let fields = question.added_fields;
        let added = usize::from(fields.logprobs) + usize::from(fields.token_ids);
        prop_assert_eq!(after.len(), before.len() + added);
        let is_added = |key: &str| key == "logprobs" || key == "return_token_ids";
        before.extend(after.clone().into_iter().filter(|(key, _)| is_added(key)));
        prop_assert_eq!(before, after);
        let behind = &asked[question.at + question.text.len()..];
        prop_assert_eq!([&asked[..question.at], behind].concat(), body.as_bytes());
        prop_assert_eq!(capture_question(&asked, None, dialect), None, "it is asked once");
    }

    #[test]
    fn the_work_on_a_body_grows_as_the_body(
        (before, again, behind) in select(vec![
            ("{", r#""a":1,"#, r#""z":1}"#),
            ("{", r#""logprobs":{},"#, r#""z":1}"#),
            ("{", r#""\u0061":1,"#, r#""z":1}"#),
            (r#"{"b":"#, "[", ""),
            (r#"{"b":""#, "\\\"", r#""}"#),
            (r#"{"b":["#, r#"1,"",{},"#, "1]}"),
        ]),
        bytes in 1_usize..30_000,
    ) {
        let body = [before, &again.repeat(bytes / again.len() + 1), behind].concat();
        WORK.set(0);
        drop(session_edit(body.as_bytes(), &params(json!({"a": 2, "logprobs": 1, "c": 3})), Some("m")));
        capture_question(body.as_bytes(), None, BodyDialect::Chat);
        prop_assert!(WORK.get() as usize <= 6 * body.len() + 100, "{} of {}", WORK.get(), body.len());
    }
}
