//! The keeper: one prober a upstream, and one task that turns their reports into snapshots.
//!
//! An upstream is ready after `health.rise` good rounds in a row and down after `health.fall` failed
//! ones. One that is not ready is asked more often, so that it is found soon after it comes up; one that
//! a request could not reach is asked at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::probe::{self, Facts, Finding, Report};
use super::snapshot::{Entry, Snapshot, State};
use super::{Fleet, Upstream};
use crate::config::types::Health;
use crate::observe;

/// Between two rounds while an upstream is not ready.
const IMPATIENT: Duration = Duration::from_millis(250);

/// Between two rounds at the least, however many requests doubt the upstream.
const LEAST: Duration = Duration::from_millis(50);

pub(super) async fn run(fleet: Arc<Fleet>, health: Health, mut stop: watch::Receiver<bool>) {
    let (reports, mut inbox) = mpsc::channel(64);
    let mut probers = JoinSet::new();
    for entry in &fleet.snapshot_owned().entries {
        let (fleet, health) = (fleet.clone(), health.clone());
        probers.spawn(probe_forever(fleet, entry.upstream.clone(), health, reports.clone()));
    }
    drop(reports);
    let mut streaks = vec![Streak::default(); fleet.snapshot().entries.len()];
    loop {
        let report = tokio::select! {
            report = inbox.recv() => report,
            _ = stop.wait_for(|stopping| *stopping) => None,
        };
        let Some(report) = report else { break };
        take_in(&fleet, &health, &mut streaks, report);
    }
    probers.shutdown().await;
}

async fn probe_forever(
    fleet: Arc<Fleet>,
    upstream: Arc<Upstream>,
    health: Health,
    reports: mpsc::Sender<Report>,
) {
    loop {
        let known = |entry: &Entry| entry.state == State::Ready && entry.version.is_some();
        let introduce = !known(&fleet.snapshot().entries[upstream.id]);
        let finding = probe::ask(fleet.client(), &upstream, &health, introduce).await;
        if reports.send(Report { upstream: upstream.clone(), finding }).await.is_err() {
            return;
        }
        let ready = fleet.snapshot().entries[upstream.id].state == State::Ready;
        let pause = if ready { health.interval } else { health.interval.min(IMPATIENT) };
        tokio::time::sleep(LEAST).await;
        tokio::select! {
            () = tokio::time::sleep(pause.saturating_sub(LEAST)) => {}
            () = upstream.doubt.notified() => {}
        }
    }
}

/// Rounds of one kind in a row.
#[derive(Clone, Copy, Default)]
struct Streak {
    good: u32,
    bad: u32,
}

impl Streak {
    /// The state after one more round.
    fn next(&mut self, up: bool, state: State, health: &Health) -> State {
        if up {
            *self = Streak { good: self.good.saturating_add(1), bad: 0 };
        } else {
            *self = Streak { good: 0, bad: self.bad.saturating_add(1) };
        }
        match state {
            State::Unknown | State::Down if self.good >= health.rise => State::Ready,
            State::Ready if self.bad >= health.fall => State::Down,
            same => same,
        }
    }
}

fn take_in(fleet: &Fleet, health: &Health, streaks: &mut [Streak], report: Report) {
    let present = fleet.snapshot_owned();
    let id = report.upstream.id;
    let entry = &present.entries[id];
    let up = matches!(report.finding, Finding::Up(_));
    let state = streaks[id].next(up, entry.state, health);
    if let Finding::Failed(why) = &report.finding {
        observe::probe_failed(report.upstream.name(), why, streaks[id].bad);
    }
    let Some(next) = changed(entry, state, report.finding) else { return };
    if next.state != entry.state {
        observe::upstream_changed(report.upstream.name(), entry.state.label(), next.state.label());
    }
    let mut entries = present.entries.clone();
    entries[id] = next;
    fleet.publish(Snapshot::new(entries));
}

/// The entry as it is now, or `None` when nothing a request could see is different.
fn changed(entry: &Entry, state: State, finding: Finding) -> Option<Entry> {
    let mut next = entry.clone();
    if let Finding::Up(Facts { models, version }) = finding {
        if !same_models(&models, &entry.models) {
            next.models = Arc::new(models);
        }
        if version.is_some() && version.as_deref() != entry.version.as_deref() {
            next.version = version.map(Arc::from);
        }
    }
    let same = state == entry.state
        && Arc::ptr_eq(&next.models, &entry.models)
        && next.version.as_deref() == entry.version.as_deref();
    if state != entry.state {
        next.state = state;
        next.since = Instant::now();
    }
    (!same).then_some(next)
}

/// Cards carry a fresh time and fresh permission ids with every answer; what counts is the rest.
fn same_models(one: &[crate::aggregate::ModelCard], other: &[crate::aggregate::ModelCard]) -> bool {
    let key = |card: &crate::aggregate::ModelCard| (card.id.clone(), card.max_model_len, card.parent.clone());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| key(a) == key(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(rounds: &str, health: &Health) -> Vec<State> {
        let mut streak = Streak::default();
        let mut state = State::Unknown;
        let step = |round: char| {
            state = streak.next(round == '+', state, health);
            state
        };
        rounds.chars().map(step).collect()
    }

    #[test]
    fn a_state_follows_from_rounds_in_a_row() {
        use State::{Down, Ready, Unknown};
        let health = Health { rise: 2, fall: 3, ..Health::default() };
        assert_eq!(walk("--+", &health), [Unknown; 3]);
        assert_eq!(walk("++--+---", &health), [Unknown, Ready, Ready, Ready, Ready, Ready, Ready, Down]);
        assert_eq!(
            walk("++---+-++", &health)[4..],
            [Down, Down, Down, Down, Ready],
            "one good round is no recovery"
        );
    }
}
