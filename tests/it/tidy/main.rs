//! Holds the house: the rules that a reader relies on and no compiler knows.
//!
//! Every rule is a function from files to problems, so that each has a test below or in its module which
//! proves that it can fail. The rules police the extremes and leave taste alone.

use std::fs;
use std::path::{Path, PathBuf};

mod circles;
mod language;
mod layers;
mod source;
mod type_names;

use source::Source;

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 70;
const LINE_COLUMNS: usize = 110;

/// Directories and files that make the project; what is installed or built is none of it.
const ROOTS: &[&str] = &[
    "src",
    "tests",
    "benches",
    "fuzz/src",
    "fuzz/targets",
    "conf",
    "docker",
    "charts",
    ".github",
    ".ci",
    "dev",
    "deny.toml",
    "README.md",
    "CONTRIBUTING.md",
    "docs",
    "CHANGELOG.md",
];
const INSTALLED: &[&str] = &["node_modules", "__pycache__"];

/// Copies of libraries; a test beside the browser tests compares them with their packages.
const VENDORED: &str = "src/dashboard/vendor/";

/// Files that tools write, or that quote whole lines of others.
const GENERATED: &[&str] = &["package-lock.json"];

const METRICS: &str = "docs/metrics.md";

// === the tree ===

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn entries(path: &Path) -> Vec<PathBuf> {
    let listed = fs::read_dir(path).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut entries: Vec<PathBuf> = listed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    entries.retain(|entry| !INSTALLED.iter().any(|installed| entry.ends_with(installed)));
    entries.sort();
    entries
}

/// Files of the project, and directories without any file.
fn walk(path: &Path, files: &mut Vec<Source>, empty: &mut Vec<String>) {
    let name = path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned();
    if path.is_dir() {
        let entries = entries(path);
        if entries.is_empty() {
            empty.push(name);
        }
        for entry in entries {
            walk(&entry, files, empty);
        }
    } else if let Ok(text) = fs::read_to_string(path) {
        files.push(Source::new(&name, &text));
    }
}

/// What the tools write is not held to the rules for what people write.
fn tree() -> Vec<Source> {
    let mut files = everything();
    files.retain(|file| !GENERATED.iter().any(|generated| file.path.ends_with(generated)));
    files.retain(|file| !file.path.starts_with(VENDORED));
    files
}

fn everything() -> Vec<Source> {
    let (mut files, mut empty) = (Vec::new(), Vec::new());
    for start in ROOTS.iter().map(|start| root().join(start)).filter(|start| start.exists()) {
        walk(&start, &mut files, &mut empty);
    }
    assert!(
        files.iter().filter(|file| file.path.starts_with("src/")).count() > 20,
        "the walk lost the source"
    );
    files
}

#[track_caller]
fn hold(problems: &[String]) {
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

// === rules of form ===

/// Code is what people read line by line; data and prose may be as long as they are.
fn is_code(file: &Source) -> bool {
    const ENDINGS: &[&str] = &[".rs", ".py", ".mjs", ".js", ".css", ".html", ".sh"];
    ENDINGS.iter().any(|ending| file.path.ends_with(ending)) || file.path == "dev"
}

fn long_files(files: &[Source]) -> Vec<String> {
    let lines = |file: &Source| file.text.lines().count();
    let long = files.iter().filter(|file| is_code(file) && lines(file) > FILE_LINES);
    long.map(|file| format!("{}: {} lines, {FILE_LINES} are allowed", file.path, lines(file))).collect()
}

fn long_functions(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        for function in file.functions().into_iter().filter(|function| function.lines > FUNCTION_LINES) {
            problems.push(format!(
                "{}:{}: {} has {} lines, {FUNCTION_LINES} are allowed",
                file.path, function.line, function.name, function.lines
            ));
        }
    }
    problems
}

/// Problems for every line of the files for which `wrong` finds something to say.
fn each_line(files: &[Source], wrong: impl Fn(&Source, &str) -> Option<String>) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        for (index, line) in file.text.lines().enumerate() {
            if let Some(problem) = wrong(file, line) {
                problems.push(format!("{}:{}: {problem}", file.path, index + 1));
            }
        }
    }
    problems
}

fn long_lines(files: &[Source]) -> Vec<String> {
    each_line(files, |file, line| {
        let columns = line.chars().count();
        let long = is_code(file) && columns > LINE_COLUMNS;
        long.then(|| format!("{columns} columns, {LINE_COLUMNS} are allowed"))
    })
}

fn untidy_ends(files: &[Source]) -> Vec<String> {
    let mut problems = each_line(files, |file, line| {
        let untidy = is_code(file) && (line.ends_with(' ') || line.contains('\t'));
        untidy.then(|| "a tab, or a blank at the end".into())
    });
    for file in
        files.iter().filter(|file| is_code(file) && !file.text.is_empty() && !file.text.ends_with('\n'))
    {
        problems.push(format!("{}: no line end at the end", file.path));
    }
    problems
}

fn headers(files: &[Source]) -> Vec<String> {
    let bare = files.iter().filter(|file| file.is_rust() && !file.text.starts_with("//! "));
    bare.map(|file| format!("{}: begins without a //! header that says what it is for", file.path)).collect()
}

fn postponed(files: &[Source]) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    each_line(files, |_, line| {
        let found = line.split(|c: char| !c.is_alphanumeric()).find(|word| marks.contains(word));
        found.map(|mark| format!("{mark}: do it, or open an issue"))
    })
}

/// Words of the code that the house does without, with the reason.
fn banned(files: &[Source]) -> Vec<String> {
    let bans = [
        (concat!("unbound", "ed"), "memory must be bounded: use a channel with a limit"),
        (concat!("uns", "afe"), "nothing here needs it"),
    ];
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        for (index, line) in file.code.lines().enumerate() {
            for word in line.split(|c: char| !c.is_alphanumeric()) {
                for (ban, reason) in bans {
                    let part = word.split('_').any(|part| part == ban);
                    if part && !line.contains(concat!("forbid(uns", "afe_code)")) {
                        problems.push(format!("{}:{}: {ban}: {reason}", file.path, index + 1));
                    }
                }
            }
        }
    }
    problems
}

/// Paths of the machine that the work was done on mean nothing on any other.
fn workplaces(files: &[Source]) -> Vec<String> {
    let places =
        [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/tmp", "/wt")];
    each_line(files, |_, line| {
        let found = places.iter().find(|place| line.contains(*place));
        found.map(|place| format!("{place} is a path of one machine"))
    })
}

// === rules of content ===

/// Metric names live in observe, and each has its line in the table for people.
fn metrics(files: &[Source]) -> Vec<String> {
    const PREFIX: &str = concat!("vllm_lb", "_");
    let documented = files.iter().find(|file| file.path == METRICS).map_or("", |file| file.text.as_str());
    let rows: Vec<&str> =
        documented.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let (mut problems, mut known) = (Vec::new(), Vec::new());
    for file in files.iter().filter(|file| file.path.starts_with("src/")) {
        let observes = file.path.starts_with("src/observe");
        for literal in file.product_literals() {
            let Some(name) = literal.text.starts_with(PREFIX).then(|| name_at_start(&literal.text)) else {
                continue;
            };
            if !observes {
                problems.push(format!("{}:{}: {name} belongs into observe", file.path, literal.line));
            } else if !rows.contains(&name) {
                problems.push(format!("{}:{}: {name} is not in {METRICS}", file.path, literal.line));
            }
            known.push(name.to_string());
        }
    }
    let gone = rows.iter().filter(|row| !known.iter().any(|name| name == *row));
    problems.extend(gone.map(|row| format!("{METRICS}: {row} is in no source")));
    problems
}

fn name_at_start(text: &str) -> &str {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or(text)
}

/// What is installed is always the same, wherever it is fetched from: exact versions, and no hosts.
fn pins(files: &[Source]) -> Vec<String> {
    each_line(files, |file, line| {
        let (line, name) = (line.trim(), file.path.rsplit('/').next().unwrap_or_default());
        let wrong = match name {
            "requirements.txt" => !line.is_empty() && !line.starts_with('#') && !line.contains("=="),
            "package.json" => line.contains("\": \"^") || line.contains("\": \"~"),
            "package-lock.json" => line.contains("\"resolved\""),
            _ => false,
        };
        wrong.then(|| format!("{line}: not an exact version without a host"))
    })
}

// === the house holds them ===

#[test]
fn layers_hold() {
    hold(&layers::arrows(&tree()));
}

#[test]
fn imports_run_in_no_circle() {
    hold(&circles::circles_of_the_house(&tree()));
}

#[test]
fn the_picture_of_the_layers_is_true() {
    let files = tree();
    let lib = files.iter().find(|file| file.path == "src/lib.rs").unwrap();
    hold(&layers::picture(lib));
    let modules: Vec<_> = files.iter().filter_map(|file| layers::module(&file.path)).collect();
    for (name, _) in layers::LAYERS {
        assert!(
            modules.iter().any(|module| module.join("::") == *name),
            "{name} is in LAYERS and in no file"
        );
    }
}

#[test]
fn pingora_has_one_door() {
    hold(&layers::pingora(&tree()));
}

#[test]
fn pure_modules_are_pure() {
    hold(&layers::purity(&tree()));
}

#[test]
fn type_names_are_unique() {
    hold(&type_names::type_names(&tree()));
}

#[test]
fn comments_name_the_actor() {
    hold(&language::persons(&tree()));
}

#[test]
fn constants_say_what_they_limit() {
    hold(&language::bare_constants(&tree()));
}

#[test]
fn public_items_are_documented() {
    hold(&language::undocumented(&tree()));
}

#[test]
fn public_items_are_used_by_the_product() {
    hold(&language::used_in_tests_alone(&tree()));
}

#[test]
fn files_functions_and_lines_are_short() {
    let files = tree();
    hold(&[long_files(&files), long_functions(&files), long_lines(&files), untidy_ends(&files)].concat());
}

#[test]
fn files_say_what_they_are_for() {
    hold(&headers(&tree()));
}

#[test]
fn nothing_is_postponed_banned_or_of_one_machine() {
    let files = tree();
    hold(&[postponed(&files), banned(&files), workplaces(&files)].concat());
}

#[test]
fn metrics_are_documented() {
    hold(&metrics(&tree()));
}

#[test]
fn what_is_installed_is_pinned() {
    let files = everything();
    assert!(files.iter().any(|file| file.path.ends_with("requirements.txt")));
    assert!(files.iter().any(|file| file.path.ends_with("package-lock.json")));
    hold(&pins(&files));
}

#[test]
fn no_directory_of_data_is_empty() {
    let mut empty = Vec::new();
    for start in ["tests", "conf", "benches", "docker", "charts"].iter().map(|start| root().join(start)) {
        if start.exists() {
            walk(&start, &mut Vec::new(), &mut empty);
        }
    }
    hold(&empty);
}

// === and each of them can fail ===

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(rule: fn(&[Source]) -> Vec<String>, path: &str, text: &str) -> usize {
        rule(&[Source::new(path, text)]).len()
    }

    #[test]
    fn lengths() {
        assert_eq!(problems(long_files, "src/x.rs", &"\n".repeat(FILE_LINES)), 0);
        assert_eq!(problems(long_files, "src/x.rs", &"\n".repeat(FILE_LINES + 1)), 1);
        assert_eq!(problems(long_files, "conf/data.json", &"\n".repeat(FILE_LINES + 1)), 0);
        let function = |lines: usize| format!("fn f() {{{}}}", "\n".repeat(lines - 1));
        assert_eq!(problems(long_files, "src/dashboard/x.css", &"\n".repeat(FILE_LINES + 1)), 1);
        assert_eq!(problems(long_functions, "src/x.rs", &function(FUNCTION_LINES)), 0);
        assert_eq!(problems(long_functions, "src/x.rs", &function(FUNCTION_LINES + 1)), 1);
        assert_eq!(problems(long_lines, "src/x.rs", &"ä".repeat(LINE_COLUMNS)), 0);
        assert_eq!(problems(long_lines, "src/x.rs", &"ä".repeat(LINE_COLUMNS + 1)), 1);
        assert_eq!(problems(untidy_ends, "src/x.rs", "a \nb\tc\nd"), 3);
    }

    #[test]
    fn words() {
        assert_eq!(problems(headers, "src/x.rs", "use a::b;\n"), 1);
        assert_eq!(problems(headers, "src/x.rs", "//! Says it.\n"), 0);
        assert_eq!(problems(postponed, "dev", concat!("a # TO", "DO: b\n")), 1);
        assert_eq!(problems(banned, "src/x.rs", concat!("mpsc::unbound", "ed_channel()\n")), 1);
        assert_eq!(problems(banned, "src/x.rs", concat!("uns", "afe { }\n")), 1);
        assert_eq!(problems(banned, "src/x.rs", concat!("// uns", "afe\n#![forbid(uns", "afe_code)]\n")), 0);
        assert_eq!(problems(workplaces, "README.md", concat!("see /ro", "ot/x\n")), 1);
        assert_eq!(problems(workplaces, "README.md", "see root/x\n"), 0);
    }

    #[test]
    fn loose_versions() {
        assert_eq!(problems(pins, "tests/sdk/requirements.txt", "# a\n\na==1\n"), 0);
        assert_eq!(problems(pins, "tests/sdk/requirements.txt", "a==1\nb>=2\nc\n"), 2);
        assert_eq!(problems(pins, "tests/sdk/package.json", "\"a\": \"1\", \"b\": \"^2\"\n"), 1);
        assert_eq!(problems(pins, "tests/sdk/package-lock.json", "\"resolved\": \"x\"\n"), 1);
    }

    #[test]
    fn a_metric_is_missed_in_the_table_and_in_the_source() {
        let name = concat!("vllm_lb", "_x_total");
        let source = |path: &str| Source::new(path, &format!("f(\"{name}\");\n"));
        let table = Source::new(METRICS, &format!("| `{name}` | counter | |\n"));
        assert_eq!(metrics(&[source("src/observe/metrics.rs"), table.clone()]), Vec::<String>::new());
        assert_eq!(metrics(&[source("src/observe.rs")]).len(), 1);
        assert_eq!(metrics(std::slice::from_ref(&table)).len(), 1);
        assert_eq!(metrics(&[source("src/observe.rs"), source("src/fleet.rs"), table]).len(), 1);
        let tested = format!("#[cfg(test)]\nmod tests {{\nf(\"{name}\");\n}}\n");
        assert_eq!(metrics(&[Source::new("src/fleet.rs", &tested)]), Vec::<String>::new());
    }

    #[test]
    fn an_empty_directory_is_seen() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("data")).unwrap();
        let mut empty = Vec::new();
        walk(place.path(), &mut Vec::new(), &mut empty);
        assert_eq!(empty.len(), 1);
    }
}
