//! The names of upstreams, and the places that refer to them.

use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::types::ALL_UPSTREAMS;

/// Collects names and references while a file is read.
#[derive(Default)]
pub(super) struct UpstreamNames {
    names: Vec<String>,
    /// Whether an upstream may have a name that is not in the list.
    is_open: bool,
    references: Vec<UpstreamReference>,
}

/// A name that must be an upstream's, and its place.
struct UpstreamReference {
    place: ConfigPlace,
    name: String,
    /// Whether the word for every upstream is allowed too.
    or_all: bool,
}

impl UpstreamNames {
    pub(super) fn add(&mut self, names: impl Iterator<Item = String>) {
        self.names.extend(names);
    }

    /// Notes that some upstream has an unreadable name, or is still to be discovered.
    pub(super) fn open(&mut self) {
        self.is_open = true;
    }

    /// Forgets all names, for upstreams that replace those of the file. References stay.
    pub(super) fn clear(&mut self) {
        self.names.clear();
        self.is_open = false;
    }

    pub(super) fn refer(&mut self, place: ConfigPlace, name: &str, or_all: bool) {
        self.references.push(UpstreamReference { place, name: name.into(), or_all });
    }

    /// Reports every reference to a name that no upstream has.
    pub(super) fn check(&self, problems: &mut Vec<ConfigProblem>) {
        if self.is_open {
            return;
        }
        for reference in self.references.iter().filter(|reference| !self.names.contains(&reference.name)) {
            let mut allowed = if reference.or_all { vec![ALL_UPSTREAMS] } else { Vec::new() };
            allowed.extend(self.names.iter().map(String::as_str));
            let (name, allowed) = (seen(&reference.name), allowed.join(", "));
            let text = format!("no upstream is named {name}: allowed are {allowed}");
            problems.push(ConfigProblem::new(&reference.place, text));
        }
    }
}
