//! Reading one map of the file key by key, collecting problems instead of stopping.
//!
//! The reader returns the default for a key that is absent or has an invalid value, and goes on to the next
//! problem. Unknown keys are found by the table in `keys`. Never keeps a default of its
//! own.

use super::keys;
use super::problem::{ConfigPlace, Problem, seen};
use super::raw::{self, YamlEntry, YamlNode, YamlValue};
use super::values::ReadResult;

pub struct Section<'t, 'p> {
    pub place: ConfigPlace,
    entries: &'t [YamlEntry],
    pub problems: &'p mut Vec<Problem>,
}

impl<'t, 'p> Section<'t, 'p> {
    /// Opens a map. Unknown keys become problems here; what is no map is a problem and reads as empty.
    pub fn open(node: &'t YamlNode, place: ConfigPlace, problems: &'p mut Vec<Problem>) -> Self {
        let known = keys::of(&place.pattern());
        let entries: &[YamlEntry] = match &node.value {
            YamlValue::Map(entries) => entries,
            YamlValue::Null | YamlValue::Broken => &[],
            YamlValue::Text(_) | YamlValue::List(_) => {
                let text =
                    format!("must be a map of keys, is {}: known are {}", node.kind(), known.join(", "));
                problems.push(Problem::new(&place, text));
                &[]
            }
        };
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let place = place.key(&entry.key, Some(entry.line));
            if keys::is_alias(&place.pattern()) {
                continue;
            }
            problems.push(Problem::new(&place, unknown(&entry.key, &place.pattern(), known)));
        }
        Section { place, entries, problems }
    }

    /// The place of a key, with its line if it was written.
    pub fn place_of(&self, key: &str) -> ConfigPlace {
        let line = self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.line);
        self.place.key(key, line)
    }

    /// What was written for the key; `None` for nothing and for null.
    pub fn node(&self, key: &str) -> Option<&'t YamlNode> {
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        (entry.node.value != YamlValue::Null).then_some(&entry.node)
    }

    /// The map of a key; reads as empty when it was not written.
    pub fn section<'s>(&'s mut self, key: &str) -> Section<'t, 's> {
        let place = self.place_of(key);
        match self.node(key) {
            Some(node) => Section::open(node, place, self.problems),
            None => Section { place, entries: &[], problems: self.problems },
        }
    }

    /// The value of a key as `read` understands it.
    pub fn get<T>(&mut self, key: &str, read: impl Fn(&str) -> ReadResult<T>) -> Option<T> {
        let place = self.place_of(key);
        scalar(self.node(key)?, &place, self.problems, read)
    }

    /// As `get`, for a key that must be there.
    pub fn require<T>(&mut self, key: &str, read: impl Fn(&str) -> ReadResult<T>) -> Option<T> {
        if self.node(key).is_none() {
            self.problem(key, "is missing");
        }
        self.get(key, read)
    }

    /// One of a set of words.
    pub fn choose<T>(&mut self, key: &str, allowed: &[&str], parse: fn(&str) -> Option<T>) -> Option<T> {
        let pattern = self.place_of(key).pattern();
        self.get(key, |text| {
            if keys::is_later(&format!("{pattern}={text}")) {
                return Err(format!("{} is {}", seen(text), keys::NOT_AVAILABLE));
            }
            parse(text).ok_or_else(|| {
                let meant = keys::closest(text, allowed).map(|word| format!(" (did you mean {word}?)"));
                format!(
                    "{} is unknown{}: allowed are {}",
                    seen(text),
                    meant.unwrap_or_default(),
                    allowed.join(", ")
                )
            })
        })
    }

    /// A list of single values.
    pub fn list<T>(&mut self, key: &str, read: impl Fn(&str) -> ReadResult<T>) -> Option<Vec<T>> {
        let place = self.place_of(key);
        let items = items(self.node(key)?, &place, self.problems)?;
        let each = items
            .iter()
            .enumerate()
            .filter_map(|(index, item)| scalar(item, &place.item(index, item.line), self.problems, &read));
        Some(each.collect())
    }

    pub fn problem(&mut self, key: &str, text: impl Into<String>) {
        let place = self.place_of(key);
        self.problems.push(Problem::new(&place, text));
    }
}

/// The items of a list, or a problem.
pub fn items<'t>(
    node: &'t YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<Problem>,
) -> Option<&'t [YamlNode]> {
    match &node.value {
        YamlValue::List(items) => Some(items),
        YamlValue::Null | YamlValue::Broken => None,
        YamlValue::Text(_) | YamlValue::Map(_) => {
            problems.push(Problem::new(place, format!("must be a list, is {}", node.kind())));
            None
        }
    }
}

/// One single value as `read` understands it, or a problem.
pub fn scalar<T>(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<Problem>,
    read: impl Fn(&str) -> ReadResult<T>,
) -> Option<T> {
    if node.value == YamlValue::Null {
        problems.push(Problem::new(place, "must not be empty"));
    }
    let text = raw::text(node, place, problems)?;
    read(text).map_err(|what| problems.push(Problem::new(place, what))).ok()
}

fn unknown(key: &str, pattern: &str, known: &[&str]) -> String {
    if keys::is_later(pattern) {
        return keys::NOT_AVAILABLE.into();
    }
    if let Some(why) = keys::why_absent(pattern) {
        return why.into();
    }
    match keys::closest(key, known) {
        Some(meant) => format!("unknown key: did you mean {meant:?}?"),
        None => format!("unknown key: known here are {}", known.join(", ")),
    }
}
