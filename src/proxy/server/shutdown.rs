//! The progress of a shutdown, and the requests that still delay it.
//!
//! A client may send a request on an idle connection at any moment, also while this process closes the
//! connection, and that request would be lost. So the next answer on each connection carries
//! `connection: close`, and idle connections are closed only after a pause. Never: decide to shut down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// The phases of a shutdown, in order; the phase never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ShutdownPhase {
    Serving,
    /// Another process accepts on the same sockets; this one has stopped accepting.
    HandedOver,
    /// No process accepts on the sockets.
    Stopping,
    /// Requests still in flight are dropped.
    Cut,
}

impl ShutdownPhase {
    /// How long an idle connection stays open. Short after a stop, which should end the process soon; a
    /// hand-over is not urgent.
    fn linger_time(self) -> Duration {
        match self {
            ShutdownPhase::Serving | ShutdownPhase::HandedOver => Duration::from_secs(2),
            ShutdownPhase::Stopping | ShutdownPhase::Cut => Duration::from_millis(100),
        }
    }
}

/// Waits for `phase` or a later one. A dropped sender counts as the last phase.
pub(crate) async fn reached(
    phases: &mut watch::Receiver<ShutdownPhase>,
    phase: ShutdownPhase,
) -> ShutdownPhase {
    phases.wait_for(|now| *now >= phase).await.map_or(ShutdownPhase::Cut, |now| *now)
}

/// The state of the shutdown that all listeners share.
#[derive(Default)]
pub(crate) struct Shutdown {
    /// Requests of all connections.
    pub requests: RequestCounter,
    closing: AtomicBool,
    unready: Arc<AtomicBool>,
    /// The listeners have closed: streams that have no end of their own end now.
    streams_over: watch::Sender<bool>,
}

impl Shutdown {
    /// Makes answers carry `connection: close` from now on.
    pub(crate) fn announce_close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Begins the shutdown: `/health` reports 503 and answers carry `connection: close`.
    pub(crate) fn begin(&self) {
        self.unready.store(true, Ordering::Release);
        self.announce_close();
    }

    /// Ends the streams that have no end of their own.
    pub(crate) fn end_streams(&self) {
        self.streams_over.send_replace(true);
    }

    /// Waits for the end of streams that have no end of their own.
    pub(crate) async fn streams_over(&self) {
        // The sender lives as long as `self`.
        drop(self.streams_over.subscribe().wait_for(|over| *over).await);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// The flag behind `is_unready`, for the admin API.
    pub(crate) fn unready(&self) -> Arc<AtomicBool> {
        self.unready.clone()
    }

    /// Whether health checks should send clients to another balancer.
    pub(crate) fn is_unready(&self) -> bool {
        self.unready.load(Ordering::Acquire)
    }
}

/// Counts requests that have begun and ended.
#[derive(Default)]
pub(crate) struct RequestCounter {
    begun: AtomicU64,
    ended: AtomicU64,
    /// A task waits for the last request; without one, the end of a request sends no notification.
    awaited: AtomicBool,
    changed: Notify,
}

impl RequestCounter {
    fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
    }

    fn end(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) {
            self.changed.notify_waiters();
        }
    }

    /// The number of requests in flight.
    pub(crate) fn in_flight(&self) -> u64 {
        // In this order: a request that begins and ends between the two reads must not count as -1.
        let ended = self.ended.load(Ordering::SeqCst);
        self.begun.load(Ordering::SeqCst).saturating_sub(ended)
    }

    /// Waits until no request is in flight and none has begun for the linger time of `phase`.
    pub(crate) async fn wait_until_idle(&self, phase: ShutdownPhase) {
        self.awaited.store(true, Ordering::SeqCst);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let begun = self.begun.load(Ordering::SeqCst);
            if self.ended.load(Ordering::SeqCst) < begun {
                changed.await;
                continue;
            }
            tokio::time::sleep(phase.linger_time()).await;
            if self.begun.load(Ordering::SeqCst) == begun {
                return;
            }
        }
    }
}

tokio::task_local! {
    /// The requests of the connection that the task serves. Unset in the tasks of HTTP/2 streams: HTTP/2
    /// connections end with GOAWAY.
    static CONNECTION: Arc<RequestCounter>;
}

/// Runs `serving` until the connection ends, or until a shutdown finds the connection idle.
pub(crate) async fn end_when_unused(serving: impl Future, mut phases: watch::Receiver<ShutdownPhase>) {
    let requests = Arc::new(RequestCounter::default());
    let unused = async {
        let phase = reached(&mut phases, ShutdownPhase::HandedOver).await;
        // A connection without a request may be HTTP/2: it ends with the last request of all connections.
        while requests.begun.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(phase.linger_time()).await;
        }
        requests.wait_until_idle(phase).await;
    };
    tokio::select! {
        biased;
        _ = CONNECTION.scope(requests.clone(), serving) => {}
        () = unused => {}
    }
}

/// Counts a request as in flight until it is dropped.
pub(crate) struct InFlightRequest {
    shutdown: Arc<Shutdown>,
    connection: Option<Arc<RequestCounter>>,
}

impl InFlightRequest {
    pub(crate) fn new(shutdown: Arc<Shutdown>) -> Self {
        let connection = CONNECTION.try_with(Arc::clone).ok();
        shutdown.requests.begin();
        connection.iter().for_each(|requests| requests.begin());
        InFlightRequest { shutdown, connection }
    }
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        self.shutdown.requests.end();
        self.connection.iter().for_each(|requests| requests.end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn is_idle_once_the_last_request_has_ended_and_no_other_follows() {
        let shutdown = Arc::new(Shutdown::default());
        let first = InFlightRequest::new(shutdown.clone());
        let waiting = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.requests.wait_until_idle(ShutdownPhase::HandedOver).await }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished(), "one is in flight");
        drop(first);
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(InFlightRequest::new(shutdown.clone()));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!waiting.is_finished(), "one came meanwhile");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(waiting.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn ends_an_idle_connection_and_not_one_with_a_request_in_flight() {
        let (phase, phases) = watch::channel(ShutdownPhase::Serving);
        let shutdown = Arc::new(Shutdown::default());
        let serving = async move {
            drop(InFlightRequest::new(shutdown.clone()));
            let second = InFlightRequest::new(shutdown);
            tokio::time::sleep(Duration::from_secs(5)).await;
            drop(second);
            std::future::pending::<()>().await;
        };
        let serving = tokio::spawn(end_when_unused(serving, phases));
        phase.send_replace(ShutdownPhase::Stopping);
        tokio::time::sleep(Duration::from_millis(4900)).await;
        assert!(!serving.is_finished(), "a request is in flight");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(serving.is_finished());
    }
}
