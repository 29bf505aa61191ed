//! Just enough of Rust's grammar to judge a file: what is code, what is a literal, where a function
//! ends, which paths are named. It never needs the compiler and never touches the disk.
//!
//! Limits, known and accepted: macros are read as they stand, and `super` inside an inline module that is
//! no test counts from the file's module.

use std::ops::Range;

/// One file of the project, by its path from the root.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: String,
    pub text: String,
    /// The text with comments and literals blanked: same lines, same length in bytes.
    pub code: String,
    pub literals: Vec<Literal>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Literal {
    /// The byte it begins at, and its line.
    pub at: usize,
    pub line: usize,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    pub line: usize,
    pub lines: usize,
}

/// A path as code names it, with groups spread out: `a::{b, c::d}` is `a::b` and `a::c::d`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub line: usize,
    pub segments: Vec<String>,
}

// === impl Source ===

impl Source {
    pub fn new(path: &str, text: &str) -> Self {
        let (code, literals) = if path.ends_with(".rs") { lex(text) } else { (String::new(), Vec::new()) };
        Source { path: path.into(), text: text.into(), code, literals }
    }

    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs") || self.path.contains("/tests/")
    }

    /// The code without what only tests compile.
    pub fn product(&self) -> String {
        let mut code = self.code.clone().into_bytes();
        if self.is_test() {
            blank(&mut code);
        }
        for item in test_items(&self.code) {
            blank(&mut code[item]);
        }
        String::from_utf8_lossy(&code).into_owned()
    }

    /// The string literals that reach the product.
    pub fn product_literals(&self) -> Vec<&Literal> {
        let items = test_items(&self.code);
        let tested =
            |literal: &Literal| self.is_test() || items.iter().any(|item| item.contains(&literal.at));
        self.literals.iter().filter(|literal| !tested(literal)).collect()
    }

    pub fn functions(&self) -> Vec<Function> {
        functions(&self.code)
    }

    /// The types that the product defines, each by its line and its name. An alias counts where it is not
    /// indented: inside of an `impl` it is an associated type, whose name belongs to the trait.
    pub fn type_definitions(&self) -> Vec<(usize, String)> {
        let code = self.product();
        let mut found = Vec::new();
        for (index, line) in code.lines().enumerate() {
            let words: Vec<_> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            let keyword = words.iter().position(|word| {
                let alias = *word == "type" && !line.starts_with(' ');
                alias || matches!(*word, "struct" | "enum" | "trait" | "union")
            });
            let name = keyword.and_then(|at| words.get(at + 1)).filter(|name| !name.is_empty());
            found.extend(name.map(|name| (index + 1, (*name).into())));
        }
        found
    }
}

/// Where the lines of a text end.
fn line_ends(text: &str) -> Vec<usize> {
    text.match_indices('\n').map(|(at, _)| at).collect()
}

/// Line of a byte, counted from 1.
fn line_of(ends: &[usize], at: usize) -> usize {
    ends.partition_point(|end| *end < at) + 1
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Blanks comments and literals, and gives the string literals back.
fn lex(text: &str) -> (String, Vec<Literal>) {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let (ends, mut literals) = (line_ends(text), Vec::new());
    let mut at = 0;
    while at < bytes.len() {
        let after_word = at > 0 && is_word(bytes[at - 1]);
        let end = if bytes[at..].starts_with(b"//") {
            bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |found| at + found)
        } else if bytes[at..].starts_with(b"/*") {
            comment_end(bytes, at)
        } else if let Some((open, end)) = string_end(bytes, at).filter(|_| !after_word || bytes[at] == b'"') {
            let inner = text.get(open..end).unwrap_or_default().trim_end_matches(['#', '"']);
            literals.push(Literal { at, line: line_of(&ends, at), text: inner.into() });
            end
        } else {
            char_end(text, at)
        };
        blank(&mut code[at..end]);
        at = end.max(at + 1);
    }
    (String::from_utf8_lossy(&code).into_owned(), literals)
}

/// Where a block comment ends; they nest.
fn comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut depth, mut at) = (0usize, start);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// Where the string literal that starts here begins inside, and where it ends; with `b`, `c` and `r`.
fn string_end(bytes: &[u8], start: usize) -> Option<(usize, usize)> {
    let mut at = start;
    if matches!(bytes.get(at), Some(b'b' | b'c')) {
        at += 1;
    }
    let raw = bytes.get(at) == Some(&b'r');
    at += usize::from(raw);
    let hashes = bytes[at..].iter().take_while(|byte| raw && **byte == b'#').count();
    at += hashes;
    if bytes.get(at) != Some(&b'"') {
        return None;
    }
    let open = at + 1;
    at = open;
    while at < bytes.len() {
        let closes = bytes[at] == b'"' && bytes[at + 1..].iter().take(hashes).all(|byte| *byte == b'#');
        if closes && bytes.len() - at > hashes {
            return Some((open, at + 1 + hashes));
        }
        at += if bytes[at] == b'\\' && !raw { 2 } else { 1 };
    }
    Some((open, bytes.len()))
}

/// The end of a character literal; `start` itself when there is none, as with a lifetime.
fn char_end(text: &str, start: usize) -> usize {
    let bytes = text.as_bytes();
    if bytes[start] != b'\'' {
        return start;
    }
    if bytes.get(start + 1) == Some(&b'\\') {
        let close = bytes.iter().skip(start + 3).position(|byte| *byte == b'\'');
        return close.map_or(start, |found| start + 3 + found + 1);
    }
    match text[start + 1..].chars().next() {
        Some(inner) if bytes.get(start + 1 + inner.len_utf8()) == Some(&b'\'') => {
            start + inner.len_utf8() + 2
        }
        _ => start,
    }
}

/// The byte after the brace that closes the one at `open`.
fn closing_brace(code: &[u8], open: usize) -> usize {
    let mut depth = 0usize;
    for (at, byte) in code.iter().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return at + 1;
        }
    }
    code.len()
}

/// Where an item's body opens; `None` when a semicolon ends it before.
fn body(code: &[u8], start: usize) -> Result<usize, usize> {
    let mut depth = 0i32;
    for (at, byte) in code.iter().enumerate().skip(start) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b'{' if depth == 0 => return Ok(at),
            b';' if depth == 0 => return Err(at),
            _ => {}
        }
    }
    Err(code.len())
}

/// Where items begin and end that only tests compile.
fn test_items(code: &str) -> Vec<Range<usize>> {
    const MARK: &str = "#[cfg(test)]";
    let (mut found, mut from) = (Vec::new(), 0);
    while let Some(start) = code[from..].find(MARK).map(|at| from + at) {
        from = match body(code.as_bytes(), start + MARK.len()) {
            Ok(open) => closing_brace(code.as_bytes(), open),
            Err(semicolon) => semicolon,
        };
        found.push(start..from);
    }
    found
}

fn blank(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().filter(|byte| **byte != b'\n') {
        *byte = b' ';
    }
}

fn functions(code: &str) -> Vec<Function> {
    let bytes = code.as_bytes();
    let (ends, mut found) = (line_ends(code), Vec::new());
    for (at, _) in code.match_indices("fn ") {
        if at > 0 && is_word(bytes[at - 1]) {
            continue;
        }
        let name: String = code[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() {
            continue;
        }
        if let Ok(open) = body(bytes, at) {
            let line = line_of(&ends, at);
            let last = line_of(&ends, closing_brace(bytes, open));
            found.push(Function { name, line, lines: last - line + 1 });
        }
    }
    found
}

// === paths ===

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Colons,
    Other(char),
}

fn tokens(code: &str) -> Vec<(usize, Token)> {
    let bytes = code.as_bytes();
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < bytes.len() {
        let length = bytes[at..].iter().take_while(|byte| is_word(**byte)).count();
        if length > 0 {
            found.push((line, Token::Word(code[at..at + length].into())));
        } else if bytes[at..].starts_with(b"::") {
            found.push((line, Token::Colons));
            at += 2;
            continue;
        } else if !bytes[at].is_ascii_whitespace() {
            found.push((line, Token::Other(bytes[at].into())));
        }
        line += usize::from(bytes[at] == b'\n');
        at += length.max(1);
    }
    found
}

/// Every path of the code, macros and attributes included.
pub fn paths(code: &str) -> Vec<Named> {
    let tokens = tokens(code);
    let (mut found, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        if let [(_, Token::Word(public)), (_, Token::Other('(')), (_, Token::Word(inside)), ..] =
            &tokens[at..]
            && public == "pub"
            && inside == "in"
        {
            // How far an item is visible: no path that the code uses.
            let end = tokens[at..].iter().position(|(_, token)| *token == Token::Other(')'));
            at = end.map_or(tokens.len(), |end| at + end);
        } else if matches!(tokens[at].1, Token::Word(_)) {
            at = path(&tokens, at, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads the path that starts at `at`, whose beginning is `prefix`; gives the token after it.
fn path(tokens: &[(usize, Token)], mut at: usize, prefix: &[String], found: &mut Vec<Named>) -> usize {
    let line = tokens[at].0;
    let mut segments = prefix.to_vec();
    loop {
        match tokens.get(at).map(|(_, token)| token) {
            Some(Token::Word(word)) if word == "self" && !segments.is_empty() => {}
            Some(Token::Word(word)) => segments.push(word.clone()),
            Some(Token::Other('*')) => segments.push("*".into()),
            Some(Token::Other('{')) => return group(tokens, at + 1, &segments, found),
            _ => break,
        }
        at += 1;
        if tokens.get(at).map(|(_, token)| token) != Some(&Token::Colons) {
            break;
        }
        at += 1;
    }
    if segments.len() > 1 {
        found.push(Named { line, segments });
    }
    at
}

fn group(tokens: &[(usize, Token)], mut at: usize, prefix: &[String], found: &mut Vec<Named>) -> usize {
    while let Some((_, token)) = tokens.get(at) {
        match token {
            Token::Other('}') => return at + 1,
            // The new name after `as` is no path.
            Token::Word(word) if word == "as" => at += 2,
            Token::Word(_) | Token::Other('*' | '{') => at = path(tokens, at, prefix, found),
            _ => at += 1,
        }
    }
    at
}

/// Names of the modules that the code declares: `mod a;`, `pub mod b;`.
pub fn declared_modules(code: &str) -> Vec<String> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    for window in tokens.windows(3) {
        if let [(_, Token::Word(keyword)), (_, Token::Word(name)), (_, Token::Other(';'))] = window
            && keyword == "mod"
        {
            found.push(name.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::new("src/x.rs", text)
    }

    #[test]
    fn literals_and_comments_are_no_code() {
        let cases = [
            (r#"a("b { c") d"#, vec!["b { c"]),
            (r##"a(r#"b " } c"#) d"##, vec![r#"b " } c"#]),
            (r#"a(b"x\"}") d"#, vec![r#"x\"}"#]),
            (r"a('{', '\'', '\u{7d}', '🦀', b'}') d", vec![]),
            ("a /* { /* } */ \" */ d", vec![]),
            ("a // { \" it's\nd", vec![]),
            ("a<'x, 'static>(r#type) d", vec![]),
        ];
        for (text, literals) in cases {
            let source = source(text);
            assert_eq!(source.code.len(), text.len(), "{text}");
            assert!(!source.code.contains(['{', '}', '"', '\\']), "{text} gave {}", source.code);
            assert!(
                source.code.starts_with('a') && source.code.ends_with('d'),
                "{text} gave {}",
                source.code
            );
            let found: Vec<_> = source.literals.iter().map(|literal| literal.text.as_str()).collect();
            assert_eq!(found, literals, "{text}");
        }
    }

    #[test]
    fn a_function_is_measured_from_its_name_to_its_brace() {
        let text = "fn a() {\n  if x { '}' } else { \"}\" }\n}\ntrait T {\n\
                    fn b(x: [u8; 4]);\n fn c() {}\n}\nfn d(e: fn (u8) -> u8)\nwhere\n  T: U,\n{\n}\n";
        let found: Vec<_> = source(text).functions().into_iter().map(|f| (f.name, f.line, f.lines)).collect();
        assert_eq!(found, [("a".into(), 1, 3), ("c".into(), 6, 1), ("d".into(), 8, 5)]);
    }

    #[test]
    fn tests_are_no_product() {
        let text = "use a::b;\n#[cfg(test)]\nmod tests {\n use c::d;\n}\n#[cfg(test)]\n\
                    use e::f;\nuse g::h;";
        let found: Vec<_> =
            paths(&source(text).product()).into_iter().map(|p| (p.line, p.segments)).collect();
        let named = |line: usize, segments: [&str; 2]| (line, segments.map(String::from).to_vec());
        assert_eq!(found, [named(1, ["a", "b"]), named(8, ["g", "h"])]);
    }

    #[test]
    fn groups_are_spread() {
        let text =
            "use crate::{a::{self, b as c}, d::*, e}; pub(in crate::m::n) fn f() { g::<h::I>::j(k::l!()) }";
        let found: Vec<_> = paths(text).into_iter().map(|path| path.segments.join("::")).collect();
        assert_eq!(found, ["crate::a", "crate::a::b", "crate::d::*", "crate::e", "h::I", "k::l"]);
    }

    #[test]
    fn declared_modules_are_found() {
        assert_eq!(declared_modules("pub mod a;\nmod b;\nmod c { }\nuse d::e;"), ["a", "b"]);
    }
}
