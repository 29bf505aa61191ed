//! The documents of refusals.

use super::*;

#[test]
fn formats_an_unknown_model_as_vllm_does() {
    let reject = Reject::Model { model: "nope".into(), aliases: vec!["tiny".into()] };
    let sample = concat!(
        r#"{"error":{"message":"The model `nope` does not exist. Valid aliases: tiny.","#,
        r#""type":"NotFoundError","param":"model","code":404}}"#,
    );
    assert_eq!(reject.answer(ErrorShape::OpenAi).body, sample);
}

#[test]
fn formats_errors_for_anthropic_clients() {
    let answer = Reject::NotReady { model: None }.answer(ErrorShape::Anthropic);
    assert_eq!(answer.status, 503);
    assert!(answer.body.starts_with(r#"{"type":"error","error":{"type":"overloaded_error","#));
    assert_eq!(answer.headers, [("retry-after", "1".to_string())]);
}

#[test]
fn keeps_the_frameworks_form_on_all_routes() {
    for style in [ErrorShape::OpenAi, ErrorShape::Anthropic] {
        assert_eq!(Reject::Path.answer(style).body, r#"{"detail":"Not Found"}"#);
        let method = Reject::Method { allow: "POST" }.answer(style);
        assert_eq!((method.status, method.body.as_str()), (405, r#"{"detail":"Method Not Allowed"}"#));
    }
}

#[test]
fn names_an_upstream_only_where_clients_may_know_it() {
    let text = |reject: &Reject| {
        let body: serde_json::Value = serde_json::from_str(&reject.answer(ErrorShape::OpenAi).body).unwrap();
        body["error"]["message"].as_str().unwrap().to_string()
    };
    for (name, subject) in [(None, "The upstream"), (Some("gpu-0"), "The upstream gpu-0")] {
        let owned = name.map(String::from);
        assert_eq!(text(&Reject::Upstream { name: owned.clone() }), format!("{subject} did not answer."));
        let late = format!("{subject} did not answer in time.");
        assert_eq!(text(&Reject::Timeout { name: owned }), late);
        let late = format!("{subject} did not go on with the answer in time.");
        assert_eq!(broken_stream(true, name), (504, late));
        let broken = format!("{subject} ended before the answer was whole.");
        assert_eq!(broken_stream(false, name), (502, broken));
    }
    assert_eq!(unanswered_call(None), "The upstream did not answer.");
    let named = unanswered_call(Some(("gpu-0", "cannot connect")));
    assert_eq!(named, "The upstream gpu-0 did not answer: cannot connect.");
}

#[test]
fn cuts_a_clients_long_name_in_errors() {
    let (long, cut) = ("é".repeat(1 << 20), "é".repeat(2046) + "…");
    for reject in [
        Reject::Model { model: long.clone(), aliases: vec![] },
        Reject::NotReady { model: Some(long.clone()) },
        Reject::Response { id: long.clone() },
    ] {
        for style in [ErrorShape::OpenAi, ErrorShape::Anthropic] {
            let body = reject.answer(style).body;
            assert!(body.contains(&cut) && body.len() < 5_000, "{} bytes", body.len());
        }
    }
}

#[test]
fn escapes_a_clients_text_in_the_body() {
    let hostile = "a\"},{\"x\":\"\u{0}\n\u{2028}";
    let reject = Reject::Model { model: hostile.into(), aliases: vec![] };
    for style in [ErrorShape::OpenAi, ErrorShape::Anthropic] {
        let parsed: serde_json::Value = serde_json::from_str(&reject.answer(style).body).unwrap();
        let message = parsed["error"]["message"].as_str().unwrap();
        assert!(message.contains(hostile));
    }
}
