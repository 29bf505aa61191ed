//! One question round to one upstream: is it up, what does it serve, which version is it?
//!
//! A prober never touches gauges and never decides what an upstream is; it tells the keeper.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::StatusCode;

use super::client::{AskError, Client};
use super::upstream::Upstream;
use crate::aggregate::{self, ModelCard};
use crate::config::types::Health;

/// What one round found.
pub(super) enum Finding {
    Up(Facts),
    Failed(String),
}

pub(super) struct Facts {
    pub models: Vec<ModelCard>,
    pub version: Option<String>,
}

/// `introduce`: ask for the version too, which changes only with a restart.
pub(super) async fn ask(client: &Client, upstream: &Upstream, health: &Health, introduce: bool) -> Finding {
    match round(client, upstream, health, introduce).await {
        Ok(facts) => Finding::Up(facts),
        Err(why) => Finding::Failed(why),
    }
}

async fn round(
    client: &Client,
    upstream: &Upstream,
    health: &Health,
    introduce: bool,
) -> Result<Facts, String> {
    let say = |path: &str, error: AskError| format!("GET {path}: {error}");
    let limit = health.timeout;
    let up = client.get(upstream, &health.path, limit).await.map_err(|e| say(&health.path, e))?;
    if up.status() != StatusCode::OK {
        return Err(format!("GET {}: status {}", health.path, up.status().as_u16()));
    }
    let models = match &upstream.config.models {
        Some(names) => names.iter().map(|name| plain_card(name)).collect(),
        None => {
            let list = client.get(upstream, "/v1/models", limit).await;
            let list = list.map_err(|error| say("/v1/models", error))?;
            match list.status() {
                StatusCode::OK => aggregate::parse_models(list.body())
                    .map_err(|error| format!("GET /v1/models: {error}"))?,
                StatusCode::UNAUTHORIZED => {
                    return Err("GET /v1/models: status 401: set the upstream's api_key or models".into());
                }
                status => return Err(format!("GET /v1/models: status {}", status.as_u16())),
            }
        }
    };
    let version = if introduce { version(client, upstream, health).await } else { None };
    Ok(Facts { models, version })
}

/// The card of a model that the configuration names, so that nobody was asked about it.
fn plain_card(name: &str) -> ModelCard {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let card = serde_json::json!({
        "id": name,
        "object": "model",
        "created": now,
        "owned_by": "vllm",
        "root": name,
        "parent": null,
        "max_model_len": null,
        "permission": [],
    });
    ModelCard { id: name.to_string(), raw: card.to_string(), max_model_len: None, parent: None }
}

/// The version is a nicety: an upstream without it is as good.
async fn version(client: &Client, upstream: &Upstream, health: &Health) -> Option<String> {
    let answer = client.get(upstream, "/version", health.timeout).await.ok()?;
    let document: serde_json::Value = serde_json::from_slice(answer.body()).ok()?;
    Some(document.get("version")?.as_str()?.chars().take(64).collect())
}

/// The findings of one upstream, for the keeper.
pub(super) struct Report {
    pub upstream: Arc<Upstream>,
    pub finding: Finding,
}
