//! A route as a person reads it. What a header's name says is secret is masked, and so is the key.

use serde_json::{Map, Value, json};

use super::{mask, retry, timeouts};
use crate::config::secret::Secret;
use crate::config::types::{HeaderEdits, RouteConfig};

/// A route; what is a map of the user's own keys is null where it is empty.
pub fn json(route: &RouteConfig) -> Value {
    let body = &route.body;
    json!({
        "model": route.model,
        "path": route.path,
        "header": pairs(&route.header, true),
        "to": route.to,
        "upstreams": route.upstreams,
        "headers": headers(&route.headers),
        "response_headers": headers(&route.response_headers),
        "body": {
            "defaults": some(&body.defaults),
            "overrides": some(&body.overrides),
            "remove": body.remove,
            "roles": pairs(&body.roles, false),
        },
        "token_ids": route.token_ids,
        "think_tags": route.think_tags,
        "overflow": route.overflow.name(),
        "responses": route.responses.name(),
        "messages": route.messages.name(),
        "metadata_overrides": route.metadata_overrides,
        "api_key": mask(route.api_key.as_ref()),
        "timeouts": timeouts(&route.timeouts),
        "retry": retry(&route.retry),
    })
}

fn headers(edits: &HeaderEdits) -> Value {
    json!({"set": pairs(&edits.set, true), "remove": edits.remove})
}

/// Names and values as a map; `hide` what names say is secret.
fn pairs(pairs: &[(String, String)], hide: bool) -> Option<Map<String, Value>> {
    let is_secret = |name: &str| {
        hide && ["auth", "key", "token", "secret", "cookie"].iter().any(|word| name.contains(word))
    };
    let value = |name: &str, value: &str| match is_secret(name) {
        true => Secret::new(value).to_string(),
        false => value.to_owned(),
    };
    let map: Map<_, _> = pairs.iter().map(|(name, v)| (name.clone(), value(name, v).into())).collect();
    some(&map)
}

fn some(map: &Map<String, Value>) -> Option<Map<String, Value>> {
    (!map.is_empty()).then(|| map.clone())
}
