//! The virtual models of a configuration: finds the route of a request.
//!
//! Everything that depends on the configuration alone is computed once, when the table is made. Most routes
//! are for one model and are indexed by its name: a lookup reads these and the routes with patterns.
//!
//! Never: read a body, choose an upstream, read what an upstream serves.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use http::HeaderMap;

use super::dialect::{ALL_DIALECTS, BodyDialect};
use super::rewrite::BodyRewrite;
use super::upstreams::{RouteNames, RouteUpstreams};
use crate::config::types::RouteConfig;

/// The routes in the order of the file.
#[derive(Debug, Default)]
pub struct RouteTable {
    plans: Vec<Arc<RoutePlan>>,
    /// By the name of a model, the indices of the routes for this model alone, in order.
    exact: HashMap<String, Vec<usize>>,
    /// The indices of the other routes, in order: each is for any model or has a pattern.
    unindexed: Vec<usize>,
}

/// One route and its edits, as prepared for requests.
#[derive(Debug)]
pub struct RoutePlan {
    /// Names the route in logs: its model, else its path, else its index.
    pub name: String,
    /// The configured route: upstreams, headers, key, timeouts, retry, overflow.
    pub route: RouteConfig,
    /// Whether `route.to` comes from the upstreams, not from the file, and may change with them.
    pub found_model: bool,
    /// The names of `route.upstreams`.
    pub names: Option<Arc<RouteNames>>,
    edits: [BodyRewrite; ALL_DIALECTS.len()],
    /// The upstreams that the route led to when a request last needed them, see `resolve::upstreams`.
    pub(super) upstreams: ArcSwapOption<RouteUpstreams>,
    /// The last result of `serving`.
    latest: ArcSwapOption<RoutePlan>,
}

/// The route and the model of a request that names no model.
#[derive(Clone, Debug, Default)]
pub struct UnnamedModelRoute {
    /// The model of the request, unless its route puts one into the body.
    pub model: Option<String>,
    pub plan: Option<Arc<RoutePlan>>,
}

// === impl RouteTable ===

impl RouteTable {
    pub fn new(routes: &[RouteConfig]) -> Self {
        let mut table = RouteTable::default();
        for (index, route) in routes.iter().enumerate() {
            match route.model.as_deref().filter(|model| !model.contains('*')) {
                Some(model) => table.exact.entry(model.to_string()).or_default().push(index),
                None => table.unindexed.push(index),
            }
            table.plans.push(Arc::new(RoutePlan::new(index, route.clone())));
        }
        table
    }

    /// The first route that matches; without one, a request goes on unchanged.
    pub fn plan(&self, model: Option<&str>, path: &str, headers: &HeaderMap) -> Option<Arc<RoutePlan>> {
        let plan = match model {
            Some(model) => self.plans_for(model).find(|plan| plan.matches(path, headers)),
            None => {
                let mut unindexed = self.unindexed.iter().map(|index| &self.plans[*index]);
                unindexed.find(|plan| plan.is_for_any() && plan.matches(path, headers))
            }
        };
        plan.cloned()
    }

    /// The routes for this model, in the order of the file; further conditions are not checked.
    fn plans_for(&self, model: &str) -> impl Iterator<Item = &Arc<RoutePlan>> {
        let exact = self.exact.get(model).map(Vec::as_slice).unwrap_or_default();
        let (mut exact, mut unindexed) = (exact.iter().peekable(), self.unindexed.iter().peekable());
        let indices = std::iter::from_fn(move || match (exact.peek(), unindexed.peek()) {
            (Some(one), Some(other)) if other < one => unindexed.next(),
            (Some(_), _) => exact.next(),
            (None, _) => unindexed.next(),
        });
        indices.map(|index| &self.plans[*index]).filter(move |plan| plan.matches_model(model))
    }

    /// The route of a request that names no model: the route of the model that its upstreams would use, so
    /// that a client cannot bypass a route by omitting the name. `base_of` returns the one base model of the
    /// upstreams of a route, or of all; `named` returns the route for a model.
    pub fn plan_unnamed(
        &self,
        path: &str,
        headers: &HeaderMap,
        base_of: impl Fn(Option<&RoutePlan>) -> Option<String>,
        named: impl Fn(&str) -> Option<Arc<RoutePlan>>,
    ) -> UnnamedModelRoute {
        if let Some(base) = base_of(None) {
            return UnnamedModelRoute { plan: named(&base), model: Some(base) };
        }
        let Some(first) = self.plan(None, path, headers) else { return UnnamedModelRoute::default() };
        let base = base_of(Some(&first)).and_then(|base| Some((named(&base)?, base)));
        match base {
            None => UnnamedModelRoute { model: None, plan: Some(first) },
            Some((plan, base)) if Arc::ptr_eq(&plan, &first) || plan.route.to.is_some() => {
                UnnamedModelRoute { model: Some(base), plan: Some(plan) }
            }
            // Its upstreams may differ from those of the first route: the body must name the model.
            Some((plan, base)) => UnnamedModelRoute { model: None, plan: Some(plan.serving(&base)) },
        }
    }

    pub fn is_empty(&self) -> bool {
        self.plans.is_empty()
    }

    /// Whether some routes are for certain models only.
    pub fn depends_on_model(&self) -> bool {
        self.plans.iter().any(|plan| !plan.is_for_any())
    }

    /// The names of models that routes are for, without patterns.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.plans.iter().filter_map(|plan| plan.route.model.as_deref());
        names.filter(|name| !name.contains('*'))
    }

    /// The routes that match requests for this model; some match by a path or headers, too.
    pub fn for_model(&self, model: &str) -> impl Iterator<Item = &RoutePlan> {
        self.plans_for(model).map(Arc::as_ref)
    }
}

// === impl RoutePlan ===

impl RoutePlan {
    fn new(index: usize, route: RouteConfig) -> Self {
        RoutePlan::named(route.name(index), route)
    }

    fn named(name: String, route: RouteConfig) -> Self {
        let edits = ALL_DIALECTS.map(|dialect| BodyRewrite::new(&route, dialect));
        let names = route.upstreams.as_deref().map(|names| Arc::new(RouteNames::new(names)));
        RoutePlan {
            name,
            route,
            found_model: false,
            names,
            edits,
            upstreams: ArcSwapOption::empty(),
            latest: ArcSwapOption::empty(),
        }
    }

    /// The same route with `to` set to this name. Computed again only when the name differs from the last
    /// one.
    pub fn serving(&self, to: &str) -> Arc<RoutePlan> {
        if let Some(latest) = self.latest.load_full().filter(|plan| plan.route.to.as_deref() == Some(to)) {
            return latest;
        }
        let route = RouteConfig { to: Some(to.to_string()), ..self.route.clone() };
        let plan = Arc::new(RoutePlan { found_model: true, ..RoutePlan::named(self.name.clone(), route) });
        self.latest.store(Some(plan.clone()));
        plan
    }

    /// Whether the route's model matches, other conditions aside.
    fn matches_model(&self, model: &str) -> bool {
        self.route.model.as_deref().is_none_or(|pattern| pattern_matches(pattern, model))
    }

    /// Whether the route is for this model only.
    pub fn is_for(&self, model: &str) -> bool {
        !model.contains('*') && self.route.model.as_deref() == Some(model)
    }

    /// Whether the route has conditions beside the model.
    pub fn has_conditions(&self) -> bool {
        self.route.path.is_some() || !self.route.header.is_empty()
    }

    /// Whether the route matches requests for any model and requests without a model.
    fn is_for_any(&self) -> bool {
        matches!(self.route.model.as_deref(), None | Some("*"))
    }

    /// Whether the path and the headers of a request match.
    fn matches(&self, path: &str, headers: &HeaderMap) -> bool {
        let route = &self.route;
        // A repeated header matches no value.
        let has = |(name, value): &(String, String)| {
            let mut all = headers.get_all(name.as_str()).iter();
            all.next().is_some_and(|first| first.as_bytes() == value.as_bytes()) && all.next().is_none()
        };
        route.path.as_deref().is_none_or(|wanted| wanted == path) && route.header.iter().all(has)
    }

    /// The edits of a body of this dialect.
    pub fn edits(&self, dialect: BodyDialect) -> &BodyRewrite {
        &self.edits[dialect.index()]
    }

    /// The name by which the upstreams serve the model.
    pub fn served<'a>(&'a self, model: Option<&'a str>) -> Option<&'a str> {
        self.route.to.as_deref().or(model)
    }
}

/// Whether a pattern, in which `*` matches any characters or none, matches a whole name.
fn pattern_matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    // The earliest match of each piece leaves the most text for later pieces.
    for piece in middle.split('*').filter(|piece| !piece.is_empty()) {
        let Some(at) = name.find(piece) else { return false };
        name = &name[at + piece.len()..];
    }
    name.ends_with(last)
}

#[cfg(test)]
mod tests;
