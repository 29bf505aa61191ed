//! The last traces of the sessions that are active, against which a new row is encoded.
//!
//! Of each conversation of a session the last trace is known: its turns by their hashes, its token ids, its
//! request. Bounded in bytes; a trace of a session that was forgotten is stored whole.
//!
//! Never: I/O.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128;

use crate::traces::record::TraceRecord;

/// The conversations of one session that are known: subagents take turns.
const MAX_BRANCHES: usize = 4;

/// What a row has to save, in bytes, to depend on another one.
const MIN_SAVED_BYTES: usize = 64;

/// The rows that a row may need one behind the other: to read one trace reads all of these.
const MAX_DEPTH: usize = 64;

/// The share of the maps in the memory of a session.
const ENTRY_BYTES: usize = 256;

/// The last traces of sessions, the least recently active of which is forgotten first.
pub(super) struct KnownParents {
    sessions: HashMap<Arc<str>, KnownSession>,
    activity: BTreeMap<u64, Arc<str>>,
    tick: u64,
    bytes: usize,
    limit: usize,
}

#[derive(Default)]
struct KnownSession {
    branches: Vec<KnownBranch>,
    tick: u64,
    bytes: usize,
}

/// The last trace of a conversation.
struct KnownBranch {
    trace_id: String,
    turns: Vec<u128>,
    /// The prompt's token ids, then those of the answer's first choice.
    ids: Vec<u32>,
    prompt_ids: usize,
    request: Option<Arc<str>>,
    /// The rows that its row needs.
    depth: usize,
}

/// What a row does not hold because its parent's has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RowDelta {
    pub parent: Option<String>,
    /// The leading turns of the parent's prompt.
    pub turns: usize,
    /// The leading token ids of the parent's prompt and of its first choice.
    pub prompt_ids: usize,
    pub request: SharedEnds,
}

/// The bytes at both ends of a text that are equal to those of another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SharedEnds {
    pub lead: usize,
    pub tail: usize,
}

// === impl KnownParents ===

impl KnownParents {
    pub(super) fn new(limit: usize) -> Self {
        let (sessions, activity) = (HashMap::new(), BTreeMap::new());
        KnownParents { sessions, activity, tick: 0, bytes: 0, limit }
    }

    /// What a record shares with the trace of its session that saves most; it is known from now on.
    pub(super) fn follow(&mut self, record: &TraceRecord) -> RowDelta {
        let turns: Vec<u128> = record.turns.iter().map(|turn| xxh3_128(turn.as_bytes())).collect();
        let id: Arc<str> = record.facts.session_id.as_str().into();
        self.tick += 1;
        let session = self.sessions.entry(id.clone()).or_insert_with(|| {
            self.bytes += ENTRY_BYTES;
            KnownSession::default()
        });
        self.activity.remove(&session.tick);
        session.tick = self.tick;
        self.activity.insert(self.tick, id);

        let (delta, continued) = session.delta(record, &turns);
        let is_parent = |branch: &&KnownBranch| delta.parent.as_ref() == Some(&branch.trace_id);
        let depth = session.branches.iter().find(is_parent).map_or(0, |parent| parent.depth + 1);
        if let Some(place) = continued {
            session.branches.remove(place);
        } else if session.branches.len() == MAX_BRANCHES {
            session.branches.remove(0);
        }
        session.branches.push(KnownBranch::new(record, turns, depth));
        let bytes = session.branches.iter().map(KnownBranch::bytes).sum();
        self.bytes = self.bytes + bytes - std::mem::replace(&mut session.bytes, bytes);
        self.shrink();
        delta
    }

    /// Forgets a session: its next trace is stored whole.
    pub(super) fn forget(&mut self, id: &str) {
        if let Some(session) = self.sessions.remove(id) {
            self.activity.remove(&session.tick);
            self.bytes -= session.bytes + ENTRY_BYTES;
        }
    }

    fn shrink(&mut self) {
        while self.bytes > self.limit {
            let Some(id) = self.activity.first_entry().map(|entry| entry.get().clone()) else { break };
            self.forget(&id);
        }
    }
}

// === impl KnownSession ===

impl KnownSession {
    /// What a record shares with the best branch, and the branch's place when the record goes on with it.
    fn delta(&self, record: &TraceRecord, turns: &[u128]) -> (RowDelta, Option<usize>) {
        let shared = self.branches.iter().enumerate().map(|(place, branch)| {
            let same_turns = branch.turns.iter().zip(turns).take_while(|(a, b)| a == b).count();
            let same_ids = equal_beginning(&branch.ids, &record.prompt_token_ids);
            let text: usize = record.turns[..same_turns].iter().map(|turn| turn.len()).sum();
            (text + 4 * same_ids, place, same_turns, same_ids)
        });
        // Of equal ones the most recent, which is the last.
        let Some((saved, place, turns, prompt_ids)) = shared.max_by_key(|(saved, ..)| *saved) else {
            return (RowDelta::default(), None);
        };
        let branch = &self.branches[place];
        let request = match (&branch.request, &record.request) {
            (Some(parent), Some(own)) => SharedEnds::of(parent, &own.text),
            _ => SharedEnds::default(),
        };
        let saves = saved + request.lead + request.tail >= MIN_SAVED_BYTES;
        let delta = match saves && branch.depth < MAX_DEPTH {
            true => RowDelta { parent: Some(branch.trace_id.clone()), turns, prompt_ids, request },
            false => RowDelta::default(),
        };
        let whole = match branch.turns.len() {
            0 => prompt_ids >= branch.prompt_ids && prompt_ids > 0,
            held => turns == held,
        };
        (delta, whole.then_some(place))
    }
}

// === impl KnownBranch ===

impl KnownBranch {
    fn new(record: &TraceRecord, turns: Vec<u128>, depth: usize) -> Self {
        let answer = record.choices.first().map_or(&[][..], |choice| &choice.token_ids);
        KnownBranch {
            trace_id: record.facts.trace_id.clone(),
            turns,
            ids: [&record.prompt_token_ids, answer].concat(),
            prompt_ids: record.prompt_token_ids.len(),
            request: record.request.as_ref().map(|document| document.text.clone()),
            depth,
        }
    }

    fn bytes(&self) -> usize {
        let request = self.request.as_ref().map_or(0, |text| text.len());
        size_of::<Self>() + self.trace_id.len() + self.turns.len() * 16 + self.ids.len() * 4 + request
    }
}

// === impl SharedEnds ===

impl SharedEnds {
    /// The equal ends of two texts, cut where characters begin; the ends do not overlap in either text.
    pub(super) fn of(parent: &str, own: &str) -> Self {
        let mut lead = equal_beginning(parent.as_bytes(), own.as_bytes());
        while !own.is_char_boundary(lead) {
            lead -= 1;
        }
        let (parent_rest, own_rest) = (&parent.as_bytes()[lead..], &own.as_bytes()[lead..]);
        let pairs = parent_rest.iter().rev().zip(own_rest.iter().rev());
        let mut tail = pairs.take_while(|(a, b)| a == b).count();
        while !own.is_char_boundary(own.len() - tail) {
            tail -= 1;
        }
        SharedEnds { lead, tail }
    }
}

/// How many items at the front of both lists are equal.
fn equal_beginning<T: Eq>(one: &[T], other: &[T]) -> usize {
    /// So many are compared at once.
    const COMPARED_AT_ONCE: usize = 64;
    let blocks = one.chunks_exact(COMPARED_AT_ONCE).zip(other.chunks_exact(COMPARED_AT_ONCE));
    let whole = COMPARED_AT_ONCE * blocks.take_while(|(one, other)| one == other).count();
    let pairs = one[whole..].iter().zip(&other[whole..]);
    whole + pairs.take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traces::store::samples::record;

    #[test]
    fn a_row_needs_few_others() {
        let (mut known, turn) = (KnownParents::new(1 << 20), "x".repeat(200));
        let (mut depth, mut whole) = (0, 0);
        for number in 0..1_000 {
            let delta = known.follow(&record("s", &number.to_string(), &[&turn], &[7; 100], &[3]));
            depth = if delta.parent.is_some() { depth + 1 } else { 0 };
            whole += usize::from(delta.parent.is_none());
            assert!(depth <= MAX_DEPTH);
        }
        assert_eq!(whole, 1_000_usize.div_ceil(MAX_DEPTH + 1), "only those are whole that must be");
    }
}
