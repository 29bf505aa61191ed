//! Conversations as they are meant, and the many ways in which clients write the same one.

mod generated;
mod layout;

pub(super) use self::generated::talk;
use self::layout::shuffle;
pub(super) use self::layout::{api, written};

use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value as Json, json};

/// What is said, whatever the interface.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Talk {
    pub system: Option<String>,
    pub tools: Vec<Tool>,
    pub turns: Vec<Turn>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tool {
    pub name: String,
    pub description: String,
    pub schema: Json,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Turn {
    User(Vec<Piece>),
    Assistant { text: Option<String>, calls: Vec<(String, Json)> },
    Result(Vec<Piece>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Piece {
    Text(String),
    Image(String),
}

// === the same thing in three interfaces ===

/// JSON to be laid out: what a client may write in another way is free.
pub(super) enum Node {
    /// Keys in any order.
    Map(Vec<(&'static str, Node)>),
    List(Vec<Node>),
    /// White space and escapes are free, the order is not.
    Kept(Json),
    /// A string that holds JSON.
    Quoted(Json),
}

fn string(text: &str) -> Node {
    Node::Kept(Json::from(text))
}

/// Chance, for what a client is free to do.
pub(super) struct Luck(pub u64);

impl Luck {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }

    fn toss(&mut self) -> bool {
        self.below(2) == 0
    }

    fn id(&mut self) -> Node {
        string(&format!("id_{}", self.below(1 << 30)))
    }

    /// Keys that a template never sees.
    fn noise(&mut self, map: &mut Vec<(&'static str, Node)>) {
        if self.toss() {
            map.push(("id", self.id()));
        }
        if self.toss() {
            map.push(("status", Node::Kept(select_status(self.below(3)))));
        }
        if self.toss() {
            map.push(("cache_control", Node::Kept(json!({"type": "ephemeral", "text": "x"}))));
        }
    }
}

fn select_status(index: usize) -> Json {
    [Json::Null, json!("completed"), json!("in_progress")][index].clone()
}

#[derive(Clone, Copy, Debug)]
pub(super) enum RenderedApi {
    Chat,
    Responses,
    Messages,
}

fn typed(kind: &str, mut rest: Vec<(&'static str, Node)>, luck: &mut Luck) -> Node {
    rest.push(("type", string(kind)));
    luck.noise(&mut rest);
    Node::Map(rest)
}

fn image(api: RenderedApi, data: &str, luck: &mut Luck) -> Node {
    let url = format!("data:image/png;base64,{data}");
    match api {
        RenderedApi::Chat if luck.toss() => typed("image_url", vec![("image_url", string(&url))], luck),
        RenderedApi::Chat => {
            let inner = Node::Map(vec![("url", string(&url)), ("detail", string("low"))]);
            typed("image_url", vec![("image_url", inner)], luck)
        }
        RenderedApi::Responses => typed("input_image", vec![("image_url", string(&url))], luck),
        RenderedApi::Messages => {
            let source = vec![("data", string(data)), ("media_type", string("image/png"))];
            let source = typed("base64", source, luck);
            typed("image", vec![("source", source)], luck)
        }
    }
}

fn content(api: RenderedApi, pieces: &[Piece], kind: &str, luck: &mut Luck) -> Node {
    let texts: Option<Vec<&str>> = pieces
        .iter()
        .map(|piece| match piece {
            Piece::Text(text) => Some(text.as_str()),
            Piece::Image(_) => None,
        })
        .collect();
    if let Some(texts) = texts.filter(|_| luck.toss()) {
        return string(&texts.join("\n"));
    }
    let part = |piece: &Piece| match piece {
        Piece::Text(text) => typed(kind, vec![("text", string(text))], luck),
        Piece::Image(data) => image(api, data, luck),
    };
    Node::List(pieces.iter().map(part).collect())
}

fn message(role: &str, content: Node, luck: &mut Luck) -> Vec<(&'static str, Node)> {
    let mut map = vec![("role", string(role)), ("content", content)];
    luck.noise(&mut map);
    map
}

fn chat(turn: &Turn, luck: &mut Luck) -> Vec<Node> {
    let map = match turn {
        Turn::User(pieces) => message("user", content(RenderedApi::Chat, pieces, "text", luck), luck),
        Turn::Result(pieces) => {
            let mut map = message("tool", content(RenderedApi::Chat, pieces, "text", luck), luck);
            map.extend([("tool_call_id", luck.id()), ("name", string("whatever"))]);
            map
        }
        Turn::Assistant { text, calls } => {
            let said = match text {
                Some(text) => content(RenderedApi::Chat, &[Piece::Text(text.clone())], "text", luck),
                None => Node::Kept([Json::Null, json!(""), json!([])][luck.below(3)].clone()),
            };
            let mut map = message("assistant", said, luck);
            map.push(("reasoning_content", string("let me think")));
            if !calls.is_empty() || luck.toss() {
                let call = |(name, arguments): &(String, Json)| {
                    let arguments = Node::Quoted(arguments.clone());
                    let function = Node::Map(vec![("name", string(name)), ("arguments", arguments)]);
                    typed("function", vec![("function", function), ("id", luck.id())], luck)
                };
                map.push(("tool_calls", Node::List(calls.iter().map(call).collect())));
            }
            map
        }
    };
    vec![Node::Map(map)]
}

fn items(turn: &Turn, luck: &mut Luck) -> Vec<Node> {
    match turn {
        Turn::User(pieces) => {
            let mut map = message("user", content(RenderedApi::Responses, pieces, "input_text", luck), luck);
            if luck.toss() {
                map.push(("type", string("message")));
            }
            vec![Node::Map(map)]
        }
        Turn::Result(pieces) => {
            let output = content(RenderedApi::Responses, pieces, "input_text", luck);
            vec![typed("function_call_output", vec![("output", output), ("call_id", luck.id())], luck)]
        }
        Turn::Assistant { text, calls } => {
            let thought = Node::Kept(json!([{"type": "reasoning_text", "text": "let me think"}]));
            let secret = string(&format!("secret {}", luck.below(1 << 30)));
            let thought = vec![("content", thought), ("encrypted_content", secret)];
            let mut items = vec![typed("reasoning", thought, luck)];
            if let Some(text) = text {
                let part = typed("output_text", vec![("text", string(text))], luck);
                items.push(Node::Map(message("assistant", Node::List(vec![part]), luck)));
            }
            items.extend(calls.iter().map(|(name, arguments)| {
                let arguments = Node::Quoted(arguments.clone());
                let call = vec![("name", string(name)), ("arguments", arguments), ("call_id", luck.id())];
                typed("function_call", call, luck)
            }));
            items
        }
    }
}

fn anthropic(turn: &Turn, luck: &mut Luck) -> Vec<Node> {
    let map = match turn {
        Turn::User(pieces) => message("user", content(RenderedApi::Messages, pieces, "text", luck), luck),
        Turn::Result(pieces) => {
            let inner = content(RenderedApi::Messages, pieces, "text", luck);
            let result = typed("tool_result", vec![("content", inner), ("tool_use_id", luck.id())], luck);
            message("user", Node::List(vec![result]), luck)
        }
        Turn::Assistant { text, calls } => {
            let mut blocks = vec![typed("thinking", vec![("thinking", string("let me think"))], luck)];
            if let Some(text) = text {
                blocks.push(typed("text", vec![("text", string(text))], luck));
            }
            blocks.extend(calls.iter().map(|(name, arguments)| {
                let input = Node::Kept(arguments.clone());
                typed("tool_use", vec![("name", string(name)), ("input", input), ("id", luck.id())], luck)
            }));
            message("assistant", Node::List(blocks), luck)
        }
    };
    vec![Node::Map(map)]
}

fn tool(api: RenderedApi, tool: &Tool, luck: &mut Luck) -> Node {
    let schema = Node::Kept(tool.schema.clone());
    let mut map = vec![("name", string(&tool.name)), ("description", string(&tool.description))];
    map.push((if matches!(api, RenderedApi::Messages) { "input_schema" } else { "parameters" }, schema));
    match api {
        RenderedApi::Chat => typed("function", vec![("function", Node::Map(map))], luck),
        RenderedApi::Responses => typed("function", map, luck),
        RenderedApi::Messages => Node::Map(map),
    }
}

const BILLING: &str = "x-anthropic-billing-header: cc_version=2; cch=";

/// The system's text as a list of parts, with or without the line that is other at every request.
fn system(text: &str, luck: &mut Luck) -> Node {
    let header = format!("{BILLING}{};", luck.below(1 << 30));
    match luck.below(3) {
        0 => string(text),
        1 => string(&format!("{header}\n{text}")),
        _ => {
            let header = typed("text", vec![("text", string(&header))], luck);
            Node::List(vec![header, typed("text", vec![("text", string(text))], luck)])
        }
    }
}

/// The body's fields. The conversation stands last among those that are prompt, where it is asked for.
pub(super) fn body(
    talk: &Talk,
    api: RenderedApi,
    talk_last: bool,
    luck: &mut Luck,
) -> Vec<(&'static str, Node)> {
    let mut fields = vec![("stream", Node::Kept(json!(true))), ("temperature", Node::Kept(json!(0.5)))];
    let write = match api {
        RenderedApi::Chat => chat,
        RenderedApi::Responses => items,
        RenderedApi::Messages => anthropic,
    };
    let mut turns: Vec<Node> = talk.turns.iter().flat_map(|turn| write(turn, luck)).collect();
    if let Some(text) = &talk.system {
        match api {
            RenderedApi::Messages => fields.push(("system", system(text, luck))),
            RenderedApi::Responses if luck.toss() => fields.push(("instructions", system(text, luck))),
            _ => {
                let role = ["system", "developer"][luck.below(2)];
                turns.insert(0, Node::Map(message(role, system(text, luck), luck)));
            }
        }
    }
    if !talk.tools.is_empty() || luck.toss() {
        let tools = talk.tools.iter().map(|each| tool(api, each, luck)).collect();
        fields.push(("tools", Node::List(tools)));
    }
    let name = if matches!(api, RenderedApi::Responses) { "input" } else { "messages" };
    let at = if talk_last { fields.len() } else { luck.below(fields.len() + 1) };
    fields.insert(at, (name, Node::List(turns)));
    if !talk_last {
        shuffle(&mut fields, luck);
    }
    fields
}
