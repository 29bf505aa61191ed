//! The list of upstreams that were changed at run time: one record for each name.
//!
//! Each record is stored behind its revision, `1795172158000 {...}`: about the time of writing in
//! milliseconds, and higher than the revision before. A lower revision than the known one comes from an
//! older state of Redis, such as a snapshot or a lagging replica, and is ignored.
//!
//! A record that changes nothing any more, or only removes its upstream, expires after `RECORD_TTL`. Its
//! name and revision are remembered, so that no older state brings it back.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::member::{MemberRecord, entry_hash};
use crate::config::types::UpstreamConfig;

/// The largest number of names: a hash with foreign writers must not exhaust the memory.
pub const MAX_MEMBERS: usize = 10_000;

/// The time after which the record of a removed upstream expires.
pub const RECORD_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// The further time after which an expired record is deleted from Redis. Balancers whose clock is behind
/// would write it again before.
const DELETE_DELAY: Duration = Duration::from_secs(3600);

/// The largest revision; a greater one counts as none. Not measured by the own clock: the clocks of two
/// balancers may differ by any time, and both must agree on which change is newer.
const MAX_REVISION: u64 = u64::MAX / 2;

/// The interval between two searches for expired records.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(600);

/// The members as this balancer knows them.
pub struct Members {
    state: Mutex<MembersState>,
    /// Held from the reading of a record to the writing of the changed one.
    edits: tokio::sync::Mutex<()>,
    /// When this process began, by the clock of revisions.
    began: u64,
}

/// The record of one upstream, and its revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberText {
    pub revision: u64,
    pub text: String,
}

/// The records to write to the shared list, and the names to delete from it.
#[derive(Debug, Default)]
pub struct UnwrittenMembers {
    /// The records that this balancer has changed.
    pub changed: HashMap<String, MemberText>,
    /// The other records that the list lacks, when it was lost.
    pub lost: HashMap<String, MemberText>,
    /// The names of expired records.
    pub expired: Vec<String>,
}

/// The shared list as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListedMembers {
    /// The names with their texts.
    pub records: Vec<(String, String)>,
    /// The number of names in the list.
    pub count: usize,
    /// All names were read.
    pub is_whole: bool,
}

/// The result of a read of the shared list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergedMembers {
    /// The records have changed.
    pub changed: bool,
    /// The list has more than `MAX_MEMBERS` names, and had not before.
    pub is_overfull: bool,
}

/// The entries of the file of this balancer: the hash of each by the name of its upstream.
pub type FileEntries = BTreeMap<String, u64>;

#[derive(Default)]
struct MembersState {
    all: HashMap<String, MemberText>,
    /// The names whose records are not written yet.
    unwritten: HashSet<String>,
    /// The revisions of expired records, by name.
    expired: HashMap<String, u64>,
    /// The names of expired records that the shared list still has.
    undeleted: HashSet<String>,
    /// When expired records were last searched, in milliseconds.
    searched_at: u64,
    /// The shared list has too many names.
    overfull: bool,
    /// The mark at the last read of the list.
    mark: Option<String>,
    /// The entries of the file, and how often they were set.
    entries: (Arc<FileEntries>, u64),
}

/// The clock of revisions: milliseconds since the epoch.
fn clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    u64::try_from(now).unwrap_or(0)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

// === impl MemberText ===

impl MemberText {
    /// Serializes the record with its revision.
    pub fn write(&self) -> String {
        format!("{} {}", self.revision, self.text)
    }

    /// Parses a record; one without a revision is older than any with one.
    pub fn read(written: String) -> Self {
        let split = written.split_once(' ');
        let numbered = split.and_then(|(revision, text)| Some((revision.parse().ok()?, text)));
        match numbered {
            Some((revision, text)) => MemberText { revision, text: text.to_string() },
            None => MemberText { revision: 0, text: written },
        }
    }

    /// Whether the record is written again where the shared list has lost it. A text without a revision is
    /// not of a balancer: where it is deleted, it stays deleted.
    fn is_restorable(&self) -> bool {
        self.revision > 0
    }

    /// Returns how long ago the record was written; a record without a revision has no age.
    fn age(&self, now: u64) -> u64 {
        if self.revision == 0 { 0 } else { now.saturating_sub(self.revision) }
    }

    /// Whether the record has expired.
    fn is_expired(&self, now: u64) -> bool {
        self.age(now) > millis(RECORD_TTL)
            && MemberRecord::read(&self.text).is_ok_and(|record| record.may_expire())
    }
}

// === impl Members ===

impl Default for Members {
    fn default() -> Self {
        Members { state: Mutex::default(), edits: tokio::sync::Mutex::default(), began: clock() }
    }
}

impl Members {
    /// Waits until no other task changes records that it has read.
    pub async fn edit(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.edits.lock().await
    }

    fn state(&self) -> MutexGuard<'_, MembersState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the record of an upstream that was changed here. Returns `false` and changes nothing when there
    /// is no room for another name.
    #[must_use]
    pub fn put(&self, name: &str, text: String) -> bool {
        let mut state = self.state();
        if !state.has_room([name]) {
            return false;
        }
        let known = state.all.get(name).map(|text| text.revision);
        let before = known.or(state.expired.remove(name)).unwrap_or(0);
        let revision = clock().max(before.saturating_add(1));
        state.undeleted.remove(name);
        state.all.insert(name.into(), MemberText { revision, text });
        state.unwritten.insert(name.into());
        true
    }

    /// Sets the entries of the file, after the changes that end with it.
    pub fn set_entries(&self, upstreams: &[UpstreamConfig]) {
        let entries = upstreams.iter().map(|upstream| (upstream.name.clone(), entry_hash(upstream)));
        let entries = Arc::new(entries.collect());
        let mut state = self.state();
        state.entries = (entries, state.entries.1 + 1);
    }

    /// Returns the entries of the file, and how often they were set.
    pub fn entries(&self) -> (Arc<FileEntries>, u64) {
        self.state().entries.clone()
    }

    /// Ends the changes of the upstreams whose entries have changed since the file that this balancer had
    /// before, as a reload does. Changes that were made since this process began stay: the comparison may
    /// come late. Returns whether any ended.
    pub fn end_outdated(&self, before: &FileEntries) -> bool {
        let (now, _) = self.entries();
        let mut ended = false;
        for (name, entry) in &*now {
            let is_changed = before.get(name).is_some_and(|before| before != entry);
            let text = is_changed.then(|| self.state().all.get(name).cloned()).flatten();
            let text = text.filter(|text| text.revision <= self.began);
            let record = text.and_then(|text| MemberRecord::read(&text.text).ok());
            if record.is_some_and(|record| !record.changes_nothing() && !record.outlasts(*entry)) {
                // The name has a record, so there is room.
                ended |= self.put(name, MemberRecord::default().write());
            }
        }
        ended
    }

    /// Writes an unchanged record again when it would expire soon: its upstream is still configured.
    /// Returns whether it was written.
    pub fn refresh(&self, name: &str) -> bool {
        let mut state = self.state();
        let (now, MembersState { all, unwritten, .. }) = (clock(), &mut *state);
        let Some(known) = all.get_mut(name) else { return false };
        if known.age(now) <= millis(RECORD_TTL) / 2 {
            return false;
        }
        known.revision = now;
        unwritten.insert(name.into());
        true
    }

    /// Adds a record of another process with its revision, if it is newer than the known one. It is written
    /// to the shared list. Returns whether it was added.
    pub fn adopt(&self, name: &str, text: MemberText) -> bool {
        let mut state = self.state();
        let known = state.all.get(name).map(|known| known.revision).or(state.expired.get(name).copied());
        let is_newer = known.is_none_or(|known| known < text.revision);
        let adopted = is_newer && state.has_room([name]) && !text.is_expired(clock());
        if adopted {
            state.all.insert(name.into(), text);
            state.unwritten.insert(name.into());
        }
        adopted
    }

    /// Whether the names fit beside those of the present records.
    pub fn has_room<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> bool {
        self.state().has_room(names)
    }

    /// Returns the record of this name.
    pub fn get(&self, name: &str) -> Option<String> {
        self.state().all.get(name).map(|text| text.text.clone())
    }

    /// Returns all records by name.
    pub fn all(&self) -> HashMap<String, String> {
        let state = self.state();
        state.all.iter().map(|(name, text)| (name.clone(), text.text.clone())).collect()
    }

    /// Returns all records with their revisions, by name.
    pub fn revisions(&self) -> HashMap<String, MemberText> {
        self.state().all.clone()
    }

    /// Whether some record is not written yet.
    pub fn has_unwritten(&self) -> bool {
        let state = self.state();
        !state.unwritten.is_empty() || !state.undeleted.is_empty()
    }

    /// Removes expired records, at most once in `EXPIRY_INTERVAL`.
    pub fn expire(&self) {
        self.state().expire(clock());
    }

    /// Whether the records are those of the shared list with this mark.
    pub fn is_read(&self, mark: Option<&str>) -> bool {
        self.state().mark.as_deref() == mark
    }

    /// Whether a shared list was read.
    pub fn was_read(&self) -> bool {
        self.state().mark.is_some()
    }

    /// Returns what the shared list lacks; all records where the list was `lost`, each of them once: a user
    /// that may restore records and not write changes must not write a change as a restored record.
    pub fn unwritten(&self, lost: bool) -> UnwrittenMembers {
        let state = self.state();
        let text = |name: &String| Some((name.clone(), state.all.get(name)?.clone()));
        let mut lost = if lost { state.all.clone() } else { HashMap::new() };
        lost.retain(|name, text| text.is_restorable() && !state.unwritten.contains(name));
        UnwrittenMembers {
            changed: state.unwritten.iter().filter_map(text).collect(),
            lost,
            expired: state.undeleted.iter().cloned().collect(),
        }
    }

    /// Applies the list as it was read. `written` is what this balancer has just written; records that
    /// changed since stay unwritten.
    pub fn merge(
        &self,
        mark: Option<String>,
        list: ListedMembers,
        written: &UnwrittenMembers,
    ) -> MergedMembers {
        let mut state = self.state();
        if mark.is_none() && !state.all.is_empty() {
            // The list was lost between two commands; the next round restores it.
            return MergedMembers::default();
        }
        state.mark = mark;
        state.undeleted.retain(|name| !written.expired.contains(name));
        let overfull = list.count > MAX_MEMBERS;
        let was_overfull = std::mem::replace(&mut state.overfull, overfull);
        let mut read = state.read(list.records, clock());
        if !list.is_whole {
            // The known names that were not read are not lost.
            for (name, text) in &state.all {
                read.entry(name.clone()).or_insert_with(|| text.clone());
            }
        }
        MergedMembers { changed: state.merge(read, &written.changed), is_overfull: overfull && !was_overfull }
    }
}

// === impl MembersState ===

impl MembersState {
    fn has_room<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> bool {
        let new = names.into_iter().filter(|name| !self.all.contains_key(*name)).count();
        new == 0 || self.all.len() + new <= MAX_MEMBERS
    }

    /// Parses the records of the shared list, without expired ones, which are to be deleted.
    fn read(&mut self, pairs: Vec<(String, String)>, now: u64) -> HashMap<String, MemberText> {
        self.searched_at = 0;
        self.expire(now);
        let mut read = HashMap::new();
        for (name, text) in pairs {
            let mut text = MemberText::read(text);
            if text.revision > MAX_REVISION {
                // No balancer wrote it, and no change would be newer for long.
                text.revision = 0;
            }
            let is_over = self.expired.get(&name).is_some_and(|expired| text.revision <= *expired);
            if is_over || text.is_expired(now) {
                self.mark_expired(name, &text, now);
            } else if read.len() < MAX_MEMBERS || self.all.contains_key(&name) {
                read.insert(name, text);
            }
        }
        read
    }

    /// Replaces the records by those that were read, except for newer ones. Returns whether they changed.
    fn merge(
        &mut self,
        mut read: HashMap<String, MemberText>,
        written: &HashMap<String, MemberText>,
    ) -> bool {
        let MembersState { all, unwritten, .. } = self;
        unwritten.retain(|name| all.get(name) != written.get(name));
        // Only expired names are removed: a missing one was lost with an older state of Redis.
        let is_older = |(name, known): &(&String, &MemberText)| match read.get(*name) {
            Some(read) => read.revision < known.revision,
            None => known.is_restorable(),
        };
        unwritten.extend(all.iter().filter(is_older).map(|(name, _)| name.clone()));
        // A change that could not be written ends with a newer one by a sibling, which takes its place.
        unwritten.retain(|name| match (all.get(name), read.get(name)) {
            (Some(known), Some(read)) => read.revision <= known.revision,
            _ => true,
        });
        for name in unwritten.iter() {
            read.extend(all.get(name).map(|text| (name.clone(), text.clone())));
        }
        let changed = *all != read;
        *all = read;
        changed
    }

    fn expire(&mut self, now: u64) {
        if now.saturating_sub(self.searched_at) < millis(EXPIRY_INTERVAL) {
            return;
        }
        self.searched_at = now;
        let over: Vec<String> =
            self.all.iter().filter(|(_, text)| text.is_expired(now)).map(|(name, _)| name.clone()).collect();
        for name in over {
            if let Some(text) = self.all.remove(&name) {
                self.unwritten.remove(&name);
                self.mark_expired(name, &text, now);
            }
        }
    }

    fn mark_expired(&mut self, name: String, text: &MemberText, now: u64) {
        if text.age(now) > millis(RECORD_TTL + DELETE_DELAY) {
            self.undeleted.insert(name.clone());
        }
        if self.expired.len() < MAX_MEMBERS || self.expired.contains_key(&name) {
            let revision = self.expired.entry(name).or_default();
            *revision = text.revision.max(*revision);
        }
    }
}

#[cfg(test)]
mod tests;
