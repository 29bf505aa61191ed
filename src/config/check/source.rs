//! The items of `upstreams` that name a discovery source in place of an upstream.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::fleet::{MAX_ACTIVE, WEIGHT, tls};
use super::set;
use crate::config::problem::{ConfigPlace, Problem, seen};
use crate::config::raw::{YamlNode, YamlValue};
use crate::config::section::Section;
use crate::config::types::{Config, Discover, DiscoverySource, PassthroughTo};
use crate::config::url;
use crate::config::values::{duration_in, integer_in, number_in};

/// Between two questions to a source.
pub const EVERY: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(3600);

/// Keys of an upstream that a source has no use for, and why.
const NOT_HERE: [(&str, &str); 4] = [
    ("url", "stands beside gym: an item has one of them"),
    ("name", "an upstream that is discovered has its host and port for a name: leave it out"),
    ("models", "comes from the model server: leave it out"),
    ("api_key", "comes from the model server: leave it out"),
];

/// Whether an item of `upstreams` is a source.
pub fn is_one(node: &YamlNode) -> bool {
    let YamlValue::Map(entries) = &node.value else { return false };
    entries.iter().any(|entry| entry.key == "gym" && entry.node.value != YamlValue::Null)
}

pub fn read(node: &YamlNode, place: &ConfigPlace, problems: &mut Vec<Problem>) -> Option<DiscoverySource> {
    let mut section = Section::open(node, place.clone(), problems);
    for (key, why) in NOT_HERE {
        if section.node(key).is_some() {
            section.problem(key, why);
        }
    }
    let gym = section.get("gym", url::upstream).map(Discover::Gym);
    let every = section.get("every", duration_in(EVERY));
    let weight = section.get("weight", number_in(WEIGHT));
    let max_active = section.get("max_active", integer_in(MAX_ACTIVE));
    // Whether the upstreams have TLS is not known yet.
    let tls = tls(&mut section, None);
    let mut source = DiscoverySource { max_active, tls, ..DiscoverySource::new(gym?) };
    set(&mut source.every, every);
    set(&mut source.weight, weight);
    Some(source)
}

/// Reports sources that are listed twice.
pub fn duplicates(found: &[(ConfigPlace, DiscoverySource)], problems: &mut Vec<Problem>) {
    for (index, (place, source)) in found.iter().enumerate() {
        let first = found[..index].iter().find(|(_, earlier)| earlier.ask == source.ask);
        if let Some((first, _)) = first {
            let text = format!("{} is {}'s already", source.ask.url().display(), first.path);
            problems.push(Problem::new(&place.key("gym", place.line), text));
        }
    }
}

/// Names that no upstream of the file has, where they may yet be those of upstreams that are discovered.
pub fn names_to_come(config: &Config) -> Vec<Problem> {
    if config.sources.is_empty() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut look = |name: &String, place: ConfigPlace| {
        let is_source = config.sources.iter().any(|source| source.ask.label() == *name);
        if !is_source && !config.upstreams.iter().any(|upstream| upstream.name == *name) {
            let text = format!("no upstream is named {} unless one is discovered", seen(name));
            found.push(Problem::new(&place, text));
        }
    };
    for (index, route) in config.routes.iter().enumerate() {
        for (item, name) in route.upstreams.iter().flatten().enumerate() {
            look(name, ConfigPlace::named(&format!("routes[{index}].upstreams[{item}]")));
        }
    }
    for (index, passthrough) in config.passthrough.iter().enumerate() {
        if let PassthroughTo::Upstream(name) = &passthrough.to {
            look(name, ConfigPlace::named(&format!("passthrough[{index}].to")));
        }
    }
    found
}
