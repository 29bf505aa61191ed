//! Failures of Redis: logged when they begin and when they end, and counted every time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use redis::{ErrorKind, RedisError};

use crate::observe::Observer;

/// Why a command or a connection failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RedisFailure {
    /// The metric label, one of few values.
    pub cause: &'static str,
    pub text: String,
    pub kind: RedisFailureKind,
}

/// What a failure means for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RedisFailureKind {
    /// The connection must be opened again.
    Broken,
    /// Redis has answered a command with an error.
    Refused,
    /// The user of this balancer may not call the command, or Redis does not have it.
    NotPermitted,
    /// The connection works, but Redis accepts no writes at present.
    NoWrites,
    /// As `NoWrites`, until memory is released.
    OutOfMemory,
    /// Another program has made a key unusable: see `repair`.
    UnusableKey,
}

/// The error codes with which Redis rejects all writes, beside `OUT_OF_MEMORY`.
const NO_WRITES_ERRORS: [&str; 2] = ["MISCONF", "NOREPLICAS"];

/// The error code of a command for a key of another type.
const WRONG_TYPE: &str = "WRONGTYPE";

/// The text of the error of a stream that has an entry with the largest id.
const LAST_ID_USED: &str = "exhausted the last possible ID";

/// The error code of a command for which the user lacks a permission.
const NO_PERMISSION: &str = "NOPERM";

/// The begin of the error of a command that Redis does not have, or has under another name.
const UNKNOWN_COMMAND: &str = "unknown command";

/// The error code with which Redis rejects writes that take memory.
const OUT_OF_MEMORY: &str = "OOM";

/// Whether Redis works, as far as this balancer has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RedisHealth {
    /// Nothing has succeeded or failed yet.
    Unknown,
    Works,
    Fails {
        since: Instant,
    },
}

/// The present health of Redis, whose changes are reported.
pub(super) struct FailureLog {
    health: Mutex<RedisHealth>,
    observer: Observer,
}

// === impl RedisFailure ===

impl RedisFailure {
    /// Builds the failure of a command without an answer.
    pub(super) fn timeout() -> Self {
        RedisFailure { cause: "silent", text: "no answer in time".into(), kind: RedisFailureKind::Broken }
    }

    /// Builds the failure of certificates that cannot be read.
    pub(super) fn certificates(text: String) -> Self {
        RedisFailure { cause: "refused", text, kind: RedisFailureKind::Broken }
    }

    /// Builds the failure of an unexpected answer.
    pub(super) fn unexpected(what: &str) -> Self {
        RedisFailure { cause: "strange", text: what.into(), kind: RedisFailureKind::Broken }
    }

    /// Whether Redis accepts no writes at present.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.kind, RedisFailureKind::NoWrites | RedisFailureKind::OutOfMemory)
    }

    /// Whether Redis has answered the command with an error that another attempt would not change.
    pub(super) fn is_refused(&self) -> bool {
        matches!(self.kind, RedisFailureKind::Refused | RedisFailureKind::NotPermitted)
    }
}

impl From<RedisError> for RedisFailure {
    fn from(error: RedisError) -> Self {
        // The error of a command in a pipeline is nested one level deeper.
        let inner = error.clone().into_server_errors();
        let inner = inner.iter().flat_map(|all| all.iter()).map(|(_, one)| one).next();
        let code = inner.map(|one| one.code()).or(error.code()).unwrap_or_default();
        let details = inner.and_then(|one| one.details()).or(error.detail()).unwrap_or_default();
        let kind = match code {
            OUT_OF_MEMORY => RedisFailureKind::OutOfMemory,
            code if NO_WRITES_ERRORS.contains(&code) => RedisFailureKind::NoWrites,
            "" => RedisFailureKind::Broken,
            WRONG_TYPE => RedisFailureKind::UnusableKey,
            _ if details.contains(LAST_ID_USED) => RedisFailureKind::UnusableKey,
            NO_PERMISSION => RedisFailureKind::NotPermitted,
            _ if details.starts_with(UNKNOWN_COMMAND) => RedisFailureKind::NotPermitted,
            _ => RedisFailureKind::Refused,
        };
        let cause = match error.kind() {
            _ if matches!(kind, RedisFailureKind::OutOfMemory | RedisFailureKind::NoWrites) => "full",
            _ if error.is_timeout() => "silent",
            _ if kind == RedisFailureKind::NotPermitted => "permission",
            ErrorKind::AuthenticationFailed => "password",
            _ if matches!(code, "NOAUTH" | "WRONGPASS") => "password",
            ErrorKind::Io | ErrorKind::ClusterConnectionNotFound => "lost",
            ErrorKind::MasterNameNotFoundBySentinel | ErrorKind::EmptySentinelList => "lost",
            _ => "refused",
        };
        RedisFailure { cause, text: error.to_string(), kind }
    }
}

// === impl FailureLog ===

impl FailureLog {
    pub(super) fn new(observer: Observer) -> Self {
        FailureLog { health: Mutex::new(RedisHealth::Unknown), observer }
    }

    /// Reports a failure; the first of a series is logged as a warning.
    pub(super) fn report(&self, failure: &RedisFailure, now: Instant) {
        let mut health = self.health();
        let first = !matches!(*health, RedisHealth::Fails { .. });
        self.observer.redis_failed(failure.cause, &failure.text, first);
        if first {
            *health = RedisHealth::Fails { since: now };
        }
    }

    /// Whether the latest command failed.
    pub(super) fn is_failing(&self) -> bool {
        matches!(*self.health(), RedisHealth::Fails { .. })
    }

    /// Reports that Redis works.
    pub(super) fn clear(&self, now: Instant) {
        let mut health = self.health();
        match std::mem::replace(&mut *health, RedisHealth::Works) {
            RedisHealth::Works => {}
            RedisHealth::Unknown => self.observer.redis_works(None),
            RedisHealth::Fails { since } => {
                self.observer.redis_works(Some(now.saturating_duration_since(since)));
            }
        }
    }

    fn health(&self) -> MutexGuard<'_, RedisHealth> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Redis answers; a command in a pipeline has its error one level deeper.
    fn failure(answer: &str) -> RedisFailure {
        let value = redis::parse_redis_value(format!("-{answer}\r\n").as_bytes()).expect("is an answer");
        value.extract_error().expect_err("is an error").into()
    }

    #[test]
    fn names_the_cause_of_each_error() {
        use RedisFailureKind::{NoWrites, NotPermitted, OutOfMemory, Refused, UnusableKey};
        for (answer, cause, kind) in [
            ("NOPERM User lb has no permissions to run the 'hscan' command", "permission", NotPermitted),
            ("NOPERM this user has no permissions to access one of the keys", "permission", NotPermitted),
            ("ERR unknown command 'HSCAN', with args beginning with: 'x'", "permission", NotPermitted),
            ("NOAUTH Authentication required.", "password", Refused),
            ("WRONGPASS invalid username-password pair or user is disabled.", "password", Refused),
            ("ERR syntax error", "refused", Refused),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", "refused", UnusableKey),
            ("NOREPLICAS Not enough good replicas to write.", "full", NoWrites),
            ("OOM command not allowed when used memory > 'maxmemory'.", "full", OutOfMemory),
        ] {
            let found = failure(answer);
            assert_eq!((found.cause, found.kind), (cause, kind), "{answer}");
        }
    }
}
