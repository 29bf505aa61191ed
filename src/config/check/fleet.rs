//! The upstreams, and what refers to them by name.

use std::ops::RangeInclusive;

use super::{Draft, set, source};
use crate::config::problem::{ConfigPlace, Problem, seen};
use crate::config::raw::{self, YamlNode, YamlValue};
use crate::config::section::{Section, items, scalar};
use crate::config::types::{Passthrough, PassthroughTo, UpstreamConfig, UpstreamTls, UpstreamUrl};
use crate::config::url;
use crate::config::values::{
    ReadResult, boolean, duration_in, file_path, integer_in, number_in, plain, secret, url_path,
};

pub const WEIGHT: RangeInclusive<f64> = 0.001..=1000.0;
pub const MAX_ACTIVE: RangeInclusive<u32> = 1..=1_000_000;
/// Metrics and admin calls carry names.
const LONGEST_NAME: usize = 128;
/// What `passthrough` calls every upstream.
const ALL: &str = "all";

/// A name that must be an upstream's, and where it was written.
pub struct Reference {
    pub place: ConfigPlace,
    pub name: String,
    /// Here the word for every upstream is allowed too.
    pub or_all: bool,
}

pub fn upstreams(root: &mut Section<'_, '_>, draft: &mut Draft) {
    let place = root.place_of("upstreams");
    let Some(node) = root.node("upstreams") else { return };
    // A list that is there and empty is as good as none, and gets the message that says what to do.
    draft.upstreams_given = !matches!(&node.value, YamlValue::List(items) if items.is_empty());
    let Some(items) = items(node, &place, root.problems) else { return };
    let (mut found, mut sources) = (Vec::new(), Vec::new());
    for (index, item) in items.iter().enumerate() {
        let place = place.item(index, item.line);
        if source::is_one(item) {
            // What it will name is not known.
            draft.names = None;
            sources.extend(source::read(item, &place, root.problems).map(|source| (place, source)));
            continue;
        }
        match upstream(item, &place, root.problems) {
            Some(upstream) => found.push((place, upstream)),
            None => draft.names = None,
        }
    }
    source::duplicates(&sources, root.problems);
    draft.config.sources = sources.into_iter().map(|(_, source)| source).collect();
    adopt(found, draft, root.problems);
}

/// Upstreams with every option at its default, as the command line names them.
pub fn from_texts<S: AsRef<str>>(from: &str, texts: &[S], draft: &mut Draft) {
    let mut problems = std::mem::take(&mut draft.problems);
    let mut found = Vec::new();
    for text in texts {
        let place = ConfigPlace::named(from);
        match url::upstream(text.as_ref()) {
            Ok(url) => found.push((place, UpstreamConfig::new(url))),
            Err(what) => {
                problems.push(Problem::new(&place, what));
                draft.names = None;
            }
        }
    }
    adopt(found, draft, &mut problems);
    draft.problems = problems;
}

/// Parses one upstream in its long form as JSON, under the rules of the file. Variables are not expanded: a
/// client that may add an upstream may not read the environment.
pub fn upstream_alone(text: &str) -> Result<UpstreamConfig, Vec<Problem>> {
    let place = ConfigPlace::named("upstreams").item(0, 1);
    let mut problems = Vec::new();
    if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(text) {
        return Err(vec![Problem::new(&ConfigPlace::named(""), format!("not valid JSON: {error}"))]);
    }
    let node = raw::parse(text, &mut problems).filter(|node| matches!(node.value, YamlValue::Map(_)));
    let found = match &node {
        Some(node) => upstream(node, &place, &mut problems),
        None => {
            let text = "must be an object: {\"url\": \"http://gpu-0:8000\"}";
            problems.push(Problem::new(&ConfigPlace::named(""), text));
            None
        }
    };
    if let (Some(found), true) = (found, problems.is_empty()) {
        return Ok(found);
    }
    for problem in &mut problems {
        let path = problem.place.path.strip_prefix(&place.path).unwrap_or(&problem.place.path);
        problem.place = ConfigPlace::named(path.trim_start_matches('.'));
    }
    Err(problems)
}

/// The weight of an upstream as it stands in the file.
pub fn weight(text: &str) -> ReadResult<f64> {
    number_in(WEIGHT)(text)
}

fn adopt(found: Vec<(ConfigPlace, UpstreamConfig)>, draft: &mut Draft, problems: &mut Vec<Problem>) {
    for (index, (place, upstream)) in found.iter().enumerate() {
        if let Some((first, _)) = found[..index].iter().find(|(_, earlier)| earlier.name == upstream.name) {
            let text = match place.line {
                Some(_) => {
                    format!("the name {:?} is {}'s already: give it another name", upstream.name, first.path)
                }
                None => format!("{} is given twice", upstream.url.display()),
            };
            problems.push(Problem::new(place, text));
        }
    }
    if let Some(names) = &mut draft.names {
        names.extend(found.iter().map(|(_, upstream)| upstream.name.clone()));
    }
    draft.config.upstreams = found.into_iter().map(|(_, upstream)| upstream).collect();
}

fn upstream(node: &YamlNode, place: &ConfigPlace, problems: &mut Vec<Problem>) -> Option<UpstreamConfig> {
    if !matches!(node.value, YamlValue::Map(_)) {
        return scalar(node, place, problems, url::upstream).map(UpstreamConfig::new);
    }
    let mut section = Section::open(node, place.clone(), problems);
    // A kind of upstream that comes later has no url, and is a problem already.
    let comes_later = ["dns", "kubernetes"].iter().any(|kind| section.node(kind).is_some());
    let url = if comes_later { None } else { section.require("url", url::upstream) };
    let every = section.get("every", duration_in(source::EVERY));
    if every.is_some() && !comes_later {
        section.problem("every", "is how often a gym is asked: leave it out");
    }
    // The file's are read elsewhere.
    if section.node("gym").is_some() {
        section.problem("gym", "can only stand in the file");
    }
    let name_given = section.node("name").is_some();
    let name = section.get("name", name);
    let models = models(&mut section);
    let weight = section.get("weight", number_in(WEIGHT));
    let api_key = section.get("api_key", secret);
    let max_active = section.get("max_active", integer_in(MAX_ACTIVE));
    let tls = tls(&mut section, url.as_ref());
    let mut upstream = UpstreamConfig::new(url?);
    if name_given && name.is_none() {
        return None;
    }
    set(&mut upstream.name, name);
    set(&mut upstream.weight, weight);
    Some(UpstreamConfig { models, api_key, max_active, tls, ..upstream })
}

fn models(section: &mut Section<'_, '_>) -> Option<Vec<String>> {
    let models = section.list("models", plain);
    let is_empty = |value: &YamlValue| matches!(value, YamlValue::List(items) if items.is_empty());
    if section.node("models").is_some_and(|node| is_empty(&node.value)) {
        section.problem("models", "must not be empty: leave the key out to ask the upstream");
    }
    models
}

pub fn tls(section: &mut Section<'_, '_>, url: Option<&UpstreamUrl>) -> UpstreamTls {
    let default = UpstreamTls::default();
    if section.node("tls").is_none() {
        return default;
    }
    if url.is_some_and(|url| !url.https) {
        section.problem("tls", "the url is not https: write https://, or leave tls out");
    }
    let mut section = section.section("tls");
    UpstreamTls {
        ca: section.get("ca", file_path),
        verify: section.get("verify", boolean).unwrap_or(default.verify),
        sni: section.get("sni", server_name),
    }
}

fn server_name(text: &str) -> ReadResult<String> {
    if crate::config::values::is_host(text) && !text.starts_with('[') {
        return Ok(text.into());
    }
    Err(format!("{} is no host name", seen(text)))
}

fn name(text: &str) -> ReadResult<String> {
    let clean = |c: char| c.is_ascii_alphanumeric() || "._:/-[]".contains(c);
    if text == ALL {
        return Err(format!("{} means every upstream: choose another name", seen(text)));
    }
    if text.is_empty() || text.len() > LONGEST_NAME || !text.chars().all(clean) {
        let allowed = format!("1 to {LONGEST_NAME} letters, digits and . _ : / -");
        return Err(format!("{} is no name: allowed are {allowed}", seen(text)));
    }
    Ok(text.into())
}

// === what refers to upstreams ===

pub fn passthrough(root: &mut Section<'_, '_>, draft: &mut Draft) {
    let list = root.place_of("passthrough");
    let Some(node) = root.node("passthrough") else { return };
    let Some(items) = items(node, &list, root.problems) else { return };
    for (index, item) in items.iter().enumerate() {
        let place = list.item(index, item.line);
        let Some(found) = one_passthrough(item, &place, root.problems, &mut draft.references) else {
            continue;
        };
        let first = draft.config.passthrough.iter().any(|earlier| earlier.path == found.path);
        if first {
            let text = format!("{} is in the list already", seen(&found.path));
            root.problems.push(Problem::new(&place, text));
        }
        draft.config.passthrough.push(found);
    }
}

fn one_passthrough(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<Problem>,
    references: &mut Vec<Reference>,
) -> Option<Passthrough> {
    if !matches!(node.value, YamlValue::Map(_)) {
        let path = scalar(node, place, problems, url_path)?;
        return Some(Passthrough { path, to: PassthroughTo::All });
    }
    let mut section = Section::open(node, place.clone(), problems);
    let path = section.require("path", url_path);
    let to = match section.get("to", plain) {
        Some(name) if name != ALL => {
            references.push(Reference { place: section.place_of("to"), name: name.clone(), or_all: true });
            PassthroughTo::Upstream(name)
        }
        _ => PassthroughTo::All,
    };
    Some(Passthrough { path: path?, to })
}

/// Every name that must be an upstream's is looked up among all upstreams there are.
pub fn references(draft: &mut Draft) {
    // With an upstream whose name is unknown, nothing can be said about the others' names.
    let Some(names) = &draft.names else { return };
    for reference in draft.references.iter().filter(|reference| !names.contains(&reference.name)) {
        let mut allowed = if reference.or_all { vec![ALL] } else { Vec::new() };
        allowed.extend(names.iter().map(String::as_str));
        let (name, allowed) = (seen(&reference.name), allowed.join(", "));
        let text = format!("no upstream is named {name}: allowed are {allowed}");
        draft.problems.push(Problem::new(&reference.place, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_alone_goes_by_the_rules_of_the_file() {
        let good = upstream_alone(
            r#"{"url": "http://gpu-0:8000/v1", "name": "a/b", "weight": 2.5, "models": ["m"]}"#,
        );
        let good = good.expect("is valid");
        assert_eq!((good.name.as_str(), good.weight, good.url.port), ("a/b", 2.5, 8000));
        let table = [
            ("", "not valid JSON: EOF while parsing a value at line 1 column 0"),
            ("url: http://a", "not valid JSON: expected value at line 1 column 1"),
            ("[]", "must be an object: {\"url\": \"http://gpu-0:8000\"}"),
            ("{}", "url: is missing"),
            (r#"{"url": "http://a", "wieght": 1}"#, "wieght: unknown key: did you mean \"weight\"?"),
            (r#"{"url": "http://a", "weight": 0}"#, "weight: \"0\" is out of range: 0.001 to 1000"),
            (r#"{"url": "https://a", "tls": {"sni": "-"}, "name": "all"}"#, ""),
            (r#"{"url": "http://a", "url": "http://b"}"#, ""),
            (r#"{"url": "http://a", "gym": "http://b"}"#, "gym: can only stand in the file"),
            (r#"{"url": "http://a", "every": "5s"}"#, "every: is how often a gym is asked: leave it out"),
        ];
        for (text, wanted) in table {
            let problems = upstream_alone(text).expect_err(text);
            let told = problems[0].to_string();
            assert!(wanted.is_empty() || told == wanted, "{text}: {told}");
        }
        let variable = upstream_alone(r#"{"url": "http://a", "api_key": "${HOME}"}"#).expect("is valid");
        assert_eq!(variable.api_key.expect("is there").expose(), "${HOME}");
    }
}
