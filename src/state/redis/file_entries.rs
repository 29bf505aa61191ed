//! Makes a restart equal to a reload: the balancer stores the entries of its file in Redis, and after a
//! restart compares its new file with them. Where an entry has changed, older run-time changes of its
//! upstream end.
//!
//! A balancer finds its own entries by its host name and its listeners. One that has another host name after
//! each start, or a port that the system chooses, finds none: then the changes last, as they do for a
//! balancer that is new. So they do where an entry is new in the file: the file does not tell whether its
//! upstream is new, and an upstream that an operator has drained must not get requests by mistake.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use super::{SiblingExchange, now, reply};
use crate::state::members::FileEntries;

/// The time for which Redis keeps the entries of a balancer that does not run.
const ENTRIES_TTL: Duration = Duration::from_secs(30 * 24 * 3600);

/// The interval after which the entries are written again, so that they do not expire.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// The interval between two checks for entries to write.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The entries of the file as Redis has them.
#[derive(Debug, Default)]
pub(super) struct StoredEntries {
    /// The entries of the process before were compared with those of this one.
    is_compared: bool,
    /// The number of the entries that were written last, and when.
    written: Option<(u64, Instant)>,
    /// The user of this balancer lacks a permission, as was reported.
    is_denied: bool,
}

impl SiblingExchange {
    /// Ends the run-time changes that are older than this process's file, once the list of members was read.
    pub(super) async fn compare_entries(
        &self,
        stored: &mut StoredEntries,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let is_read = self.list_access().is_granted() || self.members.was_read();
        let is_due = !stored.is_compared && is_read;
        let Some(key) = self.keys.file.as_ref().filter(|_| is_due) else { return Ok(()) };
        let before = match link.call(redis::cmd("GET").arg(key), COMMAND_TIMEOUT).await {
            // The key of another program is replaced by the entries.
            Err(failure) if failure.kind == RedisFailureKind::UnusableKey => None,
            Err(failure) if failure.kind == RedisFailureKind::NotPermitted => {
                self.deny_entries(stored, &failure);
                return Ok(());
            }
            answer => reply::text(&answer?),
        };
        let before: FileEntries =
            before.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
        if self.members.end_outdated(&before) {
            self.apply_members();
        }
        stored.is_compared = true;
        Ok(())
    }

    /// Compares the entries if that was not possible before, and keeps them in Redis until a failure.
    pub(super) async fn store_entries_forever(
        &self,
        stored: &mut StoredEntries,
        link: &mut RedisLink,
    ) -> Result<Infallible, RedisFailure> {
        loop {
            self.compare_entries(stored, link).await?;
            match self.store_entries(stored, link).await {
                Err(failure) if failure.kind == RedisFailureKind::NotPermitted => {
                    self.deny_entries(stored, &failure);
                }
                Err(failure) if failure.is_full() => {}
                other => other?,
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    fn deny_entries(&self, stored: &mut StoredEntries, failure: &RedisFailure) {
        let first = !std::mem::replace(&mut stored.is_denied, true);
        self.observer.entries_denied(failure.cause, &failure.text, first);
    }

    async fn store_entries(
        &self,
        stored: &mut StoredEntries,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let (entries, number) = self.members.entries();
        let is_current = |(written, at): (u64, Instant)| {
            written == number && now().saturating_duration_since(at) < RENEWAL_INTERVAL
        };
        // Before the comparison, the entries there are those of the process before.
        let is_due = stored.is_compared && !stored.written.is_some_and(is_current);
        let Some(key) = self.keys.file.as_ref().filter(|_| is_due) else { return Ok(()) };
        let text = serde_json::to_string(&*entries).unwrap_or_default();
        let mut set = redis::cmd("SET");
        set.arg(key).arg(text).arg("EX").arg(ENTRIES_TTL.as_secs());
        link.call(&set, COMMAND_TIMEOUT).await?;
        stored.written = Some((number, now()));
        Ok(())
    }
}
