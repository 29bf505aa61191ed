//! The list of members in Redis: the records of upstreams that were changed at run time, equal at all
//! balancers.
//!
//! The list is a Redis hash, so that it survives restarts of balancers, beside a mark that changes with every
//! change of the list. A balancer that reads a new mark reads the list again. Changes made while Redis was
//! unreachable are written later, and lost records are restored by a balancer that still has them. Texts that
//! no balancer wrote are applied where they can be, and are not restored.
//!
//! Where the user of this balancer lacks a permission for the list, all else is shared: the changes made here
//! wait, and the list is tried again from time to time.

use std::time::{Duration, Instant};

use redis::Pipeline;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use super::publisher::Publisher;
use super::{RedisKeys, SiblingExchange, now, reply};
use crate::observe::Observer;
use crate::state::exchange::OutboxEvent;
use crate::state::members::{ListedMembers, MAX_MEMBERS, Members, UnwrittenMembers};

/// The number of names that one command reads, about.
const LIST_PAGE_NAMES: usize = 1_000;

/// The largest number of names that are read: those beyond `MAX_MEMBERS` may be expired.
const MAX_LISTED_NAMES: usize = 2 * MAX_MEMBERS;

/// The largest size of the list that is read, in bytes.
const MAX_LISTED_BYTES: usize = 64 << 20;

/// The pause before the list is tried again for which a permission was missing.
const DENIED_LIST_PAUSE: Duration = Duration::from_secs(5);

/// Whether this balancer shares the list, as far as it has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ListAccess {
    /// The list was not read yet.
    #[default]
    Unknown,
    /// The list was read, and has the changes of this balancer.
    Granted,
    /// The user of this balancer lacks a permission, as a command has shown.
    Denied { at: Instant },
}

/// The result of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Synced {
    /// The list has changed.
    changed: bool,
    /// Records were written, of which siblings must be notified.
    written: bool,
}

// === impl ListAccess ===

impl ListAccess {
    /// Whether the list is shared.
    pub(super) fn is_granted(self) -> bool {
        self == ListAccess::Granted
    }

    fn was_denied_lately(self, now: Instant) -> bool {
        match self {
            ListAccess::Denied { at } => now.saturating_duration_since(at) < DENIED_LIST_PAUSE,
            _ => false,
        }
    }
}

// === impl SiblingExchange ===

impl SiblingExchange {
    /// Writes and reads the list. Without a permission for that, the exchange goes on without the list.
    pub(super) async fn sync_members(
        &self,
        publisher: &mut Publisher,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        if self.list_access().was_denied_lately(now()) {
            return Ok(());
        }
        let mark = publisher.next_mark(self.id);
        let synced = match sync(&self.members, link, &self.keys, &mark, &self.observer).await {
            Err(failure) if failure.kind == RedisFailureKind::NotPermitted => {
                self.deny_list(&failure);
                return Ok(());
            }
            synced => synced?,
        };
        self.grant_list();
        // Own changes are applied too: that changes nothing, and the list then has the stored records.
        if synced.changed || synced.written {
            self.apply_members();
        }
        if synced.written {
            self.outbox.put(OutboxEvent::Members);
        }
        Ok(())
    }

    /// Records that a permission for the list is missing.
    fn deny_list(&self, failure: &RedisFailure) {
        let before = std::mem::replace(&mut *self.list_access(), ListAccess::Denied { at: now() });
        let first = !matches!(before, ListAccess::Denied { .. });
        self.observer.members_denied(failure.cause, &failure.text, first);
    }

    /// Records that the list was read and written.
    fn grant_list(&self) {
        let before = std::mem::replace(&mut *self.list_access(), ListAccess::Granted);
        self.observer.members_shared(matches!(before, ListAccess::Denied { .. }));
    }
}

/// Writes the unwritten records, with `mark` as the new mark, and reads the list when the stored mark
/// differs.
async fn sync(
    members: &Members,
    link: &mut RedisLink,
    keys: &RedisKeys,
    mark: &str,
    observer: &Observer,
) -> Result<Synced, RedisFailure> {
    members.expire();
    let stored_mark = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
    let unwritten = members.unwritten(stored_mark.is_none());
    let writes = writes(&unwritten, keys, mark);
    let written = writes.is_some();
    if let Some(writes) = writes {
        link.pipe(&writes).await?;
    } else if members.is_read(stored_mark.as_deref()) {
        return Ok(Synced::default());
    }
    // The mark first: a change during the read makes another mark, with which the list is read again.
    let read_mark = reply::text(&link.call(redis::cmd("GET").arg(&keys.mark), COMMAND_TIMEOUT).await?);
    let list = read_list(&keys.members, link).await?;
    let count = list.count;
    let merged = members.merge(read_mark, list, &unwritten);
    if merged.is_overfull {
        observer.members_overfull(count, MAX_MEMBERS);
    }
    Ok(Synced { changed: merged.changed, written })
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
fn writes(unwritten: &UnwrittenMembers, keys: &RedisKeys, mark: &str) -> Option<Pipeline> {
    let mut writes = Pipeline::new();
    for (name, text) in &unwritten.changed {
        writes.cmd("HSET").arg(&keys.members).arg(name).arg(text.write()).ignore();
    }
    for (name, text) in &unwritten.lost {
        writes.cmd("HSETNX").arg(&keys.members).arg(name).arg(text.write()).ignore();
    }
    if !unwritten.expired.is_empty() {
        writes.cmd("HDEL").arg(&keys.members).arg(&unwritten.expired).ignore();
    }
    if writes.is_empty() {
        return None;
    }
    writes.cmd("SET").arg(&keys.mark).arg(mark).ignore();
    Some(writes)
}
