//! The simulated chat template: renders the bodies of three APIs to one sequence of tokens.
//!
//! All of them become `<|im_start|>role\n…<|im_end|>\n` messages, with tools after the system text, so that a
//! conversation that goes on, also in another API, begins with the blocks of the one before. What templates
//! of reasoning models drop from history (thoughts, ids of calls) is dropped here too.
//!
//! Rendering never fails: unknown content is rendered as its JSON.

use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::token::{self, END_MARKER, START_MARKER};

/// The start of a line that Claude Code adds to the system text, different in every request; vLLM removes it.
const BILLING: &str = "x-anthropic-billing-header";

/// One message of the rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RenderedMessage {
    role: String,
    text: String,
}

/// Renders an OpenAI chat request.
pub(super) fn chat(body: &Value) -> Vec<u32> {
    let mut turns = Vec::new();
    for message in body["messages"].as_array().into_iter().flatten() {
        turns.push(openai_turn(message));
    }
    let generates = body["add_generation_prompt"].as_bool().unwrap_or(true);
    tokens(turns, &body["tools"], generates)
}

/// Renders an Anthropic request.
pub(super) fn messages(body: &Value) -> Vec<u32> {
    let mut turns = Vec::new();
    let system = system_text(&body["system"]);
    if !system.is_empty() {
        turns.push(RenderedMessage { role: "system".to_owned(), text: system });
    }
    for message in body["messages"].as_array().into_iter().flatten() {
        message_turns(message, &mut turns);
    }
    tokens(turns, &body["tools"], true)
}

/// Renders an Anthropic message: results of tools come before the text of the user.
fn message_turns(message: &Value, turns: &mut Vec<RenderedMessage>) {
    let role = message["role"].as_str().unwrap_or("user").to_owned();
    let turn = |role: &str, text: String| RenderedMessage { role: role.to_owned(), text };
    let Value::Array(blocks) = &message["content"] else {
        turns.push(turn(&role, text_of(&message["content"])));
        return;
    };
    if role == "system" {
        turns.push(turn(&role, system_text(&message["content"])));
        return;
    }
    let (mut texts, mut calls) = (Vec::new(), String::new());
    for block in blocks {
        match block["type"].as_str() {
            Some("tool_use") => push_call(&mut calls, &block["name"], &block["input"]),
            Some("tool_result") => {
                let (images, plain): (Vec<Value>, Vec<Value>) =
                    block["content"].as_array().into_iter().flatten().cloned().partition(is_image);
                let text = block["content"].as_str().map(str::to_owned);
                turns.push(turn("tool", text.unwrap_or_else(|| text_of(&json!(plain)))));
                if !images.is_empty() {
                    turns.push(turn("user", text_of(&images.iter().map(chat_image).collect())));
                }
            }
            Some("thinking" | "redacted_thinking") => {}
            _ if is_image(block) => texts.push(chat_image(block)),
            _ => texts.push(block.clone()),
        }
    }
    if role == "assistant" || !texts.is_empty() {
        turns.push(turn(&role, text_of(&json!(texts)) + &calls));
    }
}

fn is_image(block: &Value) -> bool {
    block["type"] == "image"
}

/// Converts an image to the form of a chat.
fn chat_image(block: &Value) -> Value {
    let source = &block["source"];
    let text = |key: &str| source[key].as_str().unwrap_or_default();
    let url = match text("type") {
        "url" => text("url").to_owned(),
        _ => format!("data:{};base64,{}", text("media_type"), text("data")),
    };
    json!({"type": "image_url", "image_url": {"url": url}})
}

/// Joins the texts of a system's blocks without a separator.
fn system_text(content: &Value) -> String {
    let Value::Array(blocks) = content else { return text_of(content) };
    blocks.iter().filter_map(part_text).collect()
}

/// Renders a Responses request that continues `before`, the turns of an earlier answer.
pub(super) fn responses(body: &Value, before: &[Value]) -> Vec<u32> {
    let mut turns = Vec::new();
    if let Some(instructions) = body["instructions"].as_str() {
        turns.push(RenderedMessage { role: "system".to_owned(), text: instructions.to_owned() });
    }
    turns.extend(before.iter().filter_map(response_turn));
    match &body["input"] {
        Value::String(text) => turns.push(RenderedMessage { role: "user".to_owned(), text: text.clone() }),
        Value::Array(items) => turns.extend(items.iter().filter_map(response_turn)),
        _ => {}
    }
    tokens(turns, &body["tools"], true)
}

fn openai_turn(message: &Value) -> RenderedMessage {
    let role = message["role"].as_str().unwrap_or("user").to_owned();
    let mut text = text_of(&message["content"]);
    for call in message["tool_calls"].as_array().into_iter().flatten() {
        push_call(&mut text, &call["function"]["name"], &call["function"]["arguments"]);
    }
    RenderedMessage { role, text }
}

/// Renders one item; `None` for an item that is not part of the prompt.
fn response_turn(item: &Value) -> Option<RenderedMessage> {
    let mut text = String::new();
    let role = match item["type"].as_str() {
        Some("reasoning") => return None,
        Some("function_call") => {
            push_call(&mut text, &item["name"], &item["arguments"]);
            "assistant"
        }
        Some("function_call_output") => {
            text = text_of(&item["output"]);
            "tool"
        }
        _ => {
            text = text_of(&item["content"]);
            item["role"].as_str().unwrap_or("user")
        }
    };
    Some(RenderedMessage { role: role.to_owned(), text })
}

fn push_call(text: &mut String, name: &Value, arguments: &Value) {
    let name = name.as_str().unwrap_or_default();
    let arguments = arguments.as_str().map_or_else(|| arguments.to_string(), str::to_owned);
    text.push_str(&format!("<tool_call>{name} {arguments}</tool_call>"));
}

/// Returns the text of a content: a string, or parts joined by line breaks.
fn text_of(content: &Value) -> String {
    match content {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<String> = parts.iter().filter_map(part_text).collect();
            texts.join("\n")
        }
        other => other.to_string(),
    }
}

fn part_text(part: &Value) -> Option<String> {
    if let Some(text) = part.as_str() {
        return Some(text.to_owned());
    }
    match part["type"].as_str() {
        Some("thinking" | "redacted_thinking") => None,
        _ => match part["text"].as_str() {
            Some(text) if text.starts_with(BILLING) => None,
            Some(text) => Some(text.to_owned()),
            // An image or a sound: its hash stands for it.
            None => Some(format!("<|media {:016x}|>", xxh3_64(part.to_string().as_bytes()))),
        },
    }
}

fn tokens(mut turns: Vec<RenderedMessage>, tools: &Value, generates: bool) -> Vec<u32> {
    if let Some(tools) = tools.as_array().filter(|tools| !tools.is_empty()) {
        let mut text = String::from("\n\n# Tools\n");
        for tool in tools {
            let function = tool.get("function").unwrap_or(tool);
            let schema = function.get("parameters").or(function.get("input_schema")).unwrap_or(&Value::Null);
            let name = function["name"].as_str().unwrap_or_default();
            let description = function["description"].as_str().unwrap_or_default();
            text.push_str(&format!("{name}: {description} {schema}\n"));
        }
        match turns.first_mut().filter(|turn| turn.role == "system") {
            Some(system) => system.text.push_str(&text),
            None => turns.insert(0, RenderedMessage { role: "system".to_owned(), text }),
        }
    }
    let mut ids = Vec::new();
    for turn in turns {
        ids.push(START_MARKER);
        // Encoded separately, so that a text has the same tokens as question, answer and history.
        token::encode_into(&turn.role, &mut ids);
        token::encode_into("\n", &mut ids);
        token::encode_into(&turn.text, &mut ids);
        ids.push(END_MARKER);
        token::encode_into("\n", &mut ids);
    }
    if generates {
        ids.push(START_MARKER);
        token::encode_into("assistant", &mut ids);
        token::encode_into("\n", &mut ids);
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_conversation_begins_with_the_shorter_one() {
        let first = chat(&json!({"messages": [{"role": "user", "content": "how are you"}]}));
        let second = chat(&json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "how are you"}]},
            {"role": "assistant", "content": "fine", "reasoning": "hm"},
            {"role": "user", "content": "good"},
        ]}));
        assert_eq!(second[..first.len()], first[..]);
        assert_eq!(token::decode(&first), "<|im_start|>user\nhow are you<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn renders_three_apis_alike() {
        let schema = json!({"type": "object"});
        let function = json!({"name": "f", "description": "d", "parameters": schema});
        let tool = json!([{"type": "function", "function": function}]);
        let by_chat = chat(&json!({"tools": tool, "messages": [
            {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        ]}));
        let by_messages = messages(&json!({
            "system": [
                {"type": "text", "text": format!("{BILLING}: 1")},
                {"type": "text", "text": "be kind"},
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": schema}],
            "messages": [{"role": "user", "content": "hi"}],
        }));
        let by_responses = responses(
            &json!({
                "instructions": "be kind",
                "tools": [{"type": "function", "name": "f", "description": "d", "parameters": schema}],
                "input": "hi",
            }),
            &[],
        );
        assert_eq!(by_chat, by_messages);
        assert_eq!(by_chat, by_responses);
    }

    #[test]
    fn renders_media_by_its_content() {
        let picture = |url: &str| {
            chat(&json!({"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": url}},
            ]}]}))
        };
        assert_eq!(picture("a"), picture("a"));
        assert_ne!(picture("a"), picture("b"));
    }
}
