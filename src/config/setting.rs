//! The table of settings: one row a key, which reads, shows, compares and documents its field.
//!
//! A struct of `types` lists its keys as rows in [`SettingsTable::TABLE`]; the row of a section holds the
//! table of the section's struct. From the rows come the known keys, the ranges, the rendering, the
//! comparison of a reload and the reference page. Knows texts and JSON; the YAML behind a [`MapSource`]
//! belongs to the caller.

mod fields;
mod form;
mod lists;
mod row;

pub use fields::{items, optional_section, section, section_of, value};
pub use form::{
    NamedChoice, choice, custom, duration, duration_or_zero, integer, maybe, number, parse_choice, path,
    secret, show_number, size, switch, text, words,
};
pub use lists::{list, maybe_texts, object, pairs, partly_masked_pairs, texts};
pub use row::{
    ChangedKey, KeyRow, MapPlace, MapSource, ReloadEffect, SettingField, SettingRow, SettingsTable,
    ValueForm, ValueVisibility, changes, describe, describe_rows, keep_restart, known_keys, read, row, show,
};
