//! Builds every part from a configuration, starts it, and ends it in order.
//!
//! The order of a shutdown: health checks fail for `shutdown.drain`, the public listeners close, requests in
//! flight continue for at most `shutdown.grace`, then the rest is cut, and the admin listener closes: until
//! then monitoring reads the metrics of the last requests. The keeper ends last, since requests read its
//! snapshots.

mod admin_client;
mod certificates;
pub mod doctor;
pub mod files;
mod follow;
pub mod health;
mod members;
pub(crate) mod notify;
mod reload;
pub mod run;
mod sibling_loads;
mod siblings;
pub mod simulate;
pub mod top;
pub mod traces_export;
mod upgrade;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::admin::{self, AdminApi, AdminParts, Reloaded};
use crate::config::member::MemberRecord;
use crate::config::types::{Config, Listen, UpstreamConfig};
use crate::config::url;
use crate::engine::http::{EngineServer, Options};
use crate::fleet::{Fleet, Keeper, discover};
use crate::observe::{Observer, process};
use crate::otlp::SpanExporter;
use crate::proxy::server::certificate::ListenerCertificate;
use crate::proxy::server::connection_limit::ConnectionLimiter;
use crate::proxy::server::shutdown::{Shutdown, ShutdownPhase};
use crate::proxy::{self, AdminBody, Balancer, ProxyShared, server};
use crate::state::State;
use crate::traces::Traces;

use members::{MemberFollower, RecordApplier};
pub use reload::LoadConfig;
use reload::{Reloader, RuntimeChanges};
use siblings::{PendingExchange, SiblingSetup};
use upgrade::{InheritedSockets, ListeningSocket, ReceivedState, SocketPurpose, StateSource};

/// The longest time that a shutdown waits for traces to be stored.
const MAX_TRACES_STOP: Duration = Duration::from_secs(10);

/// The longest time that a shutdown waits for the collector of spans.
const MAX_SPANS_STOP: Duration = Duration::from_secs(5);

/// Adapts the admin API to the trait by which the proxy calls it.
struct AdminListener(AdminApi);

impl proxy::AdminService for AdminListener {
    fn serves(&self, path: &str) -> bool {
        admin::serves(path)
    }

    fn only_watches(&self, path: &str) -> bool {
        admin::only_watches(path)
    }

    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<AdminBody>> {
        Box::pin(self.0.call(request))
    }
}

/// A balancer that accepts requests.
pub struct RunningBalancer {
    /// The addresses of the public listeners, in the order of the configuration.
    pub addresses: Vec<String>,
    pub admin: String,
    pub fleet: Arc<Fleet>,
    pub state: Arc<State>,
    pub traces: Arc<Traces>,
    pub observer: Observer,
    spans: Arc<SpanExporter>,
    shutdown: Arc<Shutdown>,
    public_listeners: ListenerGroup,
    /// Closes after the public listeners.
    admin_listener: ListenerGroup,
    /// The keeper, and the tasks that follow its snapshots.
    tasks: JoinSet<()>,
    tasks_stop: watch::Sender<bool>,
    reloader: Arc<Reloader>,
    applier: RecordApplier,
}

/// Listeners that close together.
struct ListenerGroup {
    phase: watch::Sender<ShutdownPhase>,
    serving: JoinSet<usize>,
}

/// A balancer with all its sockets bound, before it accepts connections.
struct PreparedBalancer {
    running: RunningBalancer,
    open_listeners: Vec<OpenListener>,
}

/// A bound listener, what it serves, and its configured address.
type BoundListener = (SocketPurpose, String, server::Listener);

/// A bound listener and its server.
struct OpenListener {
    serves: SocketPurpose,
    /// The configured address.
    address: String,
    listener: server::Listener,
    server: server::SharedServer,
    limiter: Arc<ConnectionLimiter>,
}

/// Starts a balancer as `start_with` does; a reload finds the configuration unchanged.
pub async fn start(config: Config) -> Result<RunningBalancer, String> {
    let again = config.clone();
    start_with(config, Arc::new(move || Ok((again.clone(), Vec::new())))).await
}

/// Binds all listeners and starts to serve; `load` loads the configuration again for a reload. On failure
/// nothing has been started.
pub async fn start_with(config: Config, load: LoadConfig) -> Result<RunningBalancer, String> {
    Ok(prepare(config, load, &mut InheritedSockets::default()).await?.serve())
}

/// Builds all parts on inherited sockets and new ones. On failure nothing has been started.
async fn prepare(
    config: Config,
    load: LoadConfig,
    sockets: &mut InheritedSockets,
) -> Result<PreparedBalancer, String> {
    let observer = Observer::default();
    let (fleet, keeper) = Fleet::new(&config, observer.clone())?;
    let siblings = SiblingSetup::new(&config, observer.clone());
    let state = empty_state(&config, siblings.as_ref(), observer.clone());
    let (tasks_stop, stopped) = watch::channel(false);
    let meeting = siblings.map(|siblings| siblings.meet(fleet.clone(), state.clone(), &stopped));
    let exchange = meeting.as_ref().map(|meeting| meeting.exchange.clone());
    let members = exchange.as_ref().map_or_else(Arc::default, |exchange| exchange.member_list());
    members.set_entries(&config.upstreams);
    let listeners = bind(&config, sockets).await?;
    // The last step that can fail, since its thread would keep running.
    let traces = Traces::start(&config.traces, observer.clone()).await?;
    let name = name_of(&listeners);
    let shared = ProxyShared::new(
        &config,
        fleet.clone(),
        state.clone(),
        exchange.clone(),
        traces.clone(),
        observer.clone(),
        &name,
    );
    let (shutdown, spans) = (shared.shutdown().clone(), shared.spans().clone());
    let (limits, limiter) = (config.limits.connection, ConnectionLimiter::new(config.limits.connections));
    let public = server::shared_server(Balancer::public(shared.clone()), limits);
    let certificates = certificates_of(&listeners);
    let renewing = certificates::follow(certificates.clone(), stopped.clone());
    let config = Arc::new(ArcSwap::from_pointee(config));
    let parts = (fleet.clone(), RuntimeChanges { members: members.clone(), exchange: exchange.clone() });
    let reloader = Reloader::new(load, config.clone(), parts, shared.clone(), limiter.clone(), certificates);
    let parts = AdminParts {
        fleet: fleet.clone(),
        state: state.clone(),
        traces: traces.clone(),
        observer: observer.clone(),
        exchange,
        members: members.clone(),
        host: siblings::host(),
        name,
    };
    let applier = RecordApplier::new(&fleet, &config, &members, &observer);
    let follower = MemberFollower::new(applier.clone());
    let api = AdminApi::new(parts, config, reloader.clone(), shutdown.unready());
    let private = server::shared_server(Balancer::admin(shared, Arc::new(AdminListener(api))), limits);
    let open_listeners = open(listeners, &public, &private, &limiter);
    let (addresses, admin) = bound_addresses(&open_listeners);
    let tasks = start_tasks(keeper, meeting, follower, &fleet, &state, renewing, stopped).await;
    let running = RunningBalancer {
        addresses,
        admin,
        fleet,
        state,
        traces,
        observer,
        spans,
        shutdown,
        public_listeners: ListenerGroup::new(),
        admin_listener: ListenerGroup::new(),
        tasks,
        tasks_stop,
        reloader,
        applier,
    };
    Ok(PreparedBalancer { running, open_listeners })
}

/// Builds a memory that knows nothing yet, and that publishes what it learns where there are siblings.
fn empty_state(config: &Config, siblings: Option<&SiblingSetup>, observer: Observer) -> Arc<State> {
    let outbox = siblings.map(|siblings| siblings.outbox.clone());
    let seed = RandomState::new().hash_one(0u64);
    State::new(config.index, config.sessions.ttl, seed, outbox, observer)
}

/// Starts the keeper, and the tasks that follow its snapshots.
async fn start_tasks(
    keeper: Keeper,
    meeting: Option<PendingExchange>,
    follower: MemberFollower,
    fleet: &Arc<Fleet>,
    state: &Arc<State>,
    renewing: impl Future<Output = ()> + Send + 'static,
    stopped: watch::Receiver<bool>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(renewing);
    tasks.spawn(keeper.run(stopped.clone()));
    match meeting {
        Some(meeting) => meeting.begin(follower, &mut tasks).await,
        None => drop(tasks.spawn(follower.follow(None, stopped.clone()))),
    }
    tasks.spawn(discover::run(fleet.clone(), stopped.clone()));
    tasks.spawn(follow::follow(fleet.clone(), state.clone(), stopped));
    tasks
}

/// Binds all listeners, the admin listener last.
async fn bind(config: &Config, sockets: &mut InheritedSockets) -> Result<Vec<BoundListener>, String> {
    let admin_listen = Listen { address: config.admin.address.clone(), tls: None };
    let mut listeners = Vec::new();
    for listen in &config.listen {
        let listener = sockets.listener(SocketPurpose::Api, listen).await?;
        listeners.push((SocketPurpose::Api, listen.address.to_string(), listener));
    }
    let listener = sockets.listener(SocketPurpose::Admin, &admin_listen).await?;
    listeners.push((SocketPurpose::Admin, admin_listen.address.to_string(), listener));
    Ok(listeners)
}

/// Returns the certificates of the listeners with TLS.
fn certificates_of(listeners: &[BoundListener]) -> Vec<Arc<ListenerCertificate>> {
    listeners.iter().filter_map(|(_, _, listener)| listener.certificate().cloned()).collect()
}

/// Returns what this balancer is called, with the ports that the system chose.
fn name_of(listeners: &[BoundListener]) -> String {
    let public = listeners.iter().filter(|(serves, ..)| *serves == SocketPurpose::Api);
    let addresses: Vec<String> = public.map(|(_, _, listener)| listener.address().to_string()).collect();
    siblings::balancer_name(&siblings::host(), &addresses)
}

/// Combines each listener with its server and its limit of connections.
fn open(
    listeners: Vec<BoundListener>,
    public: &server::SharedServer,
    admin: &server::SharedServer,
    limiter: &Arc<ConnectionLimiter>,
) -> Vec<OpenListener> {
    // The admin API must stay reachable when the limit of connections is reached.
    let unlimited = ConnectionLimiter::new(0);
    let open = |(serves, address, listener)| {
        let (server, limiter) =
            if serves == SocketPurpose::Admin { (admin, &unlimited) } else { (public, limiter) };
        OpenListener { serves, address, listener, server: server.clone(), limiter: limiter.clone() }
    };
    listeners.into_iter().map(open).collect()
}

/// The addresses of the public listeners, and that of the admin listener, which is the last.
fn bound_addresses(listeners: &[OpenListener]) -> (Vec<String>, String) {
    let mut addresses: Vec<String> = listeners.iter().map(OpenListener::bound_address).collect();
    let admin = addresses.pop().unwrap_or_default();
    (addresses, admin)
}

/// Returns the number of worker threads for a configuration.
pub fn threads(config: &Config) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    if config.threads == 0 { cores() } else { config.threads }
}

impl OpenListener {
    /// Returns the bound address, with the port that the system chose.
    fn bound_address(&self) -> String {
        self.listener.address().to_string()
    }
}

impl PreparedBalancer {
    /// Returns further handles on the sockets, for a successor process.
    fn sockets(&self) -> std::io::Result<Vec<ListeningSocket>> {
        let handle = |open_listener: &OpenListener| {
            upgrade::handle(open_listener.serves, open_listener.address.clone(), &open_listener.listener)
        };
        self.open_listeners.iter().map(handle).collect()
    }

    /// Starts to accept connections.
    fn serve(self) -> RunningBalancer {
        let PreparedBalancer { mut running, open_listeners } = self;
        for OpenListener { serves, listener, server, limiter, .. } in open_listeners {
            process::listening(listener.address(), serves.label(), listener.certificate().is_some());
            let group = match serves {
                SocketPurpose::Admin => &mut running.admin_listener,
                _ => &mut running.public_listeners,
            };
            let (shutdown, phases) = (running.shutdown.clone(), group.phase.subscribe());
            group.serving.spawn(server::serve(listener, server, limiter, shutdown, phases));
        }
        running
    }
}

impl RunningBalancer {
    /// Returns the state that a successor takes over.
    fn state_source(&self) -> StateSource {
        let config = self.reloader.config();
        StateSource {
            state: self.state.clone(),
            members: self.applier.members.clone(),
            upstreams: config.upstreams.clone(),
            fingerprint: siblings::fingerprint(&config),
        }
    }

    /// Takes over the run-time changes of the process before.
    async fn take_over_changes(&self, received: &ReceivedState) {
        let config = self.reloader.config();
        let mut count = 0;
        for (name, text) in received.members.lasting(&config.upstreams) {
            let applied = text.text.clone();
            let read = MemberRecord::read(&applied);
            let fault = read.and_then(|record| record.check_shareable().map_err(str::to_owned)).err();
            if let Some(why) = fault.filter(|_| config.redis.is_some()) {
                self.observer.member_unusable(&name, &why);
            } else if self.applier.members.adopt(&name, text) {
                self.applier.apply(&name, None, &applied).await;
                count += 1;
            }
        }
        // At the other balancers they end too, as with a reload.
        for name in received.members.ended(&config.upstreams).filter(|_| config.redis.is_some()) {
            // Without room there is no record here, and none at the siblings.
            let _ = self.applier.members.put(name, MemberRecord::default().write());
        }
        process::changes_taken(count);
    }

    /// Takes over the prefix index of the process before.
    async fn take_over_chains(&self, received: ReceivedState) {
        let start = Instant::now();
        // Chains apply only when the state has the names of their upstreams.
        follow::publish(&self.fleet.snapshot(), &self.state);
        let (state, is_whole) = (self.state.clone(), received.is_whole);
        let fingerprint = siblings::fingerprint(&self.reloader.config());
        let learned = tokio::task::spawn_blocking(move || received.learn(&state, fingerprint)).await;
        if learned.unwrap_or(1) > 0 {
            process::state_lost("the running process makes other blocks of prompts");
        }
        process::chains_taken(self.state.size().pairs, start.elapsed(), is_whole);
    }

    /// Loads the configuration again and applies it, or returns its problems and changes nothing.
    pub async fn reload(&self) -> Result<Reloaded, Vec<String>> {
        self.reloader.reload().await
    }

    /// Stops accepting, lets requests end for `grace`, cuts the rest. Returns the number of cut connections.
    pub async fn stop(mut self, grace: Duration) -> usize {
        self.phase(ShutdownPhase::Stopping);
        let cut = match tokio::time::timeout(grace, self.ended()).await {
            Ok(cut) => cut,
            Err(_) => {
                self.phase(ShutdownPhase::Cut);
                self.ended().await
            }
        };
        self.close().await;
        cut
    }

    /// Advances the phase of the shutdown; it never moves back. In a stop the admin listener follows once the
    /// public listeners have ended; a successor takes it over together with them.
    fn phase(&self, phase: ShutdownPhase) {
        self.public_listeners.advance(phase);
        if phase != ShutdownPhase::Stopping {
            self.admin_phase(phase);
        }
    }

    fn admin_phase(&self, phase: ShutdownPhase) {
        self.admin_listener.advance(phase);
        self.shutdown.end_streams();
    }

    /// Waits for the last connection of all listeners. Returns the number of cut connections.
    async fn ended(&mut self) -> usize {
        let cut = self.public_listeners.ended().await;
        self.admin_phase(ShutdownPhase::Stopping);
        cut + self.admin_listener.ended().await
    }

    async fn close(mut self) {
        self.tasks_stop.send_replace(true);
        // The tasks end by `tasks_stop`; a panic of a task was logged when it happened.
        while self.tasks.join_next().await.is_some() {}
        // Last, after the cut requests have ended their captures and their spans.
        tokio::join!(self.traces.stop(MAX_TRACES_STOP), self.spans.stop(MAX_SPANS_STOP));
    }
}

impl ListenerGroup {
    fn new() -> Self {
        ListenerGroup { phase: watch::Sender::new(ShutdownPhase::Serving), serving: JoinSet::new() }
    }

    /// Advances the phase, which never moves back.
    fn advance(&self, phase: ShutdownPhase) {
        self.phase.send_if_modified(|now| std::mem::replace(now, phase.max(*now)) < phase);
    }

    /// Waits for the last connection. Returns the number of cut connections.
    async fn ended(&mut self) -> usize {
        let mut cut = 0;
        while let Some(left) = self.serving.join_next().await {
            cut += left.unwrap_or(0);
        }
        cut
    }
}

/// Starts simulated servers in the process and configures them as the upstreams.
async fn demo(config: &mut Config, count: u16) -> Result<Vec<EngineServer>, String> {
    let mut engines = Vec::new();
    for seed in 0..u64::from(count) {
        let options = Options { seed, ..Options::default() };
        let server = EngineServer::start(options).await;
        let server = server.map_err(|error| format!("cannot start a simulated server: {error}"))?;
        let upstream = UpstreamConfig::new(url::upstream(&server.url())?);
        process::demo_engine(upstream.name.as_str());
        config.upstreams.push(upstream);
        engines.push(server);
    }
    Ok(engines)
}
