//! Writes findings for people and for programs.
//!
//! Texts of servers may hold anything: control characters are escaped, and long texts are cut.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::facts::{RedisFacts, SetupFacts};
use super::finding::{Finding, Severity};
use crate::names::cut;

/// The longest text that is shown, in bytes.
const MAX_TEXT_BYTES: usize = 400;

/// The widest column of subjects, in characters.
const MAX_SUBJECT_COLUMNS: usize = 32;

/// The number of findings of each severity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FindingCounts {
    pub errors: usize,
    pub warnings: usize,
    pub notes: usize,
}

/// Counts findings by their severity.
pub(crate) fn counts(found: &[Finding]) -> FindingCounts {
    let count = |severity| found.iter().filter(|finding| finding.severity == severity).count();
    FindingCounts {
        errors: count(Severity::Error),
        warnings: count(Severity::Warning),
        notes: count(Severity::Note),
    }
}

/// The checks that the facts do not allow, each with what allows it.
fn unchecked(facts: &SetupFacts<'_>) -> Vec<&'static str> {
    let mut unchecked = Vec::new();
    let answered = || facts.upstreams.iter().filter(|upstream| upstream.health.is_ok());
    let is_sent = answered().any(|upstream| upstream.usage.is_some());
    if !is_sent && answered().any(|upstream| upstream.sight.is_none()) {
        unchecked.push("cached tokens in usage: --request sends two short prompts to each upstream");
    }
    if facts.config.redis.is_none() {
        unchecked.push("Redis: none is configured");
    }
    unchecked
}

/// Writes the findings as aligned lines; `colours`: with the escape codes of a terminal.
pub(crate) fn text(facts: &SetupFacts<'_>, found: &[Finding], took: Duration, colours: bool) -> String {
    let mut text = head(facts, took);
    let columns = |name: &str| name.chars().count();
    let subjects: Vec<String> = found.iter().map(|finding| safe(&finding.subject)).collect();
    let widest = subjects.iter().map(|subject| columns(subject)).max().unwrap_or(0).min(MAX_SUBJECT_COLUMNS);
    let codes = found.iter().map(|finding| columns(finding.code)).max().unwrap_or(0);
    for (finding, subject) in found.iter().zip(&subjects) {
        let label = finding.severity.label();
        let (begin, end) = if colours { (colour(finding.severity), "\u{1b}[0m") } else { ("", "") };
        let (code, seen) = (finding.code, safe(&finding.seen));
        let _ = writeln!(text, "{begin}{label:<7}{end}  {subject:<widest$}  {code:<codes$}  {seen}");
        let indent = 7 + 2 + widest + 2 + codes + 2;
        let _ = writeln!(text, "{:indent$}-> {}", "", safe(&finding.remedy));
    }
    if !found.is_empty() {
        text.push('\n');
    }
    for check in unchecked(facts) {
        let _ = writeln!(text, "not checked  {check}");
    }
    let FindingCounts { errors, warnings, notes } = counts(found);
    if found.is_empty() {
        text.push_str("nothing found\n");
    } else {
        let counted = [(errors, "error"), (warnings, "warning"), (notes, "note")];
        let counted =
            counted.iter().filter(|(count, _)| *count > 0).map(|(count, name)| plural(*count, name));
        let _ = writeln!(text, "found        {}", counted.collect::<Vec<_>>().join(", "));
    }
    text
}

/// Writes findings and facts as one JSON document.
pub(crate) fn json(facts: &SetupFacts<'_>, found: &[Finding], took: Duration) -> Value {
    let upstreams: Vec<Value> = facts
        .upstreams
        .iter()
        .map(|upstream| {
            json!({
                "name": upstream.name(),
                "url": upstream.config.url.display(),
                "answers": upstream.health.is_ok(),
                "version": upstream.version,
                "models": upstream.cards().iter().map(|card| card.id.as_str()).collect::<Vec<_>>(),
                "sight": upstream.sight.as_ref().map(|reading| reading.sight.as_str()),
                "drained": upstream.sight.as_ref().map(|reading| reading.drained),
                "took_ms": upstream.took.as_millis() as u64,
            })
        })
        .collect();
    let findings: Vec<Value> = found
        .iter()
        .map(|finding| {
            json!({
                "severity": finding.severity.label(),
                "code": finding.code,
                "subject": finding.subject,
                "seen": finding.seen,
                "remedy": finding.remedy,
            })
        })
        .collect();
    let redis = facts.redis.as_ref().map(|redis| {
        let version = redis.server.as_ref().ok().and_then(|server| server.version.as_deref());
        json!({"url": redis.url, "answers": redis.server.is_ok(), "version": version})
    });
    let FindingCounts { errors, warnings, notes } = counts(found);
    json!({
        "upstreams": upstreams,
        "redis": redis,
        "balancer_runs": facts.balancer.is_some(),
        "balancer": facts.balancer,
        "findings": findings,
        "not_checked": unchecked(facts),
        "errors": errors,
        "warnings": warnings,
        "notes": notes,
        "took_ms": took.as_millis() as u64,
    })
}

fn head(facts: &SetupFacts<'_>, took: Duration) -> String {
    let count = facts.upstreams.len();
    let answered = facts.upstreams.iter().filter(|upstream| upstream.health.is_ok()).count();
    let drained = facts.upstreams.iter().filter(|upstream| upstream.is_drained()).count();
    let mut head = format!("{}, {answered} healthy", plural(count, "upstream"));
    if drained > 0 {
        let _ = write!(head, ", {drained} drained");
    }
    if let Some(redis) = &facts.redis {
        let _ = write!(head, "; {}", redis_text(redis));
    }
    if let Some(admin) = &facts.balancer {
        let _ = write!(head, "; a balancer runs, with its admin listener at {admin}");
    }
    let _ = writeln!(head, "; {:.1} s\n", took.as_secs_f64());
    head
}

fn redis_text(redis: &RedisFacts) -> String {
    let Ok(server) = &redis.server else { return "no Redis".into() };
    let product = server.product.as_deref().unwrap_or("Redis");
    safe(&format!("{product} {}", server.version.as_deref().unwrap_or_default())).trim_end().to_string()
}

fn plural(count: usize, name: &str) -> String {
    if count == 1 { format!("1 {name}") } else { format!("{count} {name}s") }
}

fn colour(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "\u{1b}[1;31m",
        Severity::Warning => "\u{1b}[33m",
        Severity::Note => "\u{1b}[36m",
    }
}

/// A text without control characters, and not too long for a terminal.
fn safe(text: &str) -> String {
    let mut safe = String::new();
    for character in cut(text, MAX_TEXT_BYTES).concat().chars() {
        // A text with the order of its letters turned around reads as another one.
        let is_invisible = matches!(character, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if character.is_control() || is_invisible {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_servers_are_safe_for_a_terminal() {
        assert_eq!(
            safe("a\u{1b}[2Jb\nc\r\u{7f}\u{9b}d\u{202e}e é"),
            "a\\u{1b}[2Jb\\nc\\r\\u{7f}\\u{9b}d\\u{202e}e é"
        );
        assert!(safe(&"x".repeat(10_000)).len() <= MAX_TEXT_BYTES);
    }
}
