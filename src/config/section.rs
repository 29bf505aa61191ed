//! One map of the file: finds unknown keys and hands values to the rows of the table.
//!
//! Problems are collected instead of stopping at the first; a key that is absent or invalid leaves its field
//! unchanged.

use serde_json::{Map, Value};

use super::free;
use super::keys;
use super::problem::{ConfigPlace, ConfigProblem};
use super::setting::MapSource;
use super::spelling::closest;
use super::values::ReadResult;
use super::yaml::{self, YamlEntry, YamlNode, YamlValue};

/// A map of the file at its place.
pub(crate) struct ConfigSection<'t, 'p> {
    pub place: ConfigPlace,
    entries: &'t [YamlEntry],
    pub problems: &'p mut Vec<ConfigProblem>,
}

impl<'t, 'p> ConfigSection<'t, 'p> {
    /// Opens a map. Unknown keys become problems; a node that is no map is a problem and reads as empty.
    pub(crate) fn open(
        node: &'t YamlNode,
        place: ConfigPlace,
        known: &[&str],
        problems: &'p mut Vec<ConfigProblem>,
    ) -> Self {
        let entries: &[YamlEntry] = match &node.value {
            YamlValue::Map(entries) => entries,
            YamlValue::Null | YamlValue::Broken => &[],
            YamlValue::Text(_) | YamlValue::List(_) => {
                let text =
                    format!("must be a map of keys, is {}: known are {}", node.kind(), known.join(", "));
                problems.push(ConfigProblem::new(&place, text));
                &[]
            }
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let place = place.key(&entry.key, Some(entry.line));
            if keys::is_alias(&place.pattern()) {
                continue;
            }
            problems.push(ConfigProblem::new(&place, unknown(&entry.key, &place.pattern(), known)));
        }
        ConfigSection { place, entries, problems }
    }

    /// The place of a key, with its line if it was written.
    pub(crate) fn place_of(&self, key: &str) -> ConfigPlace {
        let line = self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.line);
        self.place.key(key, line)
    }

    /// The value of a key; `None` where the key is absent or null.
    pub(crate) fn node(&self, key: &str) -> Option<&'t YamlNode> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        (entry.node.value != YamlValue::Null).then_some(&entry.node)
    }

    /// The items of the list of a key, or a problem.
    pub(crate) fn items(&mut self, key: &str) -> Option<&'t [YamlNode]> {
        let place = self.place_of(key);
        items(self.node(key)?, &place, self.problems)
    }

    /// Parses the value of a key.
    pub(crate) fn get<T>(&mut self, key: &str, read: impl Fn(&str) -> ReadResult<T>) -> Option<T> {
        let place = self.place_of(key);
        scalar(self.node(key)?, &place, self.problems, read)
    }

    /// Reports a problem with the value of a key.
    pub(crate) fn report(&mut self, key: &str, text: impl Into<String>) {
        let place = self.place_of(key);
        self.problems.push(ConfigProblem::new(&place, text));
    }
}

// === impl MapSource ===

impl MapSource for ConfigSection<'_, '_> {
    fn has(&self, key: &str) -> bool {
        self.node(key).is_some()
    }

    fn is_list(&self, key: &str) -> bool {
        matches!(self.node(key).map(|node| &node.value), Some(YamlValue::List(_)))
    }

    fn text(&mut self, key: &str, take: &mut dyn FnMut(&str) -> ReadResult<()>) {
        let place = self.place_of(key);
        if let Some(node) = self.node(key) {
            scalar(node, &place, self.problems, take);
        }
    }

    fn texts(&mut self, key: &str, take: &mut dyn FnMut(&str) -> ReadResult<()>) -> Option<usize> {
        let place = self.place_of(key);
        let items = self.items(key)?;
        for (index, item) in items.iter().enumerate() {
            scalar(item, &place.item(index, item.line), self.problems, &mut *take);
        }
        Some(items.len())
    }

    /// A plain number or truth value is the text that was written.
    fn pairs(&mut self, key: &str, take: &mut dyn FnMut(&str, &str) -> ReadResult<()>) {
        let place = self.place_of(key);
        match self.node(key) {
            Some(YamlNode { value: YamlValue::Map(entries), .. }) => {
                for entry in entries {
                    let place = place.key(&entry.key, Some(entry.line));
                    scalar(&entry.node, &place, self.problems, |text| take(&entry.key, text));
                }
            }
            Some(node) => {
                free::object(node, &place, self.problems);
            }
            None => {}
        }
    }

    fn object(&mut self, key: &str) -> Option<Map<String, Value>> {
        let place = self.place_of(key);
        free::object(self.node(key)?, &place, self.problems)
    }

    fn map(&mut self, key: &str, known: &[&str], take: &mut dyn FnMut(&mut dyn MapSource)) {
        let place = self.place_of(key);
        let absent = YamlNode::null();
        let node = self.node(key).unwrap_or(&absent);
        take(&mut ConfigSection::open(node, place, known, self.problems));
    }

    fn problem(&mut self, key: &str, text: String) {
        self.report(key, text);
    }
}

/// The items of a list, or a problem.
pub(crate) fn items<'t>(
    node: &'t YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<&'t [YamlNode]> {
    match &node.value {
        YamlValue::List(items) => Some(items),
        YamlValue::Null | YamlValue::Broken => None,
        YamlValue::Text(_) | YamlValue::Map(_) => {
            problems.push(ConfigProblem::new(place, format!("must be a list, is {}", node.kind())));
            None
        }
    }
}

/// Parses one single value, or reports a problem.
pub(crate) fn scalar<T>(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
    mut read: impl FnMut(&str) -> ReadResult<T>,
) -> Option<T> {
    if node.value == YamlValue::Null {
        problems.push(ConfigProblem::new(place, "must not be empty"));
    }
    let text = yaml::text(node, place, problems)?;
    read(text).map_err(|what| problems.push(ConfigProblem::new(place, what))).ok()
}

fn unknown(key: &str, pattern: &str, known: &[&str]) -> String {
    if let Some(why) = keys::why_absent(pattern) {
        return why.into();
    }
    match closest(key, known) {
        Some(meant) => format!("unknown key: did you mean {meant:?}?"),
        None => format!("unknown key: known here are {}", known.join(", ")),
    }
}
