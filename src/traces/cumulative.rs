//! The last turn of each session, for the turn that continues from its tokens.
//!
//! The writer keeps a turn as soon as it is assembled. A client may send its next turn earlier: a call that
//! has ended counts as pending until its record is kept or dropped, and a request waits only for pending
//! calls of its session. While the writer makes no progress, one request waits in vain, and the others do not
//! wait.
//!
//! Never: a wait without a pending call, a turn of another session, a lock across an await.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::record::{CallFacts, CutDocument, TraceApi, TraceRecord, UNNAMED_SESSION};
use crate::route::cumulative::{RecordedChat, RecordedReply, RecordedTurn};

/// The most sessions whose last turn is kept; the least recently used go first.
const MAX_SESSIONS: usize = 50_000;

/// The most memory of last turns.
const MAX_TURN_BYTES: usize = 256 << 20;

/// The longest time that a turn waits for the record of the previous turn.
const MAX_LATENESS: Duration = Duration::from_secs(1);

/// The last turns of sessions.
#[derive(Default)]
pub(super) struct LastTurns {
    state: Mutex<LastTurnsState>,
}

#[derive(Default)]
struct LastTurnsState {
    sessions: HashMap<Arc<str>, KeptTurn>,
    /// The sessions by their last use.
    by_use: BTreeMap<u64, Arc<str>>,
    uses: u64,
    bytes: usize,
    /// The number of calls that have ended and are not kept yet.
    pending: HashMap<Arc<str>, PendingCalls>,
    /// Whether a request has waited in vain since the writer took the last call.
    is_stalled: bool,
}

struct KeptTurn {
    turn: Arc<RecordedTurn>,
    last_use: u64,
}

struct PendingCalls {
    count: usize,
    /// Notified when there are none any more.
    ended: Arc<Notify>,
}

/// A call that has ended, until it is dropped: then its turn is kept, or never will be.
pub(super) struct PendingTurn {
    turns: Arc<LastTurns>,
    session: Arc<str>,
    /// Whether the writer has taken the call; otherwise it was dropped, which does not count as progress.
    is_taken: bool,
}

impl std::fmt::Debug for PendingTurn {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "PendingTurn({})", self.session)
    }
}

/// Whether the call of these facts may be continued by another one.
fn may_continue(facts: &CallFacts) -> bool {
    facts.api == TraceApi::Chat && facts.session_id != UNNAMED_SESSION
}

/// The part of a record that the next turn needs; `None`: no turn can continue from it.
pub(super) fn recorded_turn(record: &TraceRecord) -> Option<RecordedTurn> {
    let facts = &record.facts;
    if !may_continue(facts) || facts.status != 200 || facts.error.is_some() || facts.partial {
        return None;
    }
    let replies = record.choices.iter().map(|choice| RecordedReply {
        message: &choice.message,
        ids: &choice.token_ids,
        finish_reason: choice.finish_reason.as_deref(),
    });
    RecordedTurn::new(&RecordedChat {
        model: &record.model,
        upstream: facts.upstream.as_deref(),
        fields: fields(record.request.as_ref()?)?,
        messages: record.turns.iter().map(|turn| &**turn).collect(),
        prompt: &record.prompt_token_ids,
        replies: replies.collect(),
    })
}

/// The fields of a body, with null for each part that stands elsewhere in the record.
fn fields(document: &CutDocument) -> Option<Map<String, Value>> {
    let mut text = String::with_capacity(document.text.len() + 4 * document.gaps.len());
    let mut from = 0;
    for gap in &document.gaps {
        text.push_str(document.text.get(from..gap.at)?);
        text.push_str("null");
        from = gap.at;
    }
    text.push_str(document.text.get(from..)?);
    serde_json::from_str(&text).ok()
}

// === impl LastTurns ===

impl LastTurns {
    /// Counts a call that has ended, until the result is dropped. `None`: no turn comes of it.
    pub(super) fn expect(self: &Arc<Self>, facts: &CallFacts) -> Option<PendingTurn> {
        if !may_continue(facts) {
            return None;
        }
        let session: Arc<str> = facts.session_id.as_str().into();
        let mut state = self.lock();
        let pending = state.pending.entry(session.clone());
        pending.or_insert_with(|| PendingCalls { count: 0, ended: Arc::default() }).count += 1;
        Some(PendingTurn { turns: self.clone(), session, is_taken: false })
    }

    /// Keeps the turn of a record, if another one can continue from it.
    pub(super) fn keep(&self, record: &TraceRecord) {
        if let Some(turn) = recorded_turn(record) {
            self.lock().keep(&record.facts.session_id, Arc::new(turn), MAX_TURN_BYTES);
        }
    }

    /// The last turn of a session, once all its calls that have ended are kept. `Err`: that takes too long.
    pub(super) async fn get(&self, session: &str) -> Result<Option<Arc<RecordedTurn>>, Late> {
        let deadline = Instant::now() + MAX_LATENESS;
        loop {
            let ended = {
                let mut state = self.lock();
                match state.pending.get(session) {
                    None => return Ok(state.get(session)),
                    // Made while the lock is held: no notification is missed.
                    Some(_) if state.is_stalled => return Err(Late),
                    Some(pending) => pending.ended.clone().notified_owned(),
                }
            };
            if timeout_at(deadline, ended).await.is_err() {
                // The writer waits for its store: requests do not wait for it in their turn.
                self.lock().is_stalled = true;
                return Err(Late);
            }
        }
    }

    /// Forgets a session that was deleted.
    pub(super) fn remove(&self, session: &str) {
        self.lock().remove(session);
    }

    fn lock(&self) -> MutexGuard<'_, LastTurnsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last turn of a session is not known in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Late;

// === impl LastTurnsState ===

impl LastTurnsState {
    fn keep(&mut self, session: &str, turn: Arc<RecordedTurn>, max_bytes: usize) {
        self.remove(session);
        let (name, last_use): (Arc<str>, u64) = (session.into(), self.uses);
        self.uses += 1;
        self.bytes += turn.bytes();
        self.by_use.insert(last_use, name.clone());
        self.sessions.insert(name, KeptTurn { turn, last_use });
        while self.bytes > max_bytes || self.sessions.len() > MAX_SESSIONS {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some(kept) = self.sessions.remove(&oldest) {
                self.bytes -= kept.turn.bytes();
            }
        }
    }

    fn get(&mut self, session: &str) -> Option<Arc<RecordedTurn>> {
        let kept = self.sessions.get_mut(session)?;
        let name = self.by_use.remove(&kept.last_use)?;
        kept.last_use = self.uses;
        self.uses += 1;
        self.by_use.insert(kept.last_use, name);
        Some(kept.turn.clone())
    }

    fn remove(&mut self, session: &str) {
        if let Some(kept) = self.sessions.remove(session) {
            self.by_use.remove(&kept.last_use);
            self.bytes -= kept.turn.bytes();
        }
    }
}

// === impl PendingTurn ===

impl PendingTurn {
    /// The writer makes progress: it has kept the turn, or found that none comes of the call.
    pub(super) fn taken(mut self) {
        self.is_taken = true;
    }
}

impl Drop for PendingTurn {
    fn drop(&mut self) {
        let mut state = self.turns.lock();
        state.is_stalled &= !self.is_taken;
        let Some(pending) = state.pending.get_mut(&self.session) else { return };
        pending.count -= 1;
        if pending.count == 0 {
            pending.ended.notify_waiters();
            state.pending.remove(&self.session);
        }
    }
}

#[cfg(test)]
mod tests;
