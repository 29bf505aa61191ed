//! Connects the exchange with siblings to the rooms that do not depend on each other: the fleet has the
//! requests in flight, the state has the memory, Redis has the siblings' messages.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::follow;
use super::sibling_loads::SiblingLoads;
use crate::config::member::MemberRecord;
use crate::config::types::Config;
use crate::fleet::upstream::UpstreamLoad;
use crate::fleet::{Fleet, FleetChange, FleetChangeError};
use crate::observe::Observer;
use crate::prompt::canon;
use crate::state::State;
use crate::state::exchange::{
    self, BindingUpdate, ChainUpdate, ExchangeMemory, Outbox, SiblingLoad, TakeBack,
};
use crate::state::redis::{ExchangeSettings, SiblingExchange};

/// The longest time that a start waits for the tail of the siblings' stream.
const MAX_START_WAIT: Duration = Duration::from_secs(1);

/// The additional parts of a balancer with a Redis.
pub struct SiblingSetup {
    settings: ExchangeSettings,
    pub outbox: Arc<Outbox>,
    observer: Observer,
}

/// The parts that the exchange uses.
struct BalancerParts {
    fleet: Arc<Fleet>,
    state: Arc<State>,
    loads: Mutex<SiblingLoads>,
    members: watch::Sender<HashMap<String, String>>,
}

// === impl SiblingSetup ===

impl SiblingSetup {
    /// Builds the setup; `None` without a Redis.
    pub fn new(config: &Config, observer: Observer) -> Option<Self> {
        let url = config.redis.clone()?;
        let addresses: Vec<String> = config.listen.iter().map(|listen| listen.address.to_string()).collect();
        let settings = ExchangeSettings {
            url,
            options: config.redis_options.clone(),
            bindings: config.sessions.ttl,
            name: host(),
            address: addresses.join(","),
            fingerprint: exchange::fingerprint(canon::FORM_VERSION, config.index.block_bytes),
        };
        Some(SiblingSetup { settings, outbox: Arc::default(), observer })
    }

    /// Builds the exchange, which starts with `begin`.
    pub fn meet(self, fleet: Arc<Fleet>, state: Arc<State>, stop: &watch::Receiver<bool>) -> PendingExchange {
        let (members, changed) = watch::channel(HashMap::new());
        let parts = Arc::new(BalancerParts {
            fleet: fleet.clone(),
            state: state.clone(),
            loads: Mutex::default(),
            members,
        });
        let exchange = SiblingExchange::new(self.settings, parts, self.outbox, self.observer.clone());
        PendingExchange { exchange, fleet, state, changed, stop: stop.clone(), observer: self.observer }
    }
}

/// An exchange before its start.
pub struct PendingExchange {
    pub exchange: Arc<SiblingExchange>,
    fleet: Arc<Fleet>,
    state: Arc<State>,
    changed: watch::Receiver<HashMap<String, String>>,
    stop: watch::Receiver<bool>,
    observer: Observer,
}

impl PendingExchange {
    /// Starts the exchange and waits at most `MAX_START_WAIT` for the tail of the stream. Requires a
    /// running keeper.
    pub async fn begin(self, tasks: &mut JoinSet<()>) {
        let PendingExchange { exchange, fleet, state, mut changed, stop, observer } = self;
        // Messages about upstreams apply only when the state has the upstreams' names.
        follow::publish(&fleet.snapshot(), &state);
        tasks.spawn(exchange.clone().run(stop.clone()));
        exchange.wait_caught_up(MAX_START_WAIT).await;
        let first = changed.borrow_and_update().clone();
        let mut follower = Follower { fleet, exchange, observer, known: HashMap::new(), met: HashMap::new() };
        follower.take_over(first).await;
        tasks.spawn(follower.follow(changed, stop));
    }
}

/// Returns the host name of this machine.
fn host() -> String {
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

    fn members(&self, all: &HashMap<String, String>) {
        self.members.send_replace(all.clone());
    }
}

// === members ===

/// Applies the changes of the list of members to the fleet.
struct Follower {
    fleet: Arc<Fleet>,
    exchange: Arc<SiblingExchange>,
    observer: Observer,
    /// The list as it was last applied.
    known: HashMap<String, String>,
    /// The ids of the upstreams that were discovered here, by name; `None` while one is being removed.
    met: HashMap<String, Option<usize>>,
}

impl Follower {
    async fn follow(
        mut self,
        mut changed: watch::Receiver<HashMap<String, String>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut fleet_changed = self.fleet.changes();
        loop {
            let stopped = async { drop(stop.wait_for(|stopping| *stopping).await) };
            tokio::select! {
                () = stopped => return,
                news = changed.changed() => {
                    if news.is_err() {
                        return;
                    }
                    let all = changed.borrow_and_update().clone();
                    self.take_over(all).await;
                }
                Ok(()) = fleet_changed.changed() => self.greet().await,
            }
        }
    }

    /// Applies the records that differ from the known ones.
    async fn take_over(&mut self, all: HashMap<String, String>) {
        for (name, text) in all.iter().filter(|(name, text)| self.known.get(*name) != Some(*text)) {
            match MemberRecord::read(text) {
                Ok(member) => self.carry_out(name, member).await,
                Err(why) => self.observer.member_unusable(name, &why),
            }
        }
        self.known = all;
    }

    /// Applies the changes that were made to a discovered upstream before this balancer discovered it. An
    /// upstream that its source lists again starts without them: its removal is outdated and is deleted from
    /// the list.
    async fn greet(&mut self) {
        let snapshot = self.fleet.snapshot_owned();
        for entry in snapshot.entries.iter().filter(|entry| entry.upstream.config.discovered.is_some()) {
            let (name, id) = (entry.upstream.name(), entry.upstream.id);
            let now = (!entry.removing).then_some(id);
            let before = self.met.insert(name.to_string(), now);
            if now.is_none() || before == Some(now) {
                continue;
            }
            let Some(Ok(member)) = self.known.get(name).map(|text| MemberRecord::read(text)) else {
                continue;
            };
            match before {
                None => self.carry_out(name, member).await,
                Some(_) if member.removed => self.exchange.put_member(name, MemberRecord::default().write()),
                Some(_) => {}
            }
        }
    }

    async fn carry_out(&self, name: &str, member: MemberRecord) {
        for change in changes(name, member) {
            match self.fleet.apply(vec![change]).await {
                // The upstream is configured at another balancer only, or was removed already.
                Ok(()) | Err(FleetChangeError::Unknown(_) | FleetChangeError::Stopping) => {}
                Err(refusal) => self.observer.member_unusable(name, &refusal.to_string()),
            }
        }
    }
}

fn changes(name: &str, member: MemberRecord) -> Vec<FleetChange> {
    let MemberRecord { upstream, drain, weight, removed } = member;
    let name = || name.to_string();
    if removed {
        return vec![FleetChange::Remove { name: name(), force: false }];
    }
    let upstream = upstream.filter(|upstream| upstream.name == name()).map(|mut upstream| {
        upstream.weight = weight.unwrap_or(upstream.weight);
        FleetChange::Upsert(upstream)
    });
    let weight =
        weight.filter(|_| upstream.is_none()).map(|weight| FleetChange::Weight { name: name(), weight });
    let drain = drain.map(|drain| FleetChange::Drain { name: name(), drain });
    upstream.into_iter().chain(weight).chain(drain).collect()
}
