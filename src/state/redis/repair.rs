//! Repairs the keys that another program has made unusable: a key of another type than the balancers', or a
//! stream with an entry of the largest id, behind which Redis adds nothing.
//!
//! Such a key stops the exchange of all balancers, and only its removal helps. It has a name of this
//! deployment but no content of it, so it may be a mistake of the other program. So it is renamed and not
//! deleted: to its own name with `ASIDE_SUFFIX`, which replaces what was renamed before, so that writing such
//! keys again and again does not fill Redis. The balancers then go on as after the loss of the key.
//!
//! One balancer repairs at a time, but nothing relies on that. Another program can replace the key of the
//! turn, and a second balancer then repairs too: it may rename a key that the first has just replaced, or
//! the turn of a third. Each renamed key of the balancers is a loss of this key, with which they go on, and
//! what the first had renamed is no longer kept. Each turn ends by itself, so no race goes on.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use redis::Value;

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use super::reply::{self, FIELD};
use super::{RedisKeys, SiblingExchange, now};

/// The end of the name of a key that was renamed.
const ASIDE_SUFFIX: &str = ":aside";

/// The longest time for which one balancer keeps the others from repairing.
const TURN_TTL: Duration = Duration::from_secs(5);

/// The wait for the end of a turn from which on it is no balancer's.
const MAX_TURN_WAIT: Duration = Duration::from_secs(6);

/// The turn of another balancer to repair keys.
pub(super) struct AwaitedTurn {
    /// The value of the key, another one for each turn.
    value: Value,
    since: Instant,
}

impl SiblingExchange {
    /// Renames the unusable keys, unless a sibling is doing that. Fails when Redis does not permit it.
    pub(super) async fn repair_keys(
        &self,
        awaited: &mut Option<AwaitedTurn>,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        // All balancers notice the key at once. A second one would rename what the first has replaced.
        let mut turn = redis::cmd("SET");
        let value = RandomState::new().hash_one(self.id);
        turn.arg(&self.keys.repair).arg(value).arg("NX").arg("PX").arg(TURN_TTL.as_millis() as u64);
        if link.call(&turn, COMMAND_TIMEOUT).await? == Value::Nil {
            return self.check_turn(awaited, link).await;
        }
        *awaited = None;
        let repaired = self.rename_unusable(link).await;
        link.call(redis::cmd("UNLINK").arg(&self.keys.repair), COMMAND_TIMEOUT).await?;
        repaired
    }

    /// Renames the key of the turn if it is no balancer's: it has another type, or does not expire. The next
    /// attempt to repair then gets the turn, or that of a sibling.
    async fn check_turn(
        &self,
        awaited: &mut Option<AwaitedTurn>,
        link: &mut RedisLink,
    ) -> Result<(), RedisFailure> {
        let key = &self.keys.repair;
        let found = type_of(key, link).await?;
        if found == "none" {
            return Ok(());
        }
        if found == "string" {
            let value = link.call(redis::cmd("GET").arg(key), COMMAND_TIMEOUT).await?;
            let turn = match awaited.take().filter(|turn| turn.value == value) {
                Some(turn) => turn,
                None => AwaitedTurn { value, since: now() },
            };
            if now().saturating_duration_since(turn.since) < MAX_TURN_WAIT {
                *awaited = Some(turn);
                return Ok(());
            }
        }
        match self.set_aside(key, &found, link).await {
            // A sibling has renamed it.
            Err(failure) if failure.kind == RedisFailureKind::Refused => Ok(()),
            renamed => renamed,
        }
    }

    async fn rename_unusable(&self, link: &mut RedisLink) -> Result<(), RedisFailure> {
        let RedisKeys { members, mark, stored, .. } = &self.keys;
        let streams = self.streams.all().map(|stream| (&stream.key, "stream"));
        let others = [(stored, "stream"), (members, "hash"), (mark, "string")];
        for (key, wanted) in streams.chain(others) {
            let found = type_of(key, link).await?;
            let is_unusable = match found.as_str() {
                "none" => false,
                "stream" if wanted == "stream" => !accepts_entries(key, link).await?,
                found => found != wanted,
            };
            if !is_unusable {
                continue;
            }
            self.set_aside(key, &found, link).await?;
            if key == members {
                // As after a loss, so that every balancer restores its records.
                link.call(redis::cmd("UNLINK").arg(mark), COMMAND_TIMEOUT).await?;
            }
        }
        Ok(())
    }

    /// Renames a key of the type `found`.
    async fn set_aside(&self, key: &str, found: &str, link: &mut RedisLink) -> Result<(), RedisFailure> {
        let aside = format!("{key}{ASIDE_SUFFIX}");
        link.call(redis::cmd("RENAME").arg(key).arg(&aside), COMMAND_TIMEOUT).await?;
        self.observer.key_set_aside(key, found, &aside);
        Ok(())
    }
}

/// Returns the type of a key; of a missing one it is `none`.
async fn type_of(key: &str, link: &mut RedisLink) -> Result<String, RedisFailure> {
    let found = link.call(redis::cmd("TYPE").arg(key), COMMAND_TIMEOUT).await?;
    Ok(reply::text(&found).unwrap_or_default())
}

/// Whether Redis can add entries to a stream: tries it with an entry that is no message.
async fn accepts_entries(key: &str, link: &mut RedisLink) -> Result<bool, RedisFailure> {
    let mut add = redis::cmd("XADD");
    add.arg(key).arg("NOMKSTREAM").arg("*").arg(FIELD).arg("");
    match link.call(&add, COMMAND_TIMEOUT).await {
        Err(failure) if failure.kind == RedisFailureKind::UnusableKey => Ok(false),
        Err(failure) if !failure.is_full() => Err(failure),
        _ => Ok(true),
    }
}
