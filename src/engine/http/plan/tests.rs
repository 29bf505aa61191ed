//! What the simulated engine answers, and where it ends.

use super::*;

fn whole(answer: &PlannedAnswer) -> String {
    answer.text(AnswerPart::Text, usize::MAX)
}

#[test]
fn plans_the_same_answer_for_the_same_prompt() {
    let sampling = SamplingOptions { max_tokens: Some(40), ..SamplingOptions::default() };
    let (one, two) = (PlannedAnswer::new(&sampling, 5), PlannedAnswer::new(&sampling, 5));
    assert_eq!(one.pieces, two.pieces);
    assert_ne!(whole(&one), whole(&PlannedAnswer::new(&sampling, 6)));
    assert_eq!((one.pieces.len(), one.finish), (40, Finish::Length));
    assert_eq!(token::encode(&whole(&one)), one.ids(40), "its text has the tokens it was reported in");
}

#[test]
fn ends_by_itself_without_a_requested_length() {
    let answer = PlannedAnswer::new(&SamplingOptions::default(), 1);
    assert_eq!((answer.pieces.len(), answer.finish), (DEFAULT_TOKENS, Finish::Stop));
}

#[test]
fn ends_the_text_before_a_stop_string() {
    let free = PlannedAnswer::new(&SamplingOptions { max_tokens: Some(30), ..SamplingOptions::default() }, 9);
    let text = whole(&free);
    let stop = text[10..16].to_owned();
    let sampling =
        SamplingOptions { max_tokens: Some(30), stop: vec![stop.clone()], ..SamplingOptions::default() };
    let answer = PlannedAnswer::new(&sampling, 9);
    assert_eq!(whole(&answer), text[..text.find(&stop).unwrap()]);
    assert_eq!((answer.finish, answer.stop_reason), (Finish::Stop, Some(stop)));
}

#[test]
fn json_fits_its_schema() {
    let schema = json!({
        "type": "object",
        "required": ["name", "age", "tags", "mood", "home", "next"],
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 18},
            "tags": {"type": "array", "minItems": 2, "items": {"type": "boolean"}},
            "mood": {"enum": ["good", "bad"]},
            "home": {"$ref": "#/$defs/home"},
            "next": {"anyOf": [{"type": "null"}, {"type": "string"}]},
            "optional": {"type": "string"},
        },
        "$defs": {
            "home": {"type": "object", "properties": {"at": {"type": "number"}}, "required": ["at"]},
        },
    });
    let sampling = SamplingOptions { schema: Some(schema), ..SamplingOptions::default() };
    let value: Value = serde_json::from_str(&whole(&PlannedAnswer::new(&sampling, 3))).unwrap();
    assert!(value["name"].is_string() && value["tags"].as_array().unwrap().len() == 2);
    assert_eq!(value["age"], 18);
    assert_eq!((&value["mood"], &value["home"]), (&json!("good"), &json!({"at": 1.5})));
    assert_eq!((value.get("next"), value.get("optional")), (Some(&Value::Null), None));
}

#[test]
fn ends_with_a_recursive_schema() {
    let schema = json!({"type": "object", "required": ["child"], "properties": {"child": {"$ref": "#"}}});
    let answer =
        PlannedAnswer::new(&SamplingOptions { schema: Some(schema), ..SamplingOptions::default() }, 3);
    assert!(serde_json::from_str::<Value>(&whole(&answer)).is_ok());
}

#[test]
fn separates_calls_and_reasoning_from_text() {
    let schema = json!({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}});
    let call = Some(("weather".to_owned(), schema));
    let answer =
        PlannedAnswer::new(&SamplingOptions { call, reasoning: true, ..SamplingOptions::default() }, 3);
    let arguments: Value = serde_json::from_str(&answer.text(AnswerPart::Arguments, usize::MAX)).unwrap();
    assert!(arguments["city"].is_string());
    assert!(!answer.text(AnswerPart::Reasoning, usize::MAX).is_empty());
    assert_eq!((whole(&answer).as_str(), answer.finish), ("", Finish::Stop));
}
