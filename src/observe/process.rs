//! Events of the process: its start, its stop and the hand-over to another process. They are only logged:
//! some happen before a balancer exists or after its end.

use std::path::Path;
use std::time::Duration;

use log::{info, warn};

/// Logs the start of the balancer.
pub(crate) fn starting(version: &str, upstreams: usize) {
    info!(version = version, upstreams = upstreams; "starting");
}

/// Logs the start of a simulated vLLM server inside this process.
pub(crate) fn demo_engine(upstream: &str) {
    info!(upstream = upstream; "simulated vLLM server started");
}

/// Logs that a listener accepts connections from now on.
pub(crate) fn listening(address: &str, what: &'static str, tls: bool) {
    info!(address = address, serves = what, tls = tls; "listening");
}

/// Logs the beginning of the shutdown.
pub(crate) fn stopping(signal: &'static str, in_flight: u64) {
    info!(signal = signal, in_flight = in_flight; "stopping");
}

/// Logs that health checks fail from now on, while requests are served for `time`.
pub(crate) fn draining(time: Duration) {
    info!(seconds = time.as_secs_f64(); "draining, health says no");
}

/// Logs the end of the process; `cut` is the number of connections that the shutdown cut.
pub(crate) fn stopped(cut: usize) {
    if cut == 0 {
        info!("stopped");
    } else {
        warn!(cut = cut; "stopped with requests still in flight");
    }
}

/// Logs that another process requests the listening sockets.
pub(crate) fn upgrade_requested(pid: u32, version: &str, sockets: usize) {
    info!(other = pid, version = version, sockets = sockets; "handing the listening sockets over");
}

/// Logs a failed hand-over: this process continues.
pub(crate) fn upgrade_failed(error: &str) {
    warn!(error = error; "no hand-over, this process goes on");
}

/// Logs that a new process has not received the whole state.
pub(crate) fn state_not_sent(error: &str) {
    warn!(error = error; "could not hand the state over");
}

/// Logs that this process starts without the state of the one that it takes over from.
pub(crate) fn state_lost(error: &str) {
    warn!(error = error; "state of the running process was not taken over");
}

/// Logs the number of upstreams whose run-time changes this process has taken over from the running one.
pub(crate) fn changes_taken(upstreams: usize) {
    info!(upstreams = upstreams; "took run-time changes over");
}

/// Logs the size of the prefix index that this process has taken over from the running one.
pub(crate) fn chains_taken(blocks: usize, took: Duration, is_whole: bool) {
    let seconds = took.as_secs_f64();
    info!(blocks = blocks, seconds = seconds, whole = is_whole; "took the prefix index over");
}

/// Logs that a listener uses another certificate from now on.
pub(crate) fn certificate_renewed(path: &Path) {
    info!(certificate:% = path.display(); "certificate renewed");
}

/// Logs that the files of a listener's certificate have changed and cannot be used.
pub(crate) fn certificate_unusable(problem: &str) {
    warn!(error = problem; "certificate not renewed");
}

/// Logs that another process accepts connections from now on.
pub(crate) fn handed_over(pid: u32, in_flight: u64) {
    info!(other = pid, in_flight = in_flight; "handed over, requests in flight end here");
}

/// Logs that this process accepts connections in place of another.
pub(crate) fn took_over(pid: u32) {
    info!(other = pid; "took over from the running process");
}

/// Logs that the socket for upgrades could not be opened. With the default path this is usual outside of a
/// service manager and logged at info level.
pub(crate) fn no_upgrade(path: &Path, error: &str, by_default: bool) {
    let level = if by_default { log::Level::Info } else { log::Level::Warn };
    let path = path.display().to_string();
    log::log!(level, upgrade_socket = path, error = error; "no socket for upgrades, --upgrade will not work");
}

/// Logs a SIGQUIT, the signal with which other load balancers request a hand-over.
pub(crate) fn handover_signal() {
    info!("SIGQUIT: a process started with --upgrade takes over without it");
}
