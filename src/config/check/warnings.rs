//! Warnings: what is valid and most likely a mistake.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;

use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::types::{Config, ListenAddress, PassthroughTarget, RouteConfig, UpstreamUrl};

/// The port of collectors for gRPC, which is not spoken.
const OTLP_GRPC_PORT: u16 = 4317;

/// Reports what is valid, since upstreams may be added later, and most likely a mistake.
pub fn warnings(config: &Config) -> Vec<ConfigProblem> {
    let mut found = names_to_come(config);
    if config.otlp.endpoint.as_ref().is_some_and(|url| url.port == OTLP_GRPC_PORT) {
        let text = "4317 is the port of OTLP over gRPC: OTLP over HTTP usually has 4318";
        found.push(ConfigProblem::new(&ConfigPlace::named("otlp.endpoint"), text));
    }
    found.extend(open_admin(config));
    found.extend(own_listeners(config));
    found.extend(doubles(config));
    for (index, route) in config.routes.iter().enumerate() {
        let place = ConfigPlace::named(&format!("routes[{index}]"));
        if let Some(to) = route.to.as_ref().filter(|to| !may_be_served(config, route, to)) {
            let text = format!("no upstream serves {}", seen(to));
            found.push(ConfigProblem::new(&place.key("to", None), text));
        }
        if let Some(first) = config.routes[..index].iter().position(|earlier| covers(earlier, route)) {
            found.push(ConfigProblem::new(
                &place,
                format!("is never reached: routes[{first}] matches all that it does"),
            ));
        }
    }
    found
}

/// Reports an admin listener that other machines reach and that has no token.
fn open_admin(config: &Config) -> Option<ConfigProblem> {
    let ListenAddress::Tcp(address) = &config.admin.address else { return None };
    if config.admin.token.is_some() || is_loopback(host_of(address)) {
        return None;
    }
    let text = format!(
        "every machine that reaches {address} may change and stop upstreams: set admin.token or \
         VLLM_LB_ADMIN_TOKEN"
    );
    Some(ConfigProblem::new(&ConfigPlace::named("admin.address"), text))
}

/// Reports upstreams that are a listener of this balancer: each request to one would end in a loop.
fn own_listeners(config: &Config) -> Vec<ConfigProblem> {
    let listeners = config.listen.iter().map(|listen| &listen.address).chain([&config.admin.address]);
    let own: Vec<&String> = listeners
        .filter_map(|address| match address {
            ListenAddress::Tcp(address) => Some(address),
            ListenAddress::Unix(_) => None,
        })
        .collect();
    let is_own = |url: &UpstreamUrl| {
        let port = format!(":{}", url.port);
        let local = url.unix.is_none() && is_loopback(&url.host);
        local && own.iter().any(|address| address.ends_with(&port) && serves_loopback(host_of(address)))
    };
    let mut found = Vec::new();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        if is_own(&upstream.url) {
            let place = ConfigPlace::named(&format!("upstreams[{index}]")).key("url", None);
            let text = format!("{} is a listener of this balancer, and no vLLM", upstream.url.display());
            found.push(ConfigProblem::new(&place, text));
        }
    }
    found
}

/// Reports a server that several upstreams name: each believes in a cache and a backlog of its own.
fn doubles(config: &Config) -> Vec<ConfigProblem> {
    let mut first_by_url = HashMap::new();
    let mut found = Vec::new();
    for (index, upstream) in config.upstreams.iter().enumerate() {
        let url = upstream.url.display();
        match first_by_url.entry(url) {
            Entry::Vacant(vacant) => {
                vacant.insert(index);
            }
            Entry::Occupied(first) => {
                let place = ConfigPlace::named(&format!("upstreams[{index}]")).key("url", None);
                let text = format!(
                    "{} is that of upstreams[{}] too: one server counts twice",
                    first.key(),
                    first.get()
                );
                found.push(ConfigProblem::new(&place, text));
            }
        }
    }
    found
}

/// The host of `host:port`.
fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// Whether only this machine reaches the host.
fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a listener on the host is reached over loopback.
fn serves_loopback(host: &str) -> bool {
    is_loopback(host) || matches!(host, "0.0.0.0" | "[::]")
}

/// Whether an upstream may serve the model: one without a list of models may, and one to be discovered.
fn may_be_served(config: &Config, route: &RouteConfig, model: &String) -> bool {
    let chosen = |name: &String| route.upstreams.as_ref().is_none_or(|names| names.contains(name));
    let mut upstreams = config.upstreams.iter().filter(|upstream| chosen(&upstream.name)).peekable();
    upstreams.peek().is_none()
        || (route.upstreams.is_none() && !config.sources.is_empty())
        || upstreams.any(|upstream| upstream.models.as_ref().is_none_or(|models| models.contains(model)))
}

/// Whether every request that `later` matches is matched by `earlier`, as far as patterns are not compared.
fn covers(earlier: &RouteConfig, later: &RouteConfig) -> bool {
    let any = |model: &Option<String>| model.as_ref().is_none_or(|model| model == "*");
    let model = any(&earlier.model) || earlier.model == later.model;
    let path = earlier.path.is_none() || earlier.path == later.path;
    model && path && earlier.header.iter().all(|pair| later.header.contains(pair))
}

/// Reports names that no upstream of the file has, where sources may still discover one.
fn names_to_come(config: &Config) -> Vec<ConfigProblem> {
    if config.sources.is_empty() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut look = |name: &String, place: ConfigPlace| {
        let is_source = config.sources.iter().any(|source| source.ask.label() == *name);
        if !is_source && !config.upstreams.iter().any(|upstream| upstream.name == *name) {
            let text = format!("no upstream is named {} unless one is discovered", seen(name));
            found.push(ConfigProblem::new(&place, text));
        }
    };
    for (index, route) in config.routes.iter().enumerate() {
        for (item, name) in route.upstreams.iter().flatten().enumerate() {
            look(name, ConfigPlace::named(&format!("routes[{index}].upstreams[{item}]")));
        }
    }
    for (index, passthrough) in config.passthrough.iter().enumerate() {
        if let PassthroughTarget::Upstream(name) = &passthrough.to {
            look(name, ConfigPlace::named(&format!("passthrough[{index}].to")));
        }
    }
    found
}
