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
    /// The connection works, but Redis accepts no writes at present.
    NoWrites,
    /// As `NoWrites`, until memory is released.
    OutOfMemory,
}

/// The error codes with which Redis rejects all writes, beside `OUT_OF_MEMORY`.
const NO_WRITES_ERRORS: [&str; 2] = ["MISCONF", "NOREPLICAS"];

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
}

impl From<RedisError> for RedisFailure {
    fn from(error: RedisError) -> Self {
        // The error of a command in a pipeline is nested one level deeper.
        let inner = error.clone().into_server_errors();
        let inner = inner.iter().flat_map(|all| all.iter()).map(|(_, one)| one.code()).next();
        let code = inner.or(error.code()).unwrap_or_default();
        let kind = match code {
            OUT_OF_MEMORY => RedisFailureKind::OutOfMemory,
            code if NO_WRITES_ERRORS.contains(&code) => RedisFailureKind::NoWrites,
            "" => RedisFailureKind::Broken,
            _ => RedisFailureKind::Refused,
        };
        let cause = match error.kind() {
            _ if matches!(kind, RedisFailureKind::OutOfMemory | RedisFailureKind::NoWrites) => "full",
            _ if error.is_timeout() => "silent",
            ErrorKind::AuthenticationFailed => "password",
            _ if matches!(code, "NOAUTH" | "WRONGPASS" | "NOPERM") => "password",
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
