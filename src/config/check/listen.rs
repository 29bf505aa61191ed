//! The listeners: an address, a map of address and `tls`, or a list of these.

use crate::config::problem::{ConfigPlace, Problem};
use crate::config::raw::{YamlNode, YamlValue};
use crate::config::section::{Section, scalar};
use crate::config::types::{Listen, ListenAddress, ListenTls};
use crate::config::values::{address, file_path};

pub fn read(root: &mut Section<'_, '_>, listen: &mut Vec<Listen>) {
    let place = root.place_of("listen");
    let Some(node) = root.node("listen") else { return };
    let problems = &mut *root.problems;
    let mut found = Vec::new();
    match &node.value {
        YamlValue::List(items) if items.is_empty() => {
            problems.push(Problem::new(&place, "must not be empty: leave the key out for the default"));
        }
        YamlValue::List(items) => {
            for (index, item) in items.iter().enumerate() {
                one(item, place.item(index, item.line), problems, &mut found);
            }
        }
        _ => one(node, place, problems, &mut found),
    }
    distinct(&found, problems);
    *listen = found.into_iter().map(|(_, listen)| listen).collect();
}

/// Listeners without TLS, as flags and variables name them.
pub fn from_texts<S: AsRef<str>>(from: &str, texts: &[S], problems: &mut Vec<Problem>) -> Vec<Listen> {
    let mut found = Vec::new();
    for text in texts {
        match address(text.as_ref()) {
            Ok(address) => found.push((ConfigPlace::named(from), Listen { address, tls: None })),
            Err(what) => problems.push(Problem::new(&ConfigPlace::named(from), what)),
        }
    }
    distinct(&found, problems);
    found.into_iter().map(|(_, listen)| listen).collect()
}

/// With port 0 the system gives each listener another port.
pub fn shareable(address: &ListenAddress) -> bool {
    matches!(address, ListenAddress::Tcp(address) if address.ends_with(":0"))
}

fn one(
    node: &YamlNode,
    place: ConfigPlace,
    problems: &mut Vec<Problem>,
    found: &mut Vec<(ConfigPlace, Listen)>,
) {
    if !matches!(node.value, YamlValue::Map(_)) {
        if let Some(address) = scalar(node, &place, problems, address) {
            found.push((place, Listen { address, tls: None }));
        }
        return;
    }
    let mut section = Section::open(node, place, problems);
    let place = section.place_of("address");
    let address = section.require("address", address);
    let tls = section.node("tls").is_some().then(|| tls(section.section("tls"))).flatten();
    if let Some(address) = address {
        found.push((place, Listen { address, tls }));
    }
}

fn tls(mut section: Section<'_, '_>) -> Option<ListenTls> {
    let certificate = section.require("certificate", file_path);
    let key = section.require("key", file_path);
    Some(ListenTls { certificate: certificate?, key: key? })
}

fn distinct(found: &[(ConfigPlace, Listen)], problems: &mut Vec<Problem>) {
    for (index, (place, listen)) in found.iter().enumerate() {
        let twice = found[..index].iter().find(|(_, earlier)| earlier.address == listen.address);
        if let Some((first, _)) = twice.filter(|_| !shareable(&listen.address)) {
            let text = format!("{} is also the address of {}", listen.address, first.path);
            problems.push(Problem::new(place, text));
        }
    }
}
