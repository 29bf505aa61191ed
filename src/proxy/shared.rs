//! The state that all listeners share.

use std::sync::Arc;

use arc_swap::ArcSwap;
use http::HeaderValue;

use super::attempt::pool::ConnectionPool;
use super::budget::RetryBudget;
use super::cached_pages::CachedPages;
use super::memory::PeekMemory;
use super::random::RandomSource;
use super::server::shutdown::Shutdown;
use super::settings::ProxySettings;
use super::stored_search::ResponseSearches;
use crate::config::types::Config;
use crate::fleet::Fleet;
use crate::observe::Observer;
use crate::otlp::SpanExporter;
use crate::state::State;
use crate::state::redis::SiblingExchange;
use crate::traces::Traces;

/// The state that all listeners share.
pub(crate) struct ProxyShared {
    pub(super) fleet: Arc<Fleet>,
    pub(super) state: Arc<State>,
    /// Looks up what siblings have published; `None` without Redis.
    pub(super) exchange: Option<Arc<SiblingExchange>>,
    pub(super) traces: Arc<Traces>,
    pub(super) spans: Arc<SpanExporter>,
    pub(super) settings: ArcSwap<ProxySettings>,
    pub(super) memory: Arc<PeekMemory>,
    pub(super) pool: ConnectionPool,
    pub(super) searches: ResponseSearches,
    pub(super) pages: CachedPages,
    pub(super) random: RandomSource,
    /// This balancer's entry in `via`, by which it detects a request that loops back.
    pub(super) mark: HeaderValue,
    /// This balancer's name for clients, with `expose`.
    pub(super) name: HeaderValue,
    pub(super) budget: RetryBudget,
    pub(super) shutdown: Arc<Shutdown>,
    pub(super) observer: Observer,
}

impl ProxyShared {
    /// `name`: what answers call this balancer, with `expose`.
    pub(crate) fn new(
        config: &Config,
        fleet: Arc<Fleet>,
        state: Arc<State>,
        exchange: Option<Arc<SiblingExchange>>,
        traces: Arc<Traces>,
        observer: Observer,
        name: &str,
    ) -> Arc<Self> {
        let memory = PeekMemory::new(config.peek.memory, observer.clone());
        let random = RandomSource::new();
        Arc::new(ProxyShared {
            settings: ArcSwap::new(ProxySettings::new(config, fleet.clone(), memory.clone(), state.blocks())),
            fleet,
            state,
            exchange,
            traces,
            spans: SpanExporter::start(&config.otlp, observer.clone()),
            memory,
            pool: ConnectionPool::default(),
            searches: ResponseSearches::default(),
            pages: CachedPages::default(),
            mark: random.mark(),
            name: shown_name(name),
            random,
            budget: RetryBudget::new(),
            shutdown: Arc::default(),
            observer,
        })
    }

    /// The progress of the shutdown, which the assembly advances.
    pub(crate) fn shutdown(&self) -> &Arc<Shutdown> {
        &self.shutdown
    }

    /// The export of spans, which the assembly stops.
    pub(crate) fn spans(&self) -> &Arc<SpanExporter> {
        &self.spans
    }

    pub(crate) fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Applies `config` to requests that begin from now on.
    pub(crate) fn reload(&self, config: &Config) {
        self.memory.set_limit(config.peek.memory);
        self.state.set_ttl(config.sessions.ttl);
        self.traces.reload(&config.traces);
        self.spans.reload(&config.otlp);
        let (fleet, memory) = (self.fleet.clone(), self.memory.clone());
        self.settings.store(ProxySettings::new(config, fleet, memory, self.state.blocks()));
    }
}

/// A name as the value of a field, without the characters that no field can have.
fn shown_name(name: &str) -> HeaderValue {
    let name: String = name.chars().filter(|character| !character.is_control()).collect();
    HeaderValue::try_from(name).expect("a text without control characters is a field's value")
}

#[cfg(test)]
mod tests {
    use super::shown_name;

    #[test]
    fn a_name_is_a_field_whatever_the_host_is_called() {
        for (name, wanted) in [
            ("lb-0@0.0.0.0:8000,unix:/run/a b.sock", "lb-0@0.0.0.0:8000,unix:/run/a b.sock"),
            ("l\r\nb\u{0}\u{7f}\t@[::]:8000", "lb@[::]:8000"),
            ("é@a:1", "é@a:1"),
            ("", ""),
        ] {
            assert_eq!(shown_name(name).as_bytes(), wanted.as_bytes(), "{name:?}");
        }
    }
}
