//! The listeners: an address, a map of `address` and `tls`, or a list of these.

use crate::config::problem::{ConfigPlace, ConfigProblem};
use crate::config::section::{ConfigSection, scalar};
use crate::config::setting::{self, MapSource, SettingsTable};
use crate::config::types::{Listen, ListenAddress};
use crate::config::yaml::{YamlNode, YamlValue};

/// Reads the listeners of a file; `None` without the key.
pub(super) fn read(root: &mut ConfigSection<'_, '_>) -> Option<Vec<Listen>> {
    let place = root.place_of("listen");
    let node = root.node("listen")?;
    let problems = &mut *root.problems;
    let mut found = Vec::new();
    match &node.value {
        YamlValue::List(items) if items.is_empty() => {
            problems.push(ConfigProblem::new(&place, "must not be empty: leave the key out for the default"));
        }
        YamlValue::List(items) => {
            for (index, item) in items.iter().enumerate() {
                found.extend(one(item, place.item(index, item.line), problems));
            }
        }
        _ => found.extend(one(node, place, problems)),
    }
    report_duplicates(&found, problems);
    Some(found.into_iter().map(|(_, listen)| listen).collect())
}

/// Listeners without TLS, as flags and variables name them.
pub(super) fn from_texts<S: AsRef<str>>(
    from: &str,
    texts: &[S],
    problems: &mut Vec<ConfigProblem>,
) -> Vec<Listen> {
    let mut found = Vec::new();
    for text in texts {
        let place = ConfigPlace::named(from);
        match ListenAddress::parse(text.as_ref()) {
            Ok(address) => found.push((place, Listen::plain(address))),
            Err(what) => problems.push(ConfigProblem::new(&place, what)),
        }
    }
    report_duplicates(&found, problems);
    found.into_iter().map(|(_, listen)| listen).collect()
}

fn one(
    node: &YamlNode,
    place: ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<(ConfigPlace, Listen)> {
    if !matches!(node.value, YamlValue::Map(_)) {
        let address = scalar(node, &place, problems, ListenAddress::parse)?;
        return Some((place, Listen::plain(address)));
    }
    let mut section = ConfigSection::open(node, place, &setting::known_keys::<Listen>(), problems);
    let place = section.place_of("address");
    // The default is for a file without listeners: a listener with TLS must say where it listens.
    let has_address = section.has("address");
    if !has_address {
        section.report("address", "is missing");
    }
    let before = section.problems.len();
    let mut listen = Listen::defaults();
    setting::read(&mut section, &mut listen, &[]);
    let is_readable = section.problems[before..].iter().all(|problem| problem.place.path != place.path);
    (has_address && is_readable).then_some((place, listen))
}

fn report_duplicates(found: &[(ConfigPlace, Listen)], problems: &mut Vec<ConfigProblem>) {
    for (index, (place, listen)) in found.iter().enumerate() {
        let twice = found[..index].iter().find(|(_, earlier)| earlier.address == listen.address);
        if let Some((first, _)) = twice.filter(|_| !listen.address.is_shareable()) {
            let text = format!("{} is also the address of {}", listen.address, first.path);
            problems.push(ConfigProblem::new(place, text));
        }
    }
}
