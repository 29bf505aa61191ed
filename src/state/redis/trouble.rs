//! What goes wrong with Redis: said once when it begins and once when it is over, and counted every time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use redis::{ErrorKind, RedisError};

use crate::observe::Observer;

/// Why something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// A label of few values.
    pub cause: &'static str,
    pub text: String,
    /// The connection is good, and Redis is not: it takes nothing in for now.
    pub full: bool,
}

/// Codes by which Redis says that it takes nothing in.
const FULL_ERRORS: [&str; 3] = ["OOM", "MISCONF", "NOREPLICAS"];

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
pub struct Troubles {
    health: Mutex<RedisHealth>,
    observer: Observer,
}

// === impl Trouble ===

impl Trouble {
    pub fn silent() -> Self {
        Trouble { cause: "silent", text: "no answer in time".into(), full: false }
    }

    /// Redis answered with an unexpected type.
    pub fn strange(what: &str) -> Self {
        Trouble { cause: "strange", text: what.into(), full: false }
    }
}

impl From<RedisError> for Trouble {
    fn from(error: RedisError) -> Self {
        // What a command in a pipeline met stands one level deeper.
        let inner = error.clone().into_server_errors();
        let inner = inner.iter().flat_map(|all| all.iter()).map(|(_, one)| one.code()).next();
        let code = inner.or(error.code()).unwrap_or_default();
        let full = FULL_ERRORS.contains(&code);
        let cause = match error.kind() {
            _ if full => "full",
            _ if error.is_timeout() => "silent",
            ErrorKind::AuthenticationFailed => "password",
            _ if matches!(code, "NOAUTH" | "WRONGPASS" | "NOPERM") => "password",
            ErrorKind::Io | ErrorKind::ClusterConnectionNotFound => "lost",
            ErrorKind::MasterNameNotFoundBySentinel | ErrorKind::EmptySentinelList => "lost",
            _ => "refused",
        };
        Trouble { cause, text: error.to_string(), full }
    }
}

// === impl Troubles ===

impl Troubles {
    pub fn new(observer: Observer) -> Self {
        Troubles { health: Mutex::new(RedisHealth::Unknown), observer }
    }

    /// An operation on Redis failed; the first failure in a row is worth a warning.
    pub fn met(&self, trouble: &Trouble, now: Instant) {
        let mut health = self.health();
        let first = !matches!(*health, RedisHealth::Fails { .. });
        self.observer.redis_failed(trouble.cause, &trouble.text, first);
        if first {
            *health = RedisHealth::Fails { since: now };
        }
    }

    pub fn are_there(&self) -> bool {
        matches!(*self.health(), RedisHealth::Fails { .. })
    }

    /// Redis works.
    pub fn over(&self, now: Instant) {
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
