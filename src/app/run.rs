//! The life of one process: signals, the handover to a successor, notifications of the supervisor.

use std::time::Duration;

use futures_util::future::OptionFuture;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};

use super::notify::Notify;
use super::upgrade::{self, HandoverSocket, InheritedSockets, Predecessor, Successor};
use super::{LoadConfig, RunningBalancer, demo, prepare, reload};
use crate::cli;
use crate::config::types::{Config, ShutdownConfig};
use crate::observe::process;
use crate::proxy::server::shutdown::ShutdownPhase;

/// The signals that end the process.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

/// The signals that do not end the process.
struct ControlSignals {
    /// Requests a handover to a new process. Without a handler the signal would end this process, with no
    /// successor.
    quit: Signal,
    hangup: Signal,
}

/// Why serving ends.
enum RunEnd {
    Signal(&'static str),
    Relieved(Successor),
}

/// Serves until a signal or a successor ends the process; with `demo_engines`, over that many simulated
/// servers; with `upgrade`, on the sockets of the running process.
pub async fn run(
    mut config: Config,
    demo_engines: Option<u16>,
    upgrade: bool,
    load: LoadConfig,
) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot listen for signals: {error}");
    let mut signals = EndSignals::new().map_err(failed)?;
    let mut orders = ControlSignals {
        quit: signal(SignalKind::quit()).map_err(failed)?,
        hangup: signal(SignalKind::hangup()).map_err(failed)?,
    };
    let _engines = match demo_engines {
        Some(count) => demo(&mut config, count).await?,
        None => Vec::new(),
    };
    process::starting(env!("CARGO_PKG_VERSION"), config.upstreams.len());
    let load = if demo_engines.is_some() { reload::over(config.upstreams.clone(), load) } else { load };
    let notify = Notify::new(&cli::environment, upgrade);
    let begun = tokio::select! {
        begun = begin(config, load, upgrade) => begun?,
        // This process does not serve yet, and the running one continues.
        signal = signals.end() => {
            process::stopping(signal, 0);
            process::stopped(0);
            return Ok(());
        }
    };
    let (mut running, handover) = begun;
    if upgrade {
        notify.succeeded()
    } else {
        notify.ready()
    }
    let end = serve(&running, handover.as_ref(), &mut signals, &mut orders, &notify).await;
    let shutdown = running.reloader.config().shutdown;
    let cut = match end {
        RunEnd::Signal(signal) => {
            notify.stopping();
            process::stopping(signal, running.shutdown.requests.in_flight());
            // From now on a new process finds no handover socket; the sockets close with their listeners.
            if let Some(handover) = handover {
                handover.close();
            }
            stop(&mut running, &mut signals, shutdown).await
        }
        RunEnd::Relieved(follower) => {
            running.phase(ShutdownPhase::HandedOver);
            process::handed_over(follower.pid, running.shutdown.requests.in_flight());
            // The file stays: it belongs to the successor now.
            drop(handover);
            follower.gone().await;
            finish(&mut running, &mut signals, shutdown.grace, false).await
        }
    };
    running.close().await;
    process::stopped(cut);
    Ok(())
}

/// Binds or inherits the sockets, and serves. On failure a running process continues as before.
async fn begin(
    config: Config,
    load: LoadConfig,
    upgrade: bool,
) -> Result<(RunningBalancer, Option<HandoverSocket>), String> {
    let path = config.upgrade_socket.clone();
    let by_default = path == Config::default().upgrade_socket;
    let (mut sockets, mut predecessor) = if upgrade {
        let (sockets, predecessor) = upgrade::take_over(&path).await?;
        (sockets, Some(predecessor))
    } else {
        (InheritedSockets::default(), None)
    };
    let prepared = prepare(config, load, &mut sockets).await?;
    if let Some(predecessor) = &mut predecessor {
        // The changes come first, since `caught_up` also waits for upstreams that were added at run time. The
        // chains come last: those of upstreams that are not discovered yet would be dropped.
        let state = predecessor.state().await.map_err(|error| process::state_lost(&error)).ok();
        if let Some(state) = &state {
            prepared.running.take_over_changes(state).await;
        }
        predecessor.caught_up(&prepared.running.fleet).await?;
        if let Some(state) = state {
            prepared.running.take_over_chains(state).await;
        }
    }
    let handover = prepared.sockets().and_then(|others| HandoverSocket::open(&path, &mut sockets, others));
    let handover = handover.map_err(|error| process::no_upgrade(&path, &error.to_string(), by_default)).ok();
    let running = prepared.serve();
    let Some(predecessor) = predecessor else { return Ok((running, handover)) };
    relieve(predecessor, running, handover, sockets).await
}

/// Requests the running process to end; if it does not, this process ends.
async fn relieve(
    predecessor: Predecessor,
    mut running: RunningBalancer,
    handover: Option<HandoverSocket>,
    left: InheritedSockets,
) -> Result<(RunningBalancer, Option<HandoverSocket>), String> {
    let pid = predecessor.pid;
    match predecessor.go().await {
        Ok(()) => {
            left.close();
            process::took_over(pid);
            Ok((running, handover))
        }
        Err(error) => {
            running.phase(ShutdownPhase::HandedOver);
            drop(handover);
            running.ended().await;
            running.close().await;
            Err(error)
        }
    }
}

/// Waits for the end. A reload that waits for a disk delays neither the end nor the watchdog, and is dropped
/// with the end. One reload runs at a time: signals that arrive meanwhile lead to one reload after it.
async fn serve(
    running: &RunningBalancer,
    handover: Option<&HandoverSocket>,
    signals: &mut EndSignals,
    orders: &mut ControlSignals,
    notify: &Notify,
) -> RunEnd {
    let relieved = async {
        match handover {
            Some(handover) => handover.relieved(&running.fleet, || running.state_source()).await,
            None => std::future::pending().await,
        }
    };
    let watchdog = async {
        loop {
            notify.alive().await;
        }
    };
    tokio::pin!(relieved, watchdog);
    let mut reload = None;
    loop {
        tokio::select! {
            signal = signals.end() => return RunEnd::Signal(signal),
            relieved = &mut relieved => return RunEnd::Relieved(relieved),
            _ = orders.quit.recv() => process::handover_signal(),
            Some(()) = orders.hangup.recv(), if reload.is_none() => {
                notify.reloading();
                reload = Some(Box::pin(running.reload()));
            }
            Some(_) = OptionFuture::from(reload.as_mut()) => {
                // The result is logged.
                reload = None;
                notify.ready();
            }
            () = &mut watchdog => {}
        }
    }
}

/// Shuts down after a signal: fails health checks for `drain`, then stops accepting, and ends with the last
/// request or after `grace`. A second signal ends the shutdown at once.
async fn stop(running: &mut RunningBalancer, signals: &mut EndSignals, shutdown: ShutdownConfig) -> usize {
    running.shutdown.begin();
    let mut now = false;
    if !shutdown.drain.is_zero() {
        process::draining(shutdown.drain);
        tokio::select! {
            () = sleep(shutdown.drain) => {}
            _ = signals.end() => now = true,
        }
    }
    running.phase(ShutdownPhase::Stopping);
    let grace = if now { Duration::ZERO } else { shutdown.grace };
    finish(running, signals, grace, true).await
}

/// Waits for the last request, for at most `grace`. A second signal ends the wait.
async fn finish(
    running: &mut RunningBalancer,
    signals: &mut EndSignals,
    grace: Duration,
    mut told: bool,
) -> usize {
    let end = Instant::now() + grace;
    loop {
        tokio::select! {
            ended = timeout_at(end, running.ended()) => match ended {
                Ok(cut) => return cut,
                Err(_) => break,
            },
            _ = signals.end() => {
                if std::mem::replace(&mut told, true) {
                    break;
                }
                running.phase(ShutdownPhase::Stopping);
            }
        }
    }
    running.phase(ShutdownPhase::Cut);
    running.ended().await
}

// === impl EndSignals ===

impl EndSignals {
    fn new() -> std::io::Result<Self> {
        Ok(EndSignals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for a signal that ends the process, and returns its name.
    async fn end(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
