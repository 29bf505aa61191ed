//! The request: every field of a Messages request as the chat has it.

use serde_json::{Value, json};

use super::{history, tools};
use crate::reject::Reject;
use crate::route::translate::request::{JsonFields, refused};

/// Fields that a chat has by the same name.
const KEPT_FIELDS: [&str; 11] = [
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "cache_salt",
    "watermarking",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "chat_template_kwargs",
    // A route may take settings from it.
    "metadata",
];

/// The fewest tokens that a model may be given to think.
const MIN_THINKING_TOKENS: i64 = 1024;

const EFFORTS: [&str; 5] = ["low", "medium", "high", "xhigh", "max"];

/// The chat of a Messages request with these fields.
pub(crate) fn translate(mut given: JsonFields, tags: bool) -> Result<JsonFields, Reject> {
    let limit = positive(&given, "max_tokens")?;
    let mut chat = conversation(&mut given, tags)?;
    let fields = KEPT_FIELDS.iter().filter_map(|key| given.shift_remove_entry(*key));
    chat.extend(fields);
    match given.shift_remove("stop_sequences") {
        None => {}
        Some(Value::Array(stops)) if stops.is_empty() => {}
        Some(stops @ Value::Array(_)) => drop(chat.insert("stop".into(), stops)),
        Some(_) => return Err(refused("stop_sequences", "Input should be a valid list")),
    }
    if let Some(user) = chat.get("metadata").and_then(|metadata| metadata.get("user_id")) {
        let user = user.clone();
        if user.is_string() {
            chat.insert("user".into(), user);
        }
    }
    if let Some(effort) = effort(&given)? {
        chat.insert("reasoning_effort".into(), effort.into());
    }
    if let Some(format) = format(&given)? {
        chat.insert("response_format".into(), format);
    }
    let is_prefill = chat.get("kv_transfer_params").is_some_and(|params| params["do_remote_decode"] == true);
    if let Some(budget) = thinking_budget(&given)? {
        // The leg that only prefills is sent with one token; that which decodes is checked.
        if budget >= limit && !is_prefill {
            let message = "thinking.budget_tokens must be less than max_tokens";
            return Err(refused("thinking.budget_tokens", message));
        }
        chat.insert("thinking_token_budget".into(), budget.into());
    }
    tools::choice(&mut given, &mut chat)?;
    match given.get("stream") {
        None | Some(Value::Bool(false)) => {}
        Some(Value::Bool(true)) => {
            // The first event reports the prompt's tokens, the last but one all of them.
            let options = json!({"include_usage": true, "continuous_usage_stats": true});
            chat.insert("stream".into(), json!(true));
            chat.insert("stream_options".into(), options);
        }
        Some(_) => return Err(refused("stream", "Input should be a valid boolean")),
    }
    Ok(chat)
}

/// The request to `/tokenize` that counts the tokens of a Messages request with these fields.
pub(crate) fn translate_count(mut given: JsonFields, tags: bool) -> Result<JsonFields, Reject> {
    let mut chat = conversation(&mut given, tags)?;
    thinking_budget(&given)?;
    let mut kwargs = match given.shift_remove("chat_template_kwargs") {
        None => JsonFields::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(_) => return Err(refused("chat_template_kwargs", "Input should be a valid dictionary")),
    };
    if let Some(effort) = effort(&given)? {
        // What the engine's chats make of an effort; `/tokenize` has no field for it.
        kwargs.entry("enable_thinking").or_insert((effort != "none").into());
        kwargs.insert("reasoning_effort".into(), effort.into());
    }
    if !kwargs.is_empty() {
        chat.insert("chat_template_kwargs".into(), Value::Object(kwargs));
    }
    Ok(chat)
}

/// The model, the messages and the tools.
fn conversation(given: &mut JsonFields, tags: bool) -> Result<JsonFields, Reject> {
    let mut chat = JsonFields::new();
    chat.extend(given.shift_remove_entry("model"));
    let list = match given.shift_remove("messages") {
        Some(Value::Array(list)) => list,
        Some(_) => return Err(refused("messages", "Input should be a valid list")),
        None => return Err(refused("messages", "Field required")),
    };
    let (messages, changes) = history::messages(given.shift_remove("system"), list, tags)?;
    chat.insert("messages".into(), messages);
    if let Some(tools) = tools::tools(given.shift_remove("tools"), changes)? {
        chat.insert("tools".into(), tools);
    }
    Ok(chat)
}

fn positive(given: &JsonFields, key: &str) -> Result<i64, Reject> {
    let value = given.get(key).ok_or_else(|| refused(key, "Field required"))?;
    let whole = value.as_i64().ok_or_else(|| refused(key, "Input should be a valid integer"))?;
    if whole > 0 { Ok(whole) } else { Err(refused(key, format!("{key} must be positive"))) }
}

/// How much the model is to reason.
fn effort(given: &JsonFields) -> Result<Option<String>, Reject> {
    if thinking_type(given)? == Some("disabled") {
        return Ok(Some("none".into()));
    }
    let Some(effort) = given.get("output_config").and_then(|config| config.get("effort")) else {
        return Ok(None);
    };
    match effort {
        Value::Null => Ok(None),
        Value::String(effort) if EFFORTS.contains(&effort.as_str()) => Ok(Some(effort.clone())),
        _ => {
            let message = format!("Input should be one of {}", EFFORTS.join(", "));
            Err(refused("output_config.effort", message))
        }
    }
}

/// The schema that the answer has to fit.
fn format(given: &JsonFields) -> Result<Option<Value>, Reject> {
    let Some(config) = given.get("output_config") else { return Ok(None) };
    if !config.is_object() {
        return Err(refused("output_config", "Input should be a valid dictionary"));
    }
    let format = &config["format"];
    let kind = format["type"].as_str().unwrap_or("json_schema");
    match &format["schema"] {
        Value::Null => Ok(None),
        _ if kind != "json_schema" => {
            Err(refused("output_config.format.type", "Input should be 'json_schema'"))
        }
        schema => {
            let named = json!({"name": kind, "schema": schema});
            Ok(Some(json!({"type": kind, "json_schema": named})))
        }
    }
}

fn thinking_type(given: &JsonFields) -> Result<Option<&str>, Reject> {
    let Some(thinking) = given.get("thinking") else { return Ok(None) };
    match thinking["type"].as_str() {
        Some(kind @ ("enabled" | "disabled" | "adaptive")) => Ok(Some(kind)),
        _ => Err(refused("thinking.type", "Input should be 'enabled', 'disabled' or 'adaptive'")),
    }
}

/// The most tokens that the model may think in.
fn thinking_budget(given: &JsonFields) -> Result<Option<i64>, Reject> {
    if thinking_type(given)? != Some("enabled") {
        return Ok(None);
    }
    let budget = given.get("thinking").and_then(|thinking| thinking["budget_tokens"].as_i64());
    match budget {
        Some(budget) if budget >= MIN_THINKING_TOKENS => Ok(Some(budget)),
        _ => {
            let message = format!("Input should be an integer of at least {MIN_THINKING_TOKENS}");
            Err(refused("thinking.budget_tokens", message))
        }
    }
}
