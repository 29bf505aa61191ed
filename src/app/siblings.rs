//! Connects the exchange with siblings to the rooms that do not depend on each other: the fleet has the
//! requests in flight, the state has the memory, Redis has the siblings' messages.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::follow;
use super::members::{MemberFollower, MemberTexts};
use super::sibling_loads::SiblingLoads;
use crate::config::types::Config;
use crate::fleet::Fleet;
use crate::fleet::upstream::UpstreamLoad;
use crate::observe::Observer;
use crate::prompt::canon;
use crate::state::State;
use crate::state::exchange::{
    self, BindingUpdate, ChainUpdate, ExchangeMemory, Outbox, SiblingLoad, TakeBack, UpstreamReport,
};
use crate::state::redis::{ExchangeSettings, SiblingExchange};

/// The longest time that a start waits for the tail of the siblings' stream.
const MAX_START_WAIT: Duration = Duration::from_secs(1);

/// The additional parts of a balancer with a Redis.
pub(super) struct SiblingSetup {
    settings: ExchangeSettings,
    pub outbox: Arc<Outbox>,
    observer: Observer,
}

/// The parts that the exchange uses.
struct BalancerParts {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    loads: Mutex<SiblingLoads>,
    members: watch::Sender<MemberTexts>,
    /// The host name of this machine.
    host: String,
}

// === impl SiblingSetup ===

impl SiblingSetup {
    /// Builds the setup; `None` without a Redis.
    pub(super) fn new(config: &Config, observer: Observer) -> Option<Self> {
        let url = config.redis.clone()?;
        let name = host();
        let addresses: Vec<String> = config.listen.iter().map(|listen| listen.address.to_string()).collect();
        let settings = ExchangeSettings {
            url,
            options: config.redis_options.clone(),
            bindings: config.sessions.ttl,
            identity: identity(&name, &addresses),
            name,
            address: addresses.join(","),
            fingerprint: fingerprint(config),
        };
        Some(SiblingSetup { settings, outbox: Arc::default(), observer })
    }

    /// Builds the exchange, which starts with `begin`.
    pub(super) fn meet(
        self,
        fleet: Arc<Fleet>,
        state: Arc<State>,
        stop: &watch::Receiver<bool>,
    ) -> PendingExchange {
        let (members, changed) = watch::channel(HashMap::new());
        let parts = Arc::new(BalancerParts {
            fleet: fleet.clone(),
            state: state.clone(),
            loads: Mutex::default(),
            members,
            host: host(),
        });
        let exchange = SiblingExchange::new(self.settings, parts, self.outbox, self.observer);
        PendingExchange { exchange, fleet, state, changed, stop: stop.clone() }
    }
}

/// An exchange before its start.
pub(super) struct PendingExchange {
    pub exchange: Arc<SiblingExchange>,
    fleet: Arc<Fleet>,
    state: Arc<State>,
    changed: watch::Receiver<MemberTexts>,
    stop: watch::Receiver<bool>,
}

impl PendingExchange {
    /// Starts the exchange and waits at most `MAX_START_WAIT` for the tail of the stream. Requires a
    /// running keeper.
    pub(super) async fn begin(self, mut follower: MemberFollower, tasks: &mut JoinSet<()>) {
        let PendingExchange { exchange, fleet, state, mut changed, stop } = self;
        // Messages about upstreams apply only when the state has the upstreams' names.
        follow::publish(&fleet.snapshot(), &state);
        tasks.spawn(exchange.clone().run(stop.clone()));
        exchange.wait_caught_up(MAX_START_WAIT).await;
        let first = changed.borrow_and_update().clone();
        follower.take_over(first).await;
        tasks.spawn(follower.follow(Some(changed), stop));
    }
}

/// Returns how this process makes chains: see `exchange::fingerprint`.
pub(super) fn fingerprint(config: &Config) -> u64 {
    exchange::fingerprint(canon::FORM_VERSION, config.index.block_bytes)
}

/// Returns the name by which a restarted process finds what this one stored: by its host and its listeners;
/// `None` where the system chooses a port.
fn identity(host: &str, addresses: &[String]) -> Option<String> {
    let is_chosen = |address: &String| address.ends_with(":0");
    (!addresses.iter().any(is_chosen)).then(|| balancer_name(host, addresses))
}

/// Returns what a balancer is called: the host, and the addresses of the listeners for clients.
pub(super) fn balancer_name(host: &str, addresses: &[String]) -> String {
    format!("{host}@{}", addresses.join(","))
}

/// Returns the host name of this machine.
pub(super) fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

// === impl ExchangeMemory for BalancerParts ===

impl ExchangeMemory for BalancerParts {
    fn gauges(&self, tell: &mut dyn FnMut(&str, SiblingLoad)) {
        for entry in &self.fleet.snapshot().entries {
            let UpstreamLoad { active, backlog, context } = entry.upstream.load();
            tell(entry.upstream.name(), SiblingLoad { active, backlog, context });
        }
    }

    fn siblings(&self, changed: &[(Arc<str>, SiblingLoad)], age: f64) {
        let mut loads = self.loads.lock().unwrap_or_else(PoisonError::into_inner);
        loads.apply(changed, &self.fleet.snapshot());
        self.state.set_siblings_age(age);
    }

    fn learn(&self, chain: &ChainUpdate<'_>) -> bool {
        self.state.apply_chain(chain)
    }

    fn take_back(&self, chain: &TakeBack<'_>) {
        self.state.apply_take_back(chain);
    }

    fn chain_to(&self, upstream: &str, hash: u64) -> Option<Vec<u64>> {
        self.state.chain_to(upstream, hash)
    }

    fn bound(&self, bound: &BindingUpdate<'_>) {
        self.state.apply_binding(bound, Instant::now());
    }

    fn balancers(&self, own: u64, siblings: &[u64]) {
        self.fleet.set_balancers(own, siblings, &self.host);
    }

    fn take_reports(&self, max_bytes: usize) -> Vec<UpstreamReport> {
        self.fleet.take_reports(max_bytes)
    }

    fn apply_reports(&self, from: u64, reports: &[UpstreamReport], age: Duration) {
        self.fleet.apply_reports(from, reports, age);
    }

    fn members(&self, all: &HashMap<String, String>) {
        self.members.send_replace(all.clone());
    }
}
