//! Merges `GET /v1/models` of several upstreams into one list.
//!
//! A card stays as its upstream wrote it, byte for byte and with unknown fields. Only `max_model_len` is
//! replaced, when another replica of the same model has a lower one: any replica must accept a request that
//! fits the list.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The largest list of models, in bytes.
const MAX_BODY: usize = 16 << 20;
/// The largest number of cards in a list.
const MAX_CARDS: usize = 10_000;

/// The longest model name, in bytes: it has to fit into error messages and labels.
const MAX_ID: usize = 1024;

/// One model in an upstream's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelCard {
    pub id: String,
    /// The whole card, as the upstream wrote it.
    pub raw: String,
    pub max_model_len: Option<u64>,
    /// The base model of a LoRA adapter.
    pub parent: Option<String>,
}

/// Parses the cards of an upstream's list. Cards without a valid id are left out; a body that is not a list
/// is an error with the reason.
pub(crate) fn parse_models(body: &[u8]) -> Result<Vec<ModelCard>, String> {
    #[derive(serde::Deserialize)]
    struct ModelList<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    if body.len() > MAX_BODY {
        return Err(format!("model list of {} bytes, at most {MAX_BODY} are read", body.len()));
    }
    let list: ModelList<'_> =
        serde_json::from_slice(body).map_err(|error| format!("model list is not vLLM's: {error}"))?;
    if list.data.len() > MAX_CARDS {
        return Err(format!("model list has {} entries, at most {MAX_CARDS} are read", list.data.len()));
    }
    Ok(list.data.into_iter().filter_map(parse_card).collect())
}

fn parse_card(raw: &RawValue) -> Option<ModelCard> {
    let entries: ModelEntries<'_> = serde_json::from_str(raw.get()).ok()?;
    let id: String = entries.last("id")?;
    if id.is_empty() || id.len() > MAX_ID {
        return None;
    }
    Some(ModelCard {
        id,
        raw: raw.get().to_owned(),
        max_model_len: entries.last("max_model_len"),
        parent: entries.last("parent"),
    })
}

/// Builds the list of these names, in this order, each with the cards that all upstreams have for its model:
/// the first card, under that name, with the least `max_model_len` of the cards that state one. A name
/// without a card is left out.
pub(crate) fn models_list<'c>(models: impl IntoIterator<Item = (&'c str, Vec<&'c ModelCard>)>) -> Vec<u8> {
    let mut body = String::from(r#"{"object":"list","data":["#);
    let first = |(name, cards): (&'c str, Vec<&'c ModelCard>)| {
        let least = cards.iter().filter_map(|card| card.max_model_len).min();
        Some((name, *cards.first()?, least))
    };
    for (index, (name, card, least)) in models.into_iter().filter_map(first).enumerate() {
        body.push_str(if index == 0 { "" } else { "," });
        let least = least.filter(|least| card.max_model_len != Some(*least));
        let name = Some(name).filter(|name| card.id != *name);
        match (least, name) {
            (None, None) => body.push_str(&card.raw),
            (least, name) => push_changed(&mut body, card, least, name),
        }
    }
    body.push_str("]}");
    body.into_bytes()
}

/// Writes a card with another `max_model_len` or under another name; every other value stays as it was
/// written.
fn push_changed(body: &mut String, card: &ModelCard, length: Option<u64>, name: Option<&str>) {
    // A card that was not parsed may hold anything and is shown unchanged.
    let Ok(ModelEntries(entries)) = serde_json::from_str(&card.raw) else {
        body.push_str(&card.raw);
        return;
    };
    let mut written: Vec<(&str, &str)> =
        entries.iter().map(|(key, value)| (key.as_str(), value.get())).collect();
    let length = length.map(|length| length.to_string());
    let name = name.map(|name| serde_json::Value::from(name).to_string());
    for (key, value) in [("max_model_len", length.as_deref()), ("id", name.as_deref())] {
        let Some(value) = value else { continue };
        let place = written.iter().position(|(known, _)| *known == key).unwrap_or(written.len());
        written.retain(|(known, _)| *known != key);
        written.insert(place.min(written.len()), (key, value));
    }
    body.push('{');
    for (index, (key, value)) in written.into_iter().enumerate() {
        body.push_str(if index == 0 { "" } else { "," });
        body.push_str(&serde_json::Value::from(key).to_string());
        body.push(':');
        body.push_str(value);
    }
    body.push('}');
}

/// The entries of an object in order, with duplicate keys and unparsed values.
struct ModelEntries<'a>(Vec<(String, &'a RawValue)>);

impl ModelEntries<'_> {
    /// Returns the value of a key, the last one as in Python, if it has this type.
    fn last<'s, T: Deserialize<'s>>(&'s self, key: &str) -> Option<T> {
        let (_, value) = self.0.iter().rfind(|(known, _)| known == key)?;
        serde_json::from_str(value.get()).ok()
    }
}

impl<'de> Deserialize<'de> for ModelEntries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = ModelEntries<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(ModelEntries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const SAMPLE: &[u8] = include_bytes!("../../tests/data/vllm-0.32/models.body");

    fn cards(list: &str) -> Vec<ModelCard> {
        parse_models(format!(r#"{{"object":"list","data":{list}}}"#).as_bytes()).unwrap()
    }

    /// The cards of all upstreams for every name.
    fn union(upstreams: &[Vec<ModelCard>]) -> String {
        let mut models: Vec<(&str, Vec<&ModelCard>)> = Vec::new();
        for card in upstreams.iter().flatten() {
            match models.iter_mut().find(|(name, _)| *name == card.id) {
                Some((_, cards)) => cards.push(card),
                None => models.push((&card.id, vec![card])),
            }
        }
        String::from_utf8(models_list(models)).unwrap()
    }

    #[test]
    fn a_card_under_another_name_says_the_rest_as_it_did() {
        let all = cards(r#"[{"x":1.0,"id":"a","max_model_len":9},{"id":"a","max_model_len":8},{"id":"b"}]"#);
        let list = models_list([("face", vec![&all[0], &all[1]]), ("none", vec![]), ("b", vec![&all[2]])]);
        assert_eq!(
            String::from_utf8(list).unwrap(),
            r#"{"object":"list","data":[{"x":1.0,"id":"face","max_model_len":8},{"id":"b"}]}"#
        );
    }

    #[test]
    fn the_list_of_one_upstream_is_its_own_byte_for_byte() {
        let tiny = parse_models(SAMPLE).unwrap();
        assert_eq!(
            (tiny[0].id.as_str(), tiny[0].max_model_len, &tiny[0].parent),
            ("tiny", Some(4096), &None)
        );
        assert_eq!(union(std::slice::from_ref(&tiny)).as_bytes(), SAMPLE);
        assert_eq!(union(&[tiny.clone(), tiny]).as_bytes(), SAMPLE);
        assert_eq!(union(&[]), r#"{"object":"list","data":[]}"#);
    }

    #[test]
    fn the_first_card_stays_and_the_least_length_is_shown() {
        let first = cards(r#"[{ "id" : "a", "max_model_len":8192, "x":1.50, "\u0078":2},{"id":"b"}]"#);
        let second =
            cards(r#"[{"id":"a","max_model_len":4096,"y":2},{"id":"lora","parent":"a"},{"id":"b"}]"#);
        let third = cards(r#"[{"id":"a","max_model_len":null},{"id":"b","max_model_len":7}]"#);
        assert_eq!(second[1].parent.as_deref(), Some("a"));
        assert_eq!(
            union(&[first.clone(), second, third]),
            r#"{"object":"list","data":[{"id":"a","max_model_len":4096,"x":1.50,"x":2},"#.to_owned()
                + r#"{"id":"b","max_model_len":7},{"id":"lora","parent":"a"}]}"#
        );
        let untouched = r#"{ "id" : "a", "max_model_len":8192, "x":1.50, "\u0078":2}"#;
        assert!(union(&[first]).contains(untouched));
    }

    #[test]
    fn odd_cards_are_left_out_and_odd_values_are_absent() {
        let long = "x".repeat(MAX_ID + 1);
        let list = format!(
            r#"[1,null,[],{{}},{{"id":7}},{{"id":""}},{{"id":"{long}"}},
            {{"id":"a","max_model_len":-1,"parent":[]}},{{"id":"b","max_model_len":1e3}},
            {{"id":"x","id":"c"}}]"#
        );
        let cards = cards(&list);
        let ids: Vec<&str> = cards.iter().map(|card| card.id.as_str()).collect();
        assert_eq!(ids, ["a", "b", "c"]);
        assert!(cards.iter().all(|card| card.max_model_len.is_none() && card.parent.is_none()));
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        let deep = format!(r#"{{"data":{}"#, "[".repeat(100_000));
        for body in ["", "[]", "{}", r#"{"data":{}}"#, r#"{"data":[{]}"#, "<html>", deep.as_str()] {
            let error = parse_models(body.as_bytes()).unwrap_err();
            assert!(error.starts_with("model list is not vLLM's: "), "{error}");
        }
        let many = format!(r#"{{"data":[{}1]}}"#, "1,".repeat(MAX_CARDS));
        assert!(parse_models(many.as_bytes()).unwrap_err().contains("10001 entries"));
        assert!(parse_models(&vec![b' '; MAX_BODY + 1]).unwrap_err().contains("bytes"));
    }

    #[test]
    fn a_card_that_no_parser_made_is_shown_as_it_is() {
        let card = |raw: &str, length| ModelCard {
            id: "a".to_owned(),
            raw: raw.to_owned(),
            max_model_len: Some(length),
            parent: None,
        };
        assert!(union(&[vec![card("7", 2)], vec![card("8", 1)]]).ends_with("[7]}"));
    }

    proptest! {
        #[test]
        fn the_union_is_what_a_parser_would_make(
            upstreams in prop::collection::vec(
                prop::collection::vec(("[abc]|é\"", prop::option::of(0u64..9), any::<i64>()), 0..5), 0..4),
        ) {
            let lists: Vec<Vec<ModelCard>> = upstreams.iter().map(|list| {
                let list: Vec<Value> = list.iter()
                    .map(|(id, length, other)| json!({"id": id, "max_model_len": length, "other": other}))
                    .collect();
                cards(&Value::from(list).to_string())
            }).collect();
            let mut expected: Vec<Value> = Vec::new();
            for (id, length, other) in upstreams.iter().flatten() {
                match expected.iter_mut().find(|card| card["id"] == **id) {
                    Some(card) => {
                        let least = card["max_model_len"].as_u64().into_iter().chain(*length).min();
                        card["max_model_len"] = json!(least);
                    }
                    None => expected.push(json!({"id": id, "max_model_len": length, "other": other})),
                }
            }
            prop_assert_eq!(union(&lists), json!({"object": "list", "data": expected}).to_string());
        }

        #[test]
        fn any_bytes_are_taken(body in any::<Vec<u8>>()) {
            let _ = parse_models(&body);
        }
    }
}
