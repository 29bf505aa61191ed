//! `${NAME}` and `${NAME:-default}` in every value of the file; `$$` is a dollar sign.
//!
//! Works on the parsed tree, so that the value of a variable is never parsed as YAML. The environment comes
//! in as a function. Keys of maps are not expanded.

use super::problem::{ConfigPlace, ConfigProblem};
use super::yaml::{YamlNode, YamlValue};

/// Looks up a variable: in the environment of the process, or in a table of a test.
pub(crate) type EnvLookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Replaces the variables in every text below `node`.
pub(crate) fn expand(
    node: &mut YamlNode,
    place: &ConfigPlace,
    env: EnvLookup<'_>,
    problems: &mut Vec<ConfigProblem>,
) {
    match &mut node.value {
        YamlValue::Null | YamlValue::Broken => {}
        YamlValue::Text(text) if !text.contains('$') => {}
        YamlValue::Text(text) => match expand_text(text, env) {
            // With an empty default the file makes a setting optional.
            Ok(Expanded { text, emptied: true }) if text.is_empty() => node.value = YamlValue::Null,
            Ok(expanded) => node.value = YamlValue::Text(expanded.text),
            Err(reason) => {
                problems.push(ConfigProblem::new(place, reason));
                node.value = YamlValue::Broken;
            }
        },
        YamlValue::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                let place = place.item(index, item.line);
                expand(item, &place, env, problems);
            }
        }
        YamlValue::Map(entries) => {
            for entry in entries {
                let place = place.key(&entry.key, Some(entry.line));
                expand(&mut entry.node, &place, env, problems);
            }
        }
    }
}

struct Expanded {
    text: String,
    /// Whether an empty default was used.
    emptied: bool,
}

fn expand_text(template: &str, env: EnvLookup<'_>) -> Result<Expanded, String> {
    let mut text = String::with_capacity(template.len());
    let mut emptied = false;
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            text.push('$');
            rest = after;
        } else if let Some(after) = rest.strip_prefix('{') {
            let Some(end) = after.find('}') else {
                return Err("a ${ has no closing brace: write $${ for the characters themselves".into());
            };
            let value = variable(&after[..end], env)?;
            emptied |= value.is_empty() && after[..end].contains(":-");
            text.push_str(&value);
            rest = &after[end + 1..];
        } else {
            // A single dollar sign is literal: passwords have them.
            text.push('$');
        }
    }
    text.push_str(rest);
    Ok(Expanded { text, emptied })
}

/// The value of the variable, or its default, that the braces enclose.
fn variable(inner: &str, env: EnvLookup<'_>) -> Result<String, String> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("${{{inner}}} is no variable: write ${{NAME}} or ${{NAME:-default}}"));
    }
    // As in a shell, the default after `:-` also replaces an empty value.
    match (env(name), default) {
        (Some(value), Some(default)) if value.is_empty() => Ok(default.into()),
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.into()),
        (None, None) => Err(format!("the variable {name} is not set: set it, or write ${{{name}:-default}}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "N" => Some("4".into()),
            "EMPTY" => Some(String::new()),
            "YAML" => Some("a: {b: [c]}".into()),
            _ => None,
        }
    }

    #[test]
    fn expands_texts() {
        let table = [
            ("${N}", "4"),
            ("${N:-8}", "4"),
            ("${M:-8}", "8"),
            ("${EMPTY:-8}", "8"),
            ("${EMPTY}", ""),
            ("a${N}b${N}c", "a4b4c"),
            ("${M:-a:-b}", "a:-b"),
            ("$${N}", "${N}"),
            ("$$", "$"),
            ("pa$word$", "pa$word$"),
            ("${YAML}", "a: {b: [c]}"),
        ];
        for (template, wanted) in table {
            assert_eq!(expand_text(template, &env).map(|e| e.text), Ok(wanted.to_string()), "{template}");
        }
    }

    #[test]
    fn rejects_mistakes() {
        for template in ["${M}", "${", "${N", "${}", "${1A}", "${A-B}", "${ N }", "${:-x}"] {
            assert!(expand_text(template, &env).is_err(), "{template}");
        }
    }

    #[test]
    fn an_empty_default_makes_the_key_absent_and_an_empty_variable_does_not() {
        let expanded = |template: &str| {
            let mut node = YamlNode { line: 1, plain: true, value: YamlValue::Text(template.into()) };
            let mut problems = Vec::new();
            expand(&mut node, &ConfigPlace::named("x"), &env, &mut problems);
            assert_eq!(problems, []);
            node.value
        };
        assert_eq!(expanded("${M:-}"), YamlValue::Null);
        assert_eq!(expanded("${EMPTY:-}"), YamlValue::Null);
        assert_eq!(expanded("${EMPTY}"), YamlValue::Text(String::new()));
        assert_eq!(expanded("${N:-}"), YamlValue::Text("4".into()));
    }
}
