//! The scanner beside a full parser, over any documents, cuts and bytes.

use super::*;

fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        any::<String>().prop_map(Json::from),
        select(vec!["llama", "", "true", "\\", "\\\"", "data:", "]}", "é😀"]).prop_map(Json::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Json::from),
            prop::collection::vec(-20..200_000, 0..60).prop_map(Json::from),
            prop::collection::vec((key(), inner), 0..6)
                .prop_map(|entries| Json::Object(entries.into_iter().collect())),
        ]
    })
}

fn key() -> impl Strategy<Value = String> {
    let known = fields::FIELDS.map(|(_, name)| name.to_owned());
    prop_oneof![4 => select(known.to_vec()), 1 => any::<String>()]
}

/// Every UTF-16 unit of the strings that `escaped` asks for is written as an escape.
fn written(value: &Json, escaped: bool, pretty: bool) -> String {
    let json = match value {
        Json::String(text) if escaped => {
            let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
            return format!("\"{units}\"");
        }
        _ if pretty => serde_json::to_string_pretty(value),
        _ => serde_json::to_string(value),
    };
    json.unwrap()
}

#[derive(Clone, Debug)]
struct Entry {
    key: String,
    value: Json,
    /// The value as it stands in the body.
    raw: String,
    text: String,
}

prop_compose! {
    fn entry()(
        key in key(), value in value(), escaped_key in any::<bool>(), escaped in any::<bool>(),
        pretty in any::<bool>(), space in select(vec!["", " ", "\r\n", "\t  "]),
    ) -> Entry {
        let name = written(&Json::from(key.as_str()), escaped_key, false);
        let raw = written(&value, escaped, pretty);
        let text = format!("{space}{name}{space}:{space}{raw}{space}");
        Entry { key, value, raw, text }
    }
}

fn document() -> impl Strategy<Value = (Vec<Entry>, String)> {
    prop::collection::vec(entry(), 0..10).prop_map(|entries| {
        let texts: Vec<&str> = entries.iter().map(|entry| entry.text.as_str()).collect();
        let body = format!("{{{}}}", texts.join(","));
        (entries, body)
    })
}

/// Counts as plainly as can be, to hold the fast way against.
fn counted(text: &str, value: &Json) -> u64 {
    fn numbers(value: &Json) -> u64 {
        match value {
            Json::Number(_) => 1,
            Json::Array(items) => items.iter().map(numbers).sum(),
            Json::Object(entries) => entries.values().map(numbers).sum(),
            _ => 0,
        }
    }
    let (mut inside, mut escape, mut bytes) = (false, false, 0);
    for byte in text.bytes() {
        match byte {
            b'"' if !escape => inside = !inside,
            _ if inside => bytes += 1,
            _ => {}
        }
        escape = inside && byte == b'\\' && !escape;
    }
    bytes + 4 * numbers(value)
}

proptest! {
    #[test]
    fn agrees_with_a_full_parser((entries, body) in document()) {
        let parsed: Json = serde_json::from_str(&body).unwrap();
        let last = |field: BodyField| entries.iter().rfind(|entry| entry.key == field.name());
        let scanner = scanned(body.as_bytes());
        let facts = scanner.facts(body.as_bytes());
        prop_assert_eq!(facts.state, ScanProgress::Complete);
        let model = match &parsed["model"] {
            Json::Null => ModelField::Absent,
            Json::String(name) => ModelField::named(name.into()),
            _ => ModelField::NotAString,
        };
        prop_assert_eq!(&facts.model, &model);
        let stream = match &parsed["stream"] {
            Json::Bool(truth) => *truth,
            Json::Number(number) => number.as_f64() == Some(1.0),
            Json::String(word) => is_true_word(word),
            _ => false,
        };
        prop_assert_eq!(facts.stream, stream);
        prop_assert_eq!(facts.previous_response_id.as_deref(), parsed["previous_response_id"].as_str());
        let mut prompt_bytes = 0;
        for (field, name) in fields::FIELDS {
            prop_assert_eq!(facts.has(field), !parsed[name].is_null(), "{}", name);
            let span = scanner.span(field).map(|span| &body[span]);
            prop_assert_eq!(span, last(field).map(|entry| entry.raw.as_str()));
            if let Some(entry) = last(field).filter(|_| field.is_prompt()) {
                prompt_bytes += counted(&entry.raw, &entry.value);
            }
        }
        prop_assert_eq!(facts.prompt_bytes, prompt_bytes);
    }

    #[test]
    fn facts_do_not_depend_on_the_pieces(
        (_, body) in document(),
        mut cuts in prop::collection::vec(any::<Index>(), 0..8),
    ) {
        let body = body.as_bytes();
        cuts.sort_by_key(|cut| cut.index(body.len()));
        let mut scanner = Scanner::new();
        for cut in cuts {
            let prefix = &body[..cut.index(body.len())];
            scanner.scan(prefix);
            prop_assert_eq!(scanner.facts(prefix), scanned(prefix).facts(prefix));
        }
        scanner.scan(body);
        prop_assert_eq!(scanner.facts(body), scanned(body).facts(body));
    }

    #[test]
    fn byte_by_byte_is_no_different((_, body) in document()) {
        let body = body.as_bytes();
        let mut scanner = Scanner::new();
        for end in 0..body.len() {
            let prefix = &body[..end];
            scanner.scan(prefix);
            prop_assert_eq!(scanner.progress(), ScanProgress::Cut);
            prop_assert_eq!(scanner.facts(prefix), scanned(prefix).facts(prefix));
        }
        scanner.scan(body);
        prop_assert_eq!(scanner.facts(body), scanned(body).facts(body));
    }

    #[test]
    fn any_bytes_are_taken(body in any::<Vec<u8>>(), cut in any::<Index>()) {
        let mut scanner = Scanner::new();
        scanner.scan(&body[..cut.index(body.len() + 1)]);
        scanner.scan(&body);
        prop_assert_eq!(scanner.facts(&body), scanned(&body).facts(&body));
    }

    #[test]
    fn bytes_that_look_like_json_are_taken(
        body in r#"\{("model"|"prompt"|[{}\[\]":,\\]|null|1e|-|\\u12| ){0,30}"#,
    ) {
        let mut scanner = Scanner::new();
        for end in 0..=body.len() {
            scanner.scan(&body.as_bytes()[..end]);
            scanner.facts(&body.as_bytes()[..end]);
        }
        let whole = scanned(body.as_bytes());
        prop_assert_eq!(scanner.facts(body.as_bytes()), whole.facts(body.as_bytes()));
    }
}

proptest! {
    /// Of what an editor may do, and more: members go, come, and stand elsewhere.
    #[test]
    fn an_edited_body_is_read_as_any_other(
        (entries, body) in document(), (others, _) in document(),
        stays in prop::collection::vec(any::<bool>(), 10), first in any::<Index>(),
    ) {
        let kept = entries.iter().zip(&stays).filter(|(_, stays)| **stays).map(|(entry, _)| entry);
        let mut texts: Vec<&str> = kept.chain(&others).map(|entry| entry.text.as_str()).collect();
        let shift = if texts.is_empty() { 0 } else { first.index(texts.len()) };
        texts.rotate_left(shift);
        let edited = format!("{{{}}}", texts.join(","));
        let before = scanned(body.as_bytes());
        let again = before.of_edited(body.as_bytes(), edited.as_bytes());
        let fresh = scanned(edited.as_bytes());
        prop_assert_eq!(again.facts(edited.as_bytes()), fresh.facts(edited.as_bytes()));
        for (field, name) in fields::FIELDS {
            prop_assert_eq!(again.span(field), fresh.span(field), "{}", name);
            if let Some(span) = before.span(field) {
                prop_assert_eq!(before.end_of(span.start), Some(span.end), "{}", name);
            }
        }
    }

    /// Bodies that are hardly any, cut anywhere, with the same values in them, also inside one another.
    #[test]
    fn what_looks_like_an_edited_body_is_read_as_any_other(
        pieces in prop::collection::vec(
            select(vec![
                "{", "}", "[", "]", ",", ":", "\"", "\\", " ", "null", "1", "\"model\":", "\"m\\u006fdel\":",
                "\"prompt\":", "\"model\":\"a\",", "\"prompt\":[1,\"]\"],",
                "\"prompt\":{\"prompt\":[1,\"]\"]},",
                "[1,\"]\"]", "\"data:a\"", "\"n\":1,", "\u{feff}", "é",
            ]),
            0..16,
        ),
        more in prop::collection::vec(any::<Index>(), 0..16), cut in any::<Index>(),
    ) {
        let old = format!("{{{}", pieces.concat());
        let piece = |at: &Index| pieces.get(at.index(pieces.len().max(1))).copied();
        let again: String = more.iter().filter_map(piece).collect();
        let edited = format!("{{{again}}}");
        let old = &old.as_bytes()[..cut.index(old.len() + 1)];
        let told = scanned(old).of_edited(old, edited.as_bytes());
        let fresh = scanned(edited.as_bytes());
        prop_assert_eq!(told.facts(edited.as_bytes()), fresh.facts(edited.as_bytes()));
        for (field, name) in fields::FIELDS {
            prop_assert_eq!(told.span(field), fresh.span(field), "{}", name);
        }
    }
}
