//! Property tests of `rewrite` against a merge of parsed documents. The readable cases are in the conformance
//! file of tests/it/routing/conformance.rs.

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::Value as Json;

use super::*;
use crate::config::types::{BodyEdits, Retry, Timeouts};
use crate::json;
use crate::prompt::scan::Scanner;

const LIMITS: [&str; 3] = ["max_tokens", "max_completion_tokens", "max_output_tokens"];

fn route(body: BodyEdits) -> RouteConfig {
    RouteConfig { body, ..RouteConfig::new(Timeouts::default(), Retry::default()) }
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![8 => select(vec!["a", "b", "c", "é", "a\"b"]).prop_map(str::to_owned), 1 => any::<String>()]
}

fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        select(vec!["", "x", "]}", "\\", "\\\"", "😀"]).prop_map(Json::from),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            map_of(inner).prop_map(Json::Object),
        ]
    })
}

fn map_of(value: impl Strategy<Value = Json>) -> impl Strategy<Value = Map<String, Json>> {
    prop::collection::vec((key(), value), 0..5).prop_map(|entries| entries.into_iter().collect())
}

/// Members as a client may write them: keys twice, escapes, white space.
fn body() -> impl Strategy<Value = String> {
    let member = (key(), value(), any::<bool>(), any::<bool>(), select(vec!["", " ", "\n\t"]));
    let text = member.prop_map(|(key, value, escaped, pretty, space)| {
        let units: String = key.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        let key = if escaped { format!("\"{units}\"") } else { Json::from(key).to_string() };
        let value = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
        format!("{space}{key}{space}:{space}{value}{space}")
    });
    prop::collection::vec(text, 0..6).prop_map(|members| format!("{{{}}}", members.join(",")))
}

/// Applies defaults: the client's values win, maps are merged.
fn below(body: &mut Map<String, Json>, defaults: &Map<String, Json>) {
    for (key, default) in defaults {
        match (body.get_mut(key), default) {
            (None, default) => drop(body.insert(key.clone(), default.clone())),
            (Some(Json::Object(there)), Json::Object(default)) => below(there, default),
            (Some(_), _) => {}
        }
    }
}

fn without_nulls(map: &Map<String, Json>) -> Map<String, Json> {
    map.iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

proptest! {
    /// Holds for any of its names in the client's body, the defaults and the override.
    #[test]
    fn override_of_the_limit_is_the_only_limit(
        client in subsequence(LIMITS.to_vec(), 0..=3), default in select(LIMITS.to_vec()),
        name in select(LIMITS.to_vec()), is_null in any::<bool>(),
    ) {
        let one = |name: &str, value: Json| Map::from_iter([(name.to_owned(), value)]);
        let edits = route(BodyEdits {
            defaults: one(default, json!(9)),
            overrides: one(name, if is_null { Json::Null } else { json!(100) }),
            ..BodyEdits::default()
        });
        let body: Map<String, Json> = client.iter().map(|name| ((*name).to_owned(), json!(5000))).collect();
        for dialect in super::super::dialect::ALL_DIALECTS {
            let body = Json::Object(body.clone()).to_string();
            let sent = BodyRewrite::new(&edits, dialect).edit(body.as_bytes()).unwrap();
            let sent = sent.body.unwrap_or(body.into_bytes());
            let sent: Map<String, Json> = serde_json::from_slice(&sent).unwrap();
            let limits: Vec<Json> = sent.values().cloned().collect();
            prop_assert_eq!(limits, if is_null { vec![] } else { vec![json!(100)] }, "{:?}", dialect);
        }
    }

    #[test]
    fn edit_equals_a_merge_of_parsed_documents(
        body in body(), defaults in map_of(value()), overrides in map_of(value()),
        remove in prop::collection::vec(key(), 0..3),
    ) {
        // A configuration that sets what it removes is refused.
        let kept = |map: Map<String, Json>| {
            map.into_iter().filter(|(key, _)| !remove.contains(key)).collect::<Map<_, _>>()
        };
        let (defaults, overrides) = (kept(defaults), kept(overrides));
        let edits = BodyEdits {
            defaults: defaults.clone(),
            overrides: overrides.clone(),
            remove: remove.clone(),
            ..BodyEdits::default()
        };
        let edits = BodyRewrite::new(&route(edits), BodyDialect::Chat);
        let edited = edits.edit(body.as_bytes()).unwrap();
        let Json::Object(mut wanted) = serde_json::from_str(&body).unwrap() else { unreachable!() };
        wanted.retain(|key, _| !remove.contains(key));
        below(&mut wanted, &without_nulls(&defaults));
        let mut wanted = Json::Object(wanted);
        patch(&mut wanted, &Json::Object(overrides));
        let out = edited.body.clone().unwrap_or_else(|| body.clone().into_bytes());
        prop_assert_eq!(serde_json::from_slice::<Json>(&out).unwrap(), wanted);
        prop_assert_eq!(edits.edit(body.as_bytes()).unwrap(), edited);
    }

    /// Every member that no rule names stands in the result as it was written.
    #[test]
    fn what_is_not_edited_stays_byte_for_byte(body in body(), set in map_of(value())) {
        let edits = BodyEdits { overrides: set.clone(), ..BodyEdits::default() };
        let edited = BodyRewrite::new(&route(edits), BodyDialect::Chat).edit(body.as_bytes()).unwrap();
        let out = edited.body.unwrap_or_else(|| body.clone().into_bytes());
        let (before, after) = (json::document(body.as_bytes()).unwrap(), json::document(&out).unwrap());
        let written = |bytes: &[u8], object: &JsonObject<'_>| {
            let kept = object.members.iter().filter(|member| !set.contains_key(&*member.key));
            kept.map(|member| bytes[member.start..member.value.end].to_vec()).collect::<Vec<_>>()
        };
        prop_assert_eq!(written(body.as_bytes(), &before), written(&out, &after));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in r#"\{?[\[\]{}",:\\a1 \-\PC]{0,40}\}?"#, set in map_of(value())) {
        let mut config = route(BodyEdits { overrides: set.clone(), defaults: set, ..BodyEdits::default() });
        config.think_tags = true;
        config.metadata_overrides = true;
        let mut scanner = Scanner::new();
        scanner.scan(bytes.as_bytes());
        for dialect in super::super::dialect::ALL_DIALECTS {
            let edits = BodyRewrite::new(&config, dialect);
            let known = edits.edit_known(bytes.as_bytes(), &|at| scanner.end_of(at));
            prop_assert_eq!(known, edits.edit(bytes.as_bytes()));
        }
    }
}

#[test]
fn recognises_bodies_that_need_no_edit() {
    let nothing = route(BodyEdits::default());
    assert!(!BodyRewrite::new(&nothing, BodyDialect::Chat).may_change(Some("a")));
    let renamed = RouteConfig { to: Some("a".into()), ..nothing.clone() };
    for (model, changes) in [(Some("a"), false), (Some("b"), true), (None, true)] {
        assert_eq!(BodyRewrite::new(&renamed, BodyDialect::Chat).may_change(model), changes, "{model:?}");
    }
    let limit = json!({"reasoning_effort": "low"}).as_object().cloned().unwrap();
    let limit = route(BodyEdits { defaults: limit, ..BodyEdits::default() });
    assert!(BodyRewrite::new(&limit, BodyDialect::Chat).may_change(Some("a")));
    assert!(!BodyRewrite::new(&limit, BodyDialect::Messages).may_change(Some("a")));
    let tags = RouteConfig { think_tags: true, token_ids: true, ..nothing };
    assert!(BodyRewrite::new(&tags, BodyDialect::Chat).may_change(None));
    assert!(!BodyRewrite::new(&tags, BodyDialect::Responses).may_change(None));
}

#[test]
fn changes_the_last_of_equal_lists_and_no_broken_list() {
    let roles = vec![("developer".to_owned(), "system".to_owned())];
    let edits = BodyRewrite::new(&route(BodyEdits { roles, ..BodyEdits::default() }), BodyDialect::Chat);
    for (before, after) in [
        ("[D]", Some("[S]")),
        ("[[D,1],[D]]", Some("[[S,1],[S]]")),
        ("[D],\"messages\":[D]", Some("[D],\"messages\":[S]")),
        ("[D],\"messages\":[D 1]", None),
        ("[D],\"messages\":{}", None),
        ("[D 1],\"messages\":[D]", Some("[D 1],\"messages\":[S]")),
    ] {
        let said = |text: &str| {
            let text = text.replace('D', r#"{"role":"developer"}"#).replace('S', r#"{"role":"system"}"#);
            format!("{{\"messages\":{text}}}").into_bytes()
        };
        assert_eq!(edits.edit(&said(before)).unwrap().body, after.map(said), "{before}");
    }
}

/// The configuration check rejects this; other routes still get the ids.
#[test]
fn token_ids_win_over_removed_fields() {
    let remove = ["logprobs", "return_token_ids", "top_logprobs"].map(str::to_owned).to_vec();
    let config = RouteConfig { token_ids: true, ..route(BodyEdits { remove, ..BodyEdits::default() }) };
    let edits = BodyRewrite::new(&config, BodyDialect::Chat);
    for body in [
        r#"{"logprobs":true,"top_logprobs":2}"#,
        r#"{"logprobs":false}"#,
        r#"{"return_token_ids":null}"#,
        "{}",
    ] {
        let edited: Json =
            serde_json::from_slice(&edits.edit(body.as_bytes()).unwrap().body.unwrap()).unwrap();
        assert_eq!(edited, json!({"logprobs": true, "return_token_ids": true}), "{body}");
    }
}

#[test]
fn puts_the_served_name_into_a_form() {
    let kind = "multipart/form-data; boundary=AbC";
    let form = |models: &[&str], end: &str| {
        let head = "--AbC\r\nContent-Disposition: form-data; name=";
        let part = |model: &&str| format!("{head}\"model\"\r\n\r\n{model}\r\n");
        let file = format!("{head}\"file\"; filename=\"model\"\r\n\r\nfast\r\n");
        format!("{file}{}--AbC{end}", models.iter().map(part).collect::<String>())
    };
    let renamed = RouteConfig { to: Some("whisper".into()), ..route(BodyEdits::default()) };
    let edits = BodyRewrite::new(&renamed, BodyDialect::Other);
    for (models, end, wanted) in [
        (&["fast"][..], "--\r\n", Some(&["whisper"][..])),
        (&["other", "fast"], "--", Some(&["other", "whisper"])),
        (&["whisper"], "--", None),
        (&[], "--", Some(&["whisper"])),
        (&[], "--\r\n", Some(&["whisper"])),
        (&[""], "--", Some(&["whisper"])),
        (&["fast"], "\r\n", None),
        (&[], "\r\n", None),
    ] {
        let edited = edits.edit_form(kind, form(models, end).as_bytes());
        assert_eq!(edited, wanted.map(|models| form(models, end).into_bytes()), "{models:?}");
    }
    let alone = b"--AbC\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--AbC--";
    assert_eq!(edits.edit_form(kind, b"--AbC--").as_deref(), Some(&alone[..]));
    assert_eq!(edits.edit_form("text/plain", form(&["fast"], "--").as_bytes()), None);
    let unnamed = BodyRewrite::new(&route(BodyEdits::default()), BodyDialect::Other);
    assert_eq!(unnamed.edit_form(kind, form(&["fast"], "--").as_bytes()), None);
    assert!(edits.renames(Some("fast")) && !edits.renames(Some("whisper")) && !unnamed.renames(None));
}
