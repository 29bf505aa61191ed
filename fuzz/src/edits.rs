//! `route::rewrite`: an edited body is what a merge of parsed documents gives, and stays JSON whatever a
//! route changes in it.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use vllm_lb::config::types::{BodyEdits, Retry, RouteConfig, Timeouts};
use vllm_lb::route::dialect::{ALL_DIALECTS, BodyDialect};
use vllm_lb::route::rewrite::BodyRewrite;

use super::json;

const SERVED: &str = "served";

/// Fields that clients lose. Names that no interface has, or another name would stand for them, too.
const REMOVED: [&str; 2] = ["r", "s"];

struct Routes {
    /// Sets, adds and removes fields: the result can be told by a merge.
    merging: Vec<BodyRewrite>,
    /// All that a route can change at once.
    everything: Vec<BodyRewrite>,
}

static ROUTES: LazyLock<Routes> = LazyLock::new(|| {
    let route = |body| RouteConfig {
        to: Some(SERVED.to_owned()),
        body,
        ..RouteConfig::new(Timeouts::default(), Retry::default())
    };
    let merging = route(body());
    let mut everything = route(BodyEdits {
        roles: vec![("system".into(), "developer".into()), ("user".into(), "a\"b".into())],
        ..body()
    });
    everything.think_tags = true;
    everything.metadata_overrides = true;
    everything.token_ids = true;
    let all =
        |route: &RouteConfig| ALL_DIALECTS.iter().map(|dialect| BodyRewrite::new(route, *dialect)).collect();
    Routes { merging: all(&merging), everything: all(&everything) }
});

fn body() -> BodyEdits {
    BodyEdits {
        defaults: map(json!({"a": 1, "m": {"x": 1, "y": {"z": true}}})),
        overrides: map(json!({"b": "set", "m": {"x": null, "k": [1]}, "gone": null})),
        remove: REMOVED.map(str::to_owned).to_vec(),
        roles: Vec::new(),
    }
}

fn map(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

pub fn run(data: &[u8]) {
    let parsed = json::object(data);
    for edits in &ROUTES.merging {
        let edited = edits.edit(data);
        assert_eq!(edits.edit(data), edited);
        // A body beyond a limit is refused.
        let Ok(edited) = edited else { continue };
        if let Some(object) = &parsed {
            let sent = edited.body.as_deref().unwrap_or(data);
            assert_eq!(json::object(sent).expect("it stays an object"), merged(object));
        }
    }
    for (edits, dialect) in ROUTES.everything.iter().zip(ALL_DIALECTS) {
        let edited = edits.edit(data);
        assert_eq!(edits.edit(data), edited);
        let Ok(edited) = edited else { continue };
        if parsed.is_some() {
            let sent = json::object(edited.body.as_deref().unwrap_or(data)).expect("it stays an object");
            assert_eq!(sent.get("model"), Some(&json!(SERVED)), "{dialect:?}");
            assert!(REMOVED.iter().all(|field| !sent.contains_key(*field)), "{dialect:?}");
            assert_eq!(sent.get("b"), Some(&json!("set")), "{dialect:?}");
            let ids = sent.get("return_token_ids") == Some(&json!(true));
            assert!(ids || dialect != BodyDialect::Chat, "token ids are not requested");
        }
    }
}

/// What a merge of the parsed body and the rules gives.
fn merged(object: &Map<String, Value>) -> Map<String, Value> {
    let mut wanted = object.clone();
    let BodyEdits { defaults, overrides, .. } = body();
    wanted.retain(|key, _| !REMOVED.contains(&key.as_str()));
    below(&mut wanted, &defaults);
    patch(&mut wanted, &overrides);
    wanted.insert("model".to_owned(), json!(SERVED));
    wanted
}

/// The client's values go before defaults, and objects merge.
fn below(body: &mut Map<String, Value>, defaults: &Map<String, Value>) {
    for (key, default) in defaults {
        match (body.get_mut(key), default) {
            (None, default) => drop(body.insert(key.clone(), default.clone())),
            (Some(Value::Object(there)), Value::Object(default)) => below(there, default),
            (Some(_), _) => {}
        }
    }
}

/// RFC 7396.
fn patch(target: &mut Map<String, Value>, with: &Map<String, Value>) {
    for (key, value) in with {
        match value {
            Value::Null => drop(target.remove(key)),
            Value::Object(inner) => {
                let mut there = map(target.get(key).cloned().unwrap_or_default());
                patch(&mut there, inner);
                target.insert(key.clone(), Value::Object(there));
            }
            value => drop(target.insert(key.clone(), value.clone())),
        }
    }
}
