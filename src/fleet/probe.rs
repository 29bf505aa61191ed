//! One probe of one upstream: whether it is up, the models that it serves, its version.
//!
//! Probers only report to the keeper, which decides the state of an upstream.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Response, StatusCode};

use super::client::{FetchError, MAX_ANSWER_BYTES, UpstreamClient};
use super::probe_connection::ProbeConnection;
use super::upstream::Upstream;
use crate::aggregate::{self, ModelCard};
use crate::config::types::Health;

/// The longest version of an engine, in characters.
pub(super) const MAX_VERSION_CHARS: usize = 64;

/// The result of a successful probe.
pub(super) struct ProbeReport {
    pub models: Vec<ModelCard>,
    pub version: Option<String>,
}

/// How a probe failed, with the reason.
pub(super) enum ProbeFailure {
    /// The connection was refused.
    Refused(String),
    /// No answer within the time limit, or a broken one.
    Silent(String),
    /// An answer with an unexpected status or body.
    Wrong(String),
}

impl ProbeFailure {
    /// The reason of the failure.
    pub(super) fn why(&self) -> &str {
        let (ProbeFailure::Refused(why) | ProbeFailure::Silent(why) | ProbeFailure::Wrong(why)) = self;
        why
    }

    /// Whether the upstream has answered.
    pub(super) fn is_answer(&self) -> bool {
        matches!(self, ProbeFailure::Wrong(_))
    }

    fn from(path: &str, error: &FetchError) -> Self {
        let why = format!("GET {path}: {error}");
        match error {
            // The file of a unix socket may disappear with its process.
            FetchError::Connect(error)
                if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
            {
                ProbeFailure::Refused(why)
            }
            _ => ProbeFailure::Silent(why),
        }
    }
}

/// The requests of one probe.
struct ProbeRequests<'a> {
    client: &'a UpstreamClient,
    connection: &'a mut ProbeConnection,
    upstream: &'a Arc<Upstream>,
    health: &'a Health,
}

/// Probes the upstream once. With `fetch_version` also reads the version, which changes only with a restart.
pub(super) async fn probe(
    client: &UpstreamClient,
    connection: &mut ProbeConnection,
    upstream: &Arc<Upstream>,
    health: &Health,
    fetch_version: bool,
) -> Result<ProbeReport, ProbeFailure> {
    let mut requests = ProbeRequests { client, connection, upstream, health };
    let up = requests.get(&health.path).await;
    let up = up.map_err(|error| ProbeFailure::from(&health.path, &error))?;
    if up.status() != StatusCode::OK {
        return Err(ProbeFailure::Wrong(format!("GET {}: status {}", health.path, up.status().as_u16())));
    }
    let models = match &upstream.config.models {
        Some(names) => names.iter().map(|name| plain_card(name)).collect(),
        None => requests.models().await?,
    };
    let version = if fetch_version { requests.version().await } else { None };
    Ok(ProbeReport { models, version })
}

/// Builds the card of a model that the configuration names; the upstream is not queried for it.
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

// === impl ProbeRequests ===

impl ProbeRequests<'_> {
    async fn get(&mut self, path: &str) -> Result<Response<Bytes>, FetchError> {
        let limit = self.health.timeout;
        self.connection.get(self.client, self.upstream, path, limit, MAX_ANSWER_BYTES).await
    }

    /// Fetches the models that the upstream serves. A discovered upstream without a model list serves the
    /// model that its source named.
    async fn models(&mut self) -> Result<Vec<ModelCard>, ProbeFailure> {
        let list = self.get("/v1/models").await;
        let list = list.map_err(|error| ProbeFailure::from("/v1/models", &error))?;
        let discovered = self.upstream.config.discovered.as_ref();
        let named = discovered.and_then(|discovered| discovered.model.as_deref());
        match (list.status(), named) {
            (StatusCode::OK, _) => aggregate::parse_models(list.body())
                .map_err(|error| ProbeFailure::Wrong(format!("GET /v1/models: {error}"))),
            (
                StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED,
                Some(model),
            ) => Ok(vec![plain_card(model)]),
            (StatusCode::UNAUTHORIZED, None) => {
                let remedy = "set the upstream's api_key or models";
                Err(ProbeFailure::Wrong(format!("GET /v1/models: status 401: {remedy}")))
            }
            (status, _) => Err(ProbeFailure::Wrong(format!("GET /v1/models: status {}", status.as_u16()))),
        }
    }

    /// Fetches the version; `None` when the upstream does not report one, which is no failure.
    async fn version(&mut self) -> Option<String> {
        let answer = self.get("/version").await.ok()?;
        let parsed: Version = serde_json::from_slice(answer.body()).ok()?;
        Some(parsed.version.chars().take(MAX_VERSION_CHARS).collect())
    }
}
