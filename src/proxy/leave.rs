//! Taking leave: how far the end of serving has come, and what still keeps the balancer from it.
//!
//! A connection that stays open between requests may bring one at any moment, also while this process
//! closes it, and such a request would be lost. So connections first hear `connection: close` with their
//! next answer, and those that stay silent are closed only after a pause. Never: a decision to end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

/// How far the end of serving has come; it only ever goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// Another process accepts on the same sockets, and this one does not any more.
    HandedOver,
    /// Nothing is accepted any more.
    Stopping,
    /// What is left is dropped.
    Cut,
}

impl Phase {
    /// How long a connection stays open that brings no requests. Whoever meets a closed door after a stop
    /// knows no other one, and the process is wanted gone; after a hand-over there is no hurry.
    fn linger(self) -> Duration {
        match self {
            Phase::Serving | Phase::HandedOver => Duration::from_secs(2),
            Phase::Stopping | Phase::Cut => Duration::from_millis(100),
        }
    }
}

/// Waits until the end has come at least as far as `phase`. That the sender is gone is the end.
pub async fn reached(told: &mut watch::Receiver<Phase>, phase: Phase) -> Phase {
    told.wait_for(|now| *now >= phase).await.map_or(Phase::Cut, |now| *now)
}

/// What all listeners know of the end.
#[derive(Default)]
pub struct Leave {
    /// Requests of all connections.
    pub requests: Requests,
    closing: AtomicBool,
    unready: Arc<AtomicBool>,
}

impl Leave {
    /// From now on answers say that their connection ends.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// From now on health says no, too.
    pub fn go(&self) {
        self.unready.store(true, Ordering::Release);
        self.close();
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// The same for those who know nothing else of the end.
    pub fn leaving(&self) -> Arc<AtomicBool> {
        self.unready.clone()
    }

    /// Whether whoever sends clients here should send them elsewhere.
    pub fn is_leaving(&self) -> bool {
        self.unready.load(Ordering::Acquire)
    }
}

/// Requests that came and went.
#[derive(Default)]
pub struct Requests {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Somebody waits for the last one: until then an end needs to wake nobody.
    awaited: AtomicBool,
    changed: Notify,
}

impl Requests {
    fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
    }

    fn end(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) {
            self.changed.notify_waiters();
        }
    }

    /// Waits until none is in flight and none has begun for as long as connections linger in this phase.
    pub async fn quiet(&self, phase: Phase) {
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
            tokio::time::sleep(phase.linger()).await;
            if self.begun.load(Ordering::SeqCst) == begun {
                return;
            }
        }
    }
}

tokio::task_local! {
    /// The requests of the connection that the task serves. Requests of HTTP/2 have tasks of their own,
    /// which do not see it: pingora ends those connections itself, by the protocol's own means.
    static CONNECTION: Arc<Requests>;
}

/// Runs what serves a connection until it ends, or is of no more use to a process that ends.
pub async fn connection(serving: impl Future, mut told: watch::Receiver<Phase>) {
    let requests = Arc::new(Requests::default());
    let unused = async {
        let phase = reached(&mut told, Phase::HandedOver).await;
        // One that has brought none yet may be of HTTP/2: it ends with the last request of all.
        while requests.begun.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(phase.linger()).await;
        }
        requests.quiet(phase).await;
    };
    tokio::select! {
        biased;
        _ = CONNECTION.scope(requests.clone(), serving) => {}
        () = unused => {}
    }
}

/// Counts a request while it lives.
pub struct InFlight {
    leave: Arc<Leave>,
    connection: Option<Arc<Requests>>,
}

impl InFlight {
    pub fn new(leave: Arc<Leave>) -> Self {
        let connection = CONNECTION.try_with(Arc::clone).ok();
        leave.requests.begin();
        connection.iter().for_each(|requests| requests.begin());
        InFlight { leave, connection }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.leave.requests.end();
        self.connection.iter().for_each(|requests| requests.end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn quiet_is_when_the_last_has_ended_and_none_came_since() {
        let leave = Arc::new(Leave::default());
        let first = InFlight::new(leave.clone());
        let waiting = tokio::spawn({
            let leave = leave.clone();
            async move { leave.requests.quiet(Phase::HandedOver).await }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!waiting.is_finished(), "one is in flight");
        drop(first);
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(InFlight::new(leave.clone()));
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!waiting.is_finished(), "one came meanwhile");
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(waiting.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_between_its_requests() {
        let (phase, told) = watch::channel(Phase::Serving);
        let leave = Arc::new(Leave::default());
        let serving = async move {
            drop(InFlight::new(leave.clone()));
            let second = InFlight::new(leave);
            tokio::time::sleep(Duration::from_secs(5)).await;
            drop(second);
            std::future::pending::<()>().await;
        };
        let serving = tokio::spawn(connection(serving, told));
        phase.send_replace(Phase::Stopping);
        tokio::time::sleep(Duration::from_millis(4900)).await;
        assert!(!serving.is_finished(), "a request is in flight");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(serving.is_finished());
    }
}
