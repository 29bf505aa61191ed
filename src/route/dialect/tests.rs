//! Tests of defaults and overrides in the dialect of each API.

use super::*;

#[test]
fn translates_defaults_into_each_dialect() {
    let table = [
        (
            json!({"max_tokens": 9}),
            [r#"{"max_tokens":9}"#; 2],
            r#"{"max_output_tokens":9}"#,
            r#"{"max_tokens":9}"#,
        ),
        (
            json!({"max_output_tokens": 9}),
            [r#"{"max_completion_tokens":9}"#, r#"{"max_tokens":9}"#],
            r#"{"max_output_tokens":9}"#,
            r#"{"max_tokens":9}"#,
        ),
        (
            json!({"max_completion_tokens": 9, "max_output_tokens": 8}),
            [r#"{"max_completion_tokens":9}"#, r#"{"max_tokens":9}"#],
            r#"{"max_output_tokens":8}"#,
            r#"{"max_tokens":9}"#,
        ),
        (
            json!({"reasoning_effort": "low"}),
            [r#"{"reasoning_effort":"low"}"#, "{}"],
            r#"{"reasoning":{"effort":"low"}}"#,
            "{}",
        ),
        (
            json!({"reasoning": {"effort": "low", "summary": "auto"}}),
            [r#"{"reasoning_effort":"low"}"#, "{}"],
            r#"{"reasoning":{"effort":"low","summary":"auto"}}"#,
            "{}",
        ),
        (
            json!({"reasoning": {"summary": "auto"}, "reasoning_effort": "low"}),
            [r#"{"reasoning_effort":"low"}"#, "{}"],
            r#"{"reasoning":{"summary":"auto","effort":"low"}}"#,
            "{}",
        ),
        (json!({"truncation": null, "top_k": null}), ["{}"; 2], "{}", "{}"),
        (json!({"truncation": "disabled"}), ["{}"; 2], r#"{"truncation":"disabled"}"#, "{}"),
        (json!({"n": 2, "stop": "x"}), [r#"{"n":2,"stop":"x"}"#; 2], r#"{"stop":"x"}"#, "{}"),
        (
            json!({"chat_template_kwargs": {"a": null}, "of_a_plugin": 1}),
            [r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#; 2],
            r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#,
            r#"{"chat_template_kwargs":{"a":null},"of_a_plugin":1}"#,
        ),
    ];
    for (written, [chat, completions], responses, messages) in table {
        let said =
            |dialect: BodyDialect| Value::Object(dialect.defaults(written.as_object().unwrap())).to_string();
        let all =
            [said(ALL_DIALECTS[0]), said(ALL_DIALECTS[1]), said(ALL_DIALECTS[2]), said(ALL_DIALECTS[3])];
        assert_eq!(all, [chat, completions, responses, messages], "{written}");
    }
    let other = BodyDialect::Other.defaults(json!({"temperature": 1, "x": 2}).as_object().unwrap());
    assert_eq!(Value::Object(other), json!({"x": 2}));
}

/// The overrides and the removed names of one dialect.
fn overridden(dialect: BodyDialect, written: &Value) -> (String, String) {
    let (said, gone) = dialect.overrides(written.as_object().unwrap());
    (Value::Object(said).to_string(), gone.join(" "))
}

#[test]
fn translates_an_override_once_into_each_dialect() {
    const COMPLETION: &str = "max_completion_tokens max_output_tokens";
    const OUTPUT: &str = "max_tokens max_completion_tokens";
    const TOKENS: &str = "max_tokens max_output_tokens";
    for (dialect, written, said, gone) in [
        (BodyDialect::Chat, json!({"max_tokens": 9}), r#"{"max_tokens":9}"#, COMPLETION),
        (BodyDialect::Chat, json!({"max_output_tokens": 9}), r#"{"max_completion_tokens":9}"#, TOKENS),
        (
            BodyDialect::Chat,
            json!({"max_tokens": 9, "a": 1, "max_completion_tokens": 8}),
            r#"{"a":1,"max_completion_tokens":8}"#,
            TOKENS,
        ),
        (BodyDialect::Completions, json!({"max_output_tokens": 9}), r#"{"max_tokens":9}"#, COMPLETION),
        (BodyDialect::Messages, json!({"max_completion_tokens": 9}), r#"{"max_tokens":9}"#, COMPLETION),
        (BodyDialect::Responses, json!({"max_tokens": null}), r#"{"max_output_tokens":null}"#, OUTPUT),
        (BodyDialect::Other, json!({"max_tokens": 9}), r#"{"max_tokens":9}"#, COMPLETION),
        (BodyDialect::Other, json!({"max_output_tokens": 9}), r#"{"max_tokens":9}"#, COMPLETION),
        (BodyDialect::Chat, json!({"reasoning_effort": "low"}), r#"{"reasoning_effort":"low"}"#, "reasoning"),
        (
            BodyDialect::Chat,
            json!({"reasoning": {"effort": "low", "summary": "auto"}}),
            r#"{"reasoning_effort":"low"}"#,
            "reasoning",
        ),
        (BodyDialect::Chat, json!({"reasoning": null}), r#"{"reasoning_effort":null}"#, "reasoning"),
        (
            BodyDialect::Chat,
            json!({"reasoning": {"summary": "auto"}}),
            r#"{"reasoning":{"summary":"auto"}}"#,
            "",
        ),
        (
            BodyDialect::Responses,
            json!({"reasoning_effort": "low", "reasoning": {"summary": "auto"}}),
            r#"{"reasoning":{"summary":"auto","effort":"low"}}"#,
            "reasoning_effort",
        ),
        (
            BodyDialect::Responses,
            json!({"reasoning_effort": null}),
            r#"{"reasoning":{"effort":null}}"#,
            "reasoning_effort",
        ),
        (
            BodyDialect::Responses,
            json!({"reasoning": {"summary": "auto"}}),
            r#"{"reasoning":{"summary":"auto"}}"#,
            "",
        ),
        (BodyDialect::Messages, json!({"reasoning_effort": "low"}), r#"{"reasoning_effort":"low"}"#, ""),
        (BodyDialect::Messages, json!({"top_k": 3, "n": null}), r#"{"top_k":3,"n":null}"#, ""),
    ] {
        let expected = (said.to_owned(), gone.to_owned());
        assert_eq!(overridden(dialect, &written), expected, "{dialect:?} {written}");
    }
}

#[test]
fn treats_the_names_of_the_limit_as_one_field() {
    let same = |dialect: BodyDialect, field| dialect.same_as(field).collect::<Vec<_>>();
    assert_eq!(same(BodyDialect::Chat, "max_tokens"), ["max_completion_tokens"]);
    assert_eq!(same(BodyDialect::Responses, "max_output_tokens"), Vec::<&str>::new());
    assert_eq!(same(BodyDialect::Chat, "seed"), Vec::<&str>::new());
    for (index, dialect) in ALL_DIALECTS.into_iter().enumerate() {
        assert_eq!(dialect.index(), index);
    }
}
