//! The effective configuration as text: every key with its value, no secret.
//!
//! `GET /admin/config` and a Debug record at the start show it. The shape is that of the file.

use serde_json::{Map, Value, json};

use super::keys;
use super::secret::Secret;
use super::setting;
use super::types::{Config, UpstreamConfig, show_upstream};

/// The configuration as JSON, keys in the manual's order.
pub fn json(config: &Config) -> Value {
    setting::show(config)
}

/// The configuration as YAML, which is a valid file again, secrets apart.
pub fn yaml(config: &Config) -> String {
    let free = keys::free();
    let mut text = String::new();
    if let Value::Object(map) = json(config) {
        yaml_map(&map, 0, &free, &mut text);
    }
    text
}

/// Renders an upstream without its key, for siblings.
pub fn upstream_without_key(config: &UpstreamConfig) -> Value {
    let mut value = show_upstream(config);
    value["api_key"] = Value::Null;
    value
}

/// Renders an upstream with its key, for a process that sends requests to it.
pub fn upstream_with_key(config: &UpstreamConfig) -> Value {
    let mut value = show_upstream(config);
    value["api_key"] = json!(config.api_key.as_ref().map(Secret::expose));
    value
}

/// `free` are the keys that hold maps of the user's own keys.
fn yaml_map(map: &Map<String, Value>, indent: usize, free: &[String], text: &mut String) {
    for (index, (key, value)) in map.iter().enumerate() {
        // The first key of a list's item stands behind the dash.
        if index > 0 || !text.ends_with("- ") {
            text.push_str(&" ".repeat(indent));
        }
        text.push_str(key);
        text.push(':');
        match value {
            // JSON is YAML; a single dollar sign would begin a variable.
            Value::Object(_) if free.contains(key) => {
                text.push_str(&format!(" {}\n", dollars_doubled(value)));
            }
            Value::Object(inner) => {
                text.push('\n');
                yaml_map(inner, indent + 2, free, text);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                text.push('\n');
                for item in items {
                    text.push_str(&format!("{}- ", " ".repeat(indent + 2)));
                    if let Value::Object(inner) = item {
                        yaml_map(inner, indent + 4, free, text);
                    }
                }
            }
            // JSON's scalars and lists of scalars are YAML.
            other => text.push_str(&format!(" {other}\n")),
        }
    }
}

fn dollars_doubled(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace('$', "$$")),
        Value::Array(items) => items.iter().map(dollars_doubled).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), dollars_doubled(value))).collect(),
        scalar => scalar.clone(),
    }
}
