//! The list of upstreams that were changed at run time: one text for each name, the same at all balancers.
//!
//! It lives in a Redis hash, so that a restart finds it, with a mark beside it that is another after every
//! change. Whoever sees a mark that it does not know reads the list again. What was changed while Redis was
//! away is written when it is back, and what Redis has lost is given back by whoever still knows it.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redis::{Pipeline, Value};

use super::Keys;
use super::connect::{Link, PATIENCE};
use super::reply;
use super::trouble::Trouble;

/// The most names that are kept: a hash that others write to as well must not take the memory.
const MOST: usize = 10_000;

#[derive(Default)]
pub struct Members {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    all: HashMap<String, String>,
    /// Names whose texts are to be written.
    unsaid: HashSet<String>,
    /// As it was when the list was read.
    mark: Option<String>,
}

/// What a round has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// The list is another now.
    pub changed: bool,
    /// Something was written, which siblings do not know yet.
    pub written: bool,
}

impl Members {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An upstream was changed here.
    pub fn put(&self, name: &str, text: String) {
        let mut state = self.state();
        if state.all.len() < MOST || state.all.contains_key(name) {
            state.all.insert(name.into(), text);
            state.unsaid.insert(name.into());
        }
    }

    pub fn all(&self) -> HashMap<String, String> {
        self.state().all.clone()
    }

    pub fn wants_writing(&self) -> bool {
        !self.state().unsaid.is_empty()
    }

    /// Writes what is unsaid, and reads the list when its mark is another. `mark` is for what is written.
    pub async fn sync(&self, link: &mut Link, keys: &Keys, mark: &str) -> Result<Synced, Trouble> {
        let theirs = reply::text(&link.ask(redis::cmd("GET").arg(&keys.mark), PATIENCE).await?);
        let (writes, names) = self.writes(keys, mark, theirs.is_none());
        let written = writes.is_some();
        if let Some(writes) = writes {
            link.pipe(&writes).await?;
        } else if theirs == self.state().mark {
            return Ok(Synced::default());
        }
        let mut read = Pipeline::new();
        read.cmd("GET").arg(&keys.mark).cmd("HGETALL").arg(&keys.members);
        let answers = link.pipe(&read).await?;
        let [mark, list] = &answers[..] else { return Err(Trouble::strange("two answers to one question")) };
        Ok(Synced { changed: self.take_in(reply::text(mark), list, &names), written })
    }

    /// The commands that write what is unsaid, and all that is known where there is nothing any more; with
    /// the texts that they write.
    fn writes(&self, keys: &Keys, mark: &str, lost: bool) -> (Option<Pipeline>, HashMap<String, String>) {
        let state = self.state();
        let mut writes = Pipeline::new();
        let texts = |names: &HashSet<String>| -> HashMap<String, String> {
            let text = |name: &String| Some((name.clone(), state.all.get(name)?.clone()));
            names.iter().filter_map(text).collect()
        };
        let unsaid = texts(&state.unsaid);
        for (name, text) in &unsaid {
            writes.cmd("HSET").arg(&keys.members).arg(name).arg(text).ignore();
        }
        for (name, text) in state.all.iter().filter(|_| lost) {
            writes.cmd("HSETNX").arg(&keys.members).arg(name).arg(text).ignore();
        }
        if writes.is_empty() {
            return (None, unsaid);
        }
        writes.cmd("SET").arg(&keys.mark).arg(mark).ignore();
        (Some(writes), unsaid)
    }

    /// The list as it was read. `written` are the texts that stand in it by us: whatever was changed here
    /// since is still to be written.
    fn take_in(&self, mark: Option<String>, list: &Value, written: &HashMap<String, String>) -> bool {
        let mut state = self.state();
        if mark.is_none() && !state.all.is_empty() {
            // It was lost between two questions; the next round gives it back.
            return false;
        }
        state.mark = mark;
        let done = |name: &String, all: &HashMap<String, String>| all.get(name) == written.get(name);
        let State { all, unsaid, .. } = &mut *state;
        unsaid.retain(|name| !done(name, all));
        let mut read: HashMap<String, String> = reply::pairs(list).into_iter().take(MOST).collect();
        // Nobody ever takes a name out: one that was there and is not was lost, with an older state of Redis.
        let lost = all.keys().filter(|name| !read.contains_key(*name)).cloned();
        unsaid.extend(lost);
        for name in unsaid.iter() {
            read.extend(all.get(name).map(|text| (name.clone(), text.clone())));
        }
        let changed = *all != read;
        *all = read;
        changed
    }
}
