//! Prompts that share their beginnings: a turn of a session keeps what its prompt adds to an earlier one.
//!
//! A node holds the rest of a prompt after the part that it shares with its parent, and the answer's token
//! ids, with which the prompt of the next turn usually goes on. Nodes are counted by their holders (traces
//! and child nodes), so that the bytes of a node are given back when the last of them goes.
//!
//! Never: I/O, a clock, recursion along a session, however long it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::traces::record::TraceRecord;

/// A prompt as the difference to its parent's prompt and answer.
#[derive(Debug)]
pub(super) struct PromptNode {
    parent: Option<Arc<PromptNode>>,
    /// The leading turns that are the parent's.
    kept_turns: usize,
    /// The leading token ids that are the parent's: its prompt's, then its answer's.
    kept_ids: usize,
    turns: Box<[Arc<str>]>,
    ids: Box<[u32]>,
    /// The token ids of the answer's first choice.
    answer_ids: Box<[u32]>,
    /// The numbers of all turns and ids of the prompt.
    turn_count: usize,
    id_count: usize,
    /// The text of the request; the parent's allocation when both are equal.
    request: Option<Arc<str>>,
    /// Traces and nodes that need this node. Changed under the lock of the store only.
    holders: AtomicUsize,
    bytes: u64,
}

/// What a prompt shares with an earlier one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct SharedPrompt {
    turns: usize,
    ids: usize,
    bytes: usize,
}

/// The memory of an allocation: its header and what the allocator rounds up.
pub(super) fn allocation(len: usize) -> u64 {
    match len {
        0 => 0,
        _ => (len as u64 + 16).next_multiple_of(16),
    }
}

// === impl PromptNode ===

impl PromptNode {
    /// The node of a record's prompt, with one holder, and the place in `earlier` of the prompt that it goes
    /// on with. The parent, which has a further holder then, is the one of `earlier` that saves most, or the
    /// ancestor of it that holds all that is shared.
    pub(super) fn new<'a>(
        record: &TraceRecord,
        earlier: impl Iterator<Item = &'a Arc<PromptNode>>,
    ) -> (PromptNode, Option<usize>) {
        let mut best: Option<(SharedPrompt, usize, &Arc<PromptNode>)> = None;
        for (place, node) in earlier.enumerate() {
            let shared = node.shared_with(record);
            if shared.bytes > 0 && best.as_ref().is_none_or(|(best, ..)| shared.bytes >= best.bytes) {
                best = Some((shared, place, node));
            }
        }
        let continued = best.and_then(|(shared, place, node)| node.is_whole_in(shared).then_some(place));
        let (shared, parent) = best.map_or_else(Default::default, |(shared, _, node)| (shared, Some(node)));
        let parent = parent.map(|mut parent| {
            while let Some(holder) = parent.parent.as_ref().filter(|_| parent.adds_nothing_to(shared)) {
                parent = holder;
            }
            parent
        });
        if let Some(parent) = parent {
            parent.holders.fetch_add(1, Ordering::Relaxed);
        }
        (PromptNode::after(record, shared, parent), continued)
    }

    fn after(record: &TraceRecord, shared: SharedPrompt, parent: Option<&Arc<PromptNode>>) -> PromptNode {
        let own_request = record.request.as_ref().map(|document| document.text.clone());
        let parents_request = parent.and_then(|parent| parent.request.clone());
        let request_shared = own_request.is_some() && own_request == parents_request;
        let mut node = PromptNode {
            parent: parent.cloned(),
            kept_turns: shared.turns,
            kept_ids: shared.ids,
            turns: record.turns[shared.turns..].into(),
            ids: record.prompt_token_ids[shared.ids..].into(),
            answer_ids: record
                .choices
                .first()
                .map(|choice| choice.token_ids.as_slice().into())
                .unwrap_or_default(),
            turn_count: record.turns.len(),
            id_count: record.prompt_token_ids.len(),
            request: if request_shared { parents_request } else { own_request },
            holders: AtomicUsize::new(1),
            bytes: 0,
        };
        let request_bytes = node.request.as_ref().filter(|_| !request_shared).map_or(0, |text| text.len());
        node.bytes = allocation(size_of::<PromptNode>())
            + node.turns.iter().map(|turn| allocation(turn.len()) + 16).sum::<u64>()
            + allocation(node.ids.len() * 4)
            + allocation(node.answer_ids.len() * 4)
            + allocation(request_bytes);
        node
    }

    /// Whether a prompt that shares this much has all turns of this one, or, without turns, all ids.
    fn is_whole_in(&self, shared: SharedPrompt) -> bool {
        match self.turn_count {
            0 => shared.ids >= self.id_count,
            turns => shared.turns == turns,
        }
    }

    /// Whether all that is shared is the parent's.
    fn adds_nothing_to(&self, shared: SharedPrompt) -> bool {
        shared.turns <= self.kept_turns && shared.ids <= self.kept_ids
    }

    /// The memory of this node alone.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn request(&self) -> Option<&Arc<str>> {
        self.request.as_ref()
    }

    pub(super) fn answer_ids(&self) -> &[u32] {
        &self.answer_ids
    }

    /// All turns of the prompt.
    pub(super) fn all_turns(&self) -> Vec<Arc<str>> {
        let mut parts: Vec<&[Arc<str>]> = Vec::new();
        let (mut node, mut keep) = (self, usize::MAX);
        loop {
            parts.push(&node.turns[..node.turns.len().min(keep.saturating_sub(node.kept_turns))]);
            keep = keep.min(node.kept_turns);
            match &node.parent {
                Some(parent) if keep > 0 => node = parent,
                _ => return parts.into_iter().rev().flatten().cloned().collect(),
            }
        }
    }

    /// All token ids of the prompt.
    pub(super) fn all_ids(&self) -> Vec<u32> {
        self.id_parts(false).concat()
    }

    /// The token ids of the prompt, and of the answer when `with_answer`, as they lie in the nodes.
    fn id_parts(&self, with_answer: bool) -> Vec<&[u32]> {
        let mut parts: Vec<&[u32]> = Vec::new();
        let (mut node, mut keep, mut answer) = (self, usize::MAX, with_answer);
        loop {
            let prompt_end = node.kept_ids + node.ids.len();
            if answer {
                let wanted = node.answer_ids.len().min(keep.saturating_sub(prompt_end));
                parts.push(&node.answer_ids[..wanted]);
            }
            parts.push(&node.ids[..node.ids.len().min(keep.saturating_sub(node.kept_ids))]);
            keep = keep.min(node.kept_ids);
            answer = true;
            match &node.parent {
                Some(parent) if keep > 0 => node = parent,
                _ => break,
            }
        }
        parts.reverse();
        parts
    }

    fn shared_with(&self, record: &TraceRecord) -> SharedPrompt {
        let turns = self.all_turns();
        let pairs = turns.iter().zip(&record.turns);
        let same_turns = pairs.take_while(|(held, new)| held == new);
        let (turns, turn_bytes) =
            same_turns.fold((0, 0), |(n, bytes), (turn, _)| (n + 1, bytes + turn.len()));
        let mut ids = 0;
        for part in self.id_parts(true) {
            let rest = &record.prompt_token_ids[ids..];
            let same = if rest.starts_with(part) {
                part.len()
            } else {
                part.iter().zip(rest).take_while(|(held, new)| held == new).count()
            };
            ids += same;
            if same < part.len() {
                break;
            }
        }
        SharedPrompt { turns, ids, bytes: turn_bytes + ids * 4 }
    }

    /// Takes one holder away. Answers the bytes of this node and of its ancestors that have none any more.
    pub(super) fn release(&self) -> u64 {
        let (mut node, mut freed) = (self, 0);
        while node.holders.fetch_sub(1, Ordering::Relaxed) == 1 {
            freed += node.bytes;
            match &node.parent {
                Some(parent) => node = parent,
                None => break,
            }
        }
        freed
    }
}

impl Drop for PromptNode {
    /// Drops the ancestors one by one: a session of many turns must not use up the stack.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(node) = next {
            next = Arc::into_inner(node).and_then(|mut node| node.parent.take());
        }
    }
}
