//! The items of an input, as messages.
//!
//! The assistant's consecutive items (reasoning, texts, calls) become one message, as templates expect and as
//! the model produced them.

use serde_json::{Map, Value, json};

use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::reject::Reject;
use crate::route::translate::request::refused;
use crate::route::translate::tokens::take_tokens;

/// Parts that a chat has in the same form.
const SHARED_PART_TYPES: [&str; 9] = [
    "audio_embeds",
    "audio_url",
    "image_embeds",
    "image_url",
    "input_audio",
    "prompt_embeds",
    "refusal",
    "text",
    "video_url",
];

/// What a message of a chat may carry beside its content; others are the response's own.
const KEPT_MESSAGE_FIELDS: [&str; 2] = ["name", "tool_call_id"];

#[derive(Default)]
struct ChatMessages {
    messages: Vec<Value>,
    assistant: Option<AssistantTurn>,
    /// Thoughts stand in the content, between tags.
    tags: bool,
}

/// The assistant's items since the last item of another role.
#[derive(Default)]
struct AssistantTurn {
    thoughts: Vec<String>,
    texts: Vec<String>,
    calls: Vec<Value>,
    /// Of the last item that has any: an answer has them on its last item.
    tokens: Map<String, Value>,
}

/// The messages of a request.
pub(super) fn messages(instructions: Option<Value>, input: Value, tags: bool) -> Result<Value, Reject> {
    let mut talk = ChatMessages { tags, ..ChatMessages::default() };
    match instructions {
        None => {}
        Some(Value::String(text)) => talk.push(json!({"role": "system", "content": text})),
        Some(_) => return Err(refused("instructions", "Input should be a valid string")),
    }
    match input {
        Value::String(text) => talk.push(json!({"role": "user", "content": text})),
        Value::Array(items) => {
            for (index, item) in items.into_iter().enumerate() {
                talk.item(item, &format!("input[{index}]"))?;
            }
        }
        _ => return Err(refused("input", "Input should be a valid string or a list")),
    }
    talk.flush();
    Ok(Value::Array(talk.messages))
}

// === impl Talk ===

impl ChatMessages {
    fn push(&mut self, message: Value) {
        self.flush();
        self.messages.push(message);
    }

    /// Ends the assistant's message.
    fn flush(&mut self) {
        if let Some(assistant) = self.assistant.take() {
            self.messages.push(assistant.message(self.tags));
        }
    }

    fn item(&mut self, item: Value, place: &str) -> Result<(), Reject> {
        let Value::Object(mut item) = item else {
            return Err(refused(place, "Input should be a valid dictionary"));
        };
        let kind = item.get("type").and_then(Value::as_str).unwrap_or("message").to_owned();
        let tokens = take_tokens(&mut item);
        let assistant = &mut self.assistant;
        match kind.as_str() {
            "message" => self.message(item, place)?,
            "reasoning" => {
                // Encrypted reasoning is no turn of the assistant.
                if let Some(thought) = thought(&item) {
                    assistant.get_or_insert_default().thoughts.push(thought);
                }
            }
            "function_call" => assistant.get_or_insert_default().calls.push(call(&mut item, place)?),
            "function_call_output" => {
                let id = required(&mut item, "call_id", place)?;
                let output = content(item.shift_remove("output"), &format!("{place}.output"))?;
                self.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
            }
            _ => {
                let kind = cut(&kind, MAX_SHOWN_BYTES).concat();
                let message = format!("Items of type `{kind}` are not supported.");
                return Err(refused(format!("{place}.type"), message));
            }
        }
        // Only an assistant's item was generated.
        if let Some((assistant, tokens)) = self.assistant.as_mut().zip(tokens) {
            assistant.tokens = tokens;
        }
        Ok(())
    }

    fn message(&mut self, mut item: Map<String, Value>, place: &str) -> Result<(), Reject> {
        let role = required(&mut item, "role", place)?;
        let said = content(item.shift_remove("content"), &format!("{place}.content"))?;
        if role != "assistant" {
            let mut message = Map::new();
            message.insert("role".into(), role);
            message.insert("content".into(), said);
            message.extend(KEPT_MESSAGE_FIELDS.iter().filter_map(|key| item.shift_remove_entry(*key)));
            self.push(Value::Object(message));
            return Ok(());
        }
        let text = match said {
            Value::String(text) => text,
            said => {
                let parts = said.as_array().into_iter().flatten();
                let texts = parts.map(|part| part["text"].as_str().or(part["refusal"].as_str()));
                let text: Option<String> = texts.collect();
                let only = "An assistant's content can only be text.";
                text.ok_or_else(|| refused(format!("{place}.content"), only))?
            }
        };
        let assistant = self.assistant.get_or_insert_default();
        assistant.texts.extend(Some(text).filter(|text| !text.is_empty()));
        // A history that was a chat's before.
        if let Some(Value::Array(calls)) = item.shift_remove("tool_calls") {
            assistant.calls.extend(calls);
        }
        if let Some(thought) = ["reasoning", "reasoning_content"].iter().find_map(|key| item.get(*key)) {
            assistant.thoughts.extend(thought.as_str().map(str::to_owned));
        }
        Ok(())
    }
}

// === impl Assistant ===

impl AssistantTurn {
    fn message(self, tags: bool) -> Value {
        let thoughts = self.thoughts.join("\n");
        let mut content = self.texts.join("\n");
        let mut message = Map::new();
        message.insert("role".into(), json!("assistant"));
        if tags && !thoughts.is_empty() {
            content = format!("<think>{thoughts}</think>{content}");
        }
        // Only beside calls may there be no content.
        let content = if content.is_empty() && !self.calls.is_empty() { Value::Null } else { content.into() };
        message.insert("content".into(), content);
        if !tags && !thoughts.is_empty() {
            message.insert("reasoning".into(), thoughts.into());
        }
        if !self.calls.is_empty() {
            message.insert("tool_calls".into(), self.calls.into());
        }
        message.extend(self.tokens);
        Value::Object(message)
    }
}

fn required(item: &mut Map<String, Value>, key: &str, place: &str) -> Result<Value, Reject> {
    let value = item.shift_remove(key).filter(Value::is_string);
    value.ok_or_else(|| refused(format!("{place}.{key}"), "Field required"))
}

/// The reasoning: its text if present, else its summary. Encrypted reasoning cannot be read.
fn thought(item: &Map<String, Value>) -> Option<String> {
    let texts = |key: &str| {
        let parts = item.get(key).and_then(Value::as_array).into_iter().flatten();
        let texts: Vec<&str> = parts.filter_map(|part| part["text"].as_str()).collect();
        Some(texts.join("\n")).filter(|text| !text.is_empty())
    };
    texts("content").or_else(|| texts("summary"))
}

fn call(item: &mut Map<String, Value>, place: &str) -> Result<Value, Reject> {
    let name = required(item, "name", place)?;
    let id = required(item, "call_id", place)?;
    let arguments = match item.shift_remove("arguments") {
        Some(Value::String(text)) => text,
        Some(Value::Object(object)) => Value::Object(object).to_string(),
        _ => return Err(refused(format!("{place}.arguments"), "Field required")),
    };
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// A text, or a list of parts.
fn content(content: Option<Value>, place: &str) -> Result<Value, Reject> {
    match content {
        None | Some(Value::Null) => Ok(json!("")),
        Some(Value::String(text)) => Ok(Value::String(text)),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            let parts = parts.map(|(index, written)| part(written, &format!("{place}[{index}]")));
            Ok(Value::Array(parts.collect::<Result<_, _>>()?))
        }
        Some(_) => Err(refused(place, "Input should be a valid string or a list")),
    }
}

fn part(part: Value, place: &str) -> Result<Value, Reject> {
    let mut part = match part {
        Value::String(text) => return Ok(json!({"type": "text", "text": text})),
        Value::Object(part) => part,
        _ => return Err(refused(place, "Input should be a valid dictionary")),
    };
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut told = match kind.as_str() {
        "input_text" | "output_text" => json!({"type": "text", "text": required(&mut part, "text", place)?}),
        "input_image" => picture(&mut part, place)?,
        "input_video" => {
            let url = required(&mut part, "video_url", place)?;
            json!({"type": "video_url", "video_url": {"url": url}})
        }
        kind if SHARED_PART_TYPES.contains(&kind) => return Ok(Value::Object(part)),
        _ => {
            let kind = cut(&kind, MAX_SHOWN_BYTES).concat();
            let message = format!("Content of type `{kind}` is not supported.");
            return Err(refused(format!("{place}.type"), message));
        }
    };
    // By which vLLM knows a picture again.
    if let Some(uuid) = part.shift_remove("uuid").filter(Value::is_string) {
        told["uuid"] = uuid;
    }
    Ok(told)
}

fn picture(part: &mut Map<String, Value>, place: &str) -> Result<Value, Reject> {
    let mut image = match part.shift_remove("image_url") {
        Some(Value::String(url)) => json!({ "url": url }),
        Some(Value::Object(image)) => Value::Object(image),
        _ => {
            let message = "An image must be given by its `image_url`: there is no store of files.";
            return Err(refused(format!("{place}.image_url"), message));
        }
    };
    if let Some(detail) = part.shift_remove("detail").filter(Value::is_string) {
        image["detail"] = detail;
    }
    Ok(json!({"type": "image_url", "image_url": image}))
}
