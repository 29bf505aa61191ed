//! Fields that never reach the upstream: by name, and by a path into maps (`a.b`) or into every item of a
//! list (`tools[].strict`).

use serde_json::{Map, Value};

/// The removed fields of one object.
#[derive(Debug, Default)]
pub(super) struct RemovedFields {
    pub names: Vec<String>,
    /// Fields further inside.
    pub inner: Vec<RemovedInside>,
}

/// The removed fields inside one member.
#[derive(Debug)]
pub(super) struct RemovedInside {
    pub key: String,
    /// The member is a list, and the fields are removed from each of its items.
    pub in_items: bool,
    pub fields: RemovedFields,
}

impl RemovedFields {
    /// Parses paths that the configuration check has accepted.
    pub(super) fn parse(paths: &[String]) -> Self {
        let mut all = RemovedFields::default();
        paths.iter().for_each(|path| all.add(path));
        all
    }

    fn add(&mut self, path: &str) {
        let Some((first, rest)) = path.split_once('.') else {
            self.names.push(path.to_owned());
            return;
        };
        let (key, in_items) = first.strip_suffix("[]").map_or((first, false), |key| (key, true));
        let at = self.inner.iter().position(|inside| inside.key == key && inside.in_items == in_items);
        let at = at.unwrap_or_else(|| {
            let fields = RemovedFields::default();
            self.inner.push(RemovedInside { key: key.to_owned(), in_items, fields });
            self.inner.len() - 1
        });
        self.inner[at].fields.add(rest);
    }

    /// The fields that are removed inside a member: of a map, or of each item of a list.
    pub(super) fn inside(&self, key: &str, in_items: bool) -> Option<&RemovedFields> {
        let mut inner = self.inner.iter();
        let found = inner.find(|inside| inside.key == key && inside.in_items == in_items);
        found.map(|inside| &inside.fields)
    }

    /// Removes the deeper fields from a value of the route itself.
    pub(super) fn strip_inside(&self, value: &mut Map<String, Value>) {
        for inside in &self.inner {
            match value.get_mut(&inside.key) {
                Some(Value::Object(object)) if !inside.in_items => inside.fields.strip(object),
                Some(Value::Array(items)) if inside.in_items => {
                    let objects = items.iter_mut().filter_map(Value::as_object_mut);
                    objects.for_each(|object| inside.fields.strip(object));
                }
                _ => {}
            }
        }
    }

    fn strip(&self, value: &mut Map<String, Value>) {
        value.retain(|key, _| !self.names.contains(key));
        self.strip_inside(value);
    }
}
