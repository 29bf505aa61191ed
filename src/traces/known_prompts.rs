//! The last prompt of each active session, as token ids: the next turn's prompt begins with them, so that
//! only the ids after them are parsed.
//!
//! Never: more memory than [`MAX_KNOWN_BYTES`], an id that was not compared with the engine's text.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::assemble::KnownPrompt;
use super::record::UNNAMED_SESSION;

/// The most memory of known prompts; the least recently used go first.
const MAX_KNOWN_BYTES: usize = 64 << 20;

/// What a session takes beside the ids of its prompt.
const ENTRY_BYTES: usize = 256;

/// The last prompts of active sessions.
#[derive(Default)]
pub(super) struct KnownPrompts {
    state: Mutex<KnownPromptsState>,
}

#[derive(Default)]
struct KnownPromptsState {
    sessions: HashMap<Arc<str>, KeptPrompt>,
    /// The sessions by their last use.
    by_use: BTreeMap<u64, Arc<str>>,
    uses: u64,
    bytes: usize,
}

struct KeptPrompt {
    prompt: KnownPrompt,
    bytes: usize,
    last_use: u64,
}

// === impl KnownPrompts ===

impl KnownPrompts {
    /// The prompt of a session, which is kept no longer; an empty one where there is none.
    pub(super) fn take(&self, session: &str) -> KnownPrompt {
        self.lock().remove(session).unwrap_or_default()
    }

    /// Keeps the prompt of a session. Calls without a session have nothing in common.
    pub(super) fn keep(&self, session: &str, prompt: KnownPrompt) {
        if session != UNNAMED_SESSION && prompt.bytes() > 0 {
            self.lock().keep(session, prompt, MAX_KNOWN_BYTES);
        }
    }

    /// Forgets a session that was deleted.
    pub(super) fn remove(&self, session: &str) {
        self.lock().remove(session);
    }

    fn lock(&self) -> MutexGuard<'_, KnownPromptsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl KnownPromptsState ===

impl KnownPromptsState {
    fn keep(&mut self, session: &str, prompt: KnownPrompt, max_bytes: usize) {
        self.remove(session);
        let (name, last_use): (Arc<str>, u64) = (session.into(), self.uses);
        let bytes = prompt.bytes() + 2 * session.len() + ENTRY_BYTES;
        self.uses += 1;
        self.bytes += bytes;
        self.by_use.insert(last_use, name.clone());
        self.sessions.insert(name, KeptPrompt { prompt, bytes, last_use });
        while self.bytes > max_bytes {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            if let Some(kept) = self.sessions.remove(&oldest) {
                self.bytes -= kept.bytes;
            }
        }
    }

    fn remove(&mut self, session: &str) -> Option<KnownPrompt> {
        let kept = self.sessions.remove(session)?;
        self.by_use.remove(&kept.last_use);
        self.bytes -= kept.bytes;
        Some(kept.prompt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_session_goes_first() {
        let prompt = || KnownPrompt::of_list(&(0..1_000).collect::<Vec<_>>());
        let one = prompt().bytes() + 2 + ENTRY_BYTES;
        let mut state = KnownPromptsState::default();
        for session in ["a", "b", "a", "c"] {
            state.keep(session, prompt(), 2 * one);
            assert!(state.bytes <= 2 * one);
        }
        assert_eq!((state.sessions.len(), state.by_use.len(), state.bytes), (2, 2, 2 * one));
        assert!(state.remove("b").is_none());
        assert_eq!(state.remove("a"), Some(prompt()));
        assert_eq!(state.remove("c"), Some(prompt()));
        assert_eq!((state.by_use.len(), state.bytes), (0, 0));
    }
}
