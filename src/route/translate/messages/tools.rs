//! The tools of a request, and which of them is to be called.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::reject::Reject;
use crate::route::translate::request::{JsonFields, refused};

/// A change of the tools in the midst of the messages.
#[derive(Debug)]
pub(super) struct ToolChange {
    /// Where it stands, for messages.
    pub place: String,
    pub is_removal: bool,
    pub tool: Value,
}

/// The functions of the chat. The templates have one list of tools: that at the end of the conversation.
pub(super) fn tools(given: Option<Value>, changes: Vec<ToolChange>) -> Result<Option<Value>, Reject> {
    let list = match given {
        None => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(refused("tools", "Input should be a valid list")),
    };
    let functions = list.into_iter().enumerate();
    let functions = functions.map(|(index, tool)| function(tool, &format!("tools[{index}]")));
    let mut functions: Vec<Value> = functions.collect::<Result<_, _>>()?;
    if !changes.is_empty() {
        functions = changed(functions, changes)?;
    }
    let nested = |function| json!({"type": "function", "function": function});
    let nested: Vec<Value> = functions.into_iter().map(nested).collect();
    Ok((!nested.is_empty()).then_some(nested.into()))
}

/// The tools at the end of the conversation. Of equal names the last counts.
fn changed(functions: Vec<Value>, changes: Vec<ToolChange>) -> Result<Vec<Value>, Reject> {
    let mut known: Map<String, Value> =
        functions.into_iter().map(|function| (name_of(&function), function)).collect();
    let mut removed = HashSet::new();
    for change in changes {
        let is_removal = change.is_removal;
        let name = apply(change, &mut known)?;
        if is_removal {
            removed.insert(name)
        } else {
            removed.remove(&name)
        };
    }
    let left = known.into_iter().filter(|(name, _)| !removed.contains(name));
    Ok(left.map(|(_, function)| function).collect())
}

fn name_of(function: &Value) -> String {
    function["name"].as_str().unwrap_or_default().to_owned()
}

/// Takes a change, and gives the name of its tool. A tool that is removed stays known by its name.
fn apply(change: ToolChange, known: &mut Map<String, Value>) -> Result<String, Reject> {
    let ToolChange { place, is_removal, mut tool } = change;
    match tool["type"].as_str() {
        Some("tool_definition") if !is_removal => {
            let function = function(tool["definition"].take(), &format!("{place}.definition"))?;
            let name = name_of(&function);
            known.insert(name.clone(), function);
            Ok(name)
        }
        Some("tool_reference") => {
            let name = tool["name"].as_str().unwrap_or_default();
            let Some(Value::Object(function)) = known.get_mut(name) else {
                let name = cut(name, MAX_SHOWN_BYTES).concat();
                return Err(refused(place, format!("The tool `{name}` is not declared in tools.")));
            };
            if !is_removal {
                function.shift_remove("defer_loading");
            }
            Ok(name.to_owned())
        }
        _ => Err(refused(format!("{place}.type"), "Input should be 'tool_reference'")),
    }
}

/// A tool that the client runs. Anthropic's own have no schema, and run nowhere here.
fn function(tool: Value, place: &str) -> Result<Value, Reject> {
    let Value::Object(mut tool) = tool else {
        return Err(refused(place, "Input should be a valid dictionary"));
    };
    let Some(name) = tool.shift_remove("name").filter(Value::is_string) else {
        return Err(refused(format!("{place}.name"), "Field required"));
    };
    let mut schema = match (tool.shift_remove("input_schema"), tool.get("type")) {
        (Some(Value::Object(schema)), _) => schema,
        (None, Some(Value::String(kind))) if kind != "custom" => {
            let kind = cut(kind, MAX_SHOWN_BYTES).concat();
            let message = format!("Tools of type `{kind}` are not available: only custom tools are.");
            return Err(refused(format!("{place}.type"), message));
        }
        _ => return Err(refused(format!("{place}.input_schema"), "Input should be a valid dictionary")),
    };
    schema.entry("type").or_insert("object".into());
    let mut function = Map::new();
    function.insert("name".into(), name);
    function.extend(present(&mut tool, "description"));
    function.insert("parameters".into(), Value::Object(schema));
    function.extend(present(&mut tool, "strict"));
    function.extend(present(&mut tool, "defer_loading"));
    Ok(Value::Object(function))
}

fn present(tool: &mut JsonFields, key: &str) -> Option<(String, Value)> {
    tool.shift_remove_entry(key).filter(|(_, value)| !value.is_null())
}

/// Which tool is to be called. Without tools a chat refuses the choice, which then says nothing.
pub(super) fn choice(given: &mut JsonFields, chat: &mut JsonFields) -> Result<(), Reject> {
    let Some(choice) = given.shift_remove("tool_choice") else { return Ok(()) };
    let chosen = match choice["type"].as_str() {
        Some("auto") => json!("auto"),
        Some("any") => json!("required"),
        Some("none") => json!("none"),
        Some("tool") => match choice["name"].as_str().filter(|name| !name.is_empty()) {
            Some(name) => json!({"type": "function", "function": {"name": name}}),
            None => return Err(refused("tool_choice.name", "Field required")),
        },
        _ => {
            let message = "Input should be 'auto', 'any', 'tool' or 'none'";
            return Err(refused("tool_choice.type", message));
        }
    };
    if chat.contains_key("tools") {
        chat.insert("tool_choice".into(), chosen);
        if let Some(one) = choice["disable_parallel_tool_use"].as_bool() {
            chat.insert("parallel_tool_calls".into(), (!one).into());
        }
    }
    Ok(())
}
