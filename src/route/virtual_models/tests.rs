//! Tests of the table of routes: the order of matches, patterns, and prepared plans.

use proptest::prelude::*;

use super::*;
use crate::config::check::check;
use crate::config::types::{Retry, Timeouts};

fn table(routes: &str) -> RouteTable {
    let text = format!("upstreams: [http://a]\nroutes: {routes}\n");
    let config = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    RouteTable::new(&config.routes)
}

fn taken(table: &RouteTable, model: Option<&str>, path: &str, headers: &[(&str, &str)]) -> Option<String> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(http::HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
    }
    table.plan(model, path, &map)?.route.to.clone()
}

#[test]
fn takes_the_first_route_that_matches() {
    let table = table(
        "[{model: fast, path: /v1/chat/completions, header: {X-Team: a}, to: one},
              {model: fast, header: {x-team: a, x-level: 7}, to: two}, {model: fast, to: three},
              {model: 'gpt-*-mini', to: four}, {path: /v1/embeddings, to: five},
              {model: '*', header: {x: y}, to: six}]",
    );
    let chat = "/v1/chat/completions";
    for (model, path, headers, to) in [
        (Some("fast"), chat, &[("x-team", "a")][..], Some("one")),
        (Some("fast"), chat, &[("x-team", "b")], Some("three")),
        (Some("fast"), chat, &[("x-team", "a"), ("x-team", "a")], Some("three")),
        (Some("fast"), "/v1/responses", &[("x-team", "a"), ("x-level", "7")], Some("two")),
        (Some("fast"), "/v1/responses", &[("x-team", "a")], Some("three")),
        (Some("faster"), chat, &[], None),
        (Some("gpt-5-mini"), chat, &[], Some("four")),
        (Some("gpt--mini"), chat, &[], Some("four")),
        (Some("gpt-mini"), chat, &[], None),
        (Some("Fast"), chat, &[], None),
        (None, chat, &[], None),
        (None, "/v1/embeddings", &[], Some("five")),
        (None, chat, &[("x", "y")], Some("six")),
    ] {
        assert_eq!(taken(&table, model, path, headers).as_deref(), to, "{model:?} {path} {headers:?}");
    }
}

/// The routes that a request without a model takes, over upstreams `one` and `two` with these bases.
fn unnamed(routes: &str, bases: [&str; 2], headers: &[(&'static str, &'static str)]) -> (String, String) {
    let upstreams = "[{url: http://a, name: one}, {url: http://b, name: two}]";
    let text = format!("upstreams: {upstreams}\nroutes: {routes}\n");
    let config = check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}"));
    let table = RouteTable::new(&config.routes);
    let mut map = HeaderMap::new();
    headers.iter().for_each(|(name, value)| drop(map.insert(*name, value.parse().unwrap())));
    let base_of = |plan: Option<&RoutePlan>| {
        let among = plan.and_then(|plan| plan.route.upstreams.as_ref());
        let is_among = |name: &str| among.is_none_or(|among| among.iter().any(|other| other == name));
        let mut bases = ["one", "two"].iter().zip(bases).filter(|(name, _)| is_among(name));
        let first = bases.next()?.1;
        bases.all(|(_, base)| base == first).then(|| first.to_string())
    };
    let found = table.plan_unnamed("/p", &map, base_of, |model| table.plan(Some(model), "/p", &map));
    let edited = found.plan.as_ref().map(|plan| plan.edits(BodyDialect::Chat).edit(b"{}").unwrap().body);
    let body = edited.flatten().map_or(String::new(), |body| String::from_utf8(body).unwrap());
    (found.model.unwrap_or_default(), body)
}

#[test]
fn routes_unnamed_requests_by_the_model_they_would_get() {
    const SEED: &str = "body: {overrides: {seed: 1}}";
    let team = &[("x-team", "a")][..];
    let (same, other) = (["big", "big"], ["big", "small"]);
    for (routes, bases, headers, model, body) in [
        (format!("[{{model: big, {SEED}}}]"), same, &[][..], "big", r#"{"seed":1}"#),
        (format!("[{{model: 'b*', to: tuned, {SEED}}}]"), same, &[], "big", r#"{"seed":1,"model":"tuned"}"#),
        (format!("[{{model: small, {SEED}}}, {{model: '*'}}]"), same, &[], "big", ""),
        (format!("[{{model: other, {SEED}}}]"), same, &[], "big", ""),
        // Which it would get is not certain.
        (format!("[{{model: big, {SEED}}}]"), other, &[], "", ""),
        (
            format!("[{{model: big, {SEED}}}, {{path: /p, to: tuned}}]"),
            other,
            &[],
            "",
            r#"{"model":"tuned"}"#,
        ),
        // It is, among the upstreams of the route that requests without a model take.
        (
            format!("[{{header: {{x-team: a}}, upstreams: [two], {SEED}}}]"),
            other,
            team,
            "small",
            r#"{"seed":1}"#,
        ),
        (
            format!("[{{model: small, {SEED}}}, {{header: {{x-team: a}}, upstreams: [two]}}]"),
            other,
            team,
            "",
            r#"{"seed":1,"model":"small"}"#,
        ),
        (
            format!("[{{model: big, {SEED}}}, {{header: {{x-team: a}}, upstreams: [two]}}]"),
            other,
            team,
            "small",
            "",
        ),
    ] {
        assert_eq!(unnamed(&routes, bases, headers), (model.into(), body.into()), "{routes} {bases:?}");
    }
}

#[test]
fn names_a_route_by_its_model_path_or_index() {
    let table = table("[{model: 'a*', path: /p}, {path: /q, to: x}, {to: y}]");
    let names: Vec<&str> = table.plans.iter().map(|plan| plan.name.as_str()).collect();
    assert_eq!(names, ["a*", "/q", "routes[2]"]);
}

#[test]
fn rebuilds_a_plan_when_the_served_name_changes() {
    let table = table("[{model: face, path: /p, body: {defaults: {seed: 1}}}]");
    let plan = table.for_model("face").next().unwrap();
    let one = plan.serving("one");
    assert!(Arc::ptr_eq(&one, &plan.serving("one")), "it is kept");
    let two = plan.serving("two");
    for (made, to, body) in [(one, "one", r#"{"model":"one","seed":1}"#), (two, "two", "")] {
        assert_eq!((made.name.as_str(), made.served(Some("face"))), ("face", Some(to)));
        let edited = made.edits(BodyDialect::Chat).edit(br#"{"model":"face"}"#).unwrap().body.unwrap();
        assert!(body.is_empty() || edited == body.as_bytes(), "{}", String::from_utf8_lossy(&edited));
    }
    assert_eq!(plan.served(Some("face")), Some("face"), "the route says nothing itself");
}

#[test]
fn stars_match_any_characters() {
    for (pattern, name, wanted) in [
        ("*", "", true),
        ("**", "x", true),
        ("a*", "a", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "a-c-b", false),
        ("*ab*", "xaab", true),
        ("ab*ba", "aba", false),
        ("é*", "éa", true),
        ("a", "a*", false),
    ] {
        assert_eq!(pattern_matches(pattern, name), wanted, "{pattern} {name}");
    }
}

/// The reference: tries every length for every star.
fn plainly(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|at| plainly(rest, &name[at..])),
        Some((byte, rest)) => name.first() == Some(byte) && plainly(rest, &name[1..]),
    }
}

proptest! {
    #[test]
    fn patterns_match_like_the_reference(pattern in "[ab*]{0,6}", name in "[ab]{0,8}") {
        prop_assert_eq!(pattern_matches(&pattern, &name), plainly(pattern.as_bytes(), name.as_bytes()));
    }

    #[test]
    fn the_index_finds_the_routes_that_fit_in_the_order_of_the_file(
        models in prop::collection::vec(prop::option::of("[ab*]{1,2}"), 0..12), name in "[ab*]{0,2}"
    ) {
        let route = |model: &Option<String>| {
            let unnamed = RouteConfig::new(Timeouts::default(), Retry::default());
            RouteConfig { model: model.clone(), ..unnamed }
        };
        let table = RouteTable::new(&models.iter().map(route).collect::<Vec<_>>());
        let fits = |model: &&Option<String>| {
            model.as_ref().is_none_or(|model| plainly(model.as_bytes(), name.as_bytes()))
        };
        let scanned: Vec<_> = models.iter().filter(fits).map(Option::as_deref).collect();
        let found: Vec<_> = table.for_model(&name).map(|plan| plan.route.model.as_deref()).collect();
        prop_assert_eq!(&found, &scanned);
        let taken = table.plan(Some(&name), "/p", &HeaderMap::new());
        let taken = taken.as_ref().map(|plan| plan.route.model.as_deref());
        prop_assert_eq!(taken, scanned.first().copied());
    }
}
