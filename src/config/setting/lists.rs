//! Forms of values that hold several: lists of single values, maps of texts, JSON objects.

use serde_json::{Map, Value, json};

use super::row::{MapSource, ValueForm, ValueVisibility};
use crate::config::values::ReadResult;

/// A list of single values `V`, kept as `L`.
pub struct ValueListForm<V: 'static, L: 'static> {
    kind: &'static str,
    read: fn(&str) -> ReadResult<V>,
    collect: fn(Vec<V>) -> L,
    show: fn(&L) -> Value,
    /// What to do in place of writing an empty list, where that is a problem.
    empty: Option<&'static str>,
}

/// A map of texts whose keys are the user's own, as pairs.
pub struct PairsForm {
    kind: &'static str,
    visibility: ValueVisibility,
    read: PairReader,
    show: fn(&str, &str) -> String,
}

/// Parses a key and its value.
type PairReader = fn(&str, &str) -> ReadResult<(String, String)>;

/// A JSON object.
pub struct ObjectForm;

/// A list of texts.
pub const fn texts(
    kind: &'static str,
    read: fn(&str) -> ReadResult<String>,
) -> ValueListForm<String, Vec<String>> {
    list(kind, read, |texts| texts, |texts| json!(texts))
}

/// A list of texts that may be absent.
pub const fn maybe_texts(
    kind: &'static str,
    read: fn(&str) -> ReadResult<String>,
) -> ValueListForm<String, Option<Vec<String>>> {
    list(kind, read, Some, |texts| json!(texts))
}

/// Returns the form of a list of scalars.
pub const fn list<V, L>(
    kind: &'static str,
    read: fn(&str) -> ReadResult<V>,
    collect: fn(Vec<V>) -> L,
    show: fn(&L) -> Value,
) -> ValueListForm<V, L> {
    ValueListForm { kind, read, collect, show, empty: None }
}

/// A map of texts that are shown as they are.
pub const fn pairs(kind: &'static str, read: PairReader) -> PairsForm {
    PairsForm { kind, visibility: ValueVisibility::Shown, read, show: |_, value| value.to_owned() }
}

/// A map of texts of which `show` masks the secret ones.
pub const fn partly_masked_pairs(
    kind: &'static str,
    read: PairReader,
    show: fn(&str, &str) -> String,
) -> PairsForm {
    PairsForm { kind, visibility: ValueVisibility::PartlyMasked, read, show }
}

pub const fn object() -> ObjectForm {
    ObjectForm
}

// === impl ValueListForm ===

impl<V, L> ValueListForm<V, L> {
    /// The form of a list that must not be empty; `remedy` says what to do instead.
    pub const fn not_empty(mut self, remedy: &'static str) -> Self {
        self.empty = Some(remedy);
        self
    }
}

impl<V, L> ValueForm<L> for ValueListForm<V, L> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut L) {
        let mut values = Vec::new();
        let items = from.texts(key, &mut |text| {
            values.push((self.read)(text)?);
            Ok(())
        });
        if let (Some(0), Some(remedy)) = (items, self.empty) {
            from.problem(key, format!("must not be empty: {remedy}"));
        }
        if items.is_some() {
            *into = (self.collect)(values);
        }
    }

    fn show(&self, value: &L) -> Value {
        (self.show)(value)
    }
}

// === impl PairsForm ===

impl ValueForm<Vec<(String, String)>> for PairsForm {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn visibility(&self) -> ValueVisibility {
        self.visibility
    }

    fn is_free(&self) -> bool {
        true
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut Vec<(String, String)>) {
        if !from.has(key) {
            return;
        }
        let mut found: Vec<(String, String)> = Vec::new();
        from.pairs(key, &mut |key, value| {
            let (key, value) = (self.read)(key, value)?;
            if found.iter().any(|(earlier, _)| *earlier == key) {
                return Err("given twice: case does not matter in a header".into());
            }
            found.push((key, value));
            Ok(())
        });
        *into = found;
    }

    fn show(&self, pairs: &Vec<(String, String)>) -> Value {
        let shown: Map<String, Value> =
            pairs.iter().map(|(key, value)| (key.clone(), (self.show)(key, value).into())).collect();
        null_if_empty(shown)
    }
}

// === impl ObjectForm ===

impl ValueForm<Map<String, Value>> for ObjectForm {
    fn kind(&self) -> &'static str {
        "map of JSON values"
    }

    fn is_free(&self) -> bool {
        true
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut Map<String, Value>) {
        if let Some(object) = from.object(key) {
            *into = object;
        }
    }

    fn show(&self, object: &Map<String, Value>) -> Value {
        null_if_empty(object.clone())
    }
}

fn null_if_empty(map: Map<String, Value>) -> Value {
    if map.is_empty() { Value::Null } else { Value::Object(map) }
}
