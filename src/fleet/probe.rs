//! One question round to one upstream: is it up, what does it serve, which version is it?
//!
//! A prober never touches gauges and never decides what an upstream is; it tells the keeper.

use std::io::ErrorKind;
use std::time::{SystemTime, UNIX_EPOCH};

use http::StatusCode;

use super::client::{AskError, Client};
use super::upstream::Upstream;
use crate::aggregate::{self, ModelCard};
use crate::config::types::Health;

/// What a good round found.
pub(super) struct Facts {
    pub models: Vec<ModelCard>,
    pub version: Option<String>,
}

/// How a round failed, and why.
pub(super) enum Failure {
    /// Nobody listens.
    Refused(String),
    /// No answer, or a broken one.
    Silent(String),
    /// An answer, and not a good one.
    Wrong(String),
}

impl Failure {
    pub fn why(&self) -> &str {
        let (Failure::Refused(why) | Failure::Silent(why) | Failure::Wrong(why)) = self;
        why
    }

    fn from(path: &str, error: &AskError) -> Self {
        let why = format!("GET {path}: {error}");
        match error {
            // The file of a unix socket goes with the process too.
            AskError::Connect(error)
                if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
            {
                Failure::Refused(why)
            }
            _ => Failure::Silent(why),
        }
    }
}

/// `introduce`: ask for the version too, which changes only with a restart.
pub(super) async fn ask(
    client: &Client,
    upstream: &Upstream,
    health: &Health,
    introduce: bool,
) -> Result<Facts, Failure> {
    let limit = health.timeout;
    let up = client.get(upstream, &health.path, limit).await;
    let up = up.map_err(|error| Failure::from(&health.path, &error))?;
    if up.status() != StatusCode::OK {
        return Err(Failure::Wrong(format!("GET {}: status {}", health.path, up.status().as_u16())));
    }
    let models = match &upstream.config.models {
        Some(names) => names.iter().map(|name| plain_card(name)).collect(),
        None => models(client, upstream, health).await?,
    };
    let version = if introduce { version(client, upstream, health).await } else { None };
    Ok(Facts { models, version })
}

/// What it says that it serves. One that was discovered and has no such list serves what its source said.
async fn models(client: &Client, upstream: &Upstream, health: &Health) -> Result<Vec<ModelCard>, Failure> {
    let list = client.get(upstream, "/v1/models", health.timeout).await;
    let list = list.map_err(|error| Failure::from("/v1/models", &error))?;
    let told = upstream.config.discovered.as_ref().and_then(|discovered| discovered.model.as_deref());
    match (list.status(), told) {
        (StatusCode::OK, _) => aggregate::parse_models(list.body())
            .map_err(|error| Failure::Wrong(format!("GET /v1/models: {error}"))),
        (
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED,
            Some(model),
        ) => Ok(vec![plain_card(model)]),
        (StatusCode::UNAUTHORIZED, None) => {
            let remedy = "set the upstream's api_key or models";
            Err(Failure::Wrong(format!("GET /v1/models: status 401: {remedy}")))
        }
        (status, _) => Err(Failure::Wrong(format!("GET /v1/models: status {}", status.as_u16()))),
    }
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

#[derive(serde::Deserialize)]
struct Version {
    version: String,
}

/// The version is a nicety: an upstream without it is as good.
async fn version(client: &Client, upstream: &Upstream, health: &Health) -> Option<String> {
    let answer = client.get(upstream, "/version", health.timeout).await.ok()?;
    // The parser works in place.
    let told: Version = simd_json::serde::from_slice(&mut answer.body().to_vec()).ok()?;
    Some(told.version.chars().take(64).collect())
}
