//! The routes of a configuration over the fleet of this moment. `route::resolve` has the rules; this module
//! reads the snapshot for them, and writes the list of models.
//!
//! Never: an await, a rule of its own, a choice among upstreams.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use crate::aggregate::{self, ModelCard};
use crate::config::types::RouteConfig;
use crate::fleet::{Fleet, Snapshot, Upstream};
use crate::route::resolve::{self, Resolver, UpstreamView};
use crate::route::virtual_models::{RoutePlan, RouteTable, UnnamedModelRoute};

/// The routes, with the models that their upstreams serve at this moment.
pub(super) struct FleetRoutes {
    table: RouteTable,
    fleet: Arc<Fleet>,
}

/// The name of the source that discovered an upstream.
fn source(upstream: &Upstream) -> Option<&str> {
    upstream.config.discovered.as_ref().map(|discovered| discovered.source.as_str())
}

/// Whether a route may lead to this upstream.
pub(super) fn leads_to(route: &RouteConfig, upstream: &Upstream) -> bool {
    resolve::leads_to(route, upstream.name(), source(upstream))
}

// === impl FleetRoutes ===

impl FleetRoutes {
    pub(super) fn new(routes: &[RouteConfig], fleet: Arc<Fleet>) -> Self {
        FleetRoutes { table: RouteTable::new(routes), fleet }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The names of models that routes are for, without patterns.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.table.names()
    }

    /// Whether some routes are for certain models only.
    pub(super) fn depends_on_model(&self) -> bool {
        self.table.depends_on_model()
    }

    fn over<'a>(&'a self, snapshot: &'a Snapshot) -> Resolver<'a, Snapshot> {
        Resolver { table: &self.table, upstreams: snapshot }
    }

    /// The route of a request that names no model, and the model that it is for.
    pub(super) fn plan_unnamed(&self, path: &str, headers: &HeaderMap) -> UnnamedModelRoute {
        self.over(&self.fleet.snapshot()).plan_unnamed(path, headers)
    }

    /// The first route that matches, with the name by which its model is served now.
    pub(super) fn plan(
        &self,
        model: Option<&str>,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<Arc<RoutePlan>> {
        self.over(&self.fleet.snapshot()).plan(model, path, headers)
    }

    /// The names that a client may request now, for vLLM's "Valid aliases".
    pub(super) fn aliases(&self, snapshot: &Snapshot) -> Vec<String> {
        self.over(snapshot).aliases()
    }

    /// The body of `GET /v1/models`: the card of a name is from the upstreams that its requests go to.
    pub(super) fn models(&self, snapshot: &Snapshot) -> Vec<u8> {
        let mut cards: HashMap<&str, Vec<(usize, &ModelCard)>> = HashMap::new();
        for entry in snapshot.ready() {
            for card in entry.models.iter() {
                cards.entry(&card.id).or_default().push((entry.upstream.id, card));
            }
        }
        let of = |model: &str, among: Option<&[usize]>| {
            let may = |id: &usize| among.is_none_or(|among| among.binary_search(id).is_ok());
            let cards = cards.get(model)?.iter().filter(|(id, _)| may(id)).map(|(_, card)| *card);
            Some(cards.collect::<Vec<&ModelCard>>()).filter(|cards| !cards.is_empty())
        };
        aggregate::models_list(self.over(snapshot).listed(&of))
    }
}

// === impl Snapshot ===

impl UpstreamView for Snapshot {
    fn version(&self) -> u64 {
        Snapshot::version(self)
    }

    fn place_of(&self, id: usize) -> Option<usize> {
        Snapshot::place_of(self, id)
    }

    fn id_of(&self, name: &str) -> Option<usize> {
        self.by_name(name).map(|entry| entry.upstream.id)
    }

    fn ids_of_source(&self, name: &str) -> impl Iterator<Item = usize> {
        let found = self.entries.iter().filter(move |entry| source(&entry.upstream) == Some(name));
        found.map(|entry| entry.upstream.id)
    }

    fn reachable(&self) -> impl Iterator<Item = usize> {
        Snapshot::reachable(self).map(|entry| entry.upstream.id)
    }

    fn reports_models(&self, id: usize) -> bool {
        self.by_id(id).is_some_and(|entry| !entry.models.is_empty())
    }

    fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        Snapshot::serves(self, model, among)
    }

    fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        Snapshot::is_ready_with(self, model, among)
    }

    fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str> {
        Snapshot::base_of_ready(self, among)
    }

    fn only_base(&self, among: Option<&[usize]>) -> Option<&str> {
        Snapshot::only_base(self, among, Instant::now())
    }

    fn served_names(&self) -> impl Iterator<Item = &str> {
        Snapshot::aliases(self).iter().map(String::as_str)
    }
}
