//! The request: every field of a Responses request as the chat has it.

use serde_json::{Value, json};

use super::items;
use super::response::RequestEcho;
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::reject::Reject;
use crate::route::translate::request::{JsonFields, refused};

/// vLLM's error where it has no store.
const NO_STORE: &str = "This vLLM engine does not support `store=True` and therefore does not support the \
                        background mode.";

/// Fields that refer to state which only OpenAI, or an engine's own Responses, keeps; with the error.
const UNSUPPORTED_FIELDS: [(&str, &str); 3] = [
    ("conversation", "conversations are not supported"),
    ("previous_input_messages", "earlier messages belong into `input`"),
    ("prompt", "prompt template is not supported"),
];

/// Fields that the chat carries in another way or does not need. A chat would answer with `n` choices.
const DROPPED_FIELDS: [&str; 7] =
    ["background", "max_tool_calls", "messages", "n", "previous_response_id", "store", "stream_options"];

/// The value of `include` that requests log-probabilities.
const LOGPROBS: &str = "message.output_text.logprobs";

/// The chat of a request with these fields, and what is remembered for its answer.
pub(crate) fn translate(mut given: JsonFields, tags: bool) -> Result<(JsonFields, RequestEcho), Reject> {
    check(&given)?;
    let echo = RequestEcho::new(&given);
    let mut chat = JsonFields::new();
    chat.extend(given.shift_remove_entry("model"));
    let instructions = given.shift_remove("instructions");
    let input = given.shift_remove("input").ok_or_else(|| refused("input", "Field required"))?;
    chat.insert("messages".into(), items::messages(instructions, input, tags)?);
    tools(&mut given, &mut chat)?;
    text(&mut given, &mut chat)?;
    logprobs(&mut given, &mut chat)?;
    sampling(&mut given, &mut chat);
    for (key, value) in given {
        if !DROPPED_FIELDS.contains(&key.as_str()) {
            chat.entry(key).or_insert(value);
        }
    }
    Ok((chat, echo))
}

/// Rejects what no chat can do.
fn check(given: &JsonFields) -> Result<(), Reject> {
    if given.get("background") == Some(&Value::Bool(true)) {
        return Err(refused("background", NO_STORE));
    }
    match given.get("previous_response_id") {
        None => {}
        Some(Value::String(id)) => return Err(Reject::Response { id: id.clone() }),
        Some(_) => return Err(refused("previous_response_id", "Input should be a valid string")),
    }
    match UNSUPPORTED_FIELDS.iter().find(|(key, _)| given.contains_key(*key)) {
        Some((key, why)) => Err(refused(*key, *why)),
        None => Ok(()),
    }
}

/// Limits, effort, truncation, streaming.
fn sampling(given: &mut JsonFields, chat: &mut JsonFields) {
    if let Some(limit) = given.shift_remove("max_output_tokens") {
        chat.insert("max_completion_tokens".into(), limit);
    }
    if let Some(mut reasoning) = given.shift_remove("reasoning")
        && let Some(effort) = reasoning.get_mut("effort").map(Value::take).filter(|effort| !effort.is_null())
    {
        chat.insert("reasoning_effort".into(), effort);
    }
    if given.shift_remove("truncation").is_some_and(|how| how == "auto") {
        // As vLLM's own Responses do it: down to what the model can read.
        chat.insert("truncate_prompt_tokens".into(), json!(-1));
    }
    if given.get("stream") == Some(&Value::Bool(true)) {
        // What the last event tells; it has no other source.
        chat.insert("stream".into(), json!(true));
        chat.insert("stream_options".into(), json!({"include_usage": true}));
    }
}

/// `text.format` is the chat's `response_format`; kinds that only vLLM has are written alike.
fn text(given: &mut JsonFields, chat: &mut JsonFields) -> Result<(), Reject> {
    let Some(text) = given.shift_remove("text") else { return Ok(()) };
    let Value::Object(mut text) = text else {
        return Err(refused("text", "Input should be a valid dictionary"));
    };
    if let Some(verbosity) = text.shift_remove("verbosity").filter(|verbosity| !verbosity.is_null()) {
        chat.insert("verbosity".into(), verbosity);
    }
    let Some(Value::Object(mut format)) = text.shift_remove("format") else { return Ok(()) };
    let kind = format.get("type").and_then(Value::as_str).unwrap_or("text").to_owned();
    let format = match kind.as_str() {
        "text" => return Ok(()),
        // Given as a chat has it already.
        "json_schema" if !format.contains_key("json_schema") => {
            format.shift_remove("type");
            format.retain(|_, value| !value.is_null());
            json!({"type": "json_schema", "json_schema": format})
        }
        _ => Value::Object(format),
    };
    chat.insert("response_format".into(), format);
    Ok(())
}

fn logprobs(given: &mut JsonFields, chat: &mut JsonFields) -> Result<(), Reject> {
    let wanted = match given.shift_remove("include") {
        None => false,
        Some(Value::Array(include)) => include.iter().any(|what| what == LOGPROBS),
        Some(_) => return Err(refused("include", "Input should be a valid list")),
    };
    if wanted {
        chat.insert("logprobs".into(), json!(true));
    }
    // Alone it would be refused, and by vLLM's Responses it is not looked at.
    let alone = !wanted && given.get("logprobs") != Some(&Value::Bool(true));
    if let Some(top) = given.shift_remove("top_logprobs").filter(|_| !alone) {
        chat.insert("top_logprobs".into(), top);
    }
    Ok(())
}

/// Tools, and which of them is to be called.
fn tools(given: &mut JsonFields, chat: &mut JsonFields) -> Result<(), Reject> {
    let list = match given.shift_remove("tools") {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(refused("tools", "Input should be a valid list")),
    };
    let has_tools = !list.is_empty();
    if has_tools {
        let nested = list.into_iter().enumerate().map(|(index, tool)| nested(tool, index));
        chat.insert("tools".into(), Value::Array(nested.collect::<Result<_, _>>()?));
    }
    let parallel = given.shift_remove("parallel_tool_calls");
    let choice = given.shift_remove("tool_choice");
    match choice {
        None => {}
        // Without tools a chat refuses any other word than these, which then say nothing.
        Some(Value::String(word)) if !has_tools && (word == "auto" || word == "none") => {}
        Some(Value::String(word)) => drop(chat.insert("tool_choice".into(), word.into())),
        Some(choice) => drop(chat.insert("tool_choice".into(), named(choice)?)),
    }
    if let Some(parallel) = parallel.filter(|_| has_tools) {
        chat.insert("parallel_tool_calls".into(), parallel);
    }
    Ok(())
}

/// A function, flat or nested already.
fn nested(mut tool: Value, index: usize) -> Result<Value, Reject> {
    let kind = tool["type"].as_str().unwrap_or_default().to_owned();
    if kind != "function" {
        let kind = cut(&kind, MAX_SHOWN_BYTES).concat();
        let message = format!("Tools of type `{kind}` are not available: only functions are.");
        return Err(refused(format!("tools[{index}].type"), message));
    }
    if tool["function"].is_object() {
        return Ok(tool);
    }
    if let Value::Object(function) = &mut tool {
        function.shift_remove("type");
        function.retain(|_, value| !value.is_null());
    }
    Ok(json!({"type": "function", "function": tool}))
}

/// The choice of one function by its name.
fn named(choice: Value) -> Result<Value, Reject> {
    if choice["type"] != "function" {
        let message = "Only `auto`, `none`, `required` and a function can be chosen.";
        return Err(refused("tool_choice", message));
    }
    if choice["function"].is_object() {
        return Ok(choice);
    }
    match choice.get("name").filter(|name| name.is_string()) {
        Some(name) => Ok(json!({"type": "function", "function": {"name": name}})),
        None => Err(refused("tool_choice.name", "Field required")),
    }
}
