//! The list of upstreams that were changed at run time: one record for each name, equal at all balancers.
//!
//! The list is a Redis hash, so that it survives restarts of balancers, beside a mark that changes with every
//! change of the list. A balancer that reads a new mark reads the list again. Changes made while Redis was
//! unreachable are written later, and lost records are restored by a balancer that still has them.
//!
//! Each record is stored behind its revision, `1795172158000 {...}`: about the time of writing in
//! milliseconds, and higher than the revision before. A lower revision than the known one comes from an
//! older state of Redis, such as a snapshot or a lagging replica, and is ignored.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use redis::{Pipeline, Value};

use super::RedisKeys;
use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply;

/// The largest number of names: a hash with foreign writers must not exhaust the memory.
const MAX_MEMBERS: usize = 10_000;

/// The members as this balancer knows them.
#[derive(Default)]
pub struct Members {
    state: Mutex<MembersState>,
}

/// The record of one upstream, and its revision.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MemberText {
    revision: u64,
    text: String,
}

#[derive(Default)]
struct MembersState {
    all: HashMap<String, MemberText>,
    /// The names whose records are not written yet.
    unwritten: HashSet<String>,
    /// The mark at the last read of the list.
    mark: Option<String>,
}

/// The result of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Synced {
    /// The list has changed.
    pub changed: bool,
    /// Records were written, of which siblings must be notified.
    pub written: bool,
}

// === impl MemberText ===

impl MemberText {
    fn write(&self) -> String {
        format!("{} {}", self.revision, self.text)
    }

    /// Parses a record; one without a revision is older than any with one.
    fn read(written: String) -> Self {
        let split = written.split_once(' ');
        let numbered = split.and_then(|(revision, text)| Some((revision.parse().ok()?, text)));
        match numbered {
            Some((revision, text)) => MemberText { revision, text: text.to_string() },
            None => MemberText { revision: 0, text: written },
        }
    }
}

// === impl Members ===

impl Members {
    fn state(&self) -> MutexGuard<'_, MembersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the record of an upstream that was changed here.
    pub fn put(&self, name: &str, text: String) {
        let mut state = self.state();
        if state.all.len() < MAX_MEMBERS || state.all.contains_key(name) {
            let before = state.all.get(name).map_or(0, |text| text.revision);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
            let revision = u64::try_from(now).unwrap_or(0).max(before.saturating_add(1));
            state.all.insert(name.into(), MemberText { revision, text });
            state.unwritten.insert(name.into());
        }
    }

    /// Returns all records by name.
    pub fn all(&self) -> HashMap<String, String> {
        let state = self.state();
        state.all.iter().map(|(name, text)| (name.clone(), text.text.clone())).collect()
    }

    /// Whether some record is not written yet.
    pub fn has_unwritten(&self) -> bool {
        !self.state().unwritten.is_empty()
    }

    /// Writes the unwritten records, with `mark` as the new mark, and reads the list when the stored mark
    /// differs.
    pub async fn sync(
        &self,
        link: &mut RedisLink,
        keys: &RedisKeys,
        mark: &str,
    ) -> Result<Synced, RedisFailure> {
        let stored_mark = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
        let (writes, names) = self.writes(keys, mark, stored_mark.is_none());
        let written = writes.is_some();
        if let Some(writes) = writes {
            link.pipe(&writes).await?;
        } else if stored_mark == self.state().mark {
            return Ok(Synced::default());
        }
        let mut read = Pipeline::new();
        read.cmd("GET").arg(&keys.mark).cmd("HGETALL").arg(&keys.members);
        let answers = link.pipe(&read).await?;
        let [mark, list] = &answers[..] else {
            return Err(RedisFailure::unexpected(
                "the number of answers differs from the number of commands",
            ));
        };
        Ok(Synced { changed: self.apply_list(reply::text(mark), list, &names), written })
    }

    /// Builds the commands that write the unwritten records, and all records when the list was lost. Also
    /// returns the unwritten records.
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
        let unwritten = texts(&state.unwritten);
        for (name, text) in &unwritten {
            writes.cmd("HSET").arg(&keys.members).arg(name).arg(text.write()).ignore();
        }
        for (name, text) in state.all.iter().filter(|_| lost) {
            writes.cmd("HSETNX").arg(&keys.members).arg(name).arg(text.write()).ignore();
        }
        if writes.is_empty() {
            return (None, unwritten);
        }
        writes.cmd("SET").arg(&keys.mark).arg(mark).ignore();
        (Some(writes), unwritten)
    }

    /// Applies the list as it was read. `written` are the records that this balancer has just written;
    /// records that changed since stay unwritten. Returns whether the list has changed.
    fn apply_list(&self, mark: Option<String>, list: &Value, written: &HashMap<String, MemberText>) -> bool {
        let mut state = self.state();
        if mark.is_none() && !state.all.is_empty() {
            // The list was lost between two commands; the next round restores it.
            return false;
        }
        state.mark = mark;
        let done = |name: &String, all: &HashMap<String, MemberText>| all.get(name) == written.get(name);
        let MembersState { all, unwritten, .. } = &mut *state;
        unwritten.retain(|name| !done(name, all));
        let pairs = reply::pairs(list).into_iter().take(MAX_MEMBERS);
        let mut read: HashMap<String, MemberText> =
            pairs.map(|(name, text)| (name, MemberText::read(text))).collect();
        // Names are never removed: a missing one was lost with an older state of Redis.
        let is_older = |(name, known): &(&String, &MemberText)| {
            read.get(*name).is_none_or(|read| read.revision < known.revision)
        };
        unwritten.extend(all.iter().filter(is_older).map(|(name, _)| name.clone()));
        for name in unwritten.iter() {
            read.extend(all.get(name).map(|text| (name.clone(), text.clone())));
        }
        let changed = *all != read;
        *all = read;
        changed
    }
}
