//! The small GETs: models, version, load.

use serde_json::{Value, json};

use super::clock;
use super::reply::{self, Reply};
use super::run::EngineCall;

/// Handles `GET /v1/models`: base names first, then adapters. The ids of permissions are new each time.
pub(super) fn list(call: &EngineCall) -> Reply {
    let options = &call.shared.options;
    let base = options.models.first().map_or("", String::as_str);
    let root = options.root.clone().unwrap_or_else(|| format!("/models/{base}"));
    let bases =
        options.models.iter().map(|id| card(call, id, &root, Value::Null, json!(options.max_model_len)));
    let loras =
        options.loras.iter().map(|id| card(call, id, &format!("/adapters/{id}"), json!(base), Value::Null));
    let data: Vec<Value> = bases.chain(loras).collect();
    reply::ok(&json!({"object": "list", "data": data}))
}

fn card(call: &EngineCall, id: &str, root: &str, parent: Value, max_model_len: Value) -> Value {
    let created = clock::created();
    json!({
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [{
            "id": format!("modelperm-{}", call.shared.random_hex()),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
    })
}

pub(super) fn version(call: &EngineCall) -> Reply {
    reply::ok(&json!({"version": call.shared.options.version}))
}

/// Handles `GET /load`: the requests in the engine, if the server is configured to count them.
pub(super) fn load(call: &EngineCall) -> Reply {
    let stats = call.shared.stats();
    let load = if call.shared.options.server_load { stats.running + stats.waiting } else { 0 };
    reply::ok(&json!({"server_load": load}))
}
