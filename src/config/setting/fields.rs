//! The kinds of fields: a value in one of its forms, a section, and a list of maps.

use serde_json::Value;

use super::row::{
    ChangedKey, KeyRow, MapPlace, MapSource, ReloadEffect, SettingField, SettingRow, SettingsTable,
    ValueForm, describe_rows, joined, keys_of, known_keys, read, read_rows, show, show_rows,
};

/// Borrows the part `V` of the struct `S`.
type FieldPart<S, V> = fn(&mut S) -> &mut V;

/// A value in the form `F`.
pub struct ValueField<S: 'static, V: 'static, F> {
    part: FieldPart<S, V>,
    form: F,
}

/// A map of further keys.
pub struct SectionField<S: 'static, T: 'static> {
    part: FieldPart<S, T>,
    table: &'static [SettingRow<T>],
}

/// A map of further keys that may be absent.
pub struct OptionalSectionField<S: 'static, T: 'static> {
    part: FieldPart<S, Option<T>>,
}

/// A list of maps of further keys, which code of its own reads.
pub struct ItemsField<S: 'static, T: 'static> {
    part: FieldPart<S, Vec<T>>,
}

pub const fn value<S, V, F>(part: FieldPart<S, V>, form: F) -> ValueField<S, V, F> {
    ValueField { part, form }
}

pub const fn section<S, T: SettingsTable>(part: FieldPart<S, T>) -> SectionField<S, T> {
    SectionField { part, table: T::TABLE }
}

/// A section with a table of its own; its keys fill several parts of `T`.
pub const fn section_of<S, T>(part: FieldPart<S, T>, table: &'static [SettingRow<T>]) -> SectionField<S, T> {
    SectionField { part, table }
}

pub const fn optional_section<S, T>(part: FieldPart<S, Option<T>>) -> OptionalSectionField<S, T> {
    OptionalSectionField { part }
}

pub const fn items<S, T>(part: FieldPart<S, Vec<T>>) -> ItemsField<S, T> {
    ItemsField { part }
}

// === impl ValueField ===

impl<S, V, F> SettingField<S> for ValueField<S, V, F>
where
    V: Clone + PartialEq,
    F: ValueForm<V>,
{
    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut S) {
        self.form.read(key, from, (self.part)(into));
    }

    fn show(&self, of: &mut S) -> Value {
        self.form.show((self.part)(of))
    }

    fn differs(&self, old: &mut S, new: &mut S) -> bool {
        (self.part)(old) != (self.part)(new)
    }

    fn copy(&self, from: &mut S, to: &mut S) {
        (self.part)(to).clone_from((self.part)(from));
    }

    fn describe(&self, row: KeyRow, defaults: &mut S, rows: &mut Vec<KeyRow>) {
        let default = match (row.default.is_empty(), self.show(defaults)) {
            (false, _) => row.default.clone(),
            (true, Value::Null) => "none".into(),
            (true, Value::String(text)) => text,
            (true, other) => other.to_string(),
        };
        rows.push(KeyRow {
            kind: self.form.kind(),
            allowed: self.form.allowed(),
            default,
            visibility: self.form.visibility(),
            is_free: self.form.is_free(),
            ..row
        });
    }
}

// === impl SectionField ===

impl<S, T: SettingsTable> SettingField<S> for SectionField<S, T> {
    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut S) {
        let known = keys_of(self.table);
        from.map(key, &known, &mut |map| read_rows(self.table, map, (self.part)(into), &[]));
    }

    fn show(&self, of: &mut S) -> Value {
        show_rows(self.table, (self.part)(of))
    }

    fn differs(&self, old: &mut S, new: &mut S) -> bool {
        let (old, new) = ((self.part)(old), (self.part)(new));
        self.table.iter().any(|row| row.field.differs(old, new))
    }

    fn copy(&self, from: &mut S, to: &mut S) {
        let (from, to) = ((self.part)(from), (self.part)(to));
        self.table.iter().for_each(|row| row.field.copy(from, to));
    }

    fn describe(&self, row: KeyRow, _defaults: &mut S, rows: &mut Vec<KeyRow>) {
        describe_rows(self.table, &row.map(), rows);
    }

    /// A key with an effect of its own is reported by its path, all others once by the section.
    fn changes(&self, at: ChangedKey<'_>, old: &mut S, new: &mut S, report: &mut dyn FnMut(ChangedKey<'_>)) {
        let (old, new) = ((self.part)(old), (self.part)(new));
        if self.table.iter().any(|row| row.reload.is_none() && row.field.differs(old, new)) {
            report(at);
        }
        for row in self.table {
            if let Some(reload) = row.reload {
                let name = joined(at.name, row.key);
                row.field.changes(ChangedKey { name: &name, reload }, old, new, report);
            }
        }
    }

    fn keep_restart(&self, reload: ReloadEffect, old: &mut S, new: &mut S) {
        let (old, new) = ((self.part)(old), (self.part)(new));
        for row in self.table {
            row.field.keep_restart(row.reload.unwrap_or(reload), old, new);
        }
    }
}

// === impl OptionalSectionField ===

impl<S, T: SettingsTable> SettingField<S> for OptionalSectionField<S, T> {
    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut S) {
        if !from.has(key) {
            return;
        }
        let mut section = T::defaults();
        from.map(key, &known_keys::<T>(), &mut |map| read(map, &mut section, &[]));
        *(self.part)(into) = Some(section);
    }

    fn show(&self, of: &mut S) -> Value {
        (self.part)(of).as_ref().map_or(Value::Null, show)
    }

    fn differs(&self, old: &mut S, new: &mut S) -> bool {
        (self.part)(old) != (self.part)(new)
    }

    fn copy(&self, from: &mut S, to: &mut S) {
        (self.part)(to).clone_from((self.part)(from));
    }

    fn describe(&self, row: KeyRow, _defaults: &mut S, rows: &mut Vec<KeyRow>) {
        describe_rows(T::TABLE, &row.map(), rows);
    }
}

// === impl ItemsField ===

impl<S, T: SettingsTable> SettingField<S> for ItemsField<S, T> {
    fn show(&self, of: &mut S) -> Value {
        (self.part)(of).iter().map(show).collect()
    }

    fn differs(&self, old: &mut S, new: &mut S) -> bool {
        (self.part)(old) != (self.part)(new)
    }

    fn copy(&self, from: &mut S, to: &mut S) {
        (self.part)(to).clone_from((self.part)(from));
    }

    fn describe(&self, row: KeyRow, _defaults: &mut S, rows: &mut Vec<KeyRow>) {
        let path = format!("{}[]", row.path);
        describe_rows(T::TABLE, &MapPlace { path: &path, ..row.map() }, rows);
    }
}
