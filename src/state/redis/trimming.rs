//! Keeps the keys in Redis small: the streams by age and size, the stored bindings by number; and makes room
//! when Redis is out of memory.
//!
//! A stored binding expires by itself. So that many of them cannot fill Redis before that, their keys are
//! also entries of a stream, oldest first, from which every balancer removes what exceeds the limit. An entry
//! takes about a tenth of the memory of a member of a sorted set, and no command is sent for an expired one.

use std::convert::Infallible;
use std::time::Duration;

use redis::{Pipeline, Value};

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use super::{SiblingExchange, now, reply};

/// The interval between two trims.
const TRIM_INTERVAL: Duration = Duration::from_secs(1);

/// The largest number of stored bindings, as in the memory of a balancer.
const MAX_STORED_BINDINGS: usize = crate::state::responses::MAX_RESPONSES;

/// The number of stored bindings that one command removes.
const REMOVED_BINDINGS_AT_ONCE: usize = 500;

/// The largest number of such commands in a row; the rest is removed after the next interval.
const MAX_REMOVALS_IN_A_ROW: usize = 20;

/// After making room, the next failure within this time is retried at once: another task of this balancer has
/// just made room for it.
const RELIEF_TIME: Duration = Duration::from_millis(20);

/// The least interval between two warnings that room was made.
const RELIEF_LOG_INTERVAL: Duration = Duration::from_secs(60);

impl SiblingExchange {
    /// Trims at every interval until a failure.
    pub(super) async fn trim_forever(&self, link: &mut RedisLink) -> Result<Infallible, RedisFailure> {
        let mut was_refused = false;
        loop {
            tokio::time::sleep(TRIM_INTERVAL).await;
            match self.trim(link).await {
                // Without the permission to trim, `stream_length` still bounds the streams.
                Err(failure) if failure.is_refused() => {
                    self.observer.trim_refused(&failure.text, !was_refused);
                    was_refused = true;
                }
                // No writes are accepted at present, as the publisher reports. Reading goes on.
                Err(failure) if failure.is_full() => {}
                other => other?,
            }
        }
    }

    async fn trim(&self, link: &mut RedisLink) -> Result<(), RedisFailure> {
        let Some(time) = self.clock().redis_time(now()) else { return Ok(()) };
        let mut commands = Pipeline::new();
        for stream in self.streams.all() {
            let oldest = stream.oldest_to_keep(time).to_string();
            commands.cmd("XTRIM").arg(&stream.key).arg("MINID").arg("~").arg(oldest).ignore();
        }
        let expired = time.saturating_sub(self.settings.bindings).as_millis().to_string();
        commands.cmd("XTRIM").arg(&self.keys.stored).arg("MINID").arg("~").arg(expired).ignore();
        commands.cmd("XLEN").arg(&self.keys.stored);
        let answers = link.pipe(&commands).await?;
        let stored = answers.first().map_or(0, reply::count);
        self.remove_bindings(stored.saturating_sub(MAX_STORED_BINDINGS), link).await
    }

    /// Makes room in a Redis that is out of memory: removes the older half of the streams and of the stored
    /// bindings, which only make routing better. Returns whether anything was removed.
    pub(super) async fn relieve(
        &self,
        failure: &RedisFailure,
        link: &mut RedisLink,
    ) -> Result<bool, RedisFailure> {
        if failure.kind != RedisFailureKind::OutOfMemory {
            return Ok(false);
        }
        match self.make_room(link).await {
            // As without anything to remove: this balancer may not trim, or no writes are accepted.
            Err(failure) if failure.is_full() || failure.is_refused() => Ok(false),
            other => other,
        }
    }

    async fn make_room(&self, link: &mut RedisLink) -> Result<bool, RedisFailure> {
        let before = *self.relieved_at();
        if before.is_some_and(|before| now().saturating_duration_since(before) < RELIEF_TIME) {
            tokio::time::sleep(RELIEF_TIME).await;
            return Ok(true);
        }
        let keys: Vec<&String> =
            self.streams.all().map(|stream| &stream.key).chain([&self.keys.stored]).collect();
        let mut lengths = Pipeline::new();
        for key in keys {
            lengths.cmd("XLEN").arg(key);
        }
        let lengths: Vec<usize> = link.pipe(&lengths).await?.iter().map(reply::count).collect();
        let mut trims = Pipeline::new();
        for (stream, length) in self.streams.all().zip(&lengths).filter(|(_, length)| **length > 0) {
            trims.cmd("XTRIM").arg(&stream.key).arg("MAXLEN").arg(length / 2).ignore();
        }
        if !trims.is_empty() {
            link.pipe(&trims).await?;
        }
        let stored = lengths.last().copied().unwrap_or(0);
        self.remove_bindings(stored.div_ceil(2), link).await?;
        let entries: usize = lengths.iter().map(|length| length.div_ceil(2)).sum();
        if entries == 0 {
            return Ok(false);
        }
        let now = now();
        *self.relieved_at() = Some(now);
        let is_quiet = |before| now.saturating_duration_since(before) < RELIEF_LOG_INTERVAL;
        self.observer.redis_relieved(entries, !before.is_some_and(is_quiet));
        Ok(true)
    }

    /// Removes the oldest stored bindings.
    async fn remove_bindings(&self, count: usize, link: &mut RedisLink) -> Result<(), RedisFailure> {
        let mut left = count;
        for _ in 0..MAX_REMOVALS_IN_A_ROW {
            let mut range = redis::cmd("XRANGE");
            range.arg(&self.keys.stored).arg("-").arg("+");
            range.arg("COUNT").arg(left.min(REMOVED_BINDINGS_AT_ONCE));
            let page = match left {
                0 => Value::Nil,
                _ => link.call(&range, COMMAND_TIMEOUT).await?,
            };
            let entries = reply::entries(&page);
            let Some(last) = entries.last() else { return Ok(()) };
            let mut removal = Pipeline::new();
            let keys = entries.iter().map(|entry| entry.bytes).filter(|key| self.keys.is_binding(key));
            for key in keys {
                removal.cmd("UNLINK").arg(key).ignore();
            }
            let next = last.id.after().to_string();
            removal.cmd("XTRIM").arg(&self.keys.stored).arg("MINID").arg(next).ignore();
            link.pipe(&removal).await?;
            left = left.saturating_sub(entries.len());
        }
        Ok(())
    }
}
