//! Reads `sessions:`.

use super::{BONUS, TTL, set};
use crate::config::problem::seen;
use crate::config::raw::YamlValue;
use crate::config::section::Section;
use crate::config::types::{SessionConfig, SubagentSessions};
use crate::config::values::{ReadResult, duration_in, header_name, number_in};

pub fn read(mut section: Section<'_, '_>, sessions: &mut SessionConfig) {
    set(&mut sessions.headers, section.list("headers", header_name));
    set(&mut sessions.body, section.list("body", field));
    let is_list = matches!(section.node("cookie").map(|node| &node.value), Some(YamlValue::List(_)));
    let cookies = if is_list { section.list("cookie", cookie) } else { section.get("cookie", cookies) };
    set(&mut sessions.cookies, cookies);
    set(
        &mut sessions.subagents,
        section.choose("subagents", &SubagentSessions::NAMES, SubagentSessions::parse),
    );
    set(&mut sessions.bonus, section.get("bonus", number_in(BONUS)));
    set(&mut sessions.ttl, section.get("ttl", duration_in(TTL)));
}

fn field(text: &str) -> ReadResult<String> {
    let mut names = text.split('.');
    let outer = names.next().unwrap_or_default();
    let inner: Vec<&str> = names.collect();
    let is_inner = || !inner.is_empty() && inner.len() < SessionConfig::MAX_DEPTH;
    let is_known = match SessionConfig::OBJECTS.contains(&outer) {
        true => is_inner() && inner.iter().all(|name| !name.is_empty()),
        false => inner.is_empty() && SessionConfig::FIELDS.contains(&outer),
    };
    if is_known {
        return Ok(text.to_string());
    }
    let (fields, objects) = (SessionConfig::FIELDS.join(", "), SessionConfig::OBJECTS.join(", "));
    let text = seen(text);
    Err(format!(
        "{text} is no field that may name a session: known are {fields}, and NAME or NAME.NAME in {objects}"
    ))
}

/// The name of a cookie; `*`, which is allowed in names, stands for any text.
fn cookie(text: &str) -> ReadResult<String> {
    header_name(text).map(|_| text.to_string())
}

fn cookies(text: &str) -> ReadResult<Vec<String>> {
    if text == "none" { Ok(Vec::new()) } else { cookie(text).map(|name| vec![name]) }
}
