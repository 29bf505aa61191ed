//! The conformance file of routes: what is made of a request, and of its answer.
//!
//! tests/data/routes/*.txt hold triples, in a form that people can read:
//!
//! ```text
//! === a name for the case
//! route: {model: fast, to: big}            one entry of `routes`, as in a configuration
//! path: /v1/chat/completions               chat unless it is given
//! --- client                               the request's body as the client wrote it
//! --- upstream                             as the upstream gets it; nothing: it goes on as it is
//! --- answer                               in place of those: the upstream's answer
//! --- told                                 and what the client gets
//! ```
//!
//! White space around a body is no part of it. Answers are given in pieces of every length too.

use std::path::Path;
use std::sync::Arc;

use http::HeaderMap;
use vllm_lb::config::check::check_ahead;
use vllm_lb::route::dialect::Dialect;
use vllm_lb::route::paths::{self, Found};
use vllm_lb::route::table::{Plan, Table};

#[derive(Debug, Default)]
struct Case {
    name: String,
    /// `key: value` lines.
    settings: Vec<(String, String)>,
    parts: Vec<(String, String)>,
}

impl Case {
    fn setting(&self, key: &str) -> Option<&str> {
        self.settings.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn part(&self, name: &str) -> Option<&str> {
        self.parts.iter().find(|(part, _)| part == name).map(|(_, text)| text.trim_matches('\n'))
    }

    fn path(&self) -> &str {
        self.setting("path").unwrap_or("/v1/chat/completions")
    }

    fn plan(&self) -> Arc<Plan> {
        let route = self.setting("route").unwrap_or_else(|| panic!("{}: no route", self.name));
        let text = format!("upstreams: [http://a]\nroutes: [{route}]\n");
        let config =
            check_ahead(&text, &|_| None).unwrap_or_else(|problems| panic!("{}: {problems:?}", self.name));
        let table = Table::new(&config.routes);
        let model = config.routes[0].model.clone();
        table.plan(model.as_deref(), self.path(), &HeaderMap::new()).expect("the only route matches")
    }

    fn dialect(&self) -> Dialect {
        match paths::Table::default().find("POST", self.path()) {
            Found::Route(route) => Dialect::of(route.api),
            other => panic!("{}: {other:?}", self.name),
        }
    }
}

fn cases(file: &str) -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/routes").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("=== ") {
            assert!(cases.iter().all(|case| case.name != name), "{name} is there twice");
            cases.push(Case { name: name.into(), ..Case::default() });
            continue;
        }
        let Some(case) = cases.last_mut() else { continue };
        if let Some(part) = line.strip_prefix("--- ") {
            case.parts.push((part.into(), String::new()));
        } else if let Some((_, text)) = case.parts.last_mut() {
            text.push_str(line);
            text.push('\n');
        } else if let Some((key, value)) = line.split_once(": ") {
            case.settings.push((key.into(), value.into()));
        }
    }
    cases
}

#[test]
fn requests_reach_the_upstream_as_they_should() {
    let cases = cases("requests.txt");
    for case in &cases {
        let client = case.part("client").unwrap_or_else(|| panic!("{}: no request", case.name));
        let wanted = case.part("upstream").filter(|text| !text.is_empty());
        let plan = case.plan();
        let edits = plan.edits(case.dialect());
        let usage = case.setting("usage").is_some();
        let edited = edits.edit(client.as_bytes(), usage);
        let sent = edited.body.as_deref().map(|body| String::from_utf8_lossy(body).into_owned());
        assert_eq!(sent.as_deref(), wanted, "{}", case.name);
        let asked = edited.asked;
        let asked = [("usage", asked.usage), ("logprobs", asked.logprobs), ("token_ids", asked.token_ids)];
        let asked: Vec<&str> = asked.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        assert_eq!(asked.join(" "), case.setting("asked").unwrap_or_default(), "{}", case.name);
        assert!(
            edited.body.is_none() || edits.may_change(None, usage),
            "{}: would not have been held",
            case.name
        );
    }
    assert!(cases.len() >= 60, "{} cases", cases.len());
}
