//! The YAML of the file as a tree of texts, lists and maps, each with its line.
//!
//! serde would stop at the first error and drop line numbers; this reader reports every problem. A scalar
//! stays the text of the file, and its key decides what it means. Aliases, merge keys (`<<`) and comments
//! are those of YAML; a duplicate key is a problem. Size, depth and number of nodes are bounded, so that no
//! file can exhaust the memory. Variables and defaults are left to other modules.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput};

use super::problem::{ConfigPlace, ConfigProblem};

const MAX_BYTES: usize = 1 << 20;
const MAX_DEPTH: usize = 32;
/// The most nodes of a file, aliases counted in full.
const MAX_NODES: usize = 100_000;

/// A value of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct YamlNode {
    pub line: usize,
    /// Whether the scalar has no quotes. In a JSON value, `1` is a number and `"1"` a text.
    pub plain: bool,
    pub value: YamlValue,
}

/// The kinds of values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum YamlValue {
    /// An empty value, `~` or `null`: the key counts as absent.
    Null,
    /// A value whose problem is reported already.
    Broken,
    Text(String),
    List(Vec<YamlNode>),
    Map(Vec<YamlEntry>),
}

/// A key of a map with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct YamlEntry {
    pub key: String,
    pub line: usize,
    pub node: YamlNode,
}

impl YamlNode {
    pub(crate) fn null() -> Self {
        YamlNode { line: 1, plain: true, value: YamlValue::Null }
    }

    /// The entry of a key, if this is a map that has the key.
    pub(crate) fn entry(&self, key: &str) -> Option<&YamlEntry> {
        let YamlValue::Map(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == key)
    }

    /// The kind of the node, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self.value {
            YamlValue::Null | YamlValue::Broken => "nothing",
            YamlValue::Text(_) => "a single value",
            YamlValue::List(_) => "a list",
            YamlValue::Map(_) => "a map of keys",
        }
    }

    fn count(&self) -> usize {
        match &self.value {
            YamlValue::List(items) => 1 + items.iter().map(YamlNode::count).sum::<usize>(),
            YamlValue::Map(entries) => 1 + entries.iter().map(|entry| entry.node.count()).sum::<usize>(),
            _ => 1,
        }
    }

    fn depth(&self) -> usize {
        match &self.value {
            YamlValue::List(items) => 1 + items.iter().map(YamlNode::depth).max().unwrap_or(0),
            YamlValue::Map(entries) => 1 + entries.iter().map(|entry| entry.node.depth()).max().unwrap_or(0),
            _ => 0,
        }
    }
}

/// Parses one YAML document. `None` for text that is not YAML, with a problem.
pub(crate) fn parse(text: &str, problems: &mut Vec<ConfigProblem>) -> Option<YamlNode> {
    let start = ConfigPlace { path: String::new(), line: None };
    if text.len() > MAX_BYTES {
        problems.push(ConfigProblem::new(&start, format!("the file is larger than {MAX_BYTES} bytes")));
        return None;
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut reader =
        YamlReader { parser: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0, problems };
    match reader.document() {
        Ok(node) => Some(node),
        Err(stop) => {
            let place = ConfigPlace { path: String::new(), line: Some(stop.line) };
            problems.push(ConfigProblem::new(&place, stop.text));
            None
        }
    }
}

/// An error that ends the parse.
struct YamlError {
    line: usize,
    text: String,
}

impl From<ScanError> for YamlError {
    fn from(error: ScanError) -> Self {
        YamlError { line: error.marker().line(), text: format!("not valid YAML: {}", error.info()) }
    }
}

struct YamlReader<'t, 'p> {
    parser: Parser<'t, StrInput<'t>>,
    anchors: HashMap<usize, YamlNode>,
    nodes: usize,
    problems: &'p mut Vec<ConfigProblem>,
}

// === impl YamlReader ===

impl<'t> YamlReader<'t, '_> {
    fn next(&mut self) -> Result<(Event<'t>, Span), YamlError> {
        match self.parser.next_event() {
            Some(event) => Ok(event?),
            None => Err(YamlError { line: 1, text: "not valid YAML: it ends too early".into() }),
        }
    }

    fn document(&mut self) -> Result<YamlNode, YamlError> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::Nothing | Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd => {}
                Event::StreamEnd => return Ok(root.unwrap_or_else(YamlNode::null)),
                _ if root.is_some() => {
                    return Err(self.stop(span, "there is a second document: one file is one document"));
                }
                event => root = Some(self.node(event, span, &ConfigPlace::at(String::new(), 1), 0)?),
            }
        }
    }

    fn stop(&self, span: Span, text: &str) -> YamlError {
        YamlError { line: span.start.line(), text: text.into() }
    }

    fn too_deep(&self, span: Span) -> YamlError {
        self.stop(span, &format!("nested deeper than {MAX_DEPTH} levels, aliases counted in full"))
    }

    fn node(
        &mut self,
        event: Event<'t>,
        span: Span,
        place: &ConfigPlace,
        depth: usize,
    ) -> Result<YamlNode, YamlError> {
        if depth > MAX_DEPTH {
            return Err(self.too_deep(span));
        }
        let line = span.start.line();
        let plain = !matches!(&event, Event::Scalar(_, style, _, _) if *style != ScalarStyle::Plain);
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => (scalar(text.into_owned(), style), anchor),
            Event::SequenceStart(anchor, _) => (self.list(place, depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.map(place, depth)?, anchor),
            Event::Alias(anchor) => return self.alias(anchor, span, depth),
            _ => return Err(self.stop(span, "not valid YAML: a value was expected")),
        };
        self.spend(1, span)?;
        let node = YamlNode { line, plain, value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn spend(&mut self, nodes: usize, span: Span) -> Result<(), YamlError> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(self.stop(span, &format!("more than {MAX_NODES} values, aliases counted in full")));
        }
        Ok(())
    }

    fn alias(&mut self, anchor: usize, span: Span, depth: usize) -> Result<YamlNode, YamlError> {
        let Some(node) = self.anchors.get(&anchor).cloned() else {
            return Err(self.stop(span, "an alias stands inside its own anchor"));
        };
        self.spend(node.count(), span)?;
        if depth + node.depth() > MAX_DEPTH {
            return Err(self.too_deep(span));
        }
        Ok(YamlNode { line: span.start.line(), ..node })
    }

    fn list(&mut self, place: &ConfigPlace, depth: usize) -> Result<YamlValue, YamlError> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(YamlValue::List(items));
            }
            let place = place.item(items.len(), span.start.line());
            items.push(self.node(event, span, &place, depth + 1)?);
        }
    }

    fn map(&mut self, place: &ConfigPlace, depth: usize) -> Result<YamlValue, YamlError> {
        let mut entries: Vec<YamlEntry> = Vec::new();
        let mut merged = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let (key, plain) = match event {
                Event::MappingEnd => break,
                Event::Scalar(key, style, _, _) => (key.into_owned(), style == ScalarStyle::Plain),
                _ => return Err(self.stop(span, "a key must be a single value")),
            };
            let line = span.start.line();
            let (event, span) = self.next()?;
            let place = place.key(&key, Some(line));
            let node = self.node(event, span, &place, depth + 1)?;
            if plain && key == "<<" {
                self.merge(node, &place, &mut merged);
            } else if let Some(first) = entries.iter().find(|entry| entry.key == key) {
                let text = format!("given twice, first on line {}", first.line);
                self.problems.push(ConfigProblem::new(&place, text));
            } else {
                entries.push(YamlEntry { key, line, node });
            }
        }
        for entry in merged {
            if !entries.iter().any(|own| own.key == entry.key) {
                entries.push(entry);
            }
        }
        Ok(YamlValue::Map(entries))
    }

    /// Collects the entries of a `<<`. Of several maps the first wins, as YAML defines.
    fn merge(&mut self, node: YamlNode, place: &ConfigPlace, merged: &mut Vec<YamlEntry>) {
        match node.value {
            YamlValue::Map(entries) => merged.extend(entries),
            YamlValue::List(items) => {
                for item in items {
                    self.merge(item, place, merged);
                }
            }
            _ => {
                let text = format!("must be a map of keys or a list of maps, is {}", node.kind());
                self.problems.push(ConfigProblem::new(place, text));
            }
        }
    }
}

fn scalar(text: String, style: ScalarStyle) -> YamlValue {
    let null = matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL");
    if null && style == ScalarStyle::Plain { YamlValue::Null } else { YamlValue::Text(text) }
}

/// The text of a scalar; a problem for a list or map.
pub(crate) fn text<'t>(
    node: &'t YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<&'t str> {
    match &node.value {
        YamlValue::Text(text) => Some(text),
        YamlValue::Null | YamlValue::Broken => None,
        YamlValue::List(_) | YamlValue::Map(_) => {
            problems.push(ConfigProblem::new(place, format!("must be a single value, is {}", node.kind())));
            None
        }
    }
}

#[cfg(test)]
mod tests;
