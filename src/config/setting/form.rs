//! Forms of single values: how each is read, shown and described.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::row::{MapSource, ValueForm, ValueVisibility};
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::spelling::closest;
use crate::config::values::{
    self, ReadResult, duration_in, integer_in, number_in, show_duration, show_size, size_in,
};

/// A single value.
pub struct TextForm<V: 'static> {
    kind: &'static str,
    allowed: AllowedValues,
    visibility: ValueVisibility,
    read: TextReader<V>,
    show: fn(&V) -> Value,
}

/// A single value that may be absent.
pub struct OptionalForm<V: 'static>(TextForm<V>);

/// The function that parses a text.
#[derive(Clone, Copy)]
enum TextReader<V: 'static> {
    /// Checks all that is allowed itself.
    Whole(fn(&str) -> ReadResult<V>),
    /// Checks what the form allows.
    Within(fn(&str, &AllowedValues) -> ReadResult<V>),
}

/// The values that a form allows. The rest is up to its reader.
#[derive(Clone, Copy)]
enum AllowedValues {
    AsRead,
    Durations(Duration, Duration),
    Sizes(u64, u64),
    Integers(u64, u64),
    Numbers(f64, f64),
    Words(&'static [&'static str]),
}

/// A type whose values the file names by words.
pub trait NamedChoice: Copy + PartialEq + 'static {
    /// The words, in the order of messages.
    const NAMES: &'static [&'static str];
    /// What each word stands for.
    const VALUES: &'static [Self];

    fn parse(name: &str) -> Option<Self> {
        let found = Self::NAMES.iter().position(|known| *known == name)?;
        Self::VALUES.get(found).copied()
    }

    /// The first word that stands for the value.
    fn name(self) -> &'static str {
        let found = Self::VALUES.iter().position(|known| *known == self);
        found.and_then(|index| Self::NAMES.get(index)).copied().unwrap_or_default()
    }
}

// === impl TextForm ===

impl<V> TextForm<V> {
    fn parse(&self, text: &str) -> ReadResult<V> {
        match self.read {
            TextReader::Whole(read) => read(text),
            TextReader::Within(read) => read(text, &self.allowed),
        }
    }

    /// The form of a value that masks its secret part itself.
    pub const fn partly_masked(mut self) -> Self {
        self.visibility = ValueVisibility::PartlyMasked;
        self
    }
}

impl<V> ValueForm<V> for TextForm<V> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn allowed(&self) -> Option<String> {
        self.allowed.describe()
    }

    fn visibility(&self) -> ValueVisibility {
        self.visibility
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut V) {
        from.text(key, &mut |text| {
            *into = self.parse(text)?;
            Ok(())
        });
    }

    fn show(&self, value: &V) -> Value {
        (self.show)(value)
    }
}

// === impl OptionalForm ===

impl<V> ValueForm<Option<V>> for OptionalForm<V> {
    fn kind(&self) -> &'static str {
        self.0.kind
    }

    fn allowed(&self) -> Option<String> {
        self.0.allowed.describe()
    }

    fn visibility(&self) -> ValueVisibility {
        self.0.visibility
    }

    fn read(&self, key: &str, from: &mut dyn MapSource, into: &mut Option<V>) {
        from.text(key, &mut |text| {
            *into = Some(self.0.parse(text)?);
            Ok(())
        });
    }

    fn show(&self, value: &Option<V>) -> Value {
        value.as_ref().map_or(Value::Null, self.0.show)
    }
}

// === impl AllowedValues ===

impl AllowedValues {
    /// The range as messages give it, or the words.
    fn describe(&self) -> Option<String> {
        let range = |low: String, high: String| Some(format!("{low} to {high}"));
        match *self {
            AllowedValues::AsRead => None,
            AllowedValues::Durations(low, high) => range(show_duration(low), show_duration(high)),
            AllowedValues::Sizes(low, high) => range(show_size(low), show_size(high)),
            AllowedValues::Integers(low, high) => range(low.to_string(), high.to_string()),
            AllowedValues::Numbers(low, high) => range(low.to_string(), high.to_string()),
            AllowedValues::Words(words) => Some(words.join(", ")),
        }
    }

    fn integers<V: TryFrom<u64>>(&self) -> Option<RangeInclusive<V>> {
        let AllowedValues::Integers(low, high) = *self else { return None };
        Some(V::try_from(low).ok()?..=V::try_from(high).ok()?)
    }
}

// === forms ===

/// `true` or `false`.
pub const fn switch() -> TextForm<bool> {
    form(
        "true or false",
        AllowedValues::Words(&["true", "false"]),
        TextReader::Whole(values::boolean),
        |value| json!(value),
    )
}

/// A duration, both ends included.
pub const fn duration(low: Duration, high: Duration) -> TextForm<Duration> {
    let read = TextReader::Within(read_duration);
    form("duration", AllowedValues::Durations(low, high), read, |value| json!(show_duration(*value)))
}

/// A duration from 0; 0 stands for no limit.
pub const fn duration_or_zero(high: Duration) -> TextForm<Option<Duration>> {
    form(
        "duration",
        AllowedValues::Durations(Duration::ZERO, high),
        TextReader::Within(|text, allowed| {
            let read = read_duration(text, allowed)?;
            Ok((!read.is_zero()).then_some(read))
        }),
        |value| json!(show_duration(value.unwrap_or_default())),
    )
}

/// A number of bytes, both ends included.
pub const fn size(low: u64, high: u64) -> TextForm<u64> {
    form(
        "size",
        AllowedValues::Sizes(low, high),
        TextReader::Within(|text, allowed| match *allowed {
            AllowedValues::Sizes(low, high) => size_in(low..=high)(text),
            _ => size_in(0..=u64::MAX)(text),
        }),
        |value| json!(show_size(*value)),
    )
}

/// A whole number, both ends included, which must fit the type `V`.
pub const fn integer<V>(low: u64, high: u64) -> TextForm<V>
where
    V: TryFrom<u64> + PartialOrd + Display + Serialize,
{
    form(
        "whole number",
        AllowedValues::Integers(low, high),
        TextReader::Within(|text, allowed| match allowed.integers() {
            Some(range) => integer_in(range)(text),
            None => Err(format!("{} is out of range", seen(text))),
        }),
        |value| json!(value),
    )
}

/// A number, both ends included.
pub const fn number(low: f64, high: f64) -> TextForm<f64> {
    form(
        "number",
        AllowedValues::Numbers(low, high),
        TextReader::Within(|text, allowed| match *allowed {
            AllowedValues::Numbers(low, high) => number_in(low..=high)(text),
            _ => number_in(f64::MIN..=f64::MAX)(text),
        }),
        |value| show_number(*value),
    )
}

/// One of the words of a type.
pub const fn choice<V: NamedChoice>() -> TextForm<V> {
    words(V::NAMES, parse_choice, |value| json!(value.name()))
}

/// A value that is named by one of these words.
pub const fn words<V>(
    names: &'static [&'static str],
    read: fn(&str) -> ReadResult<V>,
    show: fn(&V) -> Value,
) -> TextForm<V> {
    form("word", AllowedValues::Words(names), TextReader::Whole(read), show)
}

/// A key or token; never shown.
pub const fn secret() -> TextForm<Secret> {
    let mut form = form("secret", AllowedValues::AsRead, TextReader::Whole(values::secret), |value| {
        json!(value.to_string())
    });
    form.visibility = ValueVisibility::Masked;
    form
}

/// The path of a file or socket.
pub const fn path() -> TextForm<PathBuf> {
    let read = TextReader::Whole(values::file_path);
    form("file path", AllowedValues::AsRead, read, |value| json!(value.display().to_string()))
}

/// A text with a reader of its own, shown as it prints.
pub const fn text<V: Display>(kind: &'static str, read: fn(&str) -> ReadResult<V>) -> TextForm<V> {
    custom(kind, read, |value| json!(value.to_string()))
}

/// A text with a reader and a way of showing it of its own.
pub const fn custom<V>(
    kind: &'static str,
    read: fn(&str) -> ReadResult<V>,
    show: fn(&V) -> Value,
) -> TextForm<V> {
    form(kind, AllowedValues::AsRead, TextReader::Whole(read), show)
}

const fn form<V>(
    kind: &'static str,
    allowed: AllowedValues,
    read: TextReader<V>,
    show: fn(&V) -> Value,
) -> TextForm<V> {
    TextForm { kind, allowed, visibility: ValueVisibility::Shown, read, show }
}

/// A value of another form that may be absent.
pub const fn maybe<V>(form: TextForm<V>) -> OptionalForm<V> {
    OptionalForm(form)
}

// === readers ===

fn read_duration(text: &str, allowed: &AllowedValues) -> ReadResult<Duration> {
    match *allowed {
        AllowedValues::Durations(low, high) => duration_in(low..=high)(text),
        _ => duration_in(Duration::ZERO..=Duration::MAX)(text),
    }
}

/// Parses one of the words of a type.
pub fn parse_choice<V: NamedChoice>(text: &str) -> ReadResult<V> {
    V::parse(text).ok_or_else(|| {
        let meant = closest(text, V::NAMES).map(|word| format!(" (did you mean {word}?)"));
        let (shown, meant, names) = (seen(text), meant.unwrap_or_default(), V::NAMES.join(", "));
        format!("{shown} is unknown{meant}: allowed are {names}")
    })
}

/// A whole number without its point, as the file would hold it.
pub fn show_number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
