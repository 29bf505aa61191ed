//! A row of the table, the traits around it, and what is done with all rows of a struct.

use serde_json::{Map, Value};

use crate::config::values::ReadResult;

/// A struct that a map of the file fills.
pub trait SettingsTable: Clone + PartialEq + 'static {
    /// One row a key, in the order of the manual.
    const TABLE: &'static [SettingRow<Self>];

    /// The struct with every key at its default.
    fn defaults() -> Self;

    /// Reports keys that are valid alone and contradict each other.
    fn contradictions(&self, _report: &mut dyn FnMut(&'static str, String)) {}
}

/// The row of one key.
pub struct SettingRow<S: 'static> {
    pub key: &'static str,
    /// One sentence for the reference page.
    pub about: &'static str,
    /// What a reload does with a new value; `None`: what it does with the section.
    pub reload: Option<ReloadEffect>,
    /// Whether a map without the key is a problem.
    pub required: bool,
    /// How the key is read into its field and shown again.
    pub field: &'static dyn SettingField<S>,
}

/// What a reload does with a new value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadEffect {
    /// The running balancer takes the value over.
    AtOnce,
    /// The old value stays until a restart or an upgrade with `-u`.
    Restart,
}

/// How much of a value is rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueVisibility {
    Shown,
    /// Shown with the secret part masked, such as the password of a URL.
    PartlyMasked,
    Masked,
}

/// A row with its whole path, for messages and documents.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyRow {
    /// The path as a pattern: `upstreams[].tls.ca` is the `ca` in the `tls` of any upstream.
    pub path: String,
    /// One sentence about the map that the key stands in; empty for the whole file.
    pub section: &'static str,
    /// What may be written: `duration`, `list of header names`.
    pub kind: &'static str,
    /// The range or the words that are allowed.
    pub allowed: Option<String>,
    /// The default as it is rendered; `none` without one, `required` where the key must be given.
    pub default: String,
    pub visibility: ValueVisibility,
    /// Whether it is a map of the user's own keys.
    pub is_free: bool,
    pub reload: ReloadEffect,
    pub about: &'static str,
}

/// One map of the file, as rows read it. Problems are collected by the source.
pub trait MapSource {
    /// Whether the key has a value.
    fn has(&self, key: &str) -> bool;
    /// Passes the single value of a key, if there is one.
    fn text(&mut self, key: &str, take: &mut dyn FnMut(&str) -> ReadResult<()>);
    /// Passes every item of a list of single values. Returns their number, if the key has a list.
    fn texts(&mut self, key: &str, take: &mut dyn FnMut(&str) -> ReadResult<()>) -> Option<usize>;
    /// Passes every key and single value of a map of the user's own keys.
    fn pairs(&mut self, key: &str, take: &mut dyn FnMut(&str, &str) -> ReadResult<()>);
    /// The JSON object of a key.
    fn object(&mut self, key: &str) -> Option<Map<String, Value>>;
    /// Whether the key has a list.
    fn is_list(&self, key: &str) -> bool;
    /// Passes the map of a key, which is empty where the key has none.
    fn map(&mut self, key: &str, known: &[&str], take: &mut dyn FnMut(&mut dyn MapSource));
    fn problem(&mut self, key: &str, text: String);
}

/// The field of a row: the way from a key of the file to a part of the struct `S`, and back.
///
/// A part is reached by one function that borrows it mutably, so reading a value takes the struct mutably
/// too.
pub trait SettingField<S>: Sync {
    /// Reads the key, if it was written and if rows read it at all.
    fn read(&self, _key: &str, _from: &mut dyn MapSource, _into: &mut S) {}
    /// The value as the file would hold it, secrets masked.
    fn show(&self, of: &mut S) -> Value;
    fn differs(&self, old: &mut S, new: &mut S) -> bool;
    /// Sets the value of `to` to the value of `from`.
    fn copy(&self, from: &mut S, to: &mut S);
    /// Adds the field's rows, or the row itself, which is filled but for what the field knows.
    fn describe(&self, row: KeyRow, defaults: &mut S, rows: &mut Vec<KeyRow>);
    /// Reports the keys that differ with what a reload does about them.
    fn changes(&self, at: ChangedKey<'_>, old: &mut S, new: &mut S, report: &mut dyn FnMut(ChangedKey<'_>)) {
        if self.differs(old, new) {
            report(at);
        }
    }
    /// Sets what needs a restart to its old value.
    fn keep_restart(&self, reload: ReloadEffect, old: &mut S, new: &mut S) {
        if reload == ReloadEffect::Restart {
            self.copy(old, new);
        }
    }
}

/// How a value of the type `V` is written.
pub trait ValueForm<V>: Sync {
    /// What documents call it: `duration`, `list of header names`.
    fn kind(&self) -> &'static str;
    /// The range or the words that are allowed.
    fn allowed(&self) -> Option<String> {
        None
    }
    fn visibility(&self) -> ValueVisibility {
        ValueVisibility::Shown
    }
    /// Whether it is a map of the user's own keys.
    fn is_free(&self) -> bool {
        false
    }
    /// Reads the key, if it was written.
    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut V);
    /// The value as the file would hold it, secrets masked.
    fn show(&self, value: &V) -> Value;
}

/// A key or section that differs between two configurations.
#[derive(Clone, Copy, Debug)]
pub struct ChangedKey<'a> {
    pub name: &'a str,
    pub reload: ReloadEffect,
}

// === impl KeyRow ===

impl KeyRow {
    /// The map that the row of a section stands for.
    pub fn map(&self) -> MapPlace<'_> {
        MapPlace { path: &self.path, about: self.about, reload: self.reload }
    }
}

// === rows ===

/// A row that a reload treats as its section.
pub const fn row<S>(
    key: &'static str,
    about: &'static str,
    field: &'static dyn SettingField<S>,
) -> SettingRow<S> {
    SettingRow { key, about, reload: None, required: false, field }
}

impl<S> SettingRow<S> {
    /// The row of a key, or of a whole section, that a reload applies.
    pub const fn at_once(mut self) -> Self {
        self.reload = Some(ReloadEffect::AtOnce);
        self
    }

    /// The row of a key, or of a whole section, that needs a restart or an upgrade.
    pub const fn restart(mut self) -> Self {
        self.reload = Some(ReloadEffect::Restart);
        self
    }

    /// The row of a key that every map of its kind must have.
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

// === tables ===

/// The keys of a map that fills `S`.
pub fn known_keys<S: SettingsTable>() -> Vec<&'static str> {
    keys_of(S::TABLE)
}

/// Reads every key of a map, except for these.
pub fn read<S: SettingsTable>(from: &mut dyn MapSource, into: &mut S, except: &[&str]) {
    read_rows(S::TABLE, from, into, except);
}

/// A struct as the file would hold it, secrets masked.
pub fn show<S: SettingsTable>(of: &S) -> Value {
    show_rows(S::TABLE, &mut of.clone())
}

/// Adds a row for every key of the file, sections resolved.
pub fn describe<S: SettingsTable>(rows: &mut Vec<KeyRow>) {
    describe_rows(S::TABLE, &MapPlace { path: "", about: "", reload: ReloadEffect::AtOnce }, rows);
}

/// The path of a map, one sentence about it, and what a reload does with its keys.
pub struct MapPlace<'a> {
    pub path: &'a str,
    pub about: &'static str,
    pub reload: ReloadEffect,
}

/// Reports what differs between two structs, with what a reload does about it.
pub fn changes<S: SettingsTable>(old: &S, new: &S, report: &mut dyn FnMut(ChangedKey<'_>)) {
    let (mut old, mut new) = (old.clone(), new.clone());
    for row in S::TABLE {
        let at = ChangedKey { name: row.key, reload: row.reload.unwrap_or(ReloadEffect::AtOnce) };
        row.field.changes(at, &mut old, &mut new, report);
    }
}

/// Sets what needs a restart to its old value.
pub fn keep_restart<S: SettingsTable>(old: &S, new: &mut S) {
    let mut old = old.clone();
    for row in S::TABLE {
        row.field.keep_restart(row.reload.unwrap_or(ReloadEffect::AtOnce), &mut old, new);
    }
}

pub(super) fn keys_of<S>(table: &[SettingRow<S>]) -> Vec<&'static str> {
    table.iter().map(|row| row.key).collect()
}

/// Reads the keys of a map by the rows of its table.
pub(super) fn read_rows<S: SettingsTable>(
    table: &[SettingRow<S>],
    from: &mut dyn MapSource,
    into: &mut S,
    except: &[&str],
) {
    for row in table.iter().filter(|row| !except.contains(&row.key)) {
        if row.required && !from.has(row.key) {
            from.problem(row.key, "is missing".into());
        }
        row.field.read(row.key, from, into);
    }
    into.contradictions(&mut |key, text| from.problem(key, text));
}

/// Renders the values of all rows.
pub(super) fn show_rows<S>(table: &[SettingRow<S>], of: &mut S) -> Value {
    let shown: Map<String, Value> =
        table.iter().map(|row| (row.key.to_owned(), row.field.show(of))).collect();
    Value::Object(shown)
}

/// Appends the rows as they stand in the reference and the manual.
pub fn describe_rows<S: SettingsTable>(table: &[SettingRow<S>], at: &MapPlace<'_>, rows: &mut Vec<KeyRow>) {
    let mut defaults = S::defaults();
    for row in table {
        let key_row = KeyRow {
            path: joined(at.path, row.key),
            section: at.about,
            kind: "",
            allowed: None,
            default: if row.required { "required".into() } else { String::new() },
            visibility: ValueVisibility::Shown,
            is_free: false,
            reload: row.reload.unwrap_or(at.reload),
            about: row.about,
        };
        row.field.describe(key_row, &mut defaults, rows);
    }
}

pub(super) fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}
