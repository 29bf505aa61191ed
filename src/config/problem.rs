//! Problems of a configuration with their places. They are collected, so that one run reports all.
//!
//! A problem never holds a secret: code that reports one shows values through `seen`, and never the value of
//! a secret key.

use std::fmt;

/// The place of a value: its path in the file (or the flag, or the variable) and its line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConfigPlace {
    pub path: String,
    pub line: Option<usize>,
}

impl ConfigPlace {
    /// A place outside the file: a flag or an environment variable.
    pub fn named(name: &str) -> Self {
        ConfigPlace { path: name.into(), line: None }
    }

    pub fn at(path: String, line: usize) -> Self {
        ConfigPlace { path, line: Some(line) }
    }

    /// The place of a key in this map; `line` is the line of the key.
    pub fn key(&self, key: &str, line: Option<usize>) -> Self {
        let path = if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) };
        ConfigPlace { path, line: line.or(self.line) }
    }

    /// The place of an item in this list.
    pub fn item(&self, index: usize, line: usize) -> Self {
        ConfigPlace::at(format!("{}[{index}]", self.path), line)
    }

    /// The path without the numbers of list items, as the table of settings has it.
    pub fn pattern(&self) -> String {
        let mut pattern = String::with_capacity(self.path.len());
        let mut in_brackets = false;
        for character in self.path.chars() {
            in_brackets = if character == '[' { true } else { in_brackets && character != ']' };
            if !in_brackets || character == '[' {
                pattern.push(character);
            }
        }
        pattern
    }
}

/// One thing that is wrong, as the end of a sentence that begins with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    pub place: ConfigPlace,
    pub text: String,
}

impl ConfigProblem {
    pub fn new(place: &ConfigPlace, text: impl Into<String>) -> Self {
        ConfigProblem { place: place.clone(), text: text.into() }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.path.is_empty() {
            write!(f, "{}: ", printable(&self.place.path))?;
        }
        f.write_str(&printable(&self.text))?;
        match self.place.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// A value of the file in quotes, cut to a length that fits a line.
pub fn seen(value: &str) -> String {
    const MAX_SHOWN_CHARS: usize = 80;
    if value.chars().count() <= MAX_SHOWN_CHARS {
        return format!("{value:?}");
    }
    let start: String = value.chars().take(MAX_SHOWN_CHARS).collect();
    format!("{start:?}...")
}

/// The text with control characters escaped, so that a file cannot send codes to the terminal.
fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_its_place() {
        let place =
            ConfigPlace::at(String::new(), 1).key("upstreams", Some(3)).item(1, 4).key("url", Some(5));
        assert_eq!(ConfigProblem::new(&place, "is bad").to_string(), "upstreams[1].url: is bad (line 5)");
        assert_eq!(place.pattern(), "upstreams[].url");
        assert_eq!(
            ConfigProblem::new(&ConfigPlace::named("--listen"), "is bad").to_string(),
            "--listen: is bad"
        );
    }

    #[test]
    fn escapes_control_characters() {
        let problem = ConfigProblem::new(&ConfigPlace::named("a\u{1b}[31m"), "b\nc");
        assert_eq!(problem.to_string(), "a\\u{1b}[31m: b\\nc");
    }

    #[test]
    fn cuts_long_values() {
        assert_eq!(seen("abc"), "\"abc\"");
        assert_eq!(seen(&"x".repeat(90)), format!("\"{}\"...", "x".repeat(80)));
    }
}
