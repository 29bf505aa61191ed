//! Tests of `resolve`: the rules over upstreams from a table.

mod stand_ins;

pub(crate) use self::stand_ins::{StandIn, StandIns};

use std::cell::Cell;

use http::{HeaderMap, HeaderName};

use super::*;
use crate::config::check::check;

/// Two upstreams that the file names, and two that the source `gym` named.
const UPSTREAMS: &[&str] = &["one big +sql", "two small", "three of:gym big", "four of:gym down big"];

/// Routes as they are configured; `gym` and `hall` stand for the names of two sources.
fn routes(routes: &str) -> Vec<RouteConfig> {
    let names = ["one", "two", "three", "four"].map(|name| format!("{{url: 'http://{name}', name: {name}}}"));
    let sources = "{gym: 'http://gym'}, {gym: 'http://hall'}";
    let routes = routes.replace("gym", "'gym http://gym:80'").replace("hall", "'gym http://hall:80'");
    let text = format!("upstreams: [{}, {sources}]\nroutes: {routes}\n", names.join(", "));
    check(&text, &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).routes
}

fn fields(headers: &[(&'static str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&'static str, &str)| {
        (HeaderName::from_static(name), value.parse().expect("a value"))
    };
    headers.iter().map(field).collect()
}

#[test]
fn leads_to_upstreams_by_name_else_by_source() {
    let upstreams = StandIns::new(UPSTREAMS);
    for (names, among_ids, led_to) in [
        (None, None, &["one", "two", "three", "four"][..]),
        (Some("[two]"), Some(vec![11]), &["two"]),
        (Some("[two, one]"), Some(vec![11, 10]), &["one", "two"]),
        (Some("[gym]"), Some(vec![12, 13]), &["three", "four"]),
        (Some("[one, gym]"), Some(vec![10, 12, 13]), &["one", "three", "four"]),
        // A source has named none yet: the route leads nowhere, and not everywhere.
        (Some("[hall]"), Some(vec![ABSENT_UPSTREAM]), &[]),
        (Some("[hall, one]"), Some(vec![ABSENT_UPSTREAM, 10]), &["one"]),
    ] {
        let list = names.map_or(String::new(), |names| format!(", upstreams: {names}"));
        let route = &routes(&format!("[{{model: m, to: n{list}}}]"))[0];
        assert_eq!(among(route, &upstreams), among_ids, "{names:?}");
        let leads = |upstream: &&StandIn| leads_to(route, upstream.name, upstream.source.as_deref());
        let found: Vec<&str> = upstreams.0.iter().filter(leads).map(|upstream| upstream.name).collect();
        assert_eq!(found, led_to, "{names:?}");
    }
}

/// A view of a known version, which counts the names that are looked up.
struct CountingView(StandIns, u64, Cell<usize>);

impl UpstreamView for CountingView {
    fn version(&self) -> u64 {
        self.1
    }

    fn place_of(&self, id: usize) -> Option<usize> {
        id.checked_sub(10).filter(|place| *place < self.0.0.len())
    }

    fn id_of(&self, name: &str) -> Option<usize> {
        self.2.set(self.2.get() + 1);
        self.0.id_of(name)
    }

    fn ids_of_source(&self, source: &str) -> impl Iterator<Item = usize> {
        self.0.ids_of_source(source)
    }

    fn reachable(&self) -> impl Iterator<Item = usize> {
        self.0.reachable()
    }

    fn reports_models(&self, id: usize) -> bool {
        self.0.reports_models(id)
    }

    fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        self.0.serves(model, among)
    }

    fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        self.0.is_ready_with(model, among)
    }

    fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str> {
        self.0.base_of_ready(among)
    }

    fn only_base(&self, among: Option<&[usize]>) -> Option<&str> {
        self.0.only_base(among)
    }

    fn served_names(&self) -> impl Iterator<Item = &str> {
        self.0.served_names()
    }
}

#[test]
fn finds_the_upstreams_of_a_route_once_for_each_version_of_the_fleet() {
    let table = RouteTable::new(&routes("[{model: m, upstreams: [gym, two]}]"));
    let plan = table.plan(Some("m"), "/p", &HeaderMap::new()).expect("the route matches");
    let view = |version| CountingView(StandIns::new(UPSTREAMS), version, Cell::new(0));
    for (version, looked_up) in [(1, 2), (1, 0), (1, 0), (2, 2), (2, 0), (1, 2)] {
        let view = view(version);
        let found = upstreams(&plan, &view).expect("the route names some");
        assert_eq!(found.ids(), [11, 12, 13]);
        let places = found.places(version).map(|places| places.iter().collect::<Vec<_>>());
        assert_eq!((places, view.2.get()), (Some(vec![1, 2, 3]), looked_up), "version {version}");
    }
    let all = RouteTable::new(&routes("[{model: m, to: n}]"));
    let plan = all.plan(Some("m"), "/p", &HeaderMap::new()).expect("the route matches");
    assert!(upstreams(&plan, &view(1)).is_none(), "a route without names leads to all");
}

#[test]
fn uses_the_one_base_model_of_the_sources_without_a_served_name() {
    let two_bases = &["three of:gym big", "four of:gym small"][..];
    let with_file = &["one big", "three of:gym big"][..];
    let of_sources = &["three of:gym big", "four of:hall big +sql"][..];
    for (upstreams, route, model, served, found_model) in [
        (UPSTREAMS, "{model: face, upstreams: [gym]}", "face", "big", true),
        (of_sources, "{model: face}", "face", "big", true),
        // The route gives a name.
        (UPSTREAMS, "{model: face, upstreams: [gym], to: huge}", "face", "huge", false),
        // Its upstreams serve the client's name.
        (of_sources, "{model: sql}", "sql", "sql", false),
        (UPSTREAMS, "{model: big, upstreams: [gym]}", "big", "big", false),
        // Other upstreams serve it, and the route's do not.
        (UPSTREAMS, "{model: small, upstreams: [gym]}", "small", "big", true),
        // There is not one base model, or the file named an upstream, which may serve anything later.
        (two_bases, "{model: face, upstreams: [gym]}", "face", "face", false),
        (with_file, "{model: face}", "face", "face", false),
        (UPSTREAMS, "{model: face, upstreams: [one]}", "face", "face", false),
        // No upstream is there.
        (UPSTREAMS, "{model: face, upstreams: [hall]}", "face", "face", false),
        // A route for several names keeps each.
        (UPSTREAMS, "{model: 'f*', upstreams: [gym]}", "face", "face", false),
        (UPSTREAMS, "{upstreams: [gym]}", "face", "face", false),
    ] {
        let table = RouteTable::new(&routes(&format!("[{route}]")));
        let resolver = Resolver { table: &table, upstreams: &StandIns::new(upstreams) };
        let plan = resolver.plan(Some(model), "/p", &HeaderMap::new()).expect("the route matches");
        assert_eq!(
            (plan.served(Some(model)), plan.found_model),
            (Some(served), found_model),
            "{upstreams:?} {route}"
        );
    }
}

#[test]
fn finds_no_route_where_none_matches() {
    let table =
        RouteTable::new(&routes("[{model: face, path: /q}, {model: face, header: {x-team: a}, to: big}]"));
    let resolver = Resolver { table: &table, upstreams: &StandIns::new(UPSTREAMS) };
    assert!(resolver.plan(Some("face"), "/p", &HeaderMap::new()).is_none());
    assert!(resolver.plan(Some("big"), "/q", &HeaderMap::new()).is_none());
    let of_team = resolver.plan(Some("face"), "/p", &fields(&[("x-team", "a")])).expect("it has the header");
    assert_eq!(of_team.served(Some("face")), Some("big"));
}

#[test]
fn routes_unnamed_requests_to_the_one_base_model_of_ready_upstreams() {
    let alike = &["one big +sql", "two down small", "three of:gym big"][..];
    let mixed = UPSTREAMS;
    let team = &[("x-team", "a")][..];
    for (upstreams, list, headers, model, route) in [
        (alike, "[]", &[][..], Some("big"), None),
        (alike, "[{model: big, to: tuned}]", &[], Some("big"), Some("big")),
        (alike, "[{model: small, to: tuned}]", &[], Some("big"), None),
        (alike, "[{model: '*', to: tuned}]", &[], Some("big"), Some("*")),
        // Several base models: the route for any model decides, by its own upstreams.
        (mixed, "[]", &[], None, None),
        (mixed, "[{model: big, to: tuned}]", &[], None, None),
        (mixed, "[{model: '*', upstreams: [two]}]", &[], Some("small"), Some("*")),
        (mixed, "[{model: '*', upstreams: [gym]}]", &[], Some("big"), Some("*")),
        (mixed, "[{model: '*', upstreams: [one, two]}]", &[], None, Some("*")),
        (mixed, "[{model: '*', upstreams: [hall]}]", &[], None, Some("*")),
        // A bound route takes what matches it.
        (mixed, "[{path: /p, upstreams: [two]}]", &[], Some("small"), Some("/p")),
        (mixed, "[{path: /q, upstreams: [two]}]", &[], None, None),
        (mixed, "[{header: {x-team: a}, upstreams: [two]}]", team, Some("small"), Some("routes[0]")),
        (mixed, "[{header: {x-team: a}, upstreams: [two]}]", &[], None, None),
    ] {
        let table = RouteTable::new(&routes(list));
        let resolver = Resolver { table: &table, upstreams: &StandIns::new(upstreams) };
        let UnnamedModelRoute { model: found, plan } = resolver.plan_unnamed("/p", &fields(headers));
        let name = plan.as_ref().map(|plan| plan.name.as_str());
        assert_eq!((found.as_deref(), name), (model, route), "{upstreams:?} {list} {headers:?}");
    }
}

#[test]
fn lists_names_that_lead_to_a_served_model() {
    for (list, listed) in [
        ("[]", &["big", "sql", "small"][..]),
        // Names of routes come first, in the order of the file, each once.
        ("[{model: b, to: big}, {model: a, to: small}]", &["b", "a", "big", "sql", "small"]),
        ("[{model: a, path: /p, to: small}, {model: a, to: big}]", &["a", "big", "sql", "small"]),
        // A route to what its upstreams do not serve, or to no upstream.
        ("[{model: a, to: huge}]", &["big", "sql", "small"]),
        ("[{model: a, to: big, upstreams: [two]}]", &["big", "sql", "small"]),
        ("[{model: a, to: big, upstreams: [hall]}]", &["big", "sql", "small"]),
        ("[{model: a, to: big, upstreams: [four]}]", &["big", "sql", "small"]),
        ("[{model: a, to: sql, upstreams: [one]}]", &["a", "big", "sql", "small"]),
        // A route takes a served name away.
        ("[{model: big, upstreams: [two]}]", &["sql", "small"]),
        ("[{model: '*', upstreams: [gym]}]", &["big"]),
        ("[{model: 's*', upstreams: [hall]}]", &["big"]),
        // A served name may stand for another model, and is listed among the routes' names then.
        ("[{model: big, to: small}]", &["big", "sql", "small"]),
        // The one base model of a source.
        ("[{model: face, upstreams: [gym]}]", &["face", "big", "sql", "small"]),
        ("[{model: face, upstreams: [one]}]", &["big", "sql", "small"]),
        // A bound route gives its name to some requests; of a pattern no name is known.
        ("[{model: a, path: /p, to: big}]", &["a", "big", "sql", "small"]),
        (
            "[{model: a, path: /p, to: huge}, {model: a, header: {x: y}, to: big}]",
            &["a", "big", "sql", "small"],
        ),
        ("[{model: 'a*', path: /p, to: big}]", &["big", "sql", "small"]),
        // Where other requests for the name go nowhere.
        ("[{model: a, path: /p, to: big}, {model: a, to: huge}]", &["a", "big", "sql", "small"]),
        ("[{path: /p, upstreams: [hall]}]", &["big", "sql", "small"]),
    ] {
        let table = RouteTable::new(&routes(list));
        let resolver = Resolver { table: &table, upstreams: &StandIns::new(UPSTREAMS) };
        assert_eq!(resolver.aliases(), listed, "{list}");
    }
}

#[test]
fn lists_names_with_the_models_that_serve_them() {
    let table =
        RouteTable::new(&routes("[{model: a, to: big, upstreams: [gym]}, {model: small, upstreams: [two]}]"));
    let resolver = Resolver { table: &table, upstreams: &StandIns::new(UPSTREAMS) };
    let find = |model: &str, among: Option<&[usize]>| Some((model.to_string(), among.map(<[usize]>::to_vec)));
    let of =
        |name, model: &str, among: Option<&[usize]>| (name, (model.into(), among.map(<[usize]>::to_vec)));
    assert_eq!(
        resolver.listed(&find),
        [
            of("a", "big", Some(&[12, 13])),
            of("big", "big", None),
            of("sql", "sql", None),
            of("small", "small", Some(&[11]))
        ]
    );
}
