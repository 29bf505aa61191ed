//! Imitates Python: the position and reason of its JSON errors, and its format of values.
//!
//! Used for error messages only, so it is simple rather than fast, and never decides whether a body is valid.

/// The deepest nesting that is scanned; the real parser rejects deeper ones.
const MAX_DEPTH: usize = 512;

/// Returns the first error of `json.loads` with its position in characters; `None` where Python finds none.
pub(super) fn json_error(text: &str) -> Option<(usize, &'static str)> {
    let chars: Vec<char> = text.chars().collect();
    let mut scanner = PythonScanner { chars: &chars, at: 0 };
    scanner.space();
    let end = match scanner.value(MAX_DEPTH) {
        Ok(()) => {
            scanner.space();
            if scanner.at == chars.len() { return None } else { PythonError(scanner.at, "Extra data") }
        }
        Err(stop) => stop,
    };
    (!end.1.is_empty()).then_some((end.0, end.1))
}

/// The position and the reason; an empty reason means that the nesting is too deep.
struct PythonError(usize, &'static str);

struct PythonScanner<'a> {
    chars: &'a [char],
    at: usize,
}

impl PythonScanner<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn space(&mut self) {
        while self.peek().is_some_and(|c| matches!(c, ' ' | '\t' | '\n' | '\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Result<(), PythonError> {
        let Some(depth) = depth.checked_sub(1) else { return Err(PythonError(self.at, "")) };
        match self.peek() {
            Some('"') => self.string(),
            Some('{') => self.object(depth),
            Some('[') => self.array(depth),
            _ => self.scalar(),
        }
    }

    fn scalar(&mut self) -> Result<(), PythonError> {
        for word in ["null", "true", "false", "NaN", "Infinity", "-Infinity"] {
            if word.chars().enumerate().all(|(ahead, c)| self.chars.get(self.at + ahead) == Some(&c)) {
                self.at += word.len();
                return Ok(());
            }
        }
        let start = self.at;
        if self.peek() == Some('-') {
            self.at += 1;
        }
        let digits = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
            // A number that begins with zero ends there; the rest is the next error.
            if self.chars[digits] == '0' {
                break;
            }
        }
        if self.at == digits {
            self.at = start;
            return Err(PythonError(start, "Expecting value"));
        }
        if self.peek() == Some('.') && self.chars.get(self.at + 1).is_some_and(char::is_ascii_digit) {
            self.at += 1;
            self.digits();
        }
        if matches!(self.peek(), Some('e' | 'E')) {
            let sign = usize::from(matches!(self.chars.get(self.at + 1), Some('+' | '-')));
            if self.chars.get(self.at + 1 + sign).is_some_and(char::is_ascii_digit) {
                self.at += 1 + sign;
                self.digits();
            }
        }
        Ok(())
    }

    fn digits(&mut self) {
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
    }

    fn string(&mut self) -> Result<(), PythonError> {
        let begin = self.at;
        let unterminated = || PythonError(begin, "Unterminated string starting at");
        self.at += 1;
        loop {
            match self.peek().ok_or_else(unterminated)? {
                '"' => {
                    self.at += 1;
                    return Ok(());
                }
                '\\' => match self.chars.get(self.at + 1).ok_or_else(unterminated)? {
                    'u' => {
                        let hex = self.chars.get(self.at + 2..self.at + 6);
                        if !hex.is_some_and(|hex| hex.iter().all(char::is_ascii_hexdigit)) {
                            return Err(PythonError(self.at + 1, "Invalid \\uXXXX escape"));
                        }
                        self.at += 6;
                    }
                    '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => self.at += 2,
                    _ => return Err(PythonError(self.at, "Invalid \\escape")),
                },
                c if c < ' ' => return Err(PythonError(self.at, "Invalid control character at")),
                _ => self.at += 1,
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<(), PythonError> {
        self.at += 1;
        self.space();
        if self.peek() == Some('}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.peek() != Some('"') {
                return Err(PythonError(self.at, "Expecting property name enclosed in double quotes"));
            }
            self.string()?;
            self.space();
            self.expect(':', "Expecting ':' delimiter")?;
            self.space();
            self.value(depth)?;
            self.space();
            if self.peek() == Some('}') {
                self.at += 1;
                return Ok(());
            }
            self.expect(',', "Expecting ',' delimiter")?;
            self.space();
        }
    }

    fn array(&mut self, depth: usize) -> Result<(), PythonError> {
        self.at += 1;
        self.space();
        if self.peek() == Some(']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.value(depth)?;
            self.space();
            if self.peek() == Some(']') {
                self.at += 1;
                return Ok(());
            }
            self.expect(',', "Expecting ',' delimiter")?;
            self.space();
        }
    }

    fn expect(&mut self, wanted: char, reason: &'static str) -> Result<(), PythonError> {
        if self.peek() != Some(wanted) {
            return Err(PythonError(self.at, reason));
        }
        self.at += 1;
        Ok(())
    }
}

/// Formats a string as `repr` does.
pub(super) fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut written = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => written.push_str("\\\\"),
            '\n' => written.push_str("\\n"),
            '\r' => written.push_str("\\r"),
            '\t' => written.push_str("\\t"),
            c if c == quote => {
                written.push('\\');
                written.push(c);
            }
            c if c < ' ' => written.push_str(&format!("\\x{:02x}", c as u32)),
            c => written.push(c),
        }
    }
    written.push(quote);
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_errors_where_python_does() {
        for (text, expected) in [
            ("{\"model\":", Some((9, "Expecting value"))),
            ("", Some((0, "Expecting value"))),
            ("{a}", Some((1, "Expecting property name enclosed in double quotes"))),
            ("{\"a\" 1}", Some((5, "Expecting ':' delimiter"))),
            ("{\"a\":1 \"b\":2}", Some((7, "Expecting ',' delimiter"))),
            ("{\"a\":1,}", Some((7, "Expecting property name enclosed in double quotes"))),
            ("[1,]", Some((3, "Expecting value"))),
            ("{} x", Some((3, "Extra data"))),
            ("[01]", Some((2, "Expecting ',' delimiter"))),
            ("\"abc", Some((0, "Unterminated string starting at"))),
            ("{\"é\":\"a\nb\"}", Some((7, "Invalid control character at"))),
            ("\"\\x\"", Some((1, "Invalid \\escape"))),
            ("\"\\u12g4\"", Some((2, "Invalid \\uXXXX escape"))),
            ("[NaN, -Infinity, 1.5e-3, -0, true]", None),
            (" {\"a\": [null, {}]} ", None),
        ] {
            assert_eq!(json_error(text), expected, "{text}");
        }
        assert_eq!(json_error(&"[".repeat(5_000)), None, "too deep");
    }

    #[test]
    fn formats_strings_as_python_does() {
        assert_eq!(repr("a\n"), "'a\\n'");
        assert_eq!(repr("it's"), "\"it's\"");
        assert_eq!(repr("it's \"so\""), "'it\\'s \"so\"'");
    }
}
