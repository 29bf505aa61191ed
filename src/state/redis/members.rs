//! The list of members in Redis: the records of upstreams that were changed at run time, equal at all
//! balancers.
//!
//! The list is a Redis hash, so that it survives restarts of balancers, beside a mark that changes with every
//! change of the list. A balancer that reads a new mark reads the list again. Changes made while Redis was
//! unreachable are written later, and lost records are restored by a balancer that still has them. Texts that
//! no balancer wrote are applied where they can be, and are not restored.
//!
//! Where Redis accepts no writes of the list, since the user of this balancer lacks a permission or Redis
//! is full, the list is still read: the changes made here wait and apply here, until a sibling makes a
//! newer one. Without a permission to read, nothing of the list is shared. What was not permitted is tried
//! again from time to time.

use std::time::{Duration, Instant};

use redis::Pipeline;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use super::publisher::Publisher;
use super::{RedisKeys, SiblingExchange, now, reply};
use crate::state::exchange::OutboxEvent;
use crate::state::members::{ListedMembers, MAX_MEMBERS, UnwrittenMembers};

/// The number of names that one command reads, about.
const LIST_PAGE_NAMES: usize = 1_000;

/// The largest number of names that are read: those beyond `MAX_MEMBERS` may be expired.
const MAX_LISTED_NAMES: usize = 2 * MAX_MEMBERS;

/// The largest size of the list that is read, in bytes.
const MAX_LISTED_BYTES: usize = 64 << 20;

/// The pause before a command on the list is tried again for which a permission was missing.
const DENIED_LIST_PAUSE: Duration = Duration::from_secs(5);

/// Whether this balancer shares the list, as far as it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ListAccess {
    /// The list was not read yet.
    #[default]
    Unknown,
    /// The list was read, and has the changes of this balancer.
    Granted,
    /// The list was read. The user of this balancer lacks a permission to write to it, as a command has
    /// shown.
    ReadOnly { at: Instant },
    /// The user of this balancer lacks a permission to read the list, as a command has shown.
    Denied { at: Instant },
}

/// The result of one round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Synced {
    /// The list has changed.
    changed: bool,
    /// The result of writing the records of this balancer.
    writes: ListWrites,
}

/// The result of writing the unwritten records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum ListWrites {
    /// All records were written before.
    #[default]
    None,
    /// Records were written, of which siblings must be notified.
    Accepted,
    /// Redis has not accepted the records, which wait.
    Refused(RedisFailure),
    /// The pause after a refusal is not over; the records wait.
    Paused,
}

// === impl ListAccess ===

impl ListAccess {
    /// Whether the list is shared.
    pub(super) fn is_granted(self) -> bool {
        self == ListAccess::Granted
    }

    fn is_denied(self) -> bool {
        matches!(self, ListAccess::Denied { .. } | ListAccess::ReadOnly { .. })
    }

    /// Whether the pause after a missing permission to read is not over.
    fn is_reading_paused(self, now: Instant) -> bool {
        matches!(self, ListAccess::Denied { at } if is_recent(at, now))
    }

    /// Whether the pause after a missing permission is not over.
    fn is_writing_paused(self, now: Instant) -> bool {
        matches!(self, ListAccess::Denied { at } | ListAccess::ReadOnly { at } if is_recent(at, now))
    }
}

fn is_recent(denied_at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(denied_at) < DENIED_LIST_PAUSE
}

// === impl SiblingExchange ===

impl SiblingExchange {
    /// Whether records are to be written now: without a permission, they are tried from time to time only.
    pub(super) fn has_members_to_write(&self) -> bool {
        self.members.has_unwritten() && !self.list_access().is_writing_paused(now())
    }

    /// Writes and reads the list. Without a permission for that, the exchange goes on with what is permitted.
    /// Fails when Redis is full, after the list was read.
    pub(super) async fn sync_members(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        if self.list_access().is_reading_paused(now()) {
            return Ok(());
        }
        let mark = publisher.next_mark(self.id);
        let synced = match self.sync_list(&mark, link).await {
            Err(failure) if failure.kind == RedisFailureKind::NotPermitted => {
                self.deny_list(ListAccess::Denied { at: now() }, &failure);
                return Ok(());
            }
            synced => synced?,
        };
        let is_written = synced.writes == ListWrites::Accepted;
        // Own changes are applied too: that changes nothing, and the list then has the stored records.
        if synced.changed || is_written {
            self.apply_members();
        }
        if is_written {
            self.outbox.put(OutboxEvent::Members);
        }
        match synced.writes {
            ListWrites::None | ListWrites::Accepted => self.grant_list(),
            ListWrites::Paused => {}
            ListWrites::Refused(failure) if failure.is_full() => return Err(failure),
            ListWrites::Refused(failure) => self.deny_list(ListAccess::ReadOnly { at: now() }, &failure),
        }
        Ok(())
    }

    /// Records that a permission for the list is missing.
    fn deny_list(&self, access: ListAccess, failure: &RedisFailure) {
        let before = std::mem::replace(&mut *self.list_access(), access);
        self.observer.members_denied(failure.cause, &failure.text, !before.is_denied());
    }

    /// Records that the list was read, and has the changes of this balancer.
    fn grant_list(&self) {
        let before = std::mem::replace(&mut *self.list_access(), ListAccess::Granted);
        self.observer.members_shared(before.is_denied());
    }

    /// Writes the unwritten records, with `mark` as the new mark, and reads the list when the stored mark
    /// differs.
    async fn sync_list(&self, mark: &str, link: &mut RedisLink) -> Result<Synced, RedisFailure> {
        let (members, keys) = (&self.members, &self.keys);
        members.expire();
        let stored_mark = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
        let mut changed = false;
        // Redis may reject the mark of what it accepts: no record is written over one that was not read.
        let is_denied = self.list_access().is_denied();
        if is_denied && stored_mark.is_some() && !members.is_read(stored_mark.as_deref()) {
            changed = self.read_shared(&UnwrittenMembers::default(), link).await?;
        }
        let unwritten = members.unwritten(stored_mark.is_none());
        let writes = self.write_list(&unwritten, mark, link).await?;
        let is_current = match writes {
            ListWrites::Accepted => false,
            ListWrites::None => members.is_read(stored_mark.as_deref()),
            // A list without a mark is lost: there is nothing to read before it can be restored.
            ListWrites::Refused(_) | ListWrites::Paused => {
                stored_mark.is_none() || members.is_read(stored_mark.as_deref())
            }
        };
        if is_current {
            return Ok(Synced { changed, writes });
        }
        let written = if writes == ListWrites::Accepted { unwritten } else { UnwrittenMembers::default() };
        changed |= self.read_shared(&written, link).await?;
        Ok(Synced { changed, writes })
    }

    /// Reads the list, and replaces the records but for newer ones and for changes that are not `written`.
    /// Returns whether they changed.
    async fn read_shared(
        &self,
        written: &UnwrittenMembers,
        link: &mut RedisLink,
    ) -> Result<bool, RedisFailure> {
        let keys = &self.keys;
        // The mark first: a change during the read makes another mark, with which the list is read again.
        let read_mark = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
        let list = read_list(&keys.members, link).await?;
        let count = list.count;
        let merged = self.members.merge(read_mark, list, written);
        if merged.is_overfull {
            self.observer.members_overfull(count, MAX_MEMBERS);
        }
        Ok(merged.changed)
    }

    /// Writes the records with a new mark, unless writing has to wait.
    async fn write_list(
        &self,
        unwritten: &UnwrittenMembers,
        mark: &str,
        link: &mut RedisLink,
    ) -> Result<ListWrites, RedisFailure> {
        let access = *self.list_access();
        let mut records = record_writes(unwritten, &self.keys);
        let mut deletions = Pipeline::new();
        if !unwritten.expired.is_empty() {
            deletions.cmd("HDEL").arg(&self.keys.members).arg(&unwritten.expired).ignore();
        }
        if records.is_empty() && deletions.is_empty() {
            return Ok(ListWrites::None);
        }
        if access.is_writing_paused(now()) {
            return Ok(ListWrites::Paused);
        }
        let mut marks = Pipeline::new();
        // A mark that follows records that Redis rejects lets all siblings read the list for nothing.
        let mark_writes = if access.is_denied() { &mut marks } else { &mut records };
        mark_writes.cmd("SET").arg(&self.keys.mark).arg(mark).ignore();
        let mut written = Ok(());
        for commands in [&records, &marks, &deletions].into_iter().filter(|commands| !commands.is_empty()) {
            if written.is_ok() {
                written = link.pipe(commands).await.map(|_| ());
            }
        }
        match written {
            Ok(()) => Ok(ListWrites::Accepted),
            // Some of the commands may have succeeded. All are repeated later, with the same records.
            Err(failure) if failure.is_full() || failure.kind == RedisFailureKind::NotPermitted => {
                Ok(ListWrites::Refused(failure))
            }
            Err(failure) => Err(failure),
        }
    }
}

/// Reads the list page by page, up to the limits of its names and bytes.
async fn read_list(key: &str, link: &mut RedisLink) -> Result<ListedMembers, RedisFailure> {
    let count = reply::count(&link.call(redis::cmd("HLEN").arg(key), COMMAND_TIMEOUT).await?);
    let mut list = ListedMembers { count, ..ListedMembers::default() };
    let (mut cursor, mut bytes) = ("0".to_string(), 0);
    while !list.is_whole && list.records.len() < MAX_LISTED_NAMES && bytes < MAX_LISTED_BYTES {
        let mut scan = redis::cmd("HSCAN");
        scan.arg(key).arg(&cursor).arg("COUNT").arg(LIST_PAGE_NAMES);
        let page = reply::scan_page(&link.call(&scan, COMMAND_TIMEOUT).await?);
        let Some((next, pairs)) = page else {
            return Err(RedisFailure::unexpected("the answer to HSCAN is not a page"));
        };
        bytes += pairs.iter().map(|(name, text)| name.len() + text.len()).sum::<usize>();
        list.records.extend(pairs);
        list.is_whole = next == "0";
        cursor = next;
    }
    Ok(list)
}

/// Builds the commands that write the records.
fn record_writes(unwritten: &UnwrittenMembers, keys: &RedisKeys) -> Pipeline {
    let mut writes = Pipeline::new();
    for (name, text) in &unwritten.changed {
        writes.cmd("HSET").arg(&keys.members).arg(name).arg(text.write()).ignore();
    }
    for (name, text) in &unwritten.lost {
        writes.cmd("HSETNX").arg(&keys.members).arg(name).arg(text.write()).ignore();
    }
    writes
}
