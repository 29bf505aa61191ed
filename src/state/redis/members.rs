//! The list of upstreams that were changed at run time: one text for each name, the same at all balancers.
//!
//! It lives in a Redis hash, so that a restart finds it, beside a mark that changes with every change. A
//! balancer that sees a new mark reads the list again. Changes made while Redis was unreachable are written
//! when it is back, and lost entries are restored by a balancer that still has them.
//!
//! Each text stands behind a number, `1795172158000 {...}`, which is higher than that of the text before it,
//! and about the time of its writing in milliseconds. A lower one than is known comes from an older state of
//! Redis, a snapshot or a replica that lagged, and is not believed.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redis::{Pipeline, Value};

use super::RedisKeys;
use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::reply;
use super::trouble::Trouble;

/// The most names that are stored: a hash that others write to as well must not exhaust the memory.
const MAX_MEMBERS: usize = 10_000;

#[derive(Default)]
pub struct Members {
    state: Mutex<MembersState>,
}

/// The record of one upstream, and its revision.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MemberText {
    number: u64,
    text: String,
}

#[derive(Default)]
struct MembersState {
    all: HashMap<String, MemberText>,
    /// Names whose texts are to be written.
    unsaid: HashSet<String>,
    /// As it was when the list was read.
    mark: Option<String>,
}

/// The result of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// The list has changed.
    pub changed: bool,
    /// Something was written, which siblings do not know yet.
    pub written: bool,
}

// === impl Text ===

impl MemberText {
    fn write(&self) -> String {
        format!("{} {}", self.number, self.text)
    }

    /// What has no number is older than all that has one.
    fn read(written: String) -> Self {
        let split = written.split_once(' ');
        let numbered = split.and_then(|(number, text)| Some((number.parse().ok()?, text)));
        match numbered {
            Some((number, text)) => MemberText { number, text: text.to_string() },
            None => MemberText { number: 0, text: written },
        }
    }
}

// === impl Members ===

impl Members {
    fn state(&self) -> MutexGuard<'_, MembersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An upstream was changed here.
    pub fn put(&self, name: &str, text: String) {
        let mut state = self.state();
        if state.all.len() < MAX_MEMBERS || state.all.contains_key(name) {
            let before = state.all.get(name).map_or(0, |text| text.number);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
            let number = u64::try_from(now).unwrap_or(0).max(before.saturating_add(1));
            state.all.insert(name.into(), MemberText { number, text });
            state.unsaid.insert(name.into());
        }
    }

    pub fn all(&self) -> HashMap<String, String> {
        let state = self.state();
        state.all.iter().map(|(name, text)| (name.clone(), text.text.clone())).collect()
    }

    pub fn has_unwritten(&self) -> bool {
        !self.state().unsaid.is_empty()
    }

    /// Writes what is unsaid, and reads the list when its mark is another. `mark` is for what is written.
    pub async fn sync(&self, link: &mut RedisLink, keys: &RedisKeys, mark: &str) -> Result<Synced, Trouble> {
        let theirs = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
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
    fn writes(
        &self,
        keys: &RedisKeys,
        mark: &str,
        lost: bool,
    ) -> (Option<Pipeline>, HashMap<String, MemberText>) {
        let state = self.state();
        let mut writes = Pipeline::new();
        let texts = |names: &HashSet<String>| -> HashMap<String, MemberText> {
            let text = |name: &String| Some((name.clone(), state.all.get(name)?.clone()));
            names.iter().filter_map(text).collect()
        };
        let unsaid = texts(&state.unsaid);
        for (name, text) in &unsaid {
            writes.cmd("HSET").arg(&keys.members).arg(name).arg(text.write()).ignore();
        }
        for (name, text) in state.all.iter().filter(|_| lost) {
            writes.cmd("HSETNX").arg(&keys.members).arg(name).arg(text.write()).ignore();
        }
        if writes.is_empty() {
            return (None, unsaid);
        }
        writes.cmd("SET").arg(&keys.mark).arg(mark).ignore();
        (Some(writes), unsaid)
    }

    /// The list as it was read. `written` are the texts that stand in it by us: whatever was changed here
    /// since is still to be written.
    fn take_in(&self, mark: Option<String>, list: &Value, written: &HashMap<String, MemberText>) -> bool {
        let mut state = self.state();
        if mark.is_none() && !state.all.is_empty() {
            // It was lost between two questions; the next round gives it back.
            return false;
        }
        state.mark = mark;
        let done = |name: &String, all: &HashMap<String, MemberText>| all.get(name) == written.get(name);
        let MembersState { all, unsaid, .. } = &mut *state;
        unsaid.retain(|name| !done(name, all));
        let pairs = reply::pairs(list).into_iter().take(MAX_MEMBERS);
        let mut read: HashMap<String, MemberText> =
            pairs.map(|(name, text)| (name, MemberText::read(text))).collect();
        // Names are never removed: one that is missing was lost with an older state of Redis.
        let is_older = |(name, known): &(&String, &MemberText)| {
            read.get(*name).is_none_or(|read| read.number < known.number)
        };
        unsaid.extend(all.iter().filter(is_older).map(|(name, _)| name.clone()));
        for name in unsaid.iter() {
            read.extend(all.get(name).map(|text| (name.clone(), text.clone())));
        }
        let changed = *all != read;
        *all = read;
        changed
    }
}
