//! The upstreams, the sources of further ones, and the control paths that lead to them.

use super::names::UpstreamNames;
use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::section::{ConfigSection, scalar};
use crate::config::setting::{self, MapSource, SettingsTable};
use crate::config::types::{
    DiscoverySource, Passthrough, PassthroughTarget, SOURCE_KINDS, UpstreamConfig, UpstreamItem, UpstreamUrl,
    why_not_of_source,
};
use crate::config::url;
use crate::config::values::url_path;
use crate::config::yaml::{self, YamlNode, YamlValue};

/// The upstreams and sources of a file.
#[derive(Default)]
pub(super) struct FoundUpstreams {
    pub upstreams: Vec<UpstreamConfig>,
    pub sources: Vec<DiscoverySource>,
    /// Whether the file has a list with items, valid or not.
    pub is_given: bool,
}

/// Reads `upstreams`.
pub(super) fn upstreams(root: &mut ConfigSection<'_, '_>, names: &mut UpstreamNames) -> FoundUpstreams {
    let place = root.place_of("upstreams");
    let Some(node) = root.node("upstreams") else { return FoundUpstreams::default() };
    // An empty list gets the message that says what to do.
    let is_given = !matches!(&node.value, YamlValue::List(items) if items.is_empty());
    let Some(items) = root.items("upstreams") else {
        return FoundUpstreams { is_given, ..FoundUpstreams::default() };
    };
    let (mut upstreams, mut sources) = (Vec::new(), Vec::new());
    for (index, item) in items.iter().enumerate() {
        let place = place.item(index, item.line);
        if let Some(kind) = source_kind(item) {
            names.open();
            sources.extend(source(item, kind, &place, root.problems).map(|source| (place, source)));
            continue;
        }
        match upstream(item, &place, root.problems) {
            Some(upstream) => upstreams.push((place, upstream)),
            None => names.open(),
        }
    }
    report_duplicate_sources(&sources, root.problems);
    report_duplicate_names(&upstreams, root.problems);
    let upstreams: Vec<UpstreamConfig> = upstreams.into_iter().map(|(_, upstream)| upstream).collect();
    names.add(upstreams.iter().map(|upstream| upstream.name.clone()));
    FoundUpstreams { upstreams, sources: sources.into_iter().map(|(_, source)| source).collect(), is_given }
}

/// Upstreams with every option at its default, as the command line names them.
pub(super) fn from_texts<S: AsRef<str>>(
    from: &str,
    texts: &[S],
    names: &mut UpstreamNames,
    problems: &mut Vec<ConfigProblem>,
) -> Vec<UpstreamConfig> {
    let mut found = Vec::new();
    for text in texts {
        let place = ConfigPlace::named(from);
        match url::upstream(text.as_ref()) {
            Ok(url) => found.push((place, UpstreamConfig::new(url))),
            Err(what) => {
                problems.push(ConfigProblem::new(&place, what));
                names.open();
            }
        }
    }
    report_duplicate_names(&found, problems);
    let found: Vec<UpstreamConfig> = found.into_iter().map(|(_, upstream)| upstream).collect();
    names.add(found.iter().map(|upstream| upstream.name.clone()));
    found
}

/// Parses one upstream in its long form as JSON, under the rules of the file. Variables are not expanded: a
/// client that may add an upstream may not read the environment.
pub fn upstream_alone(text: &str) -> Result<UpstreamConfig, Vec<ConfigProblem>> {
    let place = ConfigPlace::named("upstreams").item(0, 1);
    let mut problems = Vec::new();
    if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(text) {
        return Err(vec![ConfigProblem::new(&ConfigPlace::named(""), format!("not valid JSON: {error}"))]);
    }
    let node = yaml::parse(text, &mut problems).filter(|node| matches!(node.value, YamlValue::Map(_)));
    let found = match &node {
        Some(node) => upstream(node, &place, &mut problems),
        None => {
            let text = "must be an object: {\"url\": \"http://gpu-0:8000\"}";
            problems.push(ConfigProblem::new(&ConfigPlace::named(""), text));
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

fn open<'t, 'p>(
    node: &'t YamlNode,
    place: &ConfigPlace,
    problems: &'p mut Vec<ConfigProblem>,
) -> ConfigSection<'t, 'p> {
    ConfigSection::open(node, place.clone(), &setting::known_keys::<UpstreamItem>(), problems)
}

// === upstreams ===

/// `None` also for an upstream with an unreadable name.
pub(super) fn upstream(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<UpstreamConfig> {
    if !matches!(node.value, YamlValue::Map(_)) {
        return scalar(node, place, problems, url::upstream).map(UpstreamConfig::new);
    }
    let mut section = open(node, place, problems);
    let mut item = UpstreamItem::unread();
    let kind = SOURCE_KINDS.into_iter().find(|kind| section.has(kind));
    // An item with a source lacks no URL: the source is a problem already.
    let except: &[&str] = if kind.is_some() { &["url", "gym", "dns", "kubernetes", "file"] } else { &[] };
    setting::read(&mut section, &mut item, except);
    if item.every.is_some() {
        section.report("every", "is how often a gym is asked: leave it out");
    }
    if section.has("resolver") {
        section.report("resolver", "is for dns: leave it out");
    }
    if let Some(kind) = kind {
        section.report(kind, "can only stand in the file");
    }
    report_tls_without_https(&mut section, "url", item.url.as_ref());
    if section.has("name") && item.name.is_none() {
        return None;
    }
    item.upstream()
}

fn report_duplicate_names(found: &[(ConfigPlace, UpstreamConfig)], problems: &mut Vec<ConfigProblem>) {
    for (index, (place, upstream)) in found.iter().enumerate() {
        if let Some((first, _)) = found[..index].iter().find(|(_, earlier)| earlier.name == upstream.name) {
            let text = match place.line {
                Some(_) => {
                    format!("the name {:?} is {}'s already: give it another name", upstream.name, first.path)
                }
                None => format!("{} is given twice", upstream.url.display()),
            };
            problems.push(ConfigProblem::new(place, text));
        }
    }
}

// === sources ===

/// Returns the key by which an item of `upstreams` names a source; `None` for an upstream.
pub(super) fn source_kind(node: &YamlNode) -> Option<&'static str> {
    let names = |kind: &&str| node.entry(kind).is_some_and(|entry| entry.node.value != YamlValue::Null);
    SOURCE_KINDS.into_iter().find(names)
}

fn source(
    node: &YamlNode,
    kind: &'static str,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
) -> Option<DiscoverySource> {
    let mut section = open(node, place, problems);
    let mut except = Vec::new();
    for key in setting::known_keys::<UpstreamItem>() {
        let Some(why) = why_not_of_source(kind, key) else { continue };
        if section.has(key) {
            section.report(key, why);
        }
        except.push(key);
    }
    let mut item = UpstreamItem::unread();
    setting::read(&mut section, &mut item, &except);
    report_tls_without_https(&mut section, "dns", item.dns.as_ref().map(|name| &name.url));
    item.source()
}

/// Reports `tls` beside a URL without https, in the value of `key`.
fn report_tls_without_https(section: &mut ConfigSection<'_, '_>, key: &str, url: Option<&UpstreamUrl>) {
    if section.has("tls") && url.is_some_and(|url| !url.https) {
        section.report("tls", format!("the {key} is not https: write https://, or leave tls out"));
    }
}

fn report_duplicate_sources(found: &[(ConfigPlace, DiscoverySource)], problems: &mut Vec<ConfigProblem>) {
    for (index, (place, source)) in found.iter().enumerate() {
        let label = source.ask.label();
        if let Some((first, _)) = found[..index].iter().find(|(_, earlier)| earlier.ask.label() == label) {
            let text = format!("{} is {}'s already", source.ask.display(), first.path);
            problems.push(ConfigProblem::new(&place.key(source.ask.key(), place.line), text));
        }
    }
}

// === control paths ===

/// Reads `passthrough`.
pub(super) fn passthrough(root: &mut ConfigSection<'_, '_>, names: &mut UpstreamNames) -> Vec<Passthrough> {
    let list = root.place_of("passthrough");
    let mut found: Vec<Passthrough> = Vec::new();
    for (index, item) in root.items("passthrough").unwrap_or_default().iter().enumerate() {
        let place = list.item(index, item.line);
        let Some(passthrough) = one_passthrough(item, &place, root.problems, names) else { continue };
        if found.iter().any(|earlier| earlier.path == passthrough.path) {
            let text = format!("{} is in the list already", seen(&passthrough.path));
            root.problems.push(ConfigProblem::new(&place, text));
        }
        found.push(passthrough);
    }
    found
}

fn one_passthrough(
    node: &YamlNode,
    place: &ConfigPlace,
    problems: &mut Vec<ConfigProblem>,
    names: &mut UpstreamNames,
) -> Option<Passthrough> {
    if !matches!(node.value, YamlValue::Map(_)) {
        return scalar(node, place, problems, url_path).map(Passthrough::to_all);
    }
    let mut section =
        ConfigSection::open(node, place.clone(), &setting::known_keys::<Passthrough>(), problems);
    let mut passthrough = Passthrough::defaults();
    setting::read(&mut section, &mut passthrough, &[]);
    if let PassthroughTarget::Upstream(name) = &passthrough.to {
        names.refer(section.place_of("to"), name, true);
    }
    (!passthrough.path.is_empty()).then_some(passthrough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applies_the_rules_of_the_file_to_an_upstream_alone() {
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
            let message = problems[0].to_string();
            assert!(wanted.is_empty() || message == wanted, "{text}: {message}");
        }
        let variable = upstream_alone(r#"{"url": "http://a", "api_key": "${HOME}"}"#).expect("is valid");
        assert_eq!(variable.api_key.expect("is there").expose(), "${HOME}");
    }
}
