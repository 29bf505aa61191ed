//! Parses the list of engines that a NeMo Gym model server returns at `GET /get_inner_vllm_config`:
//!
//! ```text
//! {"base_url": ["http://10.0.0.7:8000/v1", ...], "api_key": "dummy", "model": "Qwen/Qwen3-8B"}
//! ```
//!
//! `base_url` is one string or a list. Gym's own proxy requests the document once, after `GET /` has had any
//! answer; the balancer polls the document for as long as the source is configured.
//!
//! `api_key` is sent to the engines unchanged, also when it is "dummy" or "EMPTY": an engine without a key
//! ignores it. `model` does not limit the models of an engine: the prober reads the engine's own list, which
//! has LoRA adapters and `max_model_len`; an engine without such a list serves `model`.
//!
//! An invalid document is rejected as a whole.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Map, Value};

use super::super::client::{FetchError, UpstreamClient};
use super::engine::{DiscoveredEngine, FoundEngine};
use super::source::{FailureReason, PlannedSource, SourceFailure, SourceReporter};
use super::{POLL_TIMEOUT, UNANSWERED_POLL_INTERVAL};
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::types::UpstreamUrl;
use crate::config::url;
use crate::config::values::{plain, secret};

/// The path of the document.
const PATH: &str = "/get_inner_vllm_config";

/// The largest number of engines that one source may list.
const MAX_ENGINES: usize = 1024;

/// The engines that a model server lists, and the settings it gives for all of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DiscoveredServers {
    urls: Vec<UpstreamUrl>,
    api_key: Option<Secret>,
    model: Option<String>,
}

/// Polls the model server until dropped.
pub(super) async fn follow(source: &Arc<PlannedSource>, mut reporter: SourceReporter) {
    let (every, mut answered) = (source.source.every, false);
    loop {
        match poll(source, reporter.client(), POLL_TIMEOUT).await {
            Ok(engines) => {
                answered = true;
                if !reporter.listed(engines).await {
                    return;
                }
            }
            Err(failure) => reporter.failed(&failure),
        }
        tokio::time::sleep(if answered { every } else { every.min(UNANSWERED_POLL_INTERVAL) }).await;
    }
}

/// Requests the list of engines once.
pub(super) async fn poll(
    source: &PlannedSource,
    client: &UpstreamClient,
    limit: Duration,
) -> Result<Vec<DiscoveredEngine>, SourceFailure> {
    let failure = |reason, what: String| SourceFailure::new(reason, format!("GET {PATH}: {what}"));
    let Some(server) = &source.server else {
        return Err(failure(FailureReason::Unreachable, "it has no URL".into()));
    };
    let answer = client.small(server, PATH, limit).await.map_err(|error| {
        let reason = match error {
            FetchError::Timeout(_) => FailureReason::Timeout,
            FetchError::Answer(_) => FailureReason::Invalid,
            _ => FailureReason::Unreachable,
        };
        failure(reason, error.to_string())
    })?;
    if answer.status() != StatusCode::OK {
        return Err(failure(FailureReason::Refused, format!("status {}", answer.status().as_u16())));
    }
    let found = parse(answer.body()).map_err(|why| failure(FailureReason::Invalid, why))?;
    Ok(engines_of(&found))
}

/// Returns the engines of a document.
pub(super) fn engines_of(found: &DiscoveredServers) -> Vec<DiscoveredEngine> {
    let engine = |url: &UpstreamUrl| {
        let (api_key, model) = (found.api_key.clone(), found.model.clone());
        FoundEngine { api_key, model, ..FoundEngine::at(url.clone()) }.into()
    };
    found.urls.iter().map(engine).collect()
}

/// Parses the document, or returns what is wrong with it.
pub(super) fn parse(body: &[u8]) -> Result<DiscoveredServers, String> {
    let answer: Map<String, Value> =
        serde_json::from_slice(body).map_err(|error| format!("is no JSON object: {error}"))?;
    let urls = match answer.get("base_url") {
        None | Some(Value::Null) => return Err("base_url is missing".into()),
        Some(Value::String(one)) => vec![engine(one)?],
        Some(Value::Array(list)) => engines(list)?,
        Some(_) => return Err("base_url is neither a text nor a list".into()),
    };
    let model = text(&answer, "model")?.map(plain).transpose();
    let model = model.map_err(|what| format!("model {what}"))?.map(|model| model.trim().to_string());
    Ok(DiscoveredServers { urls, api_key: key(&answer)?, model })
}

fn engines(list: &[Value]) -> Result<Vec<UpstreamUrl>, String> {
    if list.is_empty() {
        return Err("base_url names no engine yet".into());
    }
    if list.len() > MAX_ENGINES {
        return Err(format!("base_url names {} engines: {MAX_ENGINES} is the most", list.len()));
    }
    let (mut urls, mut known) = (Vec::new(), BTreeSet::new());
    for item in list {
        let url = engine(item.as_str().ok_or("base_url has an item that is no text")?)?;
        if known.insert(url.clone()) {
            urls.push(url);
        }
    }
    Ok(urls)
}

fn engine(written: &str) -> Result<UpstreamUrl, String> {
    let url = url::upstream(written.trim()).map_err(|what| format!("base_url {what}"))?;
    // A remote server must not direct the balancer to unix sockets of this machine.
    if url.unix.is_some() {
        return Err(format!("base_url {} is no http URL", seen(written)));
    }
    Ok(url)
}

fn key(answer: &Map<String, Value>) -> Result<Option<Secret>, String> {
    let key = text(answer, "api_key")?.map(secret).transpose();
    key.map_err(|what| format!("api_key {what}"))
}

/// Returns the string member `key`; `None` when it is absent, null or blank.
fn text<'a>(answer: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match answer.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.trim().is_empty())),
        Some(_) => Err(format!("{key} is no text")),
    }
}

#[cfg(test)]
mod tests;
