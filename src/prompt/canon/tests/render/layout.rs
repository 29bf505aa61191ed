//! Conversations as bytes: the order of keys, spaces and escapes by chance.

use super::*;

pub(in crate::prompt::canon::tests) fn written(body: &[(&'static str, Node)], luck: &mut Luck) -> String {
    let mut out = String::new();
    out.push('{');
    entries_written(body, luck, &mut out);
    out.push('}');
    out
}

pub(super) fn shuffle<T>(entries: &mut [T], luck: &mut Luck) {
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
pub(in crate::prompt::canon::tests) fn api() -> impl Strategy<Value = RenderedApi> {
    select(vec![RenderedApi::Chat, RenderedApi::Responses, RenderedApi::Messages])
}
