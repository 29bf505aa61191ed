//! The table of settings against what is written from it: `docs/configuration.md`, generated from the rows,
//! and the manual `conf/lb.yaml`.
//!
//! After a change of a row, run the test with `VLLM_LB_BLESS=1` to write the page anew.

use std::fmt::Write;

use vllm_lb::config::setting::{KeyRow, ReloadEffect, ValueVisibility};
use vllm_lb::config::{check, keys};

use super::corpus::{by_key, manual, root, text};

const PAGE: &str = "docs/configuration.md";

const HEAD: &str = "# Configuration keys

Every key of the configuration file, generated from the table of settings in `src/config/types`.
[`conf/lb.yaml`](../conf/lb.yaml) describes each key at length, with an example.
`vllm-lb -c FILE -t` checks a file and prints every problem with its path and line.

A path names the maps that lead to a key; `[]` is any item of a list.
Durations are written `500ms`, `2s`, `5m`, `1h`, `7d` or `0`; sizes `1024`, `64KiB`, `2MiB`, `1GiB` or `10GB`.
`${NAME}` in a value is an environment variable, `${NAME:-text}` one with a default.

A reload (SIGHUP, or `POST /admin/reload`) applies the keys marked *at once*. A changed key marked *restart*
keeps its old value until the next start, or an upgrade with `-u`; the reload names such keys.
`GET /admin/config` shows the values in use. The value of a *masked* key is shown as `***`; of a *partly
masked* one only the secret part is hidden, such as the password of a URL.
";

fn page() -> String {
    let rows = keys::all();
    let mut maps: Vec<&str> = rows.iter().map(map_of).collect();
    maps.sort_by_key(|map| !map.is_empty());
    let mut page = HEAD.to_owned();
    for (index, map) in maps.iter().enumerate().filter(|(index, map)| !maps[..*index].contains(*map)) {
        let rows: Vec<&KeyRow> = rows.iter().filter(|row| map_of(row) == *map).collect();
        let (heading, about) = match index {
            0 => ("Keys outside of a section".to_owned(), "These keys stand at the top of the file."),
            _ => (format!("`{map}`"), rows[0].section),
        };
        let columns = "| Key | Value | Default | Reload | Meaning |\n| --- | --- | --- | --- | --- |";
        let _ = write!(page, "\n## {heading}\n\n{about}\n\n{columns}\n");
        for row in rows {
            let _ = writeln!(page, "{}", line(row));
        }
    }
    page
}

/// The path of the map that a key stands in.
fn map_of(row: &KeyRow) -> &str {
    row.path.rsplit_once('.').map_or("", |(map, _)| map)
}

fn line(row: &KeyRow) -> String {
    let reload = match row.reload {
        ReloadEffect::AtOnce => "at once",
        ReloadEffect::Restart => "restart",
    };
    format!("| `{}` | {} | {} | {reload} | {} |", row.path, value(row), default(row), row.about)
}

/// What may be written for a key.
fn value(row: &KeyRow) -> String {
    let value = match (&row.allowed, row.kind) {
        (Some(_), "true or false") => "`true` or `false`".into(),
        (Some(words), "word") => {
            words.split(", ").map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
        }
        (Some(range), kind) => format!("{kind}, {range}"),
        (None, kind) => kind.to_owned(),
    };
    match row.visibility {
        ValueVisibility::Shown => value,
        ValueVisibility::PartlyMasked => format!("{value}; partly masked"),
        ValueVisibility::Masked => format!("{value}; masked"),
    }
}

fn default(row: &KeyRow) -> String {
    match row.default.as_str() {
        word @ ("none" | "required") => word.into(),
        value => format!("`{value}`"),
    }
}

#[test]
fn the_reference_page_is_the_one_that_the_table_generates() {
    let (file, page) = (root().join(PAGE), page());
    if std::env::var_os("VLLM_LB_BLESS").is_some() {
        std::fs::write(&file, &page).expect("the tree can be written");
    }
    let committed = text(&file);
    let differing = page.lines().zip(committed.lines()).find(|(generated, committed)| generated != committed);
    assert!(page == committed, "{PAGE}: run the test with VLLM_LB_BLESS=1: {differing:#?}");
}

#[test]
fn every_row_has_one_short_sentence() {
    for row in keys::all() {
        let about = row.about;
        assert!(
            about.ends_with('.') && !about.contains('|') && about.len() <= 100,
            "{}: {about:?}",
            row.path
        );
    }
}

#[test]
fn the_manual_has_the_defaults_and_ranges_of_the_table() {
    let entries = manual().0;
    for row in keys::all() {
        let entry = entries.iter().find(|entry| entry.key == row.path);
        let entry = entry.unwrap_or_else(|| panic!("{} is not in the manual", row.path));
        assert_eq!(entry.default, row.default, "{}", row.path);
        let written = entry.range.as_ref().or(entry.values.as_ref());
        assert!(written.is_none() || written == row.allowed.as_ref(), "{}: {written:?}", row.path);
        let is_open = row.kind == "true or false" || row.allowed.is_none();
        assert!(written.is_some() || is_open, "{} has no range in the manual", row.path);
    }
}

/// A key is read from its example, so that a new key needs no other file to be covered.
#[test]
fn the_example_of_every_key_sets_the_key() {
    for entry in manual().0 {
        let upstreams = if entry.example.contains("upstreams:") { "" } else { "\nupstreams: [http://a]" };
        let written = format!("{}{upstreams}\n", entry.example);
        let env = |_: &str| Some("4".to_string());
        let config =
            check::check(&written, &env).unwrap_or_else(|problems| panic!("{written}: {problems:?}"));
        let values = by_key(&config);
        let mut values = values.iter().filter(|(key, _)| *key == entry.key).map(|(_, value)| value);
        assert!(values.any(|value| *value != entry.default), "{}: {}", entry.key, entry.example);
    }
}
