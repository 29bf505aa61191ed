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
//! Pure: parses a document and does no I/O. An invalid document is rejected as a whole.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::DiscoveredServers;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::types::UpstreamUrl;
use crate::config::url;
use crate::config::values::{plain, secret};

/// The path of the document.
pub(super) const PATH: &str = "/get_inner_vllm_config";

/// The largest number of engines that one source may list.
const MAX_ENGINES: usize = 1024;

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
