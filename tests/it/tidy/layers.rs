//! The table of layers, and the rules that follow from it. `src/lib.rs` tells the same as a picture.

use super::source::{Named, Source, declared_modules, paths};

/// Every module and its level; the longest matching path counts. An arrow may point to a lower level.
pub const LAYERS: &[(&str, Level)] = &[
    ("main", Level::Assembly),
    ("cli", Level::Assembly),
    ("app", Level::Assembly),
    ("proxy", Level::Edge),
    ("admin", Level::Edge),
    ("engine::http", Level::Edge),
    ("fleet", Level::Running),
    ("fleet::breaker", Level::Pure),
    // What the API server of Kubernetes writes, and the engines that follow from it.
    ("fleet::discover::kubernetes::messages", Level::Pure),
    ("fleet::discover::kubernetes::slices", Level::Pure),
    ("fleet::probe_duty", Level::Pure),
    ("fleet::sight", Level::Pure),
    ("state", Level::Running),
    // It holds a lock and nothing else of the world: no clock, no task, no chance. So a replay may use it.
    ("state::prefix_index", Level::Pure),
    ("state::sessions", Level::Pure),
    // So does what siblings say to each other, where it is collected and laid together.
    ("state::exchange", Level::Pure),
    ("traces", Level::Running),
    // The record and its assembly are pure, so that every answer can be a row of a table.
    ("traces::record", Level::Pure),
    ("traces::json", Level::Pure),
    ("traces::assemble", Level::Pure),
    ("otlp", Level::Running),
    ("otlp::trace_context", Level::Pure),
    ("observe", Level::Record),
    ("logging", Level::Record),
    ("system_roots", Level::Record),
    ("json", Level::Pure),
    ("prompt", Level::Pure),
    ("route", Level::Pure),
    ("retry", Level::Pure),
    ("pick", Level::Pure),
    ("reply", Level::Pure),
    ("sse", Level::Pure),
    ("aggregate", Level::Pure),
    ("doctor", Level::Pure),
    ("fleet::breaker", Level::Pure),
    ("config", Level::Pure),
    ("engine", Level::Pure),
    ("engine::cache", Level::Pure),
    ("engine::batch", Level::Pure),
    ("engine::dice", Level::Pure),
    ("simulate", Level::Pure),
    ("dashboard", Level::Pure),
    // What is shown of an overview; the terminal and the connection are the assembly's.
    ("top", Level::Pure),
    ("config::types", Level::Word),
    ("config::setting", Level::Word),
    ("config::redis", Level::Word),
    ("config::url", Level::Word),
    ("config::postgres", Level::Word),
    ("config::values", Level::Word),
    ("config::spelling", Level::Word),
    ("config::problem", Level::Word),
    ("config::secret", Level::Word),
    ("reject", Level::Word),
    ("names", Level::Word),
    ("rate", Level::Word),
];

/// Arrows within a level, from and to. Adding one is a visible change.
const SIDEWAYS: &[(&str, &str)] = &[
    ("main", "app"),
    ("main", "cli"),
    ("app", "cli"),
    ("route", "prompt"),
    // One room reads JSON, and says how strings are decoded.
    ("prompt", "json"),
    ("route", "json"),
    ("reply", "json"),
    ("traces::assemble", "json"),
    // A translated stream that cannot go on ends as any other does.
    ("route", "reply"),
    // Both read streams of events.
    ("reply", "sse"),
    ("route", "sse"),
    ("traces::assemble", "traces::record"),
    ("traces::assemble", "traces::json"),
    ("traces::assemble", "sse"),
    // The relay reads tokens once, for the client and for the trace.
    ("traces::assemble", "reply"),
    ("traces::json", "traces::record"),
    ("engine::batch", "engine::cache"),
    // A type of the configuration has the rows of its keys beside it, which name what parses their values.
    ("config::types", "config::setting"),
    ("config::types", "config::redis"),
    ("config::types", "config::url"),
    ("config::types", "config::postgres"),
    ("config::types", "config::values"),
    ("config::types", "config::problem"),
    ("config::types", "config::secret"),
    ("config::setting", "config::values"),
    ("config::setting", "config::spelling"),
    ("config::setting", "config::problem"),
    ("config::setting", "config::secret"),
    ("config::redis", "config::url"),
    ("config::redis", "config::values"),
    ("config::redis", "config::problem"),
    ("config::redis", "config::secret"),
    ("config::postgres", "config::url"),
    ("config::postgres", "config::values"),
    ("config::postgres", "config::problem"),
    ("config::url", "config::values"),
    ("config::url", "config::problem"),
    ("config::values", "config::problem"),
    ("config::values", "config::secret"),
    ("config::types", "names"),
    ("reject", "names"),
    // A page of a list holds slices.
    ("fleet::discover::kubernetes::messages", "fleet::discover::kubernetes::slices"),
    // A diagnosis reads what upstreams report.
    ("doctor", "aggregate"),
    // What the index found is put on the formula's candidates.
    ("state::prefix_index", "pick"),
    // The records that the log drops are counted as everything else is.
    ("observe", "logging"),
    // Which blocks of a chain are stored is a property of the chain.
    ("state::prefix_index", "prompt"),
    ("simulate", "prompt"),
    // A replay is the real choice and the real index over simulated engines.
    ("simulate", "engine::dice"),
    ("simulate", "engine::batch"),
    ("simulate", "state::prefix_index"),
    ("simulate", "pick"),
];

/// What the pure modules must not name: time, chance and the world come in as arguments.
const IMPURE: &[&str] = &[
    "tokio",
    "pingora",
    "hyper",
    "log",
    "std::env",
    "std::fs",
    "std::process",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Word,
    Pure,
    Record,
    Running,
    Edge,
    Assembly,
}

impl Level {
    /// How the picture in `src/lib.rs` calls it.
    pub fn label(self) -> &'static str {
        match self {
            Level::Word => "L0",
            Level::Pure => "L1",
            Level::Record => "L2a",
            Level::Running => "L2b",
            Level::Edge => "L3",
            Level::Assembly => "L4",
        }
    }
}

/// The path of a file's module: `src/a/b.rs` is `a::b`; empty for `src/lib.rs`.
pub fn module(path: &str) -> Option<Vec<String>> {
    let inner = path.strip_prefix("src/")?.strip_suffix(".rs")?;
    match inner {
        "lib" => Some(Vec::new()),
        _ => Some(inner.split('/').map(String::from).collect()),
    }
}

/// The entry of the table that a path lies in.
fn room(path: &[String]) -> Option<(&'static str, Level)> {
    let inside = |name: &str| {
        let mut segments = path.iter();
        name.split("::").all(|part| segments.next().is_some_and(|segment| segment == part))
    };
    LAYERS.iter().filter(|(name, _)| inside(name)).max_by_key(|(name, _)| name.len()).copied()
}

/// Where in the crate a path points to, when it points into the crate at all.
pub fn target(from: &[String], children: &[String], segments: &[String]) -> Option<Vec<String>> {
    let first = segments[0].as_str();
    let in_main = from.first().is_some_and(|name| name == "main");
    match first {
        "vllm_lb" => Some(segments[1..].to_vec()),
        "crate" if !in_main => Some(segments[1..].to_vec()),
        "self" => Some([from, &segments[1..]].concat()),
        "super" => {
            let ups = segments.iter().take_while(|segment| *segment == "super").count();
            let base = &from[..from.len().saturating_sub(ups)];
            Some([base, &segments[ups..]].concat())
        }
        _ if children.iter().any(|child| child == first) => Some([from, segments].concat()),
        _ => None,
    }
}

fn allowed(from: (&str, Level), to: (&str, Level)) -> bool {
    let simulated =
        |name: &str| ["engine", "simulate"].contains(&name.split("::").next().unwrap_or_default());
    if simulated(to.0) && !simulated(from.0) && from.1 != Level::Assembly {
        return false;
    }
    from.0 == to.0 || to.1 < from.1 || SIDEWAYS.contains(&(from.0, to.0))
}

/// Arrows that the table does not have, and modules that it does not know.
pub fn arrows(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        let Some(from) = module(&file.path).filter(|from| !from.is_empty()) else { continue };
        let Some(here) = room(&from) else {
            problems.push(format!("{}: no level in LAYERS, give the module its place", file.path));
            continue;
        };
        let code = file.product();
        let children = declared_modules(&code);
        for Named { line, segments } in paths(&code) {
            let Some(to) = target(&from, &children, &segments) else { continue };
            match room(&to) {
                Some(there) if allowed(here, there) => {}
                Some(there) => {
                    problems.push(format!("{}:{line}: {} must not use {}", file.path, here.0, there.0))
                }
                // A glob of, or an item in, a module that has no own code.
                None if to.is_empty() || to[0] == "*" => {}
                None => problems.push(format!(
                    "{}:{line}: {} is in no module of LAYERS",
                    file.path,
                    to.join("::")
                )),
            }
        }
    }
    // One line that names several items of a module is one problem.
    problems.dedup();
    problems
}

/// Pingora has one door, so that another engine, or the next release of it, is one module's matter.
pub fn pingora(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.path.starts_with("src/")) {
        let inside = module(&file.path).is_some_and(|path| path.first().is_some_and(|name| name == "proxy"));
        for Named { line, segments } in paths(&file.code) {
            if !inside && segments[0].starts_with("pingora") {
                problems.push(format!("{}:{line}: pingora is named under src/proxy only", file.path));
            }
        }
    }
    problems
}

/// The pure modules name no clock, no socket, no file, no log.
pub fn purity(files: &[Source]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        let level = module(&file.path).and_then(|path| room(&path)).map(|(_, level)| level);
        if level != Some(Level::Pure) && level != Some(Level::Word) {
            continue;
        }
        for Named { line, segments } in paths(&file.product()) {
            let path = segments.join("::");
            let names = |impure: &str| {
                let inside =
                    path.strip_prefix(impure).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
                inside || (impure.ends_with("::now") && path.ends_with(impure))
            };
            if let Some(impure) = IMPURE.iter().find(|impure| names(impure)) {
                problems.push(format!("{}:{line}: a pure module uses {impure}", file.path));
            }
        }
    }
    problems
}

/// The picture in `src/lib.rs` names every module of the table on a line of its level.
pub fn picture(lib: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, level) in LAYERS {
        let start = format!("//! {} ", level.label());
        let mut lines = lib.text.lines().filter(|line| line.starts_with(&start));
        let last = name.rsplit("::").next().unwrap_or(name);
        let names =
            |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == last);
        if !lines.any(names) {
            problems.push(format!("{}: no line {} names {name}", lib.path, level.label()));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> [Source; 1] {
        [Source::new(path, text)]
    }

    #[test]
    fn an_upward_or_sideways_arrow_is_found() {
        let bad = [
            ("src/pick.rs", "use crate::fleet::Lease;", "pick must not use fleet"),
            ("src/fleet.rs", "fn f() { crate::proxy::serve() }", "fleet must not use proxy"),
            ("src/admin.rs", "use crate::{names, proxy::X};", "admin must not use proxy"),
            ("src/proxy/body.rs", "use super::super::admin::X;", "proxy must not use admin"),
            ("src/proxy.rs", "use crate::engine::cache::X;", "proxy must not use engine::cache"),
            ("src/config/types.rs", "use super::check::X;", "config::types must not use config"),
            ("src/config.rs", "pub mod types;\nuse crate::pick::X;", "config must not use pick"),
            ("src/engine.rs", "pub mod http;\npub use http::X;", "engine must not use engine::http"),
            ("src/stranger.rs", "", "no level in LAYERS"),
            ("src/app.rs", "use crate::Thing;", "Thing is in no module"),
            ("src/cli.rs", "use crate::app::App;", "cli must not use app"),
        ];
        for (path, text, problem) in bad {
            let problems = arrows(&file(path, text));
            assert_eq!(problems.len(), 1, "{path}: {problems:?}");
            assert!(problems[0].contains(problem), "{problems:?} lacks {problem}");
        }
    }

    #[test]
    fn a_downward_arrow_is_fine() {
        let good = [
            ("src/proxy/body.rs", "use super::peek;\nuse crate::{config::types::Peek, pick};"),
            ("src/main.rs", "use vllm_lb::{app, cli::Cli};\nmod x { use crate::y::z; }"),
            ("src/engine/http.rs", "use super::batch::X; use crate::observe;"),
            ("src/app.rs", "use crate::engine::http::X;"),
            ("src/pick.rs", "#[cfg(test)]\nmod tests { use crate::fleet::X; }"),
            ("src/lib.rs", "pub use app::X;"),
        ];
        for (path, text) in good {
            assert_eq!(arrows(&file(path, text)), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn a_second_door_for_pingora_is_found() {
        assert_eq!(pingora(&file("src/app.rs", "use pingora_core::X;")).len(), 1);
        assert_eq!(pingora(&file("src/proxy/peer.rs", "use pingora::X;")).len(), 0);
        assert_eq!(pingora(&file("src/app.rs", "// pingora::X")).len(), 0);
    }

    #[test]
    fn impurity_is_found() {
        let bad = [
            "use tokio::sync::Mutex;",
            "use std::{env, fmt};",
            "fn f() { std::time::Instant::now() }",
            "fn f() { Instant::now() }",
            "fn f() { log::info!(\"x\") }",
        ];
        for text in bad {
            assert_eq!(purity(&file("src/prompt/scan.rs", text)).len(), 1, "{text}");
        }
        let good = ["use std::time::Instant; use logic::x;", "#[cfg(test)]\nmod tests { use std::fs::X; }"];
        for text in good {
            assert_eq!(purity(&file("src/prompt/scan.rs", text)), Vec::<String>::new());
        }
        assert_eq!(purity(&file("src/fleet.rs", "use tokio::sync::Mutex;")), Vec::<String>::new());
    }

    #[test]
    fn a_module_that_left_the_picture_is_missed() {
        let problems =
            picture(&Source::new("src/lib.rs", "//! L4 main cli\n//! L3 proxy | admin | engine::http\n"));
        assert!(problems.iter().any(|problem| problem.contains("app")), "{problems:?}");
        assert!(!problems.iter().any(|problem| problem.contains("cli") || problem.contains("http")));
    }
}
