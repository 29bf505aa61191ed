//! The task that probes one upstream, for as long as the keeper watches it.

use std::sync::Arc;

use tokio::sync::watch;

use super::keeper_message::KeeperMessage;
use super::probe;
use super::probe_connection::ProbeConnection;
use super::probe_duty::{MIN_PROBE_INTERVAL, ProbeShare, UpstreamCondition};
use super::shared_probes::ProbeCircle;
use super::upstream::Upstream;
use super::{Fleet, metrics_reader, now};
use crate::aggregate::ModelCard;

/// Probes one upstream and reads its metrics, until it is no longer watched.
pub(super) async fn watch_upstream(fleet: Arc<Fleet>, upstream: Arc<Upstream>) {
    tokio::select! {
        () = probe_forever(&fleet, upstream.clone()) => {}
        () = metrics_reader::read_metrics_forever(&fleet, &upstream) => {}
    }
}

/// What one probe needs of the snapshot.
struct ProbeTurn {
    upstream: Arc<Upstream>,
    /// The probe also has to show that the upstream accepts connections.
    doubts: bool,
    models: Arc<Vec<ModelCard>>,
    fetch_version: bool,
}

/// Probes one upstream until it is no longer watched.
async fn probe_forever(fleet: &Fleet, first: Arc<Upstream>) {
    let id = first.id;
    let mut circle = fleet.shared.subscribe();
    let mut connection = ProbeConnection::default();
    let mut turn = first_turn(first, &mut circle).await;
    loop {
        if turn.doubts {
            connection.close();
        }
        let rules = fleet.rules.load_full();
        let upstream = &turn.upstream;
        let found =
            probe::probe(fleet.client(), &mut connection, upstream, &rules.health, turn.fetch_version);
        let found = found.await;
        fleet.observer.probed(upstream.name());
        let share = share(fleet, &turn, found.is_ok(), &circle);
        if share.publish {
            fleet.shared.put_probe(upstream, found.as_ref().ok(), &turn.models);
        }
        let metrics = found.is_ok() && share.metrics;
        if fleet.keeper.send(KeeperMessage::Probed { id, found }).await.is_err() {
            return;
        }
        if metrics {
            upstream.live.well.notify_one();
        }
        if !share.metrics {
            // The next own probe is later than the server keeps an idle connection.
            connection.close();
        }
        // The keeper publishes the result meanwhile.
        tokio::time::sleep(MIN_PROBE_INTERVAL).await;
        match next_turn(fleet, id, &mut circle).await {
            Some(next) => turn = next,
            None => return,
        }
    }
}

/// Waits for the first probe. The snapshot may not have the upstream yet.
async fn first_turn(upstream: Arc<Upstream>, circle: &mut watch::Receiver<Arc<ProbeCircle>>) -> ProbeTurn {
    let first = upstream.live.duty().first_probe();
    tokio::select! {
        () = tokio::time::sleep_until(first.into()) => {}
        () = upstream.live.wake.notified() => {}
    }
    circle.mark_unchanged();
    upstream.live.duty().begin_probe();
    ProbeTurn { upstream, doubts: true, models: Arc::default(), fetch_version: true }
}

/// Waits until a probe is due; `None` when the upstream is no longer watched.
async fn next_turn(
    fleet: &Fleet,
    id: usize,
    circle: &mut watch::Receiver<Arc<ProbeCircle>>,
) -> Option<ProbeTurn> {
    loop {
        let (due, turn) = {
            let (snapshot, balancers) = (fleet.snapshot(), circle.borrow_and_update().clone());
            let entry = snapshot.watched(id)?;
            let view = fleet.duty_view(&entry.upstream, Some(entry), &balancers, now());
            let mut duty = entry.upstream.live.duty();
            let due = duty.due(&view);
            let turn = ProbeTurn {
                upstream: entry.upstream.clone(),
                doubts: view.condition != UpstreamCondition::Works || duty.is_in_doubt(),
                models: entry.models.clone(),
                fetch_version: !entry.is_ready() || entry.version.is_none(),
            };
            if due <= now() {
                duty.begin_probe();
                return Some(turn);
            }
            (due, turn)
        };
        tokio::select! {
            () = tokio::time::sleep_until(due.into()) => {}
            () = turn.upstream.live.wake.notified() => {}
            Ok(()) = circle.changed() => {}
        }
    }
}

/// Records the result of a probe, and returns what to do with it.
fn share(
    fleet: &Fleet,
    turn: &ProbeTurn,
    good: bool,
    circle: &watch::Receiver<Arc<ProbeCircle>>,
) -> ProbeShare {
    let (circle, snapshot) = (circle.borrow().clone(), fleet.snapshot());
    let view = fleet.duty_view(&turn.upstream, snapshot.watched(turn.upstream.id), &circle, now());
    turn.upstream.live.duty().probed(good, &view, fleet.draw())
}
