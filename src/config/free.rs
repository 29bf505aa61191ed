//! JSON values for the bodies of requests, from nodes of the file.
//!
//! Scalars without quotes have the types of YAML's core schema; scalars in quotes are texts.

use serde_json::{Map, Number, Value as Json};

use super::problem::{ConfigPlace, ConfigProblem, seen};
use super::yaml::{YamlNode, YamlValue};

/// The JSON of a node; `None` after a problem.
pub(crate) fn json(node: &YamlNode, place: &ConfigPlace, problems: &mut Vec<ConfigProblem>) -> Option<Json> {
    match &node.value {
        YamlValue::Null => Some(Json::Null),
        YamlValue::Broken => None,
        YamlValue::Text(text) if !node.plain => Some(Json::String(text.clone())),
        YamlValue::Text(text) => match scalar(text) {
            Ok(value) => Some(value),
            Err(what) => {
                problems.push(ConfigProblem::new(place, what));
                None
            }
        },
        YamlValue::List(items) => {
            let each = items.iter().enumerate();
            let read = each.map(|(index, item)| json(item, &place.item(index, item.line), problems));
            read.collect::<Vec<_>>().into_iter().collect::<Option<_>>().map(Json::Array)
        }
        YamlValue::Map(_) => object(node, place, problems).map(Json::Object),
    }
}

/// The JSON object of a node; `None` after a problem, which a node that is no map is.
pub(crate) fn object(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<Map<String, Json>> {
    let entries = match &node.value {
        YamlValue::Map(entries) => entries,
        YamlValue::Null | YamlValue::Broken => return None,
        YamlValue::Text(_) | YamlValue::List(_) => {
            problems.push(ConfigProblem::new(place, format!("must be a map of keys, is {}", node.kind())));
            return None;
        }
    };
    let mut map = Map::new();
    let mut whole = true;
    for entry in entries {
        let place = place.key(&entry.key, Some(entry.line));
        match json(&entry.node, &place, problems) {
            Some(value) => drop(map.insert(entry.key.clone(), value)),
            None => whole = false,
        }
    }
    whole.then_some(map)
}

/// The JSON of a scalar without quotes.
fn scalar(text: &str) -> Result<Json, String> {
    match text {
        "true" | "True" | "TRUE" => return Ok(Json::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Json::Bool(false)),
        _ => {}
    }
    // Truth values in YAML 1.1: as texts, chat templates would treat all of them as true.
    if ["yes", "no", "on", "off"].iter().any(|word| text.eq_ignore_ascii_case(word)) {
        return Err(format!("{} is neither true nor false: write one of these, or quotes", seen(text)));
    }
    let unsigned = text.trim_start_matches(['+', '-']);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN") {
        return Err(format!("{} is no number in JSON", seen(text)));
    }
    let based = |digits: &str, base| u64::from_str_radix(digits, base).ok().map(Json::from);
    let number = match (text.strip_prefix("0x"), text.strip_prefix("0o")) {
        (Some(digits), _) => based(digits, 16),
        (_, Some(digits)) => based(digits, 8),
        _ if looks_like_a_number(text) => return number(text),
        _ => None,
    };
    Ok(number.unwrap_or_else(|| Json::String(text.into())))
}

fn number(text: &str) -> Result<Json, String> {
    let bad = || format!("{} cannot be told exactly: write it in quotes, or smaller", seen(text));
    if text.contains(['.', 'e', 'E']) {
        let number = text.parse().ok().and_then(Number::from_f64);
        return number.map(Json::Number).ok_or_else(bad);
    }
    let digits = text.strip_prefix('+').unwrap_or(text);
    let number = digits.parse::<i64>().map(Json::from).or_else(|_| digits.parse::<u64>().map(Json::from));
    number.map_err(|_| bad())
}

/// Whether the text matches `[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?`
fn looks_like_a_number(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let some = !whole.is_empty() || !fraction.is_empty();
    some && digits(whole) && digits(fraction) && !exponent.is_empty() && digits(exponent)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::yaml;

    fn read(text: &str) -> (Option<Json>, Vec<String>) {
        let mut problems = Vec::new();
        let node = yaml::parse(text, &mut problems).expect("is YAML");
        let value = json(&node, &ConfigPlace::named("x"), &mut problems);
        (value, problems.iter().map(ConfigProblem::to_string).collect())
    }

    #[test]
    fn follows_the_core_schema_of_yaml() {
        for (text, wanted) in [
            ("[1, -2, +3, 0x1F, 0o17, 007]", json!([1, -2, 3, 31, 15, 7])),
            ("[0.6, 1e3, .5, 2., -1.5E-2]", json!([0.6, 1000.0, 0.5, 2.0, -0.015])),
            ("[true, False, null, ~, ]", json!([true, false, null, null])),
            ("['1', \"true\", 'null', '']", json!(["1", "true", "null", ""])),
            ("[y, 1.2.3, 1e, ., e5, 0xg, 1_000]", json!(["y", "1.2.3", "1e", ".", "e5", "0xg", "1_000"])),
            ("['yes', \"off\", none]", json!(["yes", "off", "none"])),
            ("{a: {b: [c]}, d: {}}", json!({"a": {"b": ["c"]}, "d": {}})),
            ("18446744073709551615", json!(18_446_744_073_709_551_615_u64)),
        ] {
            assert_eq!(read(text), (Some(wanted), vec![]), "{text}");
        }
    }

    /// YAML 1.1, which NeMo Gym reads, has them as truth values; as a text, `off` would count as true.
    #[test]
    fn rejects_the_truth_values_of_yaml_1_1() {
        for word in ["yes", "No", "ON", "off"] {
            let what = "is neither true nor false: write one of these, or quotes";
            let problem = format!("x.thinks: {word:?} {what} (line 1)");
            assert_eq!(read(&format!("{{thinks: {word}}}")), (None, vec![problem]), "{word}");
        }
    }

    #[test]
    fn rejects_what_json_cannot_hold() {
        let inexact = |key: &str, text: &str| {
            format!("x.{key}: {text:?} cannot be told exactly: write it in quotes, or smaller (line 1)")
        };
        assert_eq!(
            read("{a: .inf, b: [-.nan], c: 1844674407370955161600, d: 1e999}"),
            (
                None,
                vec![
                    "x.a: \".inf\" is no number in JSON (line 1)".into(),
                    "x.b[0]: \"-.nan\" is no number in JSON (line 1)".into(),
                    inexact("c", "1844674407370955161600"),
                    inexact("d", "1e999"),
                ]
            )
        );
    }
}
