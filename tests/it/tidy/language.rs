//! Rules of language that a test can hold: comments name the actor, constants say what they limit, public
//! items are documented, and a public item has a use in the product.
//!
//! They cannot judge a sentence; they find the words that mark one without an actor.

use std::collections::{HashMap, HashSet};

use super::source::Source;

/// Words that stand for a person. Programs, servers and code are named by what they are.
const PERSONS: &[&str] = &[
    concat!("wh", "o"),
    concat!("who", "ever"),
    concat!("no", "body"),
    concat!("some", "body"),
    concat!("any", "body"),
    concat!("every", "body"),
    concat!("some", "one"),
    concat!("any", "one"),
];

/// Types of constants that limit or measure something.
const MEASURES: &[&str] = &["usize", "u64", "u32", "u16", "f64", "i64", "Duration"];

/// Units: their one word says all.
const UNITS: &[&str] = &["SECOND", "MINUTE", "HOUR", "DAY", "WEEK", "KIB", "MIB", "GIB", "TIB"];

fn is_person(word: &str) -> bool {
    PERSONS.contains(&word.to_ascii_lowercase().as_str())
}

/// The comment of a line: of Rust and JavaScript after two slashes, else after a number sign. What stands in
/// back quotes is a name.
fn comment(file: &Source, line: &str, code: &str) -> Option<String> {
    let text = if file.is_rust() {
        // The code keeps the length of the text, with comments blanked.
        let end = code.trim_end().len();
        let rest = line.get(end..)?;
        rest.trim_start().strip_prefix("//")?.to_string()
    } else if [".yaml", ".sh", ".py", ".toml", ".conf"].iter().any(|end| file.path.ends_with(end))
        || file.path == "dev"
    {
        line.trim_start().strip_prefix('#')?.to_string()
    } else {
        return None;
    };
    let outside = text.split('`').step_by(2).collect::<Vec<_>>();
    Some(outside.join(" "))
}

/// Comments in which a program or a piece of code is a person.
pub fn persons(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        let mut code = file.code.lines();
        for (index, line) in file.text.lines().enumerate() {
            let code = code.next().unwrap_or_default();
            let Some(comment) = comment(file, line, code) else { continue };
            let words = comment.split(|c: char| !c.is_alphanumeric());
            for word in words.filter(|word| is_person(word)) {
                problems.push(format!("{}:{}: {word}: name the actor", file.path, index + 1));
            }
        }
    }
    problems
}

/// Constants of a module of one word which limit or measure something: of what, only the module says. A
/// constant in a function has its meaning beside it.
pub fn bare_constants(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && file.path.starts_with("src/")) {
        for (index, line) in file.product().lines().enumerate() {
            let Some((name, kind)) = constant(line) else { continue };
            if MEASURES.contains(&kind) && !name.contains('_') && !UNITS.contains(&name) {
                problems.push(format!("{}:{}: {name}: say what it limits", file.path, index + 1));
            }
        }
    }
    problems
}

/// The name and the type of the constant that a line defines, outside of functions.
fn constant(line: &str) -> Option<(&str, &str)> {
    let at = line.find("const ").filter(|_| !line.starts_with(' '))?;
    let before = line[..at].trim();
    if !before.is_empty() && !before.starts_with("pub") || before.contains('<') {
        return None;
    }
    let (name, rest) = line[at + "const ".len()..].split_once(':')?;
    let kind = rest.split(|c: char| !c.is_alphanumeric()).find(|word| !word.is_empty())?;
    name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_').then_some((name, kind))
}

/// Words before the name of an item.
const KEYWORDS: &[&str] =
    &["fn", "struct", "enum", "trait", "const", "static", "type", "mod", "async", "union"];

/// The kind and the name of the item that a line makes public; modules have headers, and are left out.
fn public_item(line: &str) -> Option<(&str, &str)> {
    let rest = line.trim_start().strip_prefix("pub")?;
    let rest = match rest.strip_prefix('(') {
        Some(scope) => scope.split_once(')')?.1,
        None => rest,
    };
    let mut words = rest.strip_prefix(' ')?.split(|c: char| !c.is_alphanumeric() && c != '_');
    let first = words.next()?;
    if !KEYWORDS.contains(&first) || first == "mod" {
        return None;
    }
    let name = words.find(|word| !KEYWORDS.contains(word) && !word.is_empty())?;
    let kind = if rest.contains(" fn ") { "fn" } else { first };
    Some((kind, name))
}

/// Public types, constants and functions without a doc comment. Fields and variants are left to taste, and
/// so are `new` and functions of one line, which read as they are named. A constant right behind another one
/// shares its comment, and clap prints the comments of what it derives.
pub fn undocumented(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && file.path.starts_with("src/")) {
        let code = file.product();
        let code: Vec<&str> = code.lines().collect();
        let text: Vec<&str> = file.text.lines().collect();
        for (index, line) in code.iter().enumerate() {
            let Some((kind, name)) = public_item(line).filter(|(_, name)| *name != "new") else { continue };
            let mut above = text[..index].iter().rev().map(|line| line.trim_start());
            let above = above.find(|line| !line.starts_with("#[") && !line.ends_with(")]"));
            let above = above.unwrap_or_default();
            let is_grouped = kind == "const" && above.contains("pub const ");
            if above.starts_with("///")
                || is_grouped
                || is_plain(kind, &code[index..])
                || is_clap(&text[..index])
            {
                continue;
            }
            problems.push(format!("{}:{}: {name} has no doc comment", file.path, index + 1));
        }
    }
    problems
}

/// Whether the type behind these lines is derived by clap.
fn is_clap(above: &[&str]) -> bool {
    let attributes = above
        .iter()
        .rev()
        .take_while(|line| line.starts_with("#[") || line.starts_with("    ") || **line == ")]");
    attributes.into_iter().any(|line| {
        ["clap::", "Parser", "Subcommand", "derive(Args", "ValueEnum", "#[command("]
            .iter()
            .any(|word| line.contains(word))
    })
}

/// Whether a function is `new`-like or a getter: at most this many lines with its head and its brace.
fn is_plain(kind: &str, code: &[&str]) -> bool {
    const PLAIN_LINES: usize = 3;
    let indent = code[0].len() - code[0].trim_start().len();
    let closes = |line: &&str| line.trim_end() == format!("{}}}", " ".repeat(indent));
    kind == "fn" && code.iter().take(PLAIN_LINES).any(closes)
}

/// Items of the simulated engine that only tests call: it is made for them, too.
const FOR_TESTS: &[&str] = &["start_tls"];

/// Items that are public and that nothing but tests names.
pub fn used_in_tests_alone(files: &[Source]) -> Vec<String> {
    let mut uses: HashMap<&str, usize> = HashMap::new();
    let (mut items, mut products) = (Vec::new(), Vec::new());
    for file in files.iter().filter(|file| file.is_rust()) {
        // Benchmarks and fuzz targets are programs of the project; tests are not.
        if let Some("src" | "benches" | "fuzz") = file.path.split('/').next() {
            products.push((file, file.product()));
        }
    }
    for (file, product) in &products {
        for word in product.split(|c: char| !c.is_alphanumeric() && c != '_') {
            *uses.entry(word).or_default() += 1;
        }
        for (index, line) in product.lines().enumerate().filter(|_| file.path.starts_with("src/")) {
            items.extend(public_item(line).map(|(_, name)| (file.path.as_str(), index + 1, name)));
        }
    }
    let mut seen = HashSet::new();
    let alone = items.into_iter().filter(|(_, _, name)| uses.get(name) == Some(&1) && seen.insert(*name));
    let alone = alone.filter(|(_, _, name)| !FOR_TESTS.contains(name));
    alone.map(|(path, line, name)| format!("{path}:{line}: {name} is used in tests alone")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(rule: fn(&[Source]) -> Vec<String>, text: &str) -> Vec<String> {
        rule(&[Source::new("src/x.rs", text)])
    }

    #[test]
    fn a_person_in_a_comment_is_found() {
        let person = PERSONS[0];
        assert_eq!(problems(persons, &format!("let x = 1; // {person} knows?\n")).len(), 1);
        assert_eq!(problems(persons, &format!("//! {person}: a line.\n/// {person}\n")).len(), 2);
        assert_eq!(
            problems(persons, &format!("let x = \"{person} // {person}\";\n// `{person}`\n")).len(),
            0
        );
        let yaml = Source::new("conf/lb.yaml", &format!("# {person} reads\nkey: {person}\n"));
        assert_eq!(persons(&[yaml]).len(), 1);
    }

    #[test]
    fn a_bare_constant_is_found() {
        assert_eq!(
            problems(bare_constants, "const MOST: usize = 1;\npub(crate) const HELD: u64 = 2;\n").len(),
            2
        );
        assert_eq!(
            problems(bare_constants, "const MAX_HELD: usize = 1;\nconst HOUR: u64 = 3600;\n").len(),
            0
        );
        assert_eq!(
            problems(bare_constants, "const NAMES: &[&str] = &[];\nfn f<const N: usize>() {}\n").len(),
            0
        );
    }

    #[test]
    fn a_public_item_without_a_comment_is_found() {
        assert_eq!(problems(undocumented, "pub struct A;\npub(crate) const B: u8 = 1;\n").len(), 2);
        assert_eq!(
            problems(undocumented, "/// Is it.\n#[derive(Clone)]\npub struct A;\nstruct B;\n").len(),
            0
        );
        let long = "impl A {\n    pub fn long(&self) {\n        a();\n        b();\n    }\n}\n";
        assert_eq!(problems(undocumented, long).len(), 1);
        assert_eq!(
            problems(undocumented, "impl A {\n    pub fn b(&self) -> B {\n        self.b\n    }\n}\n").len(),
            0
        );
    }

    #[test]
    fn an_item_for_tests_alone_is_found() {
        assert_eq!(problems(used_in_tests_alone, "pub fn lonely() {}\n").len(), 1);
        assert_eq!(problems(used_in_tests_alone, "pub fn used() {}\nfn f() { used() }\n").len(), 0);
        let tested = "pub fn lonely() {}\n#[cfg(test)]\nmod tests {\n    fn f() { super::lonely() }\n}\n";
        assert_eq!(problems(used_in_tests_alone, tested).len(), 1);
    }
}
