//! The one door for logs and metrics: a function an event, which writes the record and moves the counters
//! together. No other module names a metric or logs an event of the product.
//!
//! Messages are fixed texts; what varies stands in named fields. Label values are bounded: models that no
//! upstream serves are counted as `other`.

pub mod decisions;
pub mod discovery;
pub mod metrics;
mod request;
pub mod traces;
pub mod usage;

use std::fmt::{self, Display};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use decisions::{DECISIONS, Decision};
use log::{debug, error, info, warn};
use metrics::METRICS;

pub use request::{Done, request_done};

use crate::names::{MAX_SHOWN_BYTES, cut};
use crate::pick::{self, Candidate};

/// The beginnings of a request's and its answer's body, where `log.bodies` asks for them.
pub fn bodies(id: &str, request: &str, answer: &str) {
    debug!(id = id, request_body = request, answer_body = answer; "bodies");
}

/// A refusal of our own went out.
pub fn rejected(reason: &'static str) {
    METRICS.rejects.with_label_values(&[reason]).inc();
}

/// Why a request went where it went.
pub fn chosen(decision: &Decision<'_>) {
    DECISIONS.record(decision, SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    debug!(
        id = decision.id,
        model = cut(decision.model.unwrap_or_default(), MAX_SHOWN_BYTES).concat().as_str(),
        attempt = decision.attempt,
        session = decision.session.unwrap_or(""),
        prompt_tokens = decision.tokens,
        blocks = decision.blocks,
        upstream = (decision.name)(decision.choice.index),
        cost = decision.choice.cost,
        reason = decision.reason(),
        candidates:% = Terms(decision);
        "upstream chosen"
    );
}

/// The candidates of a choice with their terms, one after the other.
struct Terms<'d, 'a>(&'d Decision<'a>);

impl Display for Terms<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, candidate) in self.0.candidates.iter().enumerate() {
            let gap = if place == 0 { "" } else { "; " };
            let name = (self.0.name)(candidate.index);
            let cost = pick::cost(candidate, self.0.knobs);
            let Candidate { backlog, missing, active, context, weight, hit, uncached, .. } = candidate;
            let astray = candidate.session_penalty;
            write!(f, "{gap}{name} cost {cost:.1} hit {hit} uncached {uncached} missing {missing}")?;
            write!(
                f,
                " backlog {backlog} active {active} context {context} astray {astray} weight {weight}"
            )?;
        }
        Ok(())
    }
}

/// An upstream's cache is empty: nothing is believed of it any more.
pub fn cache_forgotten(upstream: &str) {
    info!(upstream = upstream; "what the upstream held is forgotten");
}

/// An engine said how much of a prompt its cache held, beside what was predicted.
pub fn cache_compared(upstream: &str, predicted: u64, reported: u64) {
    METRICS.cache.predicted.with_label_values(&[upstream]).inc_by(predicted);
    METRICS.cache.reported.with_label_values(&[upstream]).inc_by(reported);
}

/// An engine holds far less than is believed.
pub fn cache_trimmed(upstream: &str, keep: f64) {
    METRICS.cache.trimmed.with_label_values(&[upstream]).inc();
    info!(upstream = upstream, keep = keep; "the upstream holds far less than was believed");
}

/// What is remembered of prompts.
pub fn index_size(blocks: usize, pairs: usize, bytes: usize) {
    METRICS.cache.blocks.set(gauge(blocks));
    METRICS.cache.pairs.set(gauge(pairs));
    METRICS.cache.bytes.set(gauge(bytes));
}

fn counted(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn gauge(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// An attempt failed; whether another follows, the end of the request tells.
pub fn attempt_failed(id: &str, upstream: &str, cause: &'static str, attempt: u32) {
    METRICS.failures.with_label_values(&[upstream, cause]).inc();
    info!(id = id, upstream = upstream, cause = cause, attempt = attempt; "attempt failed");
}

/// A request goes to another upstream.
pub fn retried(cause: &'static str) {
    METRICS.retries.with_label_values(&[cause]).inc();
}

/// A stream that had begun could not go on: its client was told so.
pub fn stream_broken(id: &str, upstream: &str, why: &str) {
    METRICS.broken.with_label_values(&[upstream]).inc();
    warn!(id = id, upstream = upstream, error = why; "stream ended with an error");
}

pub fn upstream_changed(upstream: &str, from: &'static str, to: &'static str) {
    METRICS.changes.with_label_values(&[upstream, to]).inc();
    let level = if matches!(to, "down" | "tripped") { log::Level::Warn } else { log::Level::Info };
    log::log!(level, upstream = upstream, from = from, to = to; "upstream changed");
}

/// Its cache is taken for empty from now on.
pub fn upstream_began_anew(upstream: &str, why: &'static str) {
    info!(upstream = upstream, why = why; "upstream has an empty cache");
}

pub fn upstream_added(upstream: &str, url: &str) {
    info!(upstream = upstream, url = url; "upstream added");
}

/// It has other settings now.
pub fn upstream_altered(upstream: &str) {
    info!(upstream = upstream; "upstream altered");
}

pub fn upstream_removing(upstream: &str, active: u64) {
    info!(upstream = upstream, active = active; "upstream to be removed");
}

pub fn upstream_removed(upstream: &str) {
    info!(upstream = upstream; "upstream removed");
}

/// The engine said that it is full.
pub fn upstream_busy(upstream: &str) {
    METRICS.busy.with_label_values(&[upstream]).inc();
    debug!(upstream = upstream; "upstream is full");
}

/// The keeper had too much to hear; what was lost is like what it heard.
pub fn sign_lost() {
    METRICS.signs_lost.inc();
}

/// Another configuration runs.
pub fn reloaded(changed: &[&str], restart: &[&str], warnings: &[String]) {
    METRICS.reloads.with_label_values(&["ok"]).inc();
    info!(changed = changed.join(", "); "reloaded");
    if !restart.is_empty() {
        warn!(keys = restart.join(", "); "these changes need a restart");
    }
    for warning in warnings {
        warn!("{warning}");
    }
}

/// The one that was running goes on.
pub fn reload_failed(problems: &[String]) {
    METRICS.reloads.with_label_values(&["failed"]).inc();
    for problem in problems {
        error!(problem = problem.as_str(); "reload failed");
    }
}

/// How waiting in the queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// With a place on an upstream.
    Admitted,
    /// The client left, or was refused for another reason.
    Left,
    /// It took too long.
    Out,
    /// Before it began: too many waited already.
    NoPlace,
}

pub fn queue_joined() {
    METRICS.queued.inc();
}

pub fn queue_left() {
    METRICS.queued.dec();
}

pub fn queue_ended(end: Waited) {
    let label = match end {
        Waited::Admitted => "admitted",
        Waited::Left => "left",
        Waited::Out => "waited_out",
        Waited::NoPlace => "full",
    };
    METRICS.queue.with_label_values(&[label]).inc();
}

/// Logs the first failure of a row; the next ones would only repeat it.
pub fn probe_failed(upstream: &str, why: &str, in_a_row: u32) {
    METRICS.probe_failures.with_label_values(&[upstream]).inc();
    if in_a_row == 1 {
        info!(upstream = upstream, error = why; "upstream does not answer");
    } else {
        debug!(upstream = upstream, error = why, in_a_row = in_a_row; "upstream does not answer");
    }
}

pub fn listening(address: &str, what: &'static str, tls: bool) {
    info!(address = address, serves = what, tls = tls; "listening");
}

pub fn accept_failed(address: &str, error: &str) {
    METRICS.accept_failures.inc();
    warn!(address = address, error = error; "cannot accept a connection");
}

/// Counts a failed handshake, and logs it at debug level: it is the client's affair.
pub fn handshake_failed(error: &str) {
    METRICS.handshake_failures.inc();
    debug!(error = error; "tls handshake failed");
}

/// A client was refused before it had sent a whole request head.
pub fn head_refused(reason: &'static str) {
    rejected(reason);
    debug!(reason = reason; "request head refused");
}

/// A connection of HTTP/2 was ended for what its client did with it.
pub fn connection_ended(reason: &'static str) {
    rejected(reason);
    info!(reason = reason; "connection ended because of its client");
}

// === the exchange with siblings ===

/// Something did not work with Redis; only the first of a row is worth a warning.
pub fn redis_failed(cause: &'static str, error: &str, first: bool) {
    METRICS.exchange.redis_failures.with_label_values(&[cause]).inc();
    METRICS.exchange.redis_up.set(0);
    if first {
        warn!(cause = cause, error = error; "redis does not work, routing goes on from local memory");
    } else {
        debug!(cause = cause, error = error; "redis still does not work");
    }
}

/// Something was said and taken in; after so long in which it was not.
pub fn redis_works(trouble: Option<Duration>) {
    if METRICS.exchange.redis_up.get() == 1 && trouble.is_none() {
        return;
    }
    METRICS.exchange.redis_up.set(1);
    match trouble {
        Some(trouble) => info!(after_seconds = trouble.as_secs_f64(); "redis works again"),
        None => info!("redis works"),
    }
}

/// One message to the siblings.
pub fn exchange_sent(bytes: usize) {
    METRICS.exchange.messages.with_label_values(&["said"]).inc();
    METRICS.exchange.bytes.with_label_values(&["said"]).inc_by(bytes as u64);
}

/// One message of a sibling.
pub fn exchange_received(bytes: usize) {
    METRICS.exchange.messages.with_label_values(&["heard"]).inc();
    METRICS.exchange.bytes.with_label_values(&["heard"]).inc_by(bytes as u64);
}

/// So much was to be said, and never will be.
pub fn exchange_dropped(events: u64) {
    METRICS.exchange.lost.with_label_values(&["unsaid"]).inc_by(events);
}

/// An entry of the stream that is no message, or one of another version.
pub fn unreadable(why: &dyn Display) {
    METRICS.exchange.lost.with_label_values(&["unreadable"]).inc();
    debug!(error:% = why; "a message in the stream was passed over");
}

/// Counts a chain's tail whose beginning this balancer does not know.
pub fn unplaced() {
    METRICS.exchange.lost.with_label_values(&["unplaced"]).inc();
}

/// A request asked Redis where something is, and got no answer in time.
pub fn lookup_failed() {
    METRICS.exchange.lost.with_label_values(&["lookup"]).inc();
}

/// Where a stored response is was looked for; `by` says what told it.
pub fn response_found(by: &str) {
    METRICS.exchange.found.with_label_values(&[by]).inc();
}

/// What a sibling has changed cannot be done here.
pub fn member_unusable(upstream: &str, why: &str) {
    METRICS.exchange.lost.with_label_values(&["member"]).inc();
    warn!(upstream = upstream, error = why; "a sibling's change of an upstream cannot be taken over");
}

/// Sets the number of siblings, and the age in seconds of the oldest message that counts.
pub fn siblings(count: usize, age: f64) {
    METRICS.exchange.siblings.set(i64::try_from(count).unwrap_or(i64::MAX));
    METRICS.exchange.age.set(age);
}

pub fn starting(version: &str, upstreams: usize) {
    info!(version = version, upstreams = upstreams; "starting");
}

pub fn demo_engine(upstream: &str) {
    info!(upstream = upstream; "simulated vLLM server started");
}

pub fn stopping(signal: &'static str, in_flight: u64) {
    info!(signal = signal, in_flight = in_flight; "stopping");
}

/// Another process asks for the sockets.
pub fn upgrade_requested(pid: u32, version: &str, sockets: usize) {
    info!(other = pid, version = version, sockets = sockets; "handing the listening sockets over");
}

/// It came to nothing, and nothing has changed.
pub fn upgrade_failed(error: &str) {
    warn!(error = error; "no hand-over, this process goes on");
}

/// Another process accepts now.
pub fn handed_over(pid: u32, in_flight: u64) {
    info!(other = pid, in_flight = in_flight; "handed over, requests in flight end here");
}

/// This process accepts in another's place.
pub fn took_over(pid: u32) {
    info!(other = pid; "took over from the running process");
}

/// Under the default path this is what mostly happens outside of a service manager.
pub fn no_upgrade(path: &Path, error: &str, by_default: bool) {
    let level = if by_default { log::Level::Info } else { log::Level::Warn };
    let path = path.display().to_string();
    log::log!(level, upgrade_socket = path, error = error; "no socket for upgrades, --upgrade will not work");
}

pub fn handover_signal() {
    info!("SIGQUIT: a process started with --upgrade takes over without it");
}

pub fn draining(time: Duration) {
    info!(seconds = time.as_secs_f64(); "draining, health says no");
}

pub fn stopped(cut: usize) {
    if cut == 0 {
        info!("stopped");
    } else {
        warn!(cut = cut; "stopped with requests still in flight");
    }
}
