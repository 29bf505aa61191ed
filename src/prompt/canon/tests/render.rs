//! Conversations as they are meant, and the many ways in which clients write the same one.

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

// === generated ===

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-zA-Z ,.é😀\n\"\\\\/\t]{1,30}",
        any::<String>().prop_filter("an empty text is no turn", |text| !text.is_empty()),
    ]
}

/// JSON whose keys keep their order.
fn value() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i32>().prop_map(Json::from),
        text().prop_map(Json::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            entries(inner).prop_map(Json::Object),
        ]
    })
}

fn entries(inner: impl Strategy<Value = Json>) -> impl Strategy<Value = serde_json::Map<String, Json>> {
    prop::collection::vec(("[a-zé\"]{1,6}", inner), 0..4).prop_map(|entries| entries.into_iter().collect())
}

fn object() -> impl Strategy<Value = Json> {
    entries(value()).prop_map(Json::Object)
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![
        4 => text().prop_map(Piece::Text),
        1 => "[a-zA-Z0-9+/]{8,40}".prop_map(Piece::Image),
    ];
    prop::collection::vec(piece, 1..4)
}

fn turn() -> impl Strategy<Value = Turn> {
    let calls = || prop::collection::vec(("[a-z_]{1,12}", object()), 0..3);
    prop_oneof![
        pieces().prop_map(Turn::User),
        (text(), calls()).prop_map(|(text, calls)| Turn::Assistant { text: Some(text), calls }),
        calls().prop_map(|calls| Turn::Assistant { text: None, calls }),
        pieces().prop_map(Turn::Result),
    ]
}

prop_compose! {
    fn any_tool()(name in "[a-z_]{1,12}", description in text(), schema in object()) -> Tool {
        Tool { name, description, schema }
    }
}

prop_compose! {
    pub fn talk()(
        system in prop::option::of(text()),
        tools in prop::collection::vec(any_tool(), 0..3),
        turns in prop::collection::vec(turn(), 1..7),
    ) -> Talk {
        Talk { system, tools, turns }
    }
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

// === laid out ===

pub(super) fn written(body: &[(&'static str, Node)], luck: &mut Luck) -> String {
    let mut out = String::new();
    out.push('{');
    entries_written(body, luck, &mut out);
    out.push('}');
    out
}

fn shuffle<T>(entries: &mut [T], luck: &mut Luck) {
    for index in (1..entries.len()).rev() {
        entries.swap(index, luck.below(index + 1));
    }
}

fn entries_written(entries: &[(&'static str, Node)], luck: &mut Luck, out: &mut String) {
    for (index, (key, value)) in entries.iter().enumerate() {
        out.push_str(if index > 0 { "," } else { "" });
        string_written(key, luck, out);
        space(luck, out);
        out.push(':');
        node_written(value, luck, out);
    }
}

fn node_written(node: &Node, luck: &mut Luck, out: &mut String) {
    space(luck, out);
    match node {
        Node::Map(entries) => {
            out.push('{');
            let mut order: Vec<&(&'static str, Node)> = entries.iter().collect();
            shuffle(&mut order, luck);
            for (index, (key, value)) in order.into_iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                string_written(key, luck, out);
                out.push(':');
                node_written(value, luck, out);
            }
            out.push('}');
        }
        Node::List(nodes) => {
            out.push('[');
            for (index, node) in nodes.iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                node_written(node, luck, out);
            }
            space(luck, out);
            out.push(']');
        }
        Node::Kept(value) => json_written(value, luck, out),
        Node::Quoted(value) => {
            let mut inner = String::new();
            json_written(value, luck, &mut inner);
            string_written(&inner, luck, out);
        }
    }
    space(luck, out);
}

fn json_written(value: &Json, luck: &mut Luck, out: &mut String) {
    space(luck, out);
    match value {
        Json::String(text) => string_written(text, luck, out),
        Json::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                json_written(item, luck, out);
            }
            out.push(']');
        }
        Json::Object(entries) => {
            out.push('{');
            for (index, (key, item)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { "," } else { "" });
                string_written(key, luck, out);
                space(luck, out);
                out.push(':');
                json_written(item, luck, out);
            }
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
    space(luck, out);
}

fn space(luck: &mut Luck, out: &mut String) {
    if luck.below(4) == 0 {
        out.push_str([" ", "\n", "\r\n", "\t "][luck.below(4)]);
    }
}

fn string_written(text: &str, luck: &mut Luck, out: &mut String) {
    let escaped = [0, 10, 2][luck.below(3)];
    out.push('"');
    for character in text.chars() {
        let chance = escaped > 0 && luck.below(escaped) == 0;
        match character {
            '/' if chance => out.push_str("\\/"),
            '\n' if luck.toss() => out.push_str("\\n"),
            '"' | '\\' if luck.toss() => out.extend(['\\', character]),
            _ if chance || character < ' ' || character == '"' || character == '\\' => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

/// Any of the three.
pub(super) fn api() -> impl Strategy<Value = RenderedApi> {
    select(vec![RenderedApi::Chat, RenderedApi::Responses, RenderedApi::Messages])
}
