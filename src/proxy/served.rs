//! The routes of a configuration over the fleet of this moment: what their names stand for now, and which
//! names a client may ask for.
//!
//! A route that says no served name keeps the client's. Where nobody among its upstreams serves that, and all
//! of them are model servers' that have one base model, it is that model: what a model server comes back with
//! is not known before.
//!
//! Never: an await, a choice among upstreams.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use crate::aggregate::{self, ModelCard};
use crate::config::types::RouteConfig;
use crate::fleet::{Fleet, Snapshot, Upstream};
use crate::route::table::{Plan, Table, Unnamed};

/// The id of an upstream that is not there.
const NOBODY: usize = usize::MAX;

pub struct Routes {
    table: Table,
    fleet: Arc<Fleet>,
}

/// Whether this is the name of the source that the upstream was discovered by.
fn is_source_of(name: &str, upstream: &Upstream) -> bool {
    upstream.config.discovered.as_ref().is_some_and(|discovered| discovered.source == name)
}

/// The ids of the upstreams that a route leads to; `None`: all.
pub fn among(route: &RouteConfig, snapshot: &Snapshot) -> Option<Vec<usize>> {
    let mut ids = Vec::new();
    for name in route.upstreams.as_ref()? {
        if let Some(entry) = snapshot.by_name(name) {
            ids.push(entry.upstream.id);
            continue;
        }
        let before = ids.len();
        let found = snapshot.entries.iter().filter(|entry| is_source_of(name, &entry.upstream));
        ids.extend(found.map(|entry| entry.upstream.id));
        if ids.len() == before {
            ids.push(NOBODY);
        }
    }
    Some(ids)
}

/// Whether a route may lead to this upstream.
pub fn leads_to(route: &RouteConfig, upstream: &Upstream) -> bool {
    let is_named = |name: &String| name == upstream.name() || is_source_of(name, upstream);
    route.upstreams.as_ref().is_none_or(|names| names.iter().any(is_named))
}

/// The one model that its upstreams have, where neither the route nor the client names one that they serve.
fn only<'s>(plan: &Plan, model: &str, among: Option<&[usize]>, snapshot: &'s Snapshot) -> Option<&'s str> {
    let is_open = plan.route.to.is_none() && plan.is_for(model) && !snapshot.serves(model, among);
    if is_open { snapshot.only_base(among, Instant::now()) } else { None }
}

impl Routes {
    pub fn new(routes: &[RouteConfig], fleet: Arc<Fleet>) -> Self {
        Routes { table: Table::new(routes), fleet }
    }

    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The names of models that routes are for, as far as they are said in full.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.table.names()
    }

    /// Whether some routes are for certain models only.
    pub fn goes_by_model(&self) -> bool {
        self.table.goes_by_model()
    }

    /// The route of a request that names no model, and the model that it is for.
    pub fn plan_unnamed(&self, path: &str, headers: &HeaderMap) -> Unnamed {
        let snapshot = self.fleet.snapshot_owned();
        let base_of = |route: Option<&RouteConfig>| {
            let among = route.and_then(|route| among(route, &snapshot));
            snapshot.base_of_ready(among.as_deref()).map(str::to_string)
        };
        self.table.plan_unnamed(path, headers, base_of, |model| self.plan(Some(model), path, headers))
    }

    /// The first route that matches, with the name by which its model is served now.
    pub fn plan(&self, model: Option<&str>, path: &str, headers: &HeaderMap) -> Option<Arc<Plan>> {
        let plan = self.table.plan(model, path, headers)?;
        // What the file alone decides is not looked up.
        let Some(model) = model.filter(|model| plan.route.to.is_none() && plan.is_for(model)) else {
            return Some(plan);
        };
        let snapshot = self.fleet.snapshot();
        let among = among(&plan.route, &snapshot);
        let only = only(&plan, model, among.as_deref(), &snapshot);
        Some(only.map_or_else(|| plan.clone(), |only| plan.serving(only)))
    }

    /// For vLLM's "Valid aliases".
    pub fn aliases(&self, snapshot: &Snapshot) -> Vec<String> {
        let is_served =
            |model: &str, among: Option<&[usize]>| snapshot.is_ready_with(model, among).then_some(());
        self.listed(snapshot, &is_served).into_iter().map(|(name, ())| name.to_string()).collect()
    }

    /// The body of `GET /v1/models`: a name's card is that of who would have its requests.
    pub fn models(&self, snapshot: &Snapshot) -> Vec<u8> {
        let mut cards: HashMap<&str, Vec<(usize, &ModelCard)>> = HashMap::new();
        for entry in snapshot.ready() {
            for card in entry.models.iter() {
                cards.entry(&card.id).or_default().push((entry.upstream.id, card));
            }
        }
        let of = |model: &str, among: Option<&[usize]>| {
            let may = |id: &usize| among.is_none_or(|among| among.contains(id));
            let cards = cards.get(model)?.iter().filter(|(id, _)| may(id)).map(|(_, card)| *card);
            Some(cards.collect::<Vec<&ModelCard>>()).filter(|cards| !cards.is_empty())
        };
        aggregate::models_list(self.listed(snapshot, &of))
    }

    /// The names that a client may ask for now, each with what `find` finds: those that only routes give, in
    /// the order of the file, and the served ones.
    fn listed<'a, T>(
        &'a self,
        snapshot: &'a Snapshot,
        find: &impl Fn(&str, Option<&[usize]>) -> Option<T>,
    ) -> Vec<(&'a str, T)> {
        let (mut listed, mut tried, mut shown) = (Vec::new(), HashSet::new(), HashSet::new());
        for name in self.names().filter(|name| tried.insert(*name)) {
            match self.reach(snapshot, name, find) {
                Some((served, found)) if served != name => {
                    shown.insert(name);
                    listed.push((name, found));
                }
                _ => {}
            }
        }
        for name in snapshot.aliases().iter().map(String::as_str).filter(|name| !shown.contains(name)) {
            listed.extend(self.reach(snapshot, name, find).map(|(_, found)| (name, found)));
        }
        listed
    }

    /// What a request for this model is made one for, and what `find` finds of that among the upstreams that
    /// it may go to; `None`: they do not have it. A route for some requests counts where others go nowhere.
    fn reach<'a, T>(
        &'a self,
        snapshot: &'a Snapshot,
        model: &'a str,
        find: &impl Fn(&str, Option<&[usize]>) -> Option<T>,
    ) -> Option<(&'a str, T)> {
        let by_route = |plan: &'a Plan| {
            let among = among(&plan.route, snapshot);
            let only = only(plan, model, among.as_deref(), snapshot);
            let served = only.or(plan.served(Some(model)))?;
            Some((served, find(served, among.as_deref())?))
        };
        let general = match self.table.for_model(model).find(|plan| !plan.is_bound()) {
            Some(plan) => by_route(plan),
            None => find(model, None).map(|found| (model, found)),
        };
        let mut bound = self.table.for_model(model).filter(|plan| plan.is_bound() && plan.is_for(model));
        general.or_else(|| bound.find_map(by_route))
    }
}
