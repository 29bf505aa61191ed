//! Finds the route of a request and the model that it is forwarded for, by the models that upstreams serve
//! now.
//!
//! `table` decides by the configuration alone; the rules here add the reports of the upstreams, which they
//! read through `UpstreamView`:
//!
//! ```text
//! among         the upstreams that a route leads to: each of its names is an upstream's, else a source's
//! plan          the first route that matches; one without `to` keeps the client's name, and where none of
//!               its upstreams serves this name it is for the one base model that they have, if sources
//!               named all of them
//! plan_unnamed  as `plan`, of a request that names no model: for the one base model of the ready upstreams
//! listed        the names that clients may request now: each leads to a served model
//! ```
//!
//! The one base model counts for upstreams of sources only: a source names model servers, and the model of a
//! server is unknown until the server is back.
//!
//! Never: choose an upstream, read a body.

use std::collections::HashSet;
use std::sync::Arc;

use http::HeaderMap;

use super::upstreams::RouteUpstreams;
use super::virtual_models::{RoutePlan, RouteTable, UnnamedModelRoute};
use crate::config::types::RouteConfig;

/// The id that stands for an upstream or a source that is absent and may appear later.
const ABSENT_UPSTREAM: usize = usize::MAX;

/// The view of the upstreams for these rules. `among`: the ids of the upstreams that count, in ascending
/// order; `None`: all.
pub trait UpstreamView {
    /// Identifies the view: views of one version have the same upstreams. 0: the version is unknown.
    fn version(&self) -> u64 {
        0
    }

    /// The place of the upstream of this id in views of this version.
    fn place_of(&self, _id: usize) -> Option<usize> {
        None
    }

    /// The upstream of this name.
    fn id_of(&self, name: &str) -> Option<usize>;

    /// The upstreams that this source named.
    fn ids_of_source(&self, source: &str) -> impl Iterator<Item = usize>;

    /// The upstreams that still answer for stored responses: ready ones, and draining ones.
    fn reachable(&self) -> impl Iterator<Item = usize>;

    /// Whether it is known which models this upstream serves.
    fn reports_models(&self, id: usize) -> bool;

    /// Whether one of the upstreams serves the model, ready or not.
    fn serves(&self, model: &str, among: Option<&[usize]>) -> bool;

    /// Whether one of the upstreams serves the model and is ready.
    fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool;

    /// The base model of all ready upstreams, where it is known and the same.
    fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str>;

    /// The base model of all upstreams, where it is the same and sources named all of them.
    fn only_base(&self, among: Option<&[usize]>) -> Option<&str>;

    /// The names that ready upstreams serve.
    fn served_names(&self) -> impl Iterator<Item = &str>;
}

/// The routes of a configuration over the upstreams of one moment.
pub struct Resolver<'a, V> {
    pub table: &'a RouteTable,
    pub upstreams: &'a V,
}

/// The ids of the upstreams that a route leads to; `None`: all.
pub fn among(route: &RouteConfig, upstreams: &impl UpstreamView) -> Option<Vec<usize>> {
    let mut ids = Vec::new();
    for name in route.upstreams.as_ref()? {
        if let Some(id) = upstreams.id_of(name) {
            ids.push(id);
            continue;
        }
        let before = ids.len();
        ids.extend(upstreams.ids_of_source(name));
        if ids.len() == before {
            ids.push(ABSENT_UPSTREAM);
        }
    }
    Some(ids)
}

/// The upstreams that the route of this plan leads to; `None`: all. Found once for each version of the view,
/// and kept in the plan.
pub fn upstreams(plan: &RoutePlan, view: &impl UpstreamView) -> Option<Arc<RouteUpstreams>> {
    plan.route.upstreams.as_ref()?;
    let version = view.version();
    let latest = plan.upstreams.load();
    if let Some(latest) = latest.as_ref().filter(|latest| latest.places(version).is_some()) {
        return Some(latest.clone());
    }
    let ids = among(&plan.route, view)?;
    let found = Arc::new(RouteUpstreams::new(ids, version, |id| view.place_of(id)));
    plan.upstreams.store(Some(found.clone()));
    Some(found)
}

/// Whether a route may lead to the upstream of this name, which `source` named, if a source did.
pub fn leads_to(route: &RouteConfig, upstream: &str, source: Option<&str>) -> bool {
    let is_named = |name: &String| name == upstream || source.is_some_and(|source| source == name);
    route.upstreams.as_ref().is_none_or(|names| names.iter().any(is_named))
}

/// The ids of the upstreams of a route; `None`: all.
fn ids(upstreams: Option<&RouteUpstreams>) -> Option<&[usize]> {
    upstreams.map(RouteUpstreams::ids)
}

/// Whether the served models decide: the route matches exactly the client's name, and has no `to` of its own.
fn is_open(plan: &RoutePlan, model: &str) -> bool {
    plan.route.to.is_none() && plan.is_for(model)
}

// === impl Resolver ===

impl<'a, V: UpstreamView> Resolver<'a, V> {
    /// The first route that matches, with the name by which its model is served now.
    pub fn plan(&self, model: Option<&str>, path: &str, headers: &HeaderMap) -> Option<Arc<RoutePlan>> {
        let plan = self.table.plan(model, path, headers)?;
        // Skip the look-up if the configuration alone decides.
        let Some(model) = model.filter(|model| is_open(&plan, model)) else { return Some(plan) };
        let among = upstreams(&plan, self.upstreams);
        let only = self.only_model(&plan, model, ids(among.as_deref()));
        Some(only.map_or_else(|| plan.clone(), |only| plan.serving(only)))
    }

    /// The route of a request that names no model, and the model that it is for.
    pub fn plan_unnamed(&self, path: &str, headers: &HeaderMap) -> UnnamedModelRoute {
        let base_of = |plan: Option<&RoutePlan>| {
            let among = plan.and_then(|plan| upstreams(plan, self.upstreams));
            self.upstreams.base_of_ready(ids(among.as_deref())).map(str::to_string)
        };
        self.table.plan_unnamed(path, headers, base_of, |model| self.plan(Some(model), path, headers))
    }

    /// The names that a client may request now, for vLLM's "Valid aliases".
    pub fn aliases(&self) -> Vec<String> {
        let is_served =
            |model: &str, among: Option<&[usize]>| self.upstreams.is_ready_with(model, among).then_some(());
        self.listed(&is_served).into_iter().map(|(name, ())| name.to_string()).collect()
    }

    /// The names that a client may request now, each with what `find` finds for the model and the upstreams
    /// that its requests go to: first the names that only routes give, in the order of the file, then the
    /// served ones.
    pub fn listed<T>(&self, find: &impl Fn(&str, Option<&[usize]>) -> Option<T>) -> Vec<(&'a str, T)> {
        let (mut listed, mut tried, mut shown) = (Vec::new(), HashSet::new(), HashSet::new());
        for name in self.table.names().filter(|name| tried.insert(*name)) {
            match self.reach(name, find) {
                Some((served, found)) if served != name => {
                    shown.insert(name);
                    listed.push((name, found));
                }
                _ => {}
            }
        }
        for name in self.upstreams.served_names().filter(|name| !shown.contains(name)) {
            listed.extend(self.reach(name, find).map(|(_, found)| (name, found)));
        }
        listed
    }

    /// The model that a request for this name is forwarded for, and the result of `find` for it among its
    /// upstreams; `None`: they do not serve it. A route with conditions counts if other requests for the name
    /// have no route.
    fn reach<T>(
        &self,
        model: &'a str,
        find: &impl Fn(&str, Option<&[usize]>) -> Option<T>,
    ) -> Option<(&'a str, T)> {
        let by_route = |plan: &'a RoutePlan| {
            let among = upstreams(plan, self.upstreams);
            let among = ids(among.as_deref());
            let only = self.only_model(plan, model, among);
            let served = only.or(plan.served(Some(model)))?;
            Some((served, find(served, among)?))
        };
        let general = match self.table.for_model(model).find(|plan| !plan.has_conditions()) {
            Some(plan) => by_route(plan),
            None => find(model, None).map(|found| (model, found)),
        };
        let mut bound =
            self.table.for_model(model).filter(|plan| plan.has_conditions() && plan.is_for(model));
        general.or_else(|| bound.find_map(by_route))
    }

    /// The one model of the route's upstreams, if neither the route nor the client names one that they serve.
    fn only_model(&self, plan: &RoutePlan, model: &str, among: Option<&[usize]>) -> Option<&'a str> {
        let is_unknown = is_open(plan, model) && !self.upstreams.serves(model, among);
        if is_unknown { self.upstreams.only_base(among) } else { None }
    }
}

#[cfg(test)]
pub(crate) mod tests;
