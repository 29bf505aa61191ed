//! Files that import each other in a loop cannot be read one after another, nor moved one by one: there
//! are none. A name counts as taken from the file that its path leads to, which may hand it on from another.

use std::collections::{BTreeMap, BTreeSet};

use super::layers::{module, target};
use super::source::{Source, declared_modules, paths};

/// Files from which the files below them still import, while they import from those in turn.
const PARENTS: &[&str] = &[
    "src/app/upgrade.rs",
    "src/fleet.rs",
    "src/fleet/discover.rs",
    "src/fleet/keeper.rs",
    "src/fleet/snapshot.rs",
    "src/state.rs",
    "src/state/exchange.rs",
    "src/state/prefix_index.rs",
    "src/state/redis.rs",
];

/// The names that each file takes from each other file.
type Arrows<'a> = BTreeMap<&'a str, BTreeMap<&'a str, BTreeSet<String>>>;

fn arrows(files: &[Source]) -> Arrows<'_> {
    let modules: BTreeMap<Vec<String>, &str> =
        files.iter().filter_map(|file| Some((module(&file.path)?, file.path.as_str()))).collect();
    let mut arrows = Arrows::new();
    for file in files {
        let Some(here) = module(&file.path) else { continue };
        let code = file.product();
        let children = declared_modules(&code);
        for named in paths(&code) {
            let Some(path) = target(&here, &children, &named.segments) else { continue };
            let home = (0..=path.len()).rev().find_map(|end| modules.get(&path[..end]));
            if let (Some(home), Some(name)) = (home.filter(|home| **home != file.path), path.last()) {
                let names = arrows.entry(file.path.as_str()).or_default().entry(*home).or_default();
                names.insert(name.clone());
            }
        }
    }
    arrows
}

/// Whether a file is below the file of a module.
fn is_below(file: &str, parent: &str) -> bool {
    parent
        .strip_suffix(".rs")
        .and_then(|room| file.strip_prefix(room))
        .is_some_and(|rest| rest.starts_with('/'))
}

/// The arrows that are part of a circle, with the names that make them.
fn circling<'a>(arrows: &Arrows<'a>) -> Vec<(&'a str, &'a str, String)> {
    let mut found = Vec::new();
    for (from, targets) in arrows {
        for (to, names) in targets {
            let (mut seen, mut next) = (BTreeSet::new(), vec![*to]);
            while let Some(file) = next.pop() {
                let more = arrows.get(file).into_iter().flat_map(BTreeMap::keys);
                next.extend(more.filter(|file| seen.insert(**file)));
            }
            if seen.contains(from) {
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                found.push((*from, *to, names.join(", ")));
            }
        }
    }
    found
}

/// Every import that is part of a circle, and every exception without a circle.
pub fn circles(files: &[Source], parents: &[&str]) -> Vec<String> {
    let all = arrows(files);
    let mut counted = all.clone();
    for (from, targets) in &mut counted {
        targets.retain(|to, _| !(parents.contains(to) && is_below(from, to)));
    }
    let told = |(from, to, names)| format!("a circle of imports: {from} takes {names} from {to}");
    let mut problems: Vec<_> = circling(&counted).into_iter().map(told).collect();
    let circling = circling(&all);
    for parent in parents {
        if !circling.iter().any(|(from, to, _)| to == parent && is_below(from, to)) {
            problems.push(format!("{parent} is in no circle: take it out of PARENTS"));
        }
    }
    problems
}

/// The circles of the house, but for those of [`PARENTS`].
pub fn circles_of_the_house(files: &[Source]) -> Vec<String> {
    circles(files, PARENTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(texts: &[(&str, &str)], parents: &[&str]) -> Vec<String> {
        let files: Vec<_> = texts.iter().map(|(path, text)| Source::new(path, text)).collect();
        circles(&files, parents)
    }

    #[test]
    fn a_circle_is_found_by_the_imports_that_make_it() {
        let house = [
            ("src/a.rs", "mod b;\nmod c;\nmod d;\nuse b::run;"),
            ("src/a/b.rs", "use super::c::{self, X};"),
            ("src/a/c.rs", "fn f() -> crate::a::d::Y { f() }"),
            ("src/a/d.rs", "use crate::{a::b::Z, e};"),
            ("src/e.rs", "struct E;"),
        ];
        let circle = [
            "a circle of imports: src/a/b.rs takes X, c from src/a/c.rs",
            "a circle of imports: src/a/c.rs takes Y from src/a/d.rs",
            "a circle of imports: src/a/d.rs takes Z from src/a/b.rs",
        ];
        assert_eq!(problems(&house, &[]), circle);
        assert_eq!(problems(&house, &["src/a/c.rs"])[..3], circle, "only for files below it");
    }

    #[test]
    fn an_import_from_the_declaring_file_makes_a_circle_unless_it_is_excepted() {
        let house = [
            ("src/a.rs", "pub mod b;\npub use self::b::X;\npub struct Y;"),
            ("src/a/b.rs", "pub struct X(super::Y);"),
            ("src/ab.rs", "use crate::a::Y;"),
        ];
        assert_eq!(problems(&house, &[]).len(), 2);
        assert_eq!(problems(&house, &["src/a.rs"]), Vec::<String>::new());
        let stale = problems(&house, &["src/a.rs", "src/ab.rs"]);
        assert_eq!(stale, ["src/ab.rs is in no circle: take it out of PARENTS"]);
    }

    #[test]
    fn declarations_tests_and_visibility_make_no_circle() {
        let house = [
            ("src/a.rs", "mod b;\nmod tests;\nstruct Y;\n#[cfg(test)]\nmod inner { use super::b::X; }"),
            ("src/a/b.rs", "pub(in crate::a) struct X(super::Y);"),
            ("src/a/tests.rs", "use super::b::X;"),
            ("src/c.rs", "// use crate::d::X;\nstruct Z;"),
            ("src/d.rs", "use crate::c::Z;"),
        ];
        assert_eq!(problems(&house, &[]), Vec::<String>::new());
    }
}
