//! The sources of upstreams that a configuration names: their files, and what this program was built with.

use std::io;
use std::path::Path;

use crate::config::check;
use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::types::{DiscoveryMethod, DiscoverySource};

/// Makes the paths of listed files relative to the directory of the configuration.
pub(super) fn resolve(sources: &mut [DiscoverySource], config: Option<&Path>) {
    let Some(directory) = config.and_then(Path::parent) else { return };
    for source in sources {
        if let DiscoveryMethod::File(file) = &mut source.ask {
            file.path = directory.join(&file.written);
        }
    }
}

/// Reports sources that this program cannot follow.
pub(super) fn unbuilt(sources: &[DiscoverySource]) -> Vec<ConfigProblem> {
    let needs_feature = |source: &&DiscoverySource| {
        !cfg!(feature = "kubernetes") && matches!(source.ask, DiscoveryMethod::Kubernetes(_))
    };
    let report = |source: &DiscoverySource| {
        let text = "this vllm-lb was built without the feature kubernetes";
        ConfigProblem::new(&ConfigPlace::named(&format!("upstreams: {}", source.ask.label())), text)
    };
    sources.iter().filter(needs_feature).map(report).collect()
}

/// Reports what is wrong with the listed files. A missing one is a warning: it may come later, and a balancer
/// starts without it.
pub(super) fn check_files(
    sources: &[DiscoverySource],
    read: &dyn Fn(&Path) -> io::Result<String>,
    warnings: &mut Vec<String>,
) -> Vec<ConfigProblem> {
    let mut problems = Vec::new();
    for source in sources {
        let DiscoveryMethod::File(file) = &source.ask else { continue };
        let whole = ConfigPlace::named(&file.written.display().to_string());
        // Opening a pipe would wait for a writer.
        let is_other = file.path.metadata().is_ok_and(|found| !found.is_file());
        let text = if is_other { Err(io::Error::other("it is no file")) } else { read(&file.path) };
        match text {
            Ok(text) => problems.extend(problems_of(&whole, &text)),
            Err(error) => {
                let text = format!("cannot read {}: {error}", seen(&file.path.display().to_string()));
                let problem = ConfigProblem::new(&whole, text);
                match error.kind() {
                    io::ErrorKind::NotFound => warnings.push(problem.to_string()),
                    _ => problems.push(problem),
                }
            }
        }
    }
    problems
}

/// Returns the problems of a list, with the name of its file before each place.
fn problems_of(file: &ConfigPlace, text: &str) -> Vec<ConfigProblem> {
    match check::upstream_list(text) {
        Ok(listed) if listed.is_empty() => vec![ConfigProblem::new(file, "lists no upstream")],
        Ok(_) => Vec::new(),
        Err(mut problems) => {
            for ConfigProblem { place, .. } in &mut problems {
                let inner = std::mem::take(&mut place.path);
                let between = if inner.is_empty() { "" } else { ": " };
                place.path = format!("{}{between}{inner}", file.path);
            }
            problems
        }
    }
}
