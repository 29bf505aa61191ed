//! Upstreams in a short notation, for the tests of route resolution.

use super::*;

/// An upstream in the notation `name models…`: `of:gym` is the source that named the upstream, `down` means
/// not ready, `drains` draining, and `+adapter` is a model other than a base model.
#[derive(Clone, Debug, Default)]
pub(crate) struct StandIn {
    pub(super) name: &'static str,
    pub(super) source: Option<String>,
    down: bool,
    drains: bool,
    models: Vec<&'static str>,
}

/// Upstreams whose ids are 10, 11, ….
pub(crate) struct StandIns(pub Vec<StandIn>);

/// The name of the source at this host.
fn source_name(host: &str) -> String {
    format!("gym http://{host}:80")
}

impl StandIns {
    pub(crate) fn new(upstreams: &[&'static str]) -> Self {
        let read = |text: &&'static str| {
            let mut words = text.split(' ');
            let mut upstream = StandIn { name: words.next().unwrap(), ..StandIn::default() };
            for word in words {
                match (word, word.strip_prefix("of:")) {
                    (_, Some(source)) => upstream.source = Some(source_name(source)),
                    ("down", _) => upstream.down = true,
                    ("drains", _) => upstream.drains = true,
                    (model, _) => upstream.models.push(model),
                }
            }
            upstream
        };
        StandIns(upstreams.iter().map(read).collect())
    }

    fn all(&self) -> impl Iterator<Item = (usize, &StandIn)> {
        self.0.iter().enumerate().map(|(index, upstream)| (10 + index, upstream))
    }

    fn these(&self, among: Option<&[usize]>) -> impl Iterator<Item = &StandIn> {
        let is_among = move |id: usize| among.is_none_or(|among| among.contains(&id));
        self.all().filter(move |(id, _)| is_among(*id)).map(|(_, upstream)| upstream)
    }
}

impl StandIn {
    fn is_ready(&self) -> bool {
        !self.down && !self.drains
    }

    fn has(&self, model: &str) -> bool {
        self.models.iter().any(|served| served.trim_start_matches('+') == model)
    }

    fn base(&self) -> Option<&'static str> {
        self.models.iter().find(|model| !model.starts_with('+')).copied()
    }
}

/// The one value of all, if there is one.
fn one<'v>(mut all: impl Iterator<Item = Option<&'v str>>) -> Option<&'v str> {
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

impl UpstreamView for StandIns {
    fn id_of(&self, name: &str) -> Option<usize> {
        self.all().find(|(_, upstream)| upstream.name == name).map(|(id, _)| id)
    }

    fn ids_of_source(&self, source: &str) -> impl Iterator<Item = usize> {
        self.all().filter(move |(_, upstream)| upstream.source.as_deref() == Some(source)).map(|(id, _)| id)
    }

    fn reachable(&self) -> impl Iterator<Item = usize> {
        self.all().filter(|(_, upstream)| !upstream.down).map(|(id, _)| id)
    }

    fn reports_models(&self, id: usize) -> bool {
        self.these(Some(&[id])).any(|upstream| !upstream.models.is_empty())
    }

    fn serves(&self, model: &str, among: Option<&[usize]>) -> bool {
        self.these(among).any(|upstream| upstream.has(model))
    }

    fn is_ready_with(&self, model: &str, among: Option<&[usize]>) -> bool {
        self.these(among).any(|upstream| upstream.is_ready() && upstream.has(model))
    }

    fn base_of_ready(&self, among: Option<&[usize]>) -> Option<&str> {
        one(self.these(among).filter(|upstream| upstream.is_ready()).map(StandIn::base))
    }

    fn only_base(&self, among: Option<&[usize]>) -> Option<&str> {
        let all_of_sources = self.these(among).all(|upstream| upstream.source.is_some());
        one(self.these(among).map(StandIn::base)).filter(|_| all_of_sources)
    }

    fn served_names(&self) -> impl Iterator<Item = &str> {
        let ready = self.these(None).filter(|upstream| upstream.is_ready());
        let mut names = HashSet::new();
        let models = ready.flat_map(|upstream| upstream.models.iter());
        models.map(|model| model.trim_start_matches('+')).filter(move |name| names.insert(*name))
    }
}
