//! The meter beside a plain parser, over any documents, cuts and bytes.

use super::*;

/// Any document, with names that have a meaning and others.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..5000).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        select(vec![
            "stop",
            "length",
            "error",
            "response.failed",
            "x-1",
            "a\\\"b",
            "\"usage\":{",
            "\n",
            "é{["
        ])
        .prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 60, 8, |inner| {
        prop_oneof![
            1 => prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            6 => prop::collection::vec((name(), inner), 0..8).prop_map(|pairs| Value::Object(
                pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
            )),
        ]
    })
}

fn name() -> impl Strategy<Value = &'static str> {
    let often = ["usage", "usage", "usage", "response", "message", "error"];
    let seldom = [
        "id",
        "type",
        "code",
        "prompt_tokens",
        "input_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "completion_tokens_details",
        "prompt_tokens_details",
        "cached_tokens",
        "reasoning_tokens",
        "content",
        "a\"b\\",
    ];
    prop_oneof![select(often.to_vec()), select(seldom.to_vec())]
}

/// The expected results, read from the tree of one document whose members keep their order.
fn plainly(tree: &Value) -> Told {
    let mut found = MeterReadings::default();
    let Value::Object(top) = tree else { return (Usage::default(), None, None) };
    for (key, value) in top {
        object(key, value, &mut found);
        match (key.as_str(), value) {
            ("response" | "message", Value::Object(inner)) => {
                inner.iter().for_each(|(key, value)| object(key, value, &mut found));
            }
            ("type" | "object", word) if matches!(plain(word), Some("error" | "response.failed")) => {
                found.fail();
            }
            _ => {}
        }
    }
    let id = found.id.clone().map(String::from);
    let document = UsageMeter { form: MeterInput::Document, document: UsageDocument::default(), found };
    (document.usage(), id, document.found.failure)
}

/// A word that a meter keeps.
fn plain(word: &Value) -> Option<&str> {
    let word = word.as_str()?;
    (word.len() <= 96 && serde_json::to_string(word).unwrap().len() == word.len() + 2).then_some(word)
}

fn object(key: &str, value: &Value, found: &mut MeterReadings) {
    match (key, value) {
        ("usage", Value::Object(_)) => found.counts.update(&UsageCounts {
            prompt: value["prompt_tokens"].as_u64(),
            input: value["input_tokens"].as_u64(),
            cache_read: value["cache_read_input_tokens"].as_u64(),
            cache_creation: value["cache_creation_input_tokens"].as_u64(),
            cached: value["prompt_tokens_details"]["cached_tokens"].as_u64(),
            output: value["output_tokens"].as_u64(),
            reasoning: value["completion_tokens_details"]["reasoning_tokens"].as_u64(),
        }),
        ("id", id) if found.id.is_none() => {
            found.id = plain(id).filter(|id| !id.is_empty()).map(Box::from);
        }
        ("error", Value::String(_)) => found.fail(),
        ("error", Value::Object(error)) => {
            found.fail();
            let code = error.get("code").and_then(Value::as_u64).filter(|code| (400..600).contains(code));
            if let Some(code) = code {
                found.failure = Some(StreamError { code: u16::try_from(code).ok() });
            }
        }
        _ => {}
    }
}

fn cut<'b>(body: &'b [u8], cuts: &[Index]) -> Vec<&'b [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
    ends.extend([0, body.len()]);
    ends.sort_unstable();
    ends.windows(2).map(|pair| &body[pair[0]..pair[1]]).collect()
}

proptest! {
    #[test]
    fn agrees_with_the_tree_of_any_document(
        tree in value(),
        pretty: bool,
        cuts in prop::collection::vec(any::<Index>(), 0..8),
    ) {
        let text = if pretty { serde_json::to_string_pretty(&tree) } else { serde_json::to_string(&tree) };
        let text = text.unwrap();
        prop_assert_eq!(pieces(JSON, cut(text.as_bytes(), &cuts)), plainly(&tree));
    }

    #[test]
    fn reads_the_same_from_a_stream_cut_anywhere(
        trees in prop::collection::vec(value(), 1..8),
        noise in prop::collection::vec(any::<u8>(), 0..20),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
    ) {
        let event = |tree| format!("data: {tree}\n\n").into_bytes();
        let mut stream: Vec<u8> = trees.iter().flat_map(event).collect();
        stream.extend(noise);
        prop_assert_eq!(pieces(SSE, cut(&stream, &cuts)), whole(SSE, &stream));
        prop_assert_eq!(pieces(SSE, stream.chunks(1)), whole(SSE, &stream));
    }

    #[test]
    fn accepts_any_bytes(
        body in prop::collection::vec(any::<u8>(), 0..200),
        cuts in prop::collection::vec(any::<Index>(), 0..5),
    ) {
        for kind in [JSON, SSE] {
            prop_assert_eq!(pieces(kind, cut(&body, &cuts)), whole(kind, &body));
        }
    }
}
