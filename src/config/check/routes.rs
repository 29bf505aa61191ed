//! The routes: read by the table, then checked for keys that contradict each other.

use serde_json::Value;

use super::names::UpstreamNames;
use crate::config::keys;
use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::section::ConfigSection;
use crate::config::setting::{self, MapSource, ValueForm, pairs};
use crate::config::types::{Retry, RouteConfig, Timeouts, UpstreamForm, changed_header};
use crate::config::values::boolean;
use crate::config::yaml::YamlValue;

/// Fields of a body that a route changes by another key, or not at all.
const FIELDS_OF_OTHER_KEYS: [(&str, &str); 2] =
    [("model", "is changed by to"), ("messages", "is the client's: body.roles changes the roles in it")];

/// The messages for fields that another key needs.
const NEEDED_BY_TOKEN_IDS: &str = "is asked for by token_ids";
const NEEDED_BY_CHAT: [&str; 2] =
    ["is the client's to say with responses: chat", "is the client's to say with messages: chat"];

/// Reads `routes`. A route's timeouts and retry begin with `base`.
pub(super) fn read(
    root: &mut ConfigSection<'_, '_>,
    base: (Timeouts, Retry),
    names: &mut UpstreamNames,
) -> Vec<RouteConfig> {
    let list = root.place_of("routes");
    let known = setting::known_keys::<RouteConfig>();
    let mut routes = Vec::new();
    let mut places = Vec::new();
    for (index, item) in root.items("routes").unwrap_or_default().iter().enumerate() {
        let place = list.item(index, item.line);
        let mut section = ConfigSection::open(item, place, &known, root.problems);
        let mut route = RouteConfig::new(base.0, base.1);
        setting::read(&mut section, &mut route, &[]);
        refer_to_upstreams(&mut section, names);
        aliases(&mut section, &mut route);
        always_on(&mut section);
        contradictions(&mut section, &route);
        places.push(section.place_of("to"));
        routes.push(route);
    }
    cycles(&routes, &places, root.problems);
    routes
}

/// Notes the names of upstreams for a later check.
fn refer_to_upstreams(section: &mut ConfigSection<'_, '_>, names: &mut UpstreamNames) {
    let list = section.place_of("upstreams");
    let Some(YamlValue::List(items)) = section.node("upstreams").map(|node| &node.value) else { return };
    for (index, item) in items.iter().enumerate() {
        if let YamlValue::Text(name) = &item.value {
            names.refer(list.item(index, item.line), name, false);
        }
    }
}

/// Applies the names that NeMo Gym's model servers have for keys, each where the key itself is absent.
fn aliases(section: &mut ConfigSection<'_, '_>, route: &mut RouteConfig) {
    let mut object = |key: &str| section.object(key).unwrap_or_default();
    let defaults = object("extra_body");
    let overrides = object("sampling_overrides");
    let kwargs = object("chat_template_kwargs");
    let developer = section.get("replace_developer_role_with_system", boolean) == Some(true);
    let mut headers = Vec::new();
    pairs("", changed_header).read("default_headers", section, &mut headers);
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
        body.defaults.insert("chat_template_kwargs".into(), Value::Object(kwargs));
    }
    if let Some(token_ids) = section.get("return_token_id_information", boolean) {
        route.token_ids = token_ids;
    }
    if let Some(think_tags) = section.get("uses_reasoning_parser", boolean) {
        route.think_tags = think_tags;
    }
    if let Some(native) = section.get("is_responses_native", boolean) {
        route.responses = if native { UpstreamForm::Native } else { UpstreamForm::Chat };
    }
    for (alias, clash) in taken.into_iter().chain([("chat_template_kwargs", kwargs_taken)]) {
        if clash && section.node(alias).is_some() {
            let pattern = section.place_of(alias).pattern();
            let key = keys::ALIASES.iter().find(|(name, _)| *name == pattern).map_or(alias, |(_, key)| *key);
            let text =
                format!("is another name for {}, which is given too", key.trim_start_matches("routes[]."));
            section.report(alias, text);
        }
    }
}

/// Rejects `false` for settings of NeMo Gym's model servers that a route always has.
fn always_on(section: &mut ConfigSection<'_, '_>) {
    for (pattern, why) in keys::ALWAYS_ON {
        let key = pattern.trim_start_matches("routes[].");
        if section.get(key, boolean) == Some(false) {
            section.report(key, *why);
        }
    }
}

/// Reports keys of a route that undo each other.
fn contradictions(section: &mut ConfigSection<'_, '_>, route: &RouteConfig) {
    let body = &route.body;
    let place = section.place_of("body");
    let written = [("defaults", &body.defaults), ("overrides", &body.overrides)];
    for (name, map) in written {
        for key in map.keys() {
            let place = place.key(name, place.line).key(key, place.line);
            if body.remove.contains(key) {
                section.problems.push(ConfigProblem::new(&place, "is in body.remove too"));
            }
            if let Some((_, own)) = FIELDS_OF_OTHER_KEYS.iter().find(|(field, _)| field == key) {
                section.problems.push(ConfigProblem::new(&place, *own));
            }
        }
    }
    let needed = needed(route);
    for (field, why) in FIELDS_OF_OTHER_KEYS
        .iter()
        .chain(&needed)
        .filter(|(field, _)| body.remove.iter().any(|key| key == field))
    {
        let text = format!("{} {why}", seen(field));
        section.problems.push(ConfigProblem::new(&place.key("remove", place.line), text));
    }
    for (field, why) in needed {
        // In completions the field is a number.
        let taken =
            |value: &Value| why != NEEDED_BY_TOKEN_IDS || value.is_null() || *value == Value::Bool(false);
        if body.overrides.get(field).is_some_and(taken) {
            let place = place.key("overrides", place.line).key(field, place.line);
            section.problems.push(ConfigProblem::new(&place, why));
        }
    }
    if route.api_key.is_some() && route.headers.set.iter().any(|(name, _)| name == "authorization") {
        section.report("api_key", "is sent as authorization, which headers.set has too");
    }
}

/// Fields that must reach the upstream as another key of the route or the client sets them.
fn needed(route: &RouteConfig) -> Vec<(&'static str, &'static str)> {
    let ids = [("logprobs", NEEDED_BY_TOKEN_IDS), ("return_token_ids", NEEDED_BY_TOKEN_IDS)];
    let asked = ids.into_iter().filter(|_| route.token_ids);
    // The fields that a translated stream adds are rejected in a chat that does not stream.
    let forms = [route.responses, route.messages];
    let translated = forms.into_iter().zip(NEEDED_BY_CHAT).find(|(form, _)| *form == UpstreamForm::Chat);
    let translated = translated.map(|(_, why)| ("stream", why));
    asked.chain(translated).collect()
}

/// Reports routes that lead to each other in a circle. A request follows one route only, since `to` is a
/// served name, so a circle is always a mistake.
fn cycles(routes: &[RouteConfig], places: &[ConfigPlace], problems: &mut Vec<ConfigProblem>) {
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
            problems.push(ConfigProblem::new(place, format!("leads in a circle: {}", way.join(" -> "))));
        }
    }
}
