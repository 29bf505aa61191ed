//! The routes: read, checked, and looked at for what is allowed and yet hardly meant.

use serde_json::{Map, Value as Json};

use super::fleet::Reference;
use super::{retry, set, source, timeouts};
use crate::config::free;
use crate::config::keys::{self};
use crate::config::problem::{ConfigPlace, Problem, seen};
use crate::config::raw::YamlValue;
use crate::config::section::{Section, items};
use crate::config::types::{
    BodyEdits, Config, HeaderEdits, Overflow, Retry, RouteConfig, Timeouts, UpstreamForm,
};
use crate::config::values::{ReadResult, boolean, plain, secret, url_path};

/// Headers that frame a message or belong to one connection: the balancer's own.
const OURS: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Fields of a body that a route changes in a way of its own, or not at all.
const OWN_WAY: [(&str, &str); 2] =
    [("model", "is changed by to"), ("messages", "is the client's: body.roles changes the roles in it")];

/// The most steps of a path to a field that is removed.
const MAX_PATH_STEPS: usize = 8;

const ASKED: &str = "is asked for by token_ids";
const STREAM: [&str; 2] =
    ["is the client's to say with responses: chat", "is the client's to say with messages: chat"];

/// The routes of a file. `base` is what a route's timeouts and retry begin with.
pub fn read(
    root: &mut Section<'_, '_>,
    base: (Timeouts, Retry),
    references: &mut Vec<Reference>,
) -> Vec<RouteConfig> {
    let list = root.place_of("routes");
    let Some(node) = root.node("routes") else { return Vec::new() };
    let Some(items) = items(node, &list, root.problems) else { return Vec::new() };
    let mut routes = Vec::new();
    let mut places = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let place = list.item(index, item.line);
        let mut section = Section::open(item, place, root.problems);
        routes.push(route(&mut section, RouteConfig::new(base.0, base.1), references));
        places.push(section.place_of("to"));
    }
    cycles(&routes, &places, root.problems);
    routes
}

fn route(
    section: &mut Section<'_, '_>,
    mut route: RouteConfig,
    references: &mut Vec<Reference>,
) -> RouteConfig {
    route.model = section.get("model", plain);
    route.path = section.get("path", url_path);
    route.header = header_map(section, "header").unwrap_or_default();
    route.to = section.get("to", plain);
    route.upstreams = upstreams(section, references);
    route.headers = headers(section.section("headers"));
    route.response_headers = headers(section.section("response_headers"));
    route.body = body(section.section("body"));
    set(&mut route.token_ids, section.get("token_ids", boolean));
    set(&mut route.think_tags, section.get("think_tags", boolean));
    set(&mut route.overflow, section.choose("overflow", &Overflow::NAMES, Overflow::parse));
    set(&mut route.responses, section.choose("responses", &UpstreamForm::NAMES, UpstreamForm::parse));
    set(&mut route.messages, section.choose("messages", &UpstreamForm::NAMES, UpstreamForm::parse));
    set(&mut route.metadata_overrides, section.get("metadata_overrides", boolean));
    route.api_key = section.get("api_key", secret);
    timeouts(section.section("timeouts"), &mut route.timeouts);
    retry(section.section("retry"), &mut route.retry);
    aliases(section, &mut route);
    always_on(section);
    contradictions(section, &route);
    route
}

fn upstreams(section: &mut Section<'_, '_>, references: &mut Vec<Reference>) -> Option<Vec<String>> {
    let node = section.node("upstreams")?;
    let names = section.list("upstreams", plain)?;
    let list = section.place_of("upstreams");
    let YamlValue::List(items) = &node.value else { return None };
    if items.is_empty() {
        section.problem("upstreams", "must not be empty: leave the key out for all upstreams");
    }
    for (index, item) in items.iter().enumerate() {
        if let YamlValue::Text(name) = &item.value {
            let place = list.item(index, item.line);
            references.push(Reference { place, name: name.clone(), or_all: false });
        }
    }
    Some(names)
}

fn headers(mut section: Section<'_, '_>) -> HeaderEdits {
    let set = header_map(&mut section, "set").unwrap_or_default();
    let remove = section.list("remove", changeable_header).unwrap_or_default();
    if let Some((name, _)) = set.iter().find(|(name, _)| remove.contains(name)) {
        section.problem("remove", format!("{} is in set too", seen(name)));
    }
    HeaderEdits { set, remove }
}

/// A map of header names and values. What is only compared may have any name.
fn header_map(section: &mut Section<'_, '_>, key: &str) -> Option<Vec<(String, String)>> {
    let place = section.place_of(key);
    let name = if key == "header" { header_name } else { changeable_header };
    let map = pairs(section, key)?;
    let mut found = Vec::new();
    for (written, value) in map {
        let at = place.key(&written, place.line);
        match name(&written).and_then(|name| Ok((name, header_value(&value)?))) {
            Ok((name, _)) if found.iter().any(|(earlier, _)| *earlier == name) => {
                section.problems.push(Problem::new(&at, "given twice: case does not matter in a header"));
            }
            Ok(pair) => found.push(pair),
            Err(what) => section.problems.push(Problem::new(&at, what)),
        }
    }
    Some(found)
}

/// A map of texts. A plain number or truth value is the text that was written.
fn pairs(section: &mut Section<'_, '_>, key: &str) -> Option<Vec<(String, String)>> {
    let place = section.place_of(key);
    let node = section.node(key)?;
    let entries = match &node.value {
        YamlValue::Map(entries) => entries,
        _ => {
            free::object(node, &place, section.problems)?;
            return None;
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let place = place.key(&entry.key, Some(entry.line));
        let text = crate::config::section::scalar(&entry.node, &place, section.problems, |text| {
            Ok::<_, String>(text.to_owned())
        });
        found.extend(text.map(|text| (entry.key.clone(), text)));
    }
    Some(found)
}

fn header_name(text: &str) -> ReadResult<String> {
    match http::HeaderName::from_bytes(text.as_bytes()) {
        Ok(name) => Ok(name.as_str().to_owned()),
        Err(_) => Err(format!("{} is no name of a header", seen(text))),
    }
}

fn changeable_header(text: &str) -> ReadResult<String> {
    let name = header_name(text)?;
    if OURS.contains(&name.as_str()) {
        return Err(format!("{} is the balancer's own and cannot be changed", seen(text)));
    }
    Ok(name)
}

fn header_value(text: &str) -> ReadResult<String> {
    let clean = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if !clean || text.trim() != text {
        // What is set may be a key, so it is not shown.
        return Err("must be visible ASCII characters, with blanks only between them".into());
    }
    Ok(text.to_owned())
}

fn body(mut section: Section<'_, '_>) -> BodyEdits {
    let roles = pairs(&mut section, "roles").unwrap_or_default();
    let edits = BodyEdits {
        defaults: object(&mut section, "defaults"),
        overrides: object(&mut section, "overrides"),
        remove: section.list("remove", field_path).unwrap_or_default(),
        roles,
    };
    let chain = edits.roles.iter().find(|(_, to)| edits.roles.iter().any(|(from, _)| from == to));
    if let Some((from, to)) = chain {
        let text = format!("{} becomes {}, which becomes another: write what is meant", seen(from), seen(to));
        section.problem("roles", text);
    }
    edits
}

/// A field of a body, or a path to one: `a.b` into a map, `a[].b` into every item of a list.
fn field_path(text: &str) -> ReadResult<String> {
    let path = plain(text)?;
    let mut steps: Vec<&str> = text.split('.').collect();
    let field = steps.pop().unwrap_or_default();
    let keys = steps.iter().map(|step| step.strip_suffix("[]").unwrap_or(step)).chain([field]);
    let is_key = |key: &str| !key.is_empty() && !key.contains(['[', ']']);
    if steps.len() >= MAX_PATH_STEPS || !keys.clone().all(is_key) {
        return Err(format!(
            "{} is neither a field nor a path to one, as a.b or tools[].strict, of {MAX_PATH_STEPS} steps at \
             most",
            seen(text)
        ));
    }
    if ["messages", "input"].contains(&keys.clone().next().unwrap_or_default()) && !steps.is_empty() {
        return Err(format!(
            "{} leads into the client's messages, which only body.roles changes",
            seen(text)
        ));
    }
    Ok(path)
}

fn object(section: &mut Section<'_, '_>, key: &str) -> Map<String, Json> {
    let place = section.place_of(key);
    section.node(key).and_then(|node| free::object(node, &place, section.problems)).unwrap_or_default()
}

/// The names that NeMo Gym's model servers have for keys of ours; each only where ours was not given.
fn aliases(section: &mut Section<'_, '_>, route: &mut RouteConfig) {
    let defaults = object(section, "extra_body");
    let overrides = object(section, "sampling_overrides");
    let kwargs = object(section, "chat_template_kwargs");
    let developer = section.get("replace_developer_role_with_system", boolean) == Some(true);
    let headers = header_map(section, "default_headers").unwrap_or_default();
    let body = &mut route.body;
    let taken = [
        ("extra_body", !defaults.is_empty() && !body.defaults.is_empty()),
        ("sampling_overrides", !overrides.is_empty() && !body.overrides.is_empty()),
        ("replace_developer_role_with_system", developer && !body.roles.is_empty()),
        ("default_headers", !headers.is_empty() && !route.headers.set.is_empty()),
        ("return_token_id_information", section.node("token_ids").is_some()),
        ("uses_reasoning_parser", section.node("think_tags").is_some()),
        ("is_responses_native", section.node("responses").is_some()),
    ];
    body.defaults.extend(defaults);
    body.overrides.extend(overrides);
    body.roles.extend(developer.then(|| ("developer".to_owned(), "system".to_owned())));
    route.headers.set.extend(headers);
    let kwargs_taken = !kwargs.is_empty() && body.defaults.contains_key("chat_template_kwargs");
    if !kwargs.is_empty() {
        body.defaults.insert("chat_template_kwargs".into(), Json::Object(kwargs));
    }
    set(&mut route.token_ids, section.get("return_token_id_information", boolean));
    set(&mut route.think_tags, section.get("uses_reasoning_parser", boolean));
    let native = section.get("is_responses_native", boolean);
    let form = native.map(|native| if native { UpstreamForm::Native } else { UpstreamForm::Chat });
    set(&mut route.responses, form);
    for (alias, clash) in taken.into_iter().chain([("chat_template_kwargs", kwargs_taken)]) {
        if clash && section.node(alias).is_some() {
            let pattern = section.place_of(alias).pattern();
            let key = keys::ALIASES.iter().find(|(name, _)| *name == pattern).map_or(alias, |(_, key)| *key);
            let text =
                format!("is another name for {}, which is given too", key.trim_start_matches("routes[]."));
            section.problem(alias, text);
        }
    }
}

/// Settings of theirs that a route has in one way only.
fn always_on(section: &mut Section<'_, '_>) {
    for (pattern, why) in keys::ALWAYS_ON {
        let key = pattern.trim_start_matches("routes[].");
        if section.get(key, boolean) == Some(false) {
            section.problem(key, *why);
        }
    }
}

/// What one key asks for and another takes back.
fn contradictions(section: &mut Section<'_, '_>, route: &RouteConfig) {
    let body = &route.body;
    let place = section.place_of("body");
    let written = [("defaults", &body.defaults), ("overrides", &body.overrides)];
    for (name, map) in written {
        for key in map.keys() {
            let place = place.key(name, place.line).key(key, place.line);
            if body.remove.contains(key) {
                section.problems.push(Problem::new(&place, "is in body.remove too"));
            }
            if let Some((_, own)) = OWN_WAY.iter().find(|(field, _)| field == key) {
                section.problems.push(Problem::new(&place, *own));
            }
        }
    }
    let needed = needed(route);
    for (field, why) in
        OWN_WAY.iter().chain(&needed).filter(|(field, _)| body.remove.iter().any(|key| key == field))
    {
        let text = format!("{} {why}", seen(field));
        section.problems.push(Problem::new(&place.key("remove", place.line), text));
    }
    for (field, why) in needed {
        // For completions, which have such a field, too, it is a number.
        let taken = |value: &Json| why != ASKED || value.is_null() || *value == Json::Bool(false);
        if body.overrides.get(field).is_some_and(taken) {
            let place = place.key("overrides", place.line).key(field, place.line);
            section.problems.push(Problem::new(&place, why));
        }
    }
    if route.api_key.is_some() && route.headers.set.iter().any(|(name, _)| name == "authorization") {
        section.problem("api_key", "is sent as authorization, which headers.set has too");
    }
}

/// Fields that must reach the upstream as another key of the route, or the client, has them.
fn needed(route: &RouteConfig) -> Vec<(&'static str, &'static str)> {
    let ids = [("logprobs", ASKED), ("return_token_ids", ASKED)];
    let asked = ids.into_iter().filter(|_| route.token_ids);
    // A chat that does not stream is refused with what a translated stream has beside it.
    let forms = [route.responses, route.messages];
    let translated = forms.into_iter().zip(STREAM).find(|(form, _)| *form == UpstreamForm::Chat);
    let translated = translated.map(|(_, why)| ("stream", why));
    asked.chain(translated).collect()
}

/// Reports routes that lead to each other in a circle. `to` is a served name and is not followed further, so
/// a circle is always a mistake.
fn cycles(routes: &[RouteConfig], places: &[ConfigPlace], problems: &mut Vec<Problem>) {
    let next = |name: &str| {
        let route = routes.iter().find(|route| route.model.as_deref() == Some(name))?;
        route.to.as_deref().filter(|to| *to != name)
    };
    for (route, place) in routes.iter().zip(places) {
        let (Some(model), Some(to)) = (&route.model, &route.to) else { continue };
        let mut seen_names = vec![model.as_str()];
        let mut name = to.as_str();
        while name != model && !seen_names.contains(&name) {
            seen_names.push(name);
            let Some(further) = next(name) else { break };
            name = further;
        }
        if name == model && seen_names.len() > 1 {
            let way: Vec<&str> = seen_names.iter().copied().chain([name]).collect();
            problems.push(Problem::new(place, format!("leads in a circle: {}", way.join(" -> "))));
        }
    }
}

/// What is allowed, since upstreams may come later, and yet hardly meant.
pub fn warnings(config: &Config) -> Vec<Problem> {
    let mut found = source::names_to_come(config);
    for (index, route) in config.routes.iter().enumerate() {
        let place = ConfigPlace::named(&format!("routes[{index}]"));
        if let Some(to) = route.to.as_ref().filter(|to| !may_be_served(config, route, to)) {
            let text = format!("no upstream serves {}", seen(to));
            found.push(Problem::new(&place.key("to", None), text));
        }
        if let Some(first) = config.routes[..index].iter().position(|earlier| covers(earlier, route)) {
            found.push(Problem::new(
                &place,
                format!("is never reached: routes[{first}] matches all that it does"),
            ));
        }
    }
    found
}

/// An upstream whose models are asked for may serve any, as may one that is yet to be discovered.
fn may_be_served(config: &Config, route: &RouteConfig, model: &String) -> bool {
    let chosen = |name: &String| route.upstreams.as_ref().is_none_or(|names| names.contains(name));
    let mut upstreams = config.upstreams.iter().filter(|upstream| chosen(&upstream.name)).peekable();
    upstreams.peek().is_none()
        || (route.upstreams.is_none() && !config.sources.is_empty())
        || upstreams.any(|upstream| upstream.models.as_ref().is_none_or(|models| models.contains(model)))
}

/// Whether every request that `later` matches is matched by `earlier`, as far as that is plain to see.
fn covers(earlier: &RouteConfig, later: &RouteConfig) -> bool {
    let any = |model: &Option<String>| model.as_ref().is_none_or(|model| model == "*");
    let model = any(&earlier.model) || earlier.model == later.model;
    let path = earlier.path.is_none() || earlier.path == later.path;
    model && path && earlier.header.iter().all(|pair| later.header.contains(pair))
}
