//! The list of upstreams that were changed at run time: one record for each name.
//!
//! Each record is stored behind its revision, `1795172158000 {...}`: about the time of writing in
//! milliseconds, and higher than the revision before. A lower revision than the known one comes from an
//! older state of Redis, such as a snapshot or a lagging replica, and is ignored.
//!
//! A record that changes nothing any more, or only removes its upstream, expires after `RECORD_TTL`. Its
//! name and revision are remembered, so that no older state brings it back.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::member::MemberRecord;

/// The largest number of names: a hash with foreign writers must not exhaust the memory.
pub const MAX_MEMBERS: usize = 10_000;

/// The time after which the record of a removed upstream expires.
pub const RECORD_TTL: Duration = Duration::from_secs(7 * 24 * 3600);

/// The further time after which an expired record is deleted from Redis. Balancers whose clock is behind
/// would write it again before.
const DELETE_DELAY: Duration = Duration::from_secs(3600);

/// The interval between two searches for expired records.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(600);

/// The members as this balancer knows them.
#[derive(Default)]
pub struct Members {
    state: Mutex<MembersState>,
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
    /// The records that the list lacks, when it was lost.
    pub lost: HashMap<String, MemberText>,
    /// The names of expired records.
    pub expired: Vec<String>,
}

/// The result of a read of the shared list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergedMembers {
    /// The records have changed.
    pub changed: bool,
    /// The list has more than `MAX_MEMBERS` names, and had not before.
    pub is_overfull: bool,
}

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

impl Members {
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

    /// Returns what the shared list lacks; all records where the list was `lost`.
    pub fn unwritten(&self, lost: bool) -> UnwrittenMembers {
        let state = self.state();
        let text = |name: &String| Some((name.clone(), state.all.get(name)?.clone()));
        let lost = if lost { state.all.clone() } else { HashMap::new() };
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
        pairs: Vec<(String, String)>,
        written: &UnwrittenMembers,
    ) -> MergedMembers {
        let mut state = self.state();
        if mark.is_none() && !state.all.is_empty() {
            // The list was lost between two commands; the next round restores it.
            return MergedMembers::default();
        }
        state.mark = mark;
        state.undeleted.retain(|name| !written.expired.contains(name));
        let overfull = pairs.len() > MAX_MEMBERS;
        let was_overfull = std::mem::replace(&mut state.overfull, overfull);
        let read = state.read(pairs, clock());
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
            let text = MemberText::read(text);
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
mod tests {
    use super::*;

    const REMOVED: &str = r#"{"removed": true}"#;
    const DRAINED: &str = r#"{"drain": true}"#;

    fn days_ago(days: u64) -> u64 {
        clock() - millis(Duration::from_secs(days * 24 * 3600))
    }

    fn pair(name: &str, revision: u64, text: &str) -> (String, String) {
        (name.into(), MemberText { revision, text: text.into() }.write())
    }

    fn merge(members: &Members, pairs: &[(String, String)]) -> MergedMembers {
        members.merge(Some("mark".into()), pairs.to_vec(), &UnwrittenMembers::default())
    }

    fn names(members: &Members) -> Vec<String> {
        let mut names: Vec<String> = members.all().into_keys().collect();
        names.sort();
        names
    }

    #[test]
    fn expires_removals_after_seven_days_and_no_other_change() {
        let members = Members::default();
        let list = [
            pair("removed", days_ago(8), REMOVED),
            pair("cleared", days_ago(8), "{}"),
            pair("drained", days_ago(800), DRAINED),
            pair("recent", days_ago(6), REMOVED),
            pair("unreadable", days_ago(8), "added"),
        ];
        assert!(merge(&members, &list).changed);
        assert_eq!(names(&members), ["drained", "recent", "unreadable"]);
        let mut deleted = members.unwritten(false).expired;
        deleted.sort();
        assert_eq!(deleted, ["cleared", "removed"]);
        // Deleted once, also where the list is read again.
        let written = members.unwritten(false);
        members.merge(Some("mark".into()), list[2..].to_vec(), &written);
        assert!(!members.has_unwritten());
    }

    #[test]
    fn an_older_state_does_not_bring_an_expired_name_back() {
        let members = Members::default();
        merge(&members, &[pair("a", days_ago(8), REMOVED)]);
        assert!(!merge(&members, &[pair("a", days_ago(30), DRAINED)]).changed);
        assert_eq!((names(&members).len(), members.unwritten(false).expired), (0, vec!["a".to_string()]));
        assert!(members.put("a", DRAINED.into()), "a new change of the name counts");
        assert_eq!(names(&members), ["a"]);
        assert!(members.unwritten(false).expired.is_empty());
    }

    #[test]
    fn keeps_the_removal_of_a_configured_upstream() {
        let members = Members::default();
        merge(&members, &[pair("a", days_ago(5), REMOVED), pair("b", days_ago(1), REMOVED)]);
        assert!(members.refresh("a") && !members.refresh("b") && !members.refresh("c"));
        let written = members.unwritten(false).changed;
        assert_eq!(written.keys().collect::<Vec<_>>(), ["a"]);
        assert!(written["a"].revision > days_ago(1));
    }

    #[test]
    fn rejects_names_beyond_the_limit_and_reports_a_longer_list_once() {
        let members = Members::default();
        for number in 0..MAX_MEMBERS {
            assert!(members.put(&format!("{number}"), DRAINED.into()));
        }
        assert!(!members.put("more", DRAINED.into()) && !members.has_room(["more"]));
        assert!(members.put("7", REMOVED.into()), "a known name has room");
        let list: Vec<_> = (0..=MAX_MEMBERS).map(|number| pair(&format!("{number}"), 1, DRAINED)).collect();
        let full = |list: &[(String, String)]| merge(&members, list).is_overfull;
        assert_eq!([full(&list), full(&list), full(&list[1..]), full(&list)], [true, false, false, true]);
    }

    #[test]
    fn adopts_newer_records_of_another_process() {
        let members = Members::default();
        let text = |revision, text: &str| MemberText { revision, text: text.into() };
        members.adopt("a", text(days_ago(1), DRAINED));
        members.adopt("a", text(days_ago(2), REMOVED));
        members.adopt("b", text(days_ago(8), REMOVED));
        assert_eq!(members.all(), HashMap::from([("a".to_string(), DRAINED.to_string())]));
    }
}
