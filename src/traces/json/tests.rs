//! Tests of `traces::json`: the wire form parses to what the record holds.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn string(text: &str) -> String {
    let mut out = String::new();
    push_string(&mut out, text);
    out
}

proptest! {
    #[test]
    fn a_string_is_written_as_json(text in any::<String>()) {
        prop_assert_eq!(serde_json::from_str::<String>(&string(&text)).unwrap(), text);
    }

    #[test]
    fn a_float_is_written_to_the_bit(bits in any::<u64>()) {
        let number = f64::from_bits(bits);
        let mut out = String::new();
        push_float(&mut out, number);
        if number.is_finite() {
            prop_assert_eq!(serde_json::from_str::<f64>(&out).unwrap().to_bits(), bits);
        } else {
            prop_assert_eq!(out, "null");
        }
    }

    #[test]
    fn ids_are_written_as_a_list(ids in prop::collection::vec(any::<u32>(), 0..20)) {
        let mut out = String::new();
        push_ids(&mut out, &ids);
        prop_assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), json!(ids));
    }
}

#[test]
fn control_characters_are_escaped() {
    assert_eq!(
        string("a\"\\\n\r\t\u{0}\u{1f}\u{7f}\u{2028}é"),
        "\"a\\\"\\\\\\n\\r\\t\\u0000\\u001f\u{7f}\u{2028}é\""
    );
}

#[test]
fn a_routing_value_of_any_form_is_a_list_of_strings() {
    for (experts, expected) in [
        ("[\"a\",\"b\"]", json!(["a", "b"])),
        ("\"a\"", json!(["a"])),
        ("[[1,2]]", json!(["[[1,2]]"])),
        ("[]", json!([])),
    ] {
        let choice = ChoiceRecord { routed_experts: Some(experts.into()), ..ChoiceRecord::default() };
        let mut out = String::new();
        push_routing(&mut out, Some(&choice));
        assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), expected, "{experts}");
    }
}
