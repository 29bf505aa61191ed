//! A file with a list of upstreams, which a source of the configuration names.
//!
//! The items have the form and the rules of `upstreams`, except that they name no further sources, and that
//! variables are not expanded: a program that may list upstreams may not read the environment.

use std::collections::{BTreeMap, HashMap};

use super::fleet::{source_kind, upstream};
use crate::config::problem::{ConfigPlace, ConfigProblem};
use crate::config::section;
use crate::config::types::UpstreamConfig;
use crate::config::yaml::{self, YamlNode, YamlValue};

/// The largest number of upstreams in one file.
const MAX_LISTED_UPSTREAMS: usize = 4096;

/// The key of the configuration that has a list of the same form.
const LIST_KEY: &str = "upstreams";

/// Reads the list of a file, or reports every problem. A file without an item is an empty list.
pub fn upstream_list(text: &str) -> Result<Vec<UpstreamConfig>, Vec<ConfigProblem>> {
    let mut problems = Vec::new();
    let found = yaml::parse(text, &mut problems).map(|root| read(&root, &mut problems));
    match found {
        Some(found) if problems.is_empty() => Ok(found),
        _ => {
            for problem in &mut problems {
                let path = problem.place.path.strip_prefix(LIST_KEY).unwrap_or(&problem.place.path);
                problem.place.path = path.to_string();
            }
            problems.sort_by_key(|problem| problem.place.line.unwrap_or(0));
            Err(problems)
        }
    }
}

fn read(root: &YamlNode, problems: &mut Vec<ConfigProblem>) -> Vec<UpstreamConfig> {
    let list = ConfigPlace::at(LIST_KEY.into(), root.line);
    let items = section::items(root, &list, problems).unwrap_or_default();
    if items.len() > MAX_LISTED_UPSTREAMS {
        let text = format!("lists {} upstreams: {MAX_LISTED_UPSTREAMS} is the most", items.len());
        problems.push(ConfigProblem::new(&list, text));
        return Vec::new();
    }
    let mut found = Vec::new();
    let (mut names, mut urls) = (HashMap::new(), BTreeMap::new());
    for (index, item) in items.iter().enumerate() {
        let place = list.item(index, item.line);
        if let Some(kind) = source_kind(item) {
            let text = "can only stand in the configuration: a listed file names upstreams alone";
            problems.push(ConfigProblem::new(&place.key(kind, None), text));
            continue;
        }
        report_variables(item, &place, problems);
        let Some(upstream) = upstream(item, &place, problems) else { continue };
        if let Some(first) = names.insert(upstream.name.clone(), index) {
            let text = format!("the name {:?} is [{first}]'s already: give it another name", upstream.name);
            problems.push(ConfigProblem::new(&place, text));
        } else if let Some(first) = urls.insert(upstream.url.clone(), index) {
            let text = format!("{} is [{first}]'s already", upstream.url.display());
            problems.push(ConfigProblem::new(&place, text));
        }
        found.push(upstream);
    }
    found
}

/// Reports texts with variables, which would reach the upstream as they are written.
fn report_variables(node: &YamlNode, place: &ConfigPlace, problems: &mut Vec<ConfigProblem>) {
    match &node.value {
        YamlValue::Text(text) if text.contains("${") => {
            let text = "variables are not expanded in a listed file: api_key_env names one with a key";
            problems.push(ConfigProblem::new(place, text));
        }
        YamlValue::List(items) => {
            for (index, item) in items.iter().enumerate() {
                report_variables(item, &place.item(index, item.line), problems);
            }
        }
        YamlValue::Map(entries) => {
            for entry in entries {
                report_variables(&entry.node, &place.key(&entry.key, Some(entry.line)), problems);
            }
        }
        YamlValue::Text(_) | YamlValue::Null | YamlValue::Broken => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn problems(text: &str) -> Vec<String> {
        upstream_list(text).expect_err(text).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn reads_lists_in_yaml_and_json() {
        let table = [
            ("", &[][..]),
            ("# nothing yet\n", &[]),
            ("[]", &[]),
            ("- http://a:1/v1\n- {url: http://b:2, name: b, weight: 2}\n", &["a:1 1", "b 2"]),
            (r#"["http://a:1", {"url": "http://b:2", "max_active": 3}]"#, &["a:1 1", "b:2 1"]),
            ("- unix:/run/a.sock\n- url: https://b\n  tls: {sni: c}\n", &["/run/a.sock 1", "b:443 1"]),
        ];
        for (text, wanted) in table {
            let found = upstream_list(text).unwrap_or_else(|problems| panic!("{text}: {problems:?}"));
            let shown = |upstream: &UpstreamConfig| format!("{} {}", upstream.name, upstream.weight);
            assert_eq!(found.iter().map(shown).collect::<Vec<_>>(), wanted, "{text}");
        }
    }

    #[test]
    fn reports_every_problem_with_its_line() {
        let text = "- http://a\n- {url: http://b, wieght: 2}\n- gym: http://g\n\
                    - {url: http://c, name: a:80}\n\
                    - {url: http://a:80/v1, name: other}\n- {url: http://d, api_key: \"${HOME}\"}\n\
                    - {url: http://e, every: 5s, resolver: [10.0.0.2]}\n- file: other.yaml\n- b:2\n";
        let wanted = [
            "[1].wieght: unknown key: did you mean \"weight\"? (line 2)",
            "[2].gym: can only stand in the configuration: a listed file names upstreams alone (line 3)",
            "[3]: the name \"a:80\" is [0]'s already: give it another name (line 4)",
            "[4]: http://a:80 is [0]'s already (line 5)",
            "[5].api_key: variables are not expanded in a listed file: \
             api_key_env names one with a key (line 6)",
            "[6].every: is how often a gym is asked: leave it out (line 7)",
            "[6].resolver: is for dns: leave it out (line 7)",
            "[7].file: can only stand in the configuration: a listed file names upstreams alone (line 8)",
            "[8]: \"b:2\" has an unknown scheme: \
             write http://host:port, https://host:port or unix:/path (line 9)",
        ];
        let found = problems(text);
        assert_eq!(found[..8], wanted[..8]);
        assert!(found[8].starts_with("[8]: \"b:2\" has") && found.len() == 9, "{found:?}");
        for (text, wanted) in [
            ("upstreams: [http://a]", "must be a list, is a map of keys (line 1)"),
            ("http://a", "must be a list, is a single value (line 1)"),
            ("- http://a\n- {url: http", "not valid YAML"),
            ("- http://a\n---\n- http://b\n", "there is a second document"),
        ] {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].contains(wanted), "{text}: {found:?}");
        }
        assert!(!problems("- {url: http://a, api_key: hunter2 hunter2}").concat().contains("hunter2"));
    }

    #[test]
    fn bounds_the_number_of_upstreams() {
        let many = |count: usize| -> String { (0..count).map(|n| format!("- http://a:1/{n}\n")).collect() };
        // Names are made of host and port.
        let named = |count: usize| -> String {
            (0..count).map(|n| format!("- {{url: \"http://a:1/{n}\", name: n{n}}}\n")).collect()
        };
        assert_eq!(upstream_list(&named(1000)).expect("is valid").len(), 1000);
        assert_eq!(
            upstream_list(&named(MAX_LISTED_UPSTREAMS)).expect("is valid").len(),
            MAX_LISTED_UPSTREAMS
        );
        assert_eq!(
            problems(&many(MAX_LISTED_UPSTREAMS + 1)),
            ["lists 4097 upstreams: 4096 is the most (line 1)"]
        );
    }

    proptest! {
        /// A list that ends anywhere is a shorter list or has problems, and nothing else is listed.
        #[test]
        fn a_cut_list_lists_nothing_that_the_whole_does_not(cut in 0..200_usize, text in "\\PC{0,10}") {
            let whole = "- http://gpu-0:8000\n- url: http://gpu-1:8000\n  name: gpu-1\n  weight: 2\n\
                         - http://c:1\n";
            let cut = cut.min(whole.len());
            let all = upstream_list(whole).expect("is valid");
            if let Ok(found) = upstream_list(&whole[..cut]) {
                prop_assert!(found.len() <= all.len());
            }
            let _ = upstream_list(&format!("{}{text}{}", &whole[..cut], &whole[cut..]));
        }
    }
}
