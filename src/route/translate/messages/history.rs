//! The system's text and the messages: blocks as a chat's messages have them.
//!
//! The results of tools in a user's message become messages of their own before it. Thoughts of the assistant
//! go back as its reasoning; redacted ones, which no template can render, do not.

use serde_json::{Map, Value, json};

use super::tools::ToolChange;
use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::reject::Reject;
use crate::route::translate::request::{JsonFields, refused};
use crate::route::translate::tokens::take_tokens;

/// Begins Claude Code's system text that differs in every request, which vLLM leaves out.
const BILLING: &str = "x-anthropic-billing-header";

/// The type of an image whose source names none.
const DEFAULT_IMAGE_TYPE: &str = "image/jpeg";

/// The conversation of a chat, as far as it is translated.
#[derive(Default)]
struct ChatHistory {
    messages: Vec<Value>,
    changes: Vec<ToolChange>,
    /// Thoughts stand in the content, between tags.
    tags: bool,
}

/// What the blocks of one message make.
#[derive(Default)]
struct MessageParts {
    /// Texts and images.
    parts: Vec<Value>,
    thoughts: String,
    has_thoughts: bool,
    calls: Vec<Value>,
    /// Of the last block that has any: an answer has them on its last block.
    tokens: Map<String, Value>,
}

/// The messages of a chat, and the changes of its tools that stand between them.
pub(super) fn messages(
    system: Option<Value>,
    list: Vec<Value>,
    tags: bool,
) -> Result<(Value, Vec<ToolChange>), Reject> {
    let mut talk = ChatHistory { tags, ..ChatHistory::default() };
    let system = match system {
        None => String::new(),
        Some(Value::String(text)) => text,
        Some(Value::Array(blocks)) => talk.system_text(blocks, "system", false)?,
        Some(_) => return Err(refused("system", "Input should be a valid string or a list")),
    };
    talk.push_system(system);
    for (index, message) in list.into_iter().enumerate() {
        talk.message(message, &format!("messages[{index}]"))?;
    }
    Ok((Value::Array(talk.messages), talk.changes))
}

// === impl ChatHistory ===

impl ChatHistory {
    fn push_system(&mut self, text: String) {
        if !text.is_empty() {
            self.messages.push(json!({"role": "system", "content": text}));
        }
    }

    fn message(&mut self, message: Value, place: &str) -> Result<(), Reject> {
        let mut message = object(message, place)?;
        let role = required(&mut message, "role", place)?;
        let place = format!("{place}.content");
        let content = match message.shift_remove("content") {
            Some(content @ (Value::String(_) | Value::Array(_))) => content,
            Some(_) => return Err(refused(place, "Input should be a valid string or a list")),
            None => return Err(refused(place, "Field required")),
        };
        match role.as_str() {
            "system" => {
                let text = match content {
                    Value::String(text) if text.starts_with(BILLING) => String::new(),
                    Value::String(text) => text,
                    content => self.system_text(list(content), &place, true)?,
                };
                self.push_system(text);
            }
            "user" => self.user(content, &place)?,
            "assistant" => {
                let tokens = take_tokens(&mut message).unwrap_or_default();
                self.assistant(content, tokens, &place)?;
            }
            _ => {
                let place = place.trim_end_matches("content");
                let message = "Input should be 'user', 'assistant' or 'system'";
                return Err(refused(format!("{place}role"), message));
            }
        }
        Ok(())
    }

    /// The texts of a system's blocks. `changes`: its blocks may change the tools.
    fn system_text(&mut self, blocks: Vec<Value>, place: &str, changes: bool) -> Result<String, Reject> {
        let mut text = String::new();
        for (index, block) in blocks.into_iter().enumerate() {
            let place = format!("{place}[{index}]");
            let mut block = object(block, &place)?;
            let kind = kind(&block);
            match kind.as_str() {
                "text" => match block.get("text") {
                    Some(Value::String(more)) if !more.starts_with(BILLING) => text.push_str(more),
                    _ => {}
                },
                "tool_addition" | "tool_removal" if changes => {
                    let Some(tool) = block.shift_remove("tool").filter(Value::is_object) else {
                        return Err(refused(format!("{place}.tool"), "Field required"));
                    };
                    let (place, is_removal) = (format!("{place}.tool"), kind == "tool_removal");
                    self.changes.push(ToolChange { place, is_removal, tool });
                }
                _ => return Err(unsupported(&kind, &place)),
            }
        }
        Ok(text)
    }

    fn user(&mut self, content: Value, place: &str) -> Result<(), Reject> {
        let content = match content {
            Value::Array(blocks) => {
                let mut parts = MessageParts::default();
                for (index, block) in blocks.into_iter().enumerate() {
                    let place = format!("{place}[{index}]");
                    let mut block = object(block, &place)?;
                    match kind(&block).as_str() {
                        "tool_result" => self.tool_result(&mut block, &place)?,
                        kind => parts.block(kind, block, &place)?,
                    }
                }
                let Some(content) = parts.content() else { return Ok(()) };
                content
            }
            text => text,
        };
        self.messages.push(json!({"role": "user", "content": content}));
        Ok(())
    }

    fn assistant(&mut self, content: Value, tokens: Map<String, Value>, place: &str) -> Result<(), Reject> {
        let mut parts = MessageParts { tokens, ..MessageParts::default() };
        match content {
            Value::Array(blocks) => {
                for (index, block) in blocks.into_iter().enumerate() {
                    let place = format!("{place}[{index}]");
                    let mut block = object(block, &place)?;
                    if let Some(tokens) = take_tokens(&mut block) {
                        parts.tokens = tokens;
                    }
                    match kind(&block).as_str() {
                        "tool_result" => parts.text(&format!("Tool result: {}", result(&block).text)),
                        kind => parts.block(kind, block, &place)?,
                    }
                }
            }
            text => parts.parts.push(json!({"type": "text", "text": text})),
        }
        self.messages.push(parts.assistant(self.tags));
        Ok(())
    }

    /// The result of a tool: a message of its own, and one for its images, and one for the tools that it
    /// refers to. Whether it is an error stands only in its text.
    fn tool_result(&mut self, block: &mut JsonFields, place: &str) -> Result<(), Reject> {
        let id = block.shift_remove("tool_use_id").filter(Value::is_string).unwrap_or_else(|| json!(""));
        match block.get("content") {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => {}
            Some(_) => {
                let message = "Input should be a valid string or a list";
                return Err(refused(format!("{place}.content"), message));
            }
        }
        let result = result(block);
        self.messages.push(json!({"role": "tool", "tool_call_id": id, "content": result.text}));
        if !result.images.is_empty() {
            let images = result.images.iter().map(|source| image(source, place));
            let images: Vec<Value> = images.collect::<Result<_, _>>()?;
            self.messages.push(json!({"role": "user", "content": images}));
        }
        if !result.references.is_empty() {
            let message = json!({"role": "tool", "tool_call_id": id, "content": result.references});
            self.messages.push(message);
        }
        Ok(())
    }
}

// === impl MessageParts ===

impl MessageParts {
    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.parts.push(json!({"type": "text", "text": text}));
        }
    }

    fn block(&mut self, kind: &str, mut block: JsonFields, place: &str) -> Result<(), Reject> {
        match kind {
            "text" => self.text(block.get("text").and_then(Value::as_str).unwrap_or_default()),
            "image" => {
                let source = block.get("source").unwrap_or(&Value::Null);
                self.parts.push(image(source, place)?);
            }
            "thinking" => {
                if let Some(thought) = block.get("thinking").and_then(Value::as_str) {
                    self.thoughts.push_str(thought);
                    self.has_thoughts = true;
                }
            }
            "tool_use" => self.calls.push(call(&mut block, place)?),
            "redacted_thinking" | "tool_reference" => {}
            _ => return Err(unsupported(kind, place)),
        }
        Ok(())
    }

    /// A single text stands alone.
    fn content(&mut self) -> Option<Value> {
        let mut parts = std::mem::take(&mut self.parts);
        match &mut parts[..] {
            [] => None,
            [only] if only["type"] == "text" => Some(only["text"].take()),
            _ => Some(Value::Array(parts)),
        }
    }

    fn assistant(mut self, tags: bool) -> Value {
        let mut message = Map::new();
        message.insert("role".into(), json!("assistant"));
        if tags && self.has_thoughts {
            let thoughts = format!("<think>{}</think>", self.thoughts);
            self.parts.insert(0, json!({"type": "text", "text": thoughts}));
        }
        // Only beside calls may there be no content.
        let none = if self.calls.is_empty() { json!("") } else { Value::Null };
        message.insert("content".into(), self.content().unwrap_or(none));
        if !tags && self.has_thoughts {
            message.insert("reasoning".into(), self.thoughts.into());
        }
        if !self.calls.is_empty() {
            message.insert("tool_calls".into(), self.calls.into());
        }
        message.extend(self.tokens);
        Value::Object(message)
    }
}

// === blocks ===

/// What a tool has given.
#[derive(Default)]
struct ToolResult {
    text: String,
    /// The sources of its images.
    images: Vec<Value>,
    /// Tools that are to be looked up by their names.
    references: Vec<Value>,
}

/// The texts, a line each, the images and the references of a result. vLLM leaves out what else it has.
fn result(block: &JsonFields) -> ToolResult {
    let blocks = match block.get("content") {
        Some(Value::String(text)) => return ToolResult { text: text.clone(), ..ToolResult::default() },
        Some(Value::Array(blocks)) => blocks.as_slice(),
        _ => &[],
    };
    let (mut result, mut texts) = (ToolResult::default(), Vec::new());
    for block in blocks {
        match block["type"].as_str() {
            Some("text") => texts.push(block["text"].as_str().unwrap_or_default()),
            Some("image") => result.images.push(block["source"].clone()),
            Some("tool_reference") => {
                let name = [&block["tool_name"], &block["name"]].into_iter().find(|name| name.is_string());
                if let Some(name) = name {
                    result.references.push(json!({"type": "tool_reference", "name": name}));
                }
            }
            _ => {}
        }
    }
    result.text = texts.join("\n");
    result
}

fn image(source: &Value, place: &str) -> Result<Value, Reject> {
    let text = |key: &str| source[key].as_str();
    let url = match (text("type").unwrap_or("base64"), text("url"), text("data")) {
        ("url", Some(url), _) => url.to_owned(),
        ("base64", _, Some(data)) => {
            format!("data:{};base64,{data}", text("media_type").unwrap_or(DEFAULT_IMAGE_TYPE))
        }
        _ => {
            let message = "An image must be given as `base64` or by its `url`: there is no store of files.";
            return Err(refused(format!("{place}.source"), message));
        }
    };
    Ok(json!({"type": "image_url", "image_url": {"url": url}}))
}

fn call(block: &mut JsonFields, place: &str) -> Result<Value, Reject> {
    let id = required(block, "id", place)?;
    let name = required(block, "name", place)?;
    let arguments = match block.shift_remove("input") {
        None | Some(Value::Null) => "{}".to_owned(),
        Some(input @ Value::Object(_)) => input.to_string(),
        Some(_) => return Err(refused(format!("{place}.input"), "Input should be a valid dictionary")),
    };
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn object(value: Value, place: &str) -> Result<JsonFields, Reject> {
    match value {
        Value::Object(fields) => Ok(fields),
        _ => Err(refused(place, "Input should be a valid dictionary")),
    }
}

fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(list) => list,
        _ => Vec::new(),
    }
}

fn kind(block: &JsonFields) -> String {
    block.get("type").and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn required(fields: &mut JsonFields, key: &str, place: &str) -> Result<String, Reject> {
    match fields.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(refused(format!("{place}.{key}"), "Field required")),
    }
}

fn unsupported(kind: &str, place: &str) -> Reject {
    let kind = cut(kind, MAX_SHOWN_BYTES).concat();
    refused(format!("{place}.type"), format!("Blocks of type `{kind}` are not supported."))
}
