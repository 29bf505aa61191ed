//! Type names are unique in the crate, so that a name says what a value is without its module.

use super::source::Source;

/// Names that still stand for several types. Every entry must be needed, and covers only the files below
/// `AMBIGUOUS_ROOTS`: a name defined anywhere else is unique in the crate.
pub const AMBIGUOUS: &[&str] = &[
    "Answer", "Asker", "Dialect", "Field", "Fields", "Form", "Found", "InFlight", "Kind", "Object", "Open",
    "Place", "Read", "Request", "Rule", "Scope", "Source", "Stop", "Table", "Talk", "Thoughts", "Way",
];

/// The modules that `AMBIGUOUS` covers.
const AMBIGUOUS_ROOTS: &[&str] =
    &["src/prompt", "src/reject.rs", "src/reply", "src/route", "src/proxy", "src/sse"];

/// Types that several definitions share a name, and exceptions that are no longer needed.
pub fn type_names(files: &[Source], ambiguous: &[&str]) -> Vec<String> {
    let mut definitions: Vec<(String, String)> = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with("src/") && file.is_rust()) {
        let found = file.type_definitions().into_iter();
        definitions.extend(found.map(|(line, name)| (name, format!("{}:{line}", file.path))));
    }
    definitions.sort();
    let mut problems = Vec::new();
    for same in definitions.chunk_by(|one, other| one.0 == other.0).filter(|same| same.len() > 1) {
        let name = same[0].0.as_str();
        let covered = |place: &str| {
            ambiguous.contains(&name) && AMBIGUOUS_ROOTS.iter().any(|root| place.starts_with(root))
        };
        if !same.iter().all(|(_, place)| covered(place)) {
            let places: Vec<_> = same.iter().map(|(_, place)| place.as_str()).collect();
            problems.push(format!("{}: {name} is also defined at {}", places[0], places[1..].join(", ")));
        }
    }
    for name in ambiguous {
        if definitions.iter().filter(|(defined, _)| defined == name).count() < 2 {
            problems.push(format!("AMBIGUOUS names {name}, which is unique: remove the entry"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(texts: &[(&str, &str)], ambiguous: &[&str]) -> Vec<String> {
        let files: Vec<_> = texts.iter().map(|(path, text)| Source::new(path, text)).collect();
        type_names(&files, ambiguous)
    }

    #[test]
    fn a_name_of_two_types_is_found() {
        let kinds =
            ["struct Kind;", "pub(super) enum Kind {}", "pub trait Kind {}", "type Kind<'a> = &'a str;"];
        for text in kinds {
            let found = problems(&[("src/a.rs", text), ("src/b.rs", "fn f() {\n    struct Kind;\n}")], &[]);
            assert_eq!(found, ["src/a.rs:1: Kind is also defined at src/b.rs:2"]);
        }
    }

    #[test]
    fn tests_comments_and_associated_types_define_no_names() {
        let texts = [
            "#[cfg(test)]\nmod tests {\n    struct Kind;\n}",
            "// struct Kind;",
            "impl Iterator for X {\n    type Kind = u8;\n}",
            "fn f(kind: Kind) {}",
        ];
        for text in texts {
            let found = problems(&[("src/a.rs", "struct Kind;"), ("src/b.rs", text)], &[]);
            assert_eq!(found, Vec::<String>::new(), "{text}");
        }
        let elsewhere = [("src/a.rs", "struct Kind;"), ("src/a/tests.rs", "struct Kind;")];
        assert_eq!(problems(&elsewhere, &[]), Vec::<String>::new());
    }

    #[test]
    fn an_exception_covers_its_modules_only_and_has_to_be_needed() {
        let covered = [("src/proxy/a.rs", "struct Kind;"), ("src/route.rs", "struct Kind;")];
        assert_eq!(problems(&covered, &["Kind"]), Vec::<String>::new());
        let elsewhere = [("src/proxy/a.rs", "struct Kind;"), ("src/fleet.rs", "struct Kind;")];
        assert_eq!(problems(&elsewhere, &["Kind"]).len(), 1);
        let unique = [("src/proxy/a.rs", "struct Kind;")];
        assert_eq!(problems(&unique, &["Kind"]), ["AMBIGUOUS names Kind, which is unique: remove the entry"]);
    }
}
