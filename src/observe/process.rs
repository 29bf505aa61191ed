//! Events of the process: its start, its stop and the hand-over to another process. They are logged and not
//! counted, and happen before there is a balancer or after its end.

use std::path::Path;
use std::time::Duration;

use log::{info, warn};

pub fn starting(version: &str, upstreams: usize) {
    info!(version = version, upstreams = upstreams; "starting");
}

/// A simulated vLLM server was started inside this process.
pub fn demo_engine(upstream: &str) {
    info!(upstream = upstream; "simulated vLLM server started");
}

/// A listener accepts connections from now on.
pub fn listening(address: &str, what: &'static str, tls: bool) {
    info!(address = address, serves = what, tls = tls; "listening");
}

/// The shutdown begins.
pub fn stopping(signal: &'static str, in_flight: u64) {
    info!(signal = signal, in_flight = in_flight; "stopping");
}

/// Health checks fail from now on, and requests are still served for `time`.
pub fn draining(time: Duration) {
    info!(seconds = time.as_secs_f64(); "draining, health says no");
}

/// The process ends; `cut` is the number of connections that the shutdown cut.
pub fn stopped(cut: usize) {
    if cut == 0 {
        info!("stopped");
    } else {
        warn!(cut = cut; "stopped with requests still in flight");
    }
}

/// Another process requests the listening sockets.
pub fn upgrade_requested(pid: u32, version: &str, sockets: usize) {
    info!(other = pid, version = version, sockets = sockets; "handing the listening sockets over");
}

/// The hand-over failed and changed nothing.
pub fn upgrade_failed(error: &str) {
    warn!(error = error; "no hand-over, this process goes on");
}

/// Another process accepts connections from now on.
pub fn handed_over(pid: u32, in_flight: u64) {
    info!(other = pid, in_flight = in_flight; "handed over, requests in flight end here");
}

/// This process accepts connections in place of another.
pub fn took_over(pid: u32) {
    info!(other = pid; "took over from the running process");
}

/// The socket for upgrades could not be opened. Under the default path this is usual outside of a service
/// manager, and no warning.
pub fn no_upgrade(path: &Path, error: &str, by_default: bool) {
    let level = if by_default { log::Level::Info } else { log::Level::Warn };
    let path = path.display().to_string();
    log::log!(level, upgrade_socket = path, error = error; "no socket for upgrades, --upgrade will not work");
}

/// SIGQUIT was received, which other balancers use to request a hand-over.
pub fn handover_signal() {
    info!("SIGQUIT: a process started with --upgrade takes over without it");
}
