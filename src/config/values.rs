//! Parsers and writers of single values: durations, sizes, numbers, truth values, texts, paths.
//!
//! A parser returns the value, or the rest of a sentence that begins with the key: the text and what is
//! allowed. A writer returns the form that its parser accepts.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::problem::seen;
use super::secret::Secret;

/// The result of a parser; the error continues a sentence that begins with the key.
pub type ReadResult<T> = Result<T, String>;

/// Units of time.
pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);
pub const HOUR: Duration = Duration::from_secs(3600);
pub const DAY: Duration = Duration::from_secs(24 * 3600);

/// Units of size, in bytes.
pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

const SIZE_UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("KB", 1000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// Splits `64KiB` into 64 and `KiB`; a number that does not fit counts as the largest one.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    if digits == 0 {
        return None;
    }
    Some((text[..digits].parse().unwrap_or(u64::MAX), &text[digits..]))
}

fn duration(text: &str) -> ReadResult<Duration> {
    let bad = || format!("{} is not a duration: write 500ms, 2s, 5m, 1h, 7d or 0", seen(text));
    let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
    if number == 0 && unit.is_empty() {
        return Ok(Duration::ZERO);
    }
    let (_, factor) = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
    Ok(Duration::from_millis(number.saturating_mul(*factor)))
}

fn size(text: &str) -> ReadResult<u64> {
    let bad = || format!("{} is not a size: write 1024, 64KiB, 2MiB, 1GiB or 10GB", seen(text));
    let (number, unit) = number_and_unit(text).ok_or_else(bad)?;
    let (_, factor) = SIZE_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(bad)?;
    Ok(number.saturating_mul(*factor))
}

fn within<T: PartialOrd>(
    text: &str,
    value: T,
    range: &RangeInclusive<T>,
    show: impl Fn(&T) -> String,
) -> ReadResult<T> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(format!("{} is out of range: {} to {}", seen(text), show(range.start()), show(range.end())))
}

/// Parses a duration within a range.
pub fn duration_in(range: RangeInclusive<Duration>) -> impl Fn(&str) -> ReadResult<Duration> {
    move |text| within(text, duration(text)?, &range, |value| show_duration(*value))
}

/// Parses a size within a range.
pub fn size_in(range: RangeInclusive<u64>) -> impl Fn(&str) -> ReadResult<u64> {
    move |text| within(text, size(text)?, &range, |value| show_size(*value))
}

/// Parses a whole number of the integer type `T`.
pub fn integer_in<T: TryFrom<u64> + PartialOrd + Display>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> ReadResult<T> {
    move |text| {
        let out_of_range = || format!("{} is out of range: {} to {}", seen(text), range.start(), range.end());
        let digits = text.strip_prefix('-').unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!("{} is not a whole number", seen(text)));
        }
        let value = text.parse::<u64>().ok().and_then(|value| T::try_from(value).ok());
        within(text, value.ok_or_else(out_of_range)?, &range, T::to_string)
    }
}

/// Parses a number within a range.
pub fn number_in(range: RangeInclusive<f64>) -> impl Fn(&str) -> ReadResult<f64> {
    move |text| {
        let looks_right = text.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
        match text.parse::<f64>() {
            Ok(value) if looks_right => within(text, value, &range, f64::to_string),
            _ => Err(format!("{} is not a number", seen(text))),
        }
    }
}

/// Parses `true` or `false`.
pub fn boolean(text: &str) -> ReadResult<bool> {
    match text {
        "true" | "True" | "TRUE" => Ok(true),
        "false" | "False" | "FALSE" => Ok(false),
        _ => Err(format!("{} is neither true nor false", seen(text))),
    }
}

/// Parses any text of visible characters and spaces.
pub fn plain(text: &str) -> ReadResult<String> {
    if text.trim().is_empty() {
        return Err("must not be empty".into());
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{} has control characters", seen(text)));
    }
    Ok(text.into())
}

/// Parses a token or key that goes into a header; the error does not show it.
pub fn secret(text: &str) -> ReadResult<Secret> {
    if text.is_empty() {
        return Err("must not be empty: leave the key out where there is none".into());
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("must be visible ASCII characters without spaces".into());
    }
    Ok(Secret::new(text))
}

/// Parses the name of a header or cookie, in lower case.
pub fn header_name(text: &str) -> ReadResult<String> {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if text.is_empty() || !text.bytes().all(is_part) {
        return Err(format!("{} is no name: write letters, digits and dashes", seen(text)));
    }
    Ok(text.to_ascii_lowercase())
}

/// Parses the path of a file.
pub fn file_path(text: &str) -> ReadResult<PathBuf> {
    plain(text).map(PathBuf::from)
}

/// Parses the path of a request, which begins with a slash and has no query.
pub fn url_path(text: &str) -> ReadResult<String> {
    if text.is_empty() {
        return Err("must not be empty".into());
    }
    let clean = text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte));
    if !text.starts_with('/') || !clean {
        return Err(format!("{} is not a path: write it as /health, without query", seen(text)));
    }
    Ok(text.into())
}

/// Parses the absolute path after `unix:`, also of `unix:///path`.
pub(super) fn unix_path(text: &str) -> Option<PathBuf> {
    let path = text.strip_prefix("//").unwrap_or(text);
    let clean = path.starts_with('/') && path.len() > 1 && !path.chars().any(char::is_control);
    clean.then(|| PathBuf::from(path))
}

/// Whether the text is a host name, an IPv4 address, or an IPv6 address in brackets.
pub(super) fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let label = |label: &str| {
        !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    host.len() <= 253 && host.strip_suffix('.').unwrap_or(host).split('.').all(label)
}

// === writers ===

/// Writes a duration in the largest unit that leaves no rest.
pub fn show_duration(value: Duration) -> String {
    let ms = u64::try_from(value.as_millis()).unwrap_or(u64::MAX);
    if ms == 0 {
        return "0".into();
    }
    let fits = DURATION_UNITS.iter().rev().find(|(_, factor)| ms.is_multiple_of(*factor));
    fits.map_or_else(|| format!("{ms}ms"), |(unit, factor)| format!("{}{unit}", ms / factor))
}

/// Writes a size in the unit, binary or decimal, that gives the smallest whole number.
pub fn show_size(value: u64) -> String {
    let fits =
        SIZE_UNITS.iter().rev().filter(|(_, factor)| value >= *factor && value.is_multiple_of(*factor));
    match fits.max_by_key(|(unit, factor)| (*factor, unit.is_empty())) {
        Some((unit, factor)) => format!("{}{unit}", value / factor),
        None => value.to_string(),
    }
}

#[cfg(test)]
mod tests;
