//! Builds every part from a configuration, starts it, and ends it in order.
//!
//! The order of an end: listeners close, requests in flight go on for as long as `shutdown.grace`, then
//! what is left is cut; the keeper ends last, since requests read its snapshots.

mod reload;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::admin::{self, Admin, Reloaded};
use crate::config::types::{Config, Listen, UpstreamConfig};
use crate::config::url;
use crate::fleet::Fleet;
use crate::observe;
use crate::observe::metrics::METRICS;
use crate::proxy::connections::Connections;
use crate::proxy::{self, Balancer, Shared, server};
use crate::sim::http::{Engine, Options};
pub use reload::Load;
use reload::Reloader;

/// The admin room behind the trait that the proxy hands its requests to.
struct AdminDoor(Admin);

impl proxy::Admin for AdminDoor {
    fn serves(&self, path: &str) -> bool {
        admin::serves(path)
    }

    fn call(&self, request: Request<Bytes>) -> BoxFuture<'_, Response<Bytes>> {
        Box::pin(self.0.call(request))
    }
}

/// A balancer that serves.
pub struct Running {
    /// Where the public listeners are bound, in the order of the configuration.
    pub addresses: Vec<String>,
    pub admin: String,
    pub fleet: Arc<Fleet>,
    stop: watch::Sender<bool>,
    cut: watch::Sender<bool>,
    serving: JoinSet<usize>,
    keeper: JoinHandle<()>,
    keeper_stop: watch::Sender<bool>,
    reloader: Arc<Reloader>,
}

/// As `start_with`, with a configuration that a reload finds unchanged.
pub async fn start(config: Config) -> Result<Running, String> {
    let again = config.clone();
    start_with(config, Arc::new(move || Ok((again.clone(), Vec::new())))).await
}

/// Binds all listeners and starts to serve; `load` gives the configuration again when it is to be reloaded.
/// Nothing has been started when it fails.
pub async fn start_with(config: Config, load: Load) -> Result<Running, String> {
    let (fleet, keeper) = Fleet::new(&config)?;
    let shared = Shared::new(&config, fleet.clone());
    let mut listeners = Vec::new();
    for listen in &config.listen {
        listeners.push(server::Listener::bind(listen).await?);
    }
    let admin_listen = Listen { address: config.admin.address.clone(), tls: None };
    let admin_listener = server::Listener::bind(&admin_listen).await?;

    let threads = threads(&config);
    let public = server::engine(Balancer::public(shared.clone()), threads);
    let seats = Connections::new(config.limits.connections);
    let config = Arc::new(ArcSwap::from_pointee(config));
    let reloader = Reloader::new(load, config.clone(), fleet.clone(), shared.clone(), seats.clone());
    let door = Arc::new(AdminDoor(Admin::new(fleet.clone(), config, reloader.clone())));
    let private = server::engine(Balancer::admin(shared, door), threads);
    let (stop, stopped) = watch::channel(false);
    let (cut, cutting) = watch::channel(false);
    let (keeper_stop, keeper_stopped) = watch::channel(false);
    let keeper = tokio::spawn(keeper.run(keeper_stopped));
    let mut serving = JoinSet::new();
    let addresses = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let admin = admin_listener.address().to_string();
    for listener in listeners {
        observe::listening(listener.address(), "api", listener.is_tls());
        serving.spawn(server::serve(
            listener,
            public.clone(),
            seats.clone(),
            stopped.clone(),
            cutting.clone(),
        ));
    }
    observe::listening(&admin, "admin", false);
    // Whoever looks after a full balancer must get in.
    serving.spawn(server::serve(admin_listener, private, Connections::new(0), stopped, cutting));
    Ok(Running { addresses, admin, fleet, stop, cut, serving, keeper, keeper_stop, reloader })
}

/// Worker threads for a configuration.
pub fn threads(config: &Config) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    if config.threads == 0 { cores() } else { config.threads }
}

impl Running {
    /// Reads the configuration again and goes by it, or tells its problems and changes nothing.
    pub async fn reload(&self) -> Result<Reloaded, Vec<String>> {
        self.reloader.reload().await
    }

    /// Stops accepting, lets requests end for `grace`, cuts the rest. Returns how many connections were cut.
    pub async fn stop(mut self, grace: Duration) -> usize {
        self.stop.send_replace(true);
        let serving = &mut self.serving;
        let mut ended = async || {
            let mut cut = 0;
            while let Some(left) = serving.join_next().await {
                cut += left.unwrap_or(0);
            }
            cut
        };
        let cut = match tokio::time::timeout(grace, ended()).await {
            Ok(cut) => cut,
            Err(_) => {
                self.cut.send_replace(true);
                ended().await
            }
        };
        self.keeper_stop.send_replace(true);
        // The keeper only ever ends by this word; a panic of its own was told when it happened.
        drop(self.keeper.await);
        cut
    }
}

/// Starts simulated servers in the process and makes them the upstreams.
async fn demo(config: &mut Config, count: u16) -> Result<Vec<Engine>, String> {
    let mut engines = Vec::new();
    for seed in 0..u64::from(count) {
        let options = Options { seed, ..Options::default() };
        let engine = Engine::start(options).await;
        let engine = engine.map_err(|error| format!("cannot start a simulated server: {error}"))?;
        let upstream = UpstreamConfig::new(url::upstream(&engine.url())?);
        observe::demo_engine(upstream.name.as_str());
        config.upstreams.push(upstream);
        engines.push(engine);
    }
    Ok(engines)
}

/// Serves until a signal ends it; with `demo`, over so many simulated servers.
pub async fn run(mut config: Config, demo_engines: Option<u16>, load: Load) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot listen for signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    let _engines = match demo_engines {
        Some(count) => demo(&mut config, count).await?,
        None => Vec::new(),
    };
    observe::starting(env!("CARGO_PKG_VERSION"), config.upstreams.len());
    let load = if demo_engines.is_some() { reload::over(config.upstreams.clone(), load) } else { load };
    let running = start_with(config, load).await?;
    let name = loop {
        tokio::select! {
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            // What came of it stands in the log.
            Some(()) = hangup.recv() => drop(running.reload().await),
        }
    };
    observe::stopping(name, METRICS.in_flight.get().max(0).cast_unsigned());
    let grace = running.reloader.config().shutdown.grace;
    let stopping = running.stop(grace);
    tokio::pin!(stopping);
    // Whoever asks a second time does not want to wait.
    let cut = tokio::select! {
        cut = &mut stopping => cut,
        _ = interrupt.recv() => 0,
    };
    observe::stopped(cut);
    Ok(())
}
