//! What a NeMo Gym model server says of its engines, at `GET /get_inner_vllm_config`:
//!
//! ```text
//! {"base_url": ["http://10.0.0.7:8000/v1", ...], "api_key": "dummy", "model": "Qwen/Qwen3-8B"}
//! ```
//!
//! `base_url` is one text or a list. Gym's own proxy asks once, after `GET /` has had any answer; here the
//! question is put until it is answered, and again from then on, so that one path is enough.
//!
//! `api_key` is sent to the engines as it is, also where it is "dummy" or "EMPTY": an engine that wants none
//! does not look. `model` is not taken for all that an engine serves: engines are asked for their models as
//! any others are, which brings LoRA adapters and `max_model_len`, and one that has no list of models serves
//! this one.
//!
//! Pure: what was read is judged here, and never asked for. An answer is taken as a whole or not at all.

use serde_json::{Map, Value};

use super::DiscoveredServers;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::types::UpstreamUrl;
use crate::config::url;
use crate::config::values::{plain, secret};

pub const PATH: &str = "/get_inner_vllm_config";

/// The most engines that one source may name.
const MAX_ENGINES: usize = 1024;

/// What the answer says, or what is wrong with it.
pub fn parse(body: &[u8]) -> Result<DiscoveredServers, String> {
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
    let mut urls = Vec::new();
    for item in list {
        let url = engine(item.as_str().ok_or("base_url has an item that is no text")?)?;
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    Ok(urls)
}

fn engine(written: &str) -> Result<UpstreamUrl, String> {
    let url = url::upstream(written.trim()).map_err(|what| format!("base_url {what}"))?;
    // The answering server must not choose among the sockets of this machine.
    if url.unix.is_some() {
        return Err(format!("base_url {} is no http URL", seen(written)));
    }
    Ok(url)
}

fn key(answer: &Map<String, Value>) -> Result<Option<Secret>, String> {
    let key = text(answer, "api_key")?.map(secret).transpose();
    key.map_err(|what| format!("api_key {what}"))
}

/// `None` for what is not there, or empty.
fn text<'a>(answer: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match answer.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.trim().is_empty())),
        Some(_) => Err(format!("{key} is no text")),
    }
}

#[cfg(test)]
mod tests;
