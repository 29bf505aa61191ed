//! Type names are unique in the crate, so that a name says what a value is without its module.

use super::source::Source;

/// Types that share a name with another type.
pub fn type_names(files: &[Source]) -> Vec<String> {
    let mut definitions: Vec<(String, String)> = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with("src/") && file.is_rust()) {
        let found = file.type_definitions().into_iter();
        definitions.extend(found.map(|(line, name)| (name, format!("{}:{line}", file.path))));
    }
    definitions.sort();
    let shared = definitions.chunk_by(|one, other| one.0 == other.0).filter(|same| same.len() > 1);
    let problem = |same: &[(String, String)]| {
        let places: Vec<_> = same.iter().map(|(_, place)| place.as_str()).collect();
        format!("{}: {} is also defined at {}", places[0], same[0].0, places[1..].join(", "))
    };
    shared.map(problem).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(texts: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<_> = texts.iter().map(|(path, text)| Source::new(path, text)).collect();
        type_names(&files)
    }

    #[test]
    fn a_name_of_two_types_is_found() {
        let kinds =
            ["struct Kind;", "pub(super) enum Kind {}", "pub trait Kind {}", "type Kind<'a> = &'a str;"];
        for text in kinds {
            let found = problems(&[("src/a.rs", text), ("src/b.rs", "fn f() {\n    struct Kind;\n}")]);
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
            let found = problems(&[("src/a.rs", "struct Kind;"), ("src/b.rs", text)]);
            assert_eq!(found, Vec::<String>::new(), "{text}");
        }
        let elsewhere = [("src/a.rs", "struct Kind;"), ("src/a/tests.rs", "struct Kind;")];
        assert_eq!(problems(&elsewhere), Vec::<String>::new());
    }
}
