//! The list of members in Redis: the records of upstreams that were changed at run time, equal at all
//! balancers.
//!
//! The list is a Redis hash, so that it survives restarts of balancers, beside a mark that changes with every
//! change of the list. A balancer that reads a new mark reads the list again. Changes made while Redis was
//! unreachable are written later, and lost records are restored by a balancer that still has them.

use redis::Pipeline;

use super::RedisKeys;
use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply;
use crate::observe::Observer;
use crate::state::members::{MAX_MEMBERS, Members, UnwrittenMembers};

/// The result of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Synced {
    /// The list has changed.
    pub changed: bool,
    /// Records were written, of which siblings must be notified.
    pub written: bool,
}

/// Writes the unwritten records, with `mark` as the new mark, and reads the list when the stored mark
/// differs.
pub(super) async fn sync(
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
    let mut read = Pipeline::new();
    read.cmd("GET").arg(&keys.mark).cmd("HGETALL").arg(&keys.members);
    let answers = link.pipe(&read).await?;
    let [mark, list] = &answers[..] else {
        return Err(RedisFailure::unexpected("the number of answers differs from the number of commands"));
    };
    let pairs = reply::pairs(list);
    let count = pairs.len();
    let merged = members.merge(reply::text(mark), pairs, &unwritten);
    if merged.is_overfull {
        observer.members_overfull(count, MAX_MEMBERS);
    }
    Ok(Synced { changed: merged.changed, written })
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
