//! What a configuration says to requests. A request loads it once and keeps it: whatever is reloaded
//! meanwhile, it ends by the settings that it began with.

use std::sync::Arc;
use std::time::Duration;

use pingora::protocols::l4::socket::SocketAddr;

use super::intake::peek::Peeker;
use super::memory::Memory;
use super::served::Routes;
use crate::config::types::{Balance, Config, Retry, Timeouts, TrustedProxies};
use crate::fleet::Fleet;
use crate::prompt::chain::Blocks;
use crate::route::paths;

pub struct Settings {
    pub table: paths::Table,
    pub knobs: Balance,
    pub peeker: Peeker,
    pub timeouts: Timeouts,
    pub retry: Retry,
    /// How long a request waits while all who could have it are full.
    pub wait: Duration,
    pub header_bytes: u64,
    pub expose: bool,
    pub trusted_proxies: TrustedProxies,
    /// Bytes of bodies that are logged.
    pub sample: Option<usize>,
}

impl Settings {
    /// Whether a client's word on where a request came from is believed.
    pub fn trusts(&self, address: Option<&SocketAddr>) -> bool {
        match address {
            Some(SocketAddr::Inet(address)) => self.trusted_proxies.contains(address.ip()),
            Some(SocketAddr::Unix(_)) | None => self.trusted_proxies.contains_unix(),
        }
    }

    /// `memory` is what all requests share, also those that began with other settings. `blocks`: how prompts
    /// are cut, where they are remembered.
    pub fn new(config: &Config, fleet: Arc<Fleet>, memory: Arc<Memory>, blocks: Option<Blocks>) -> Arc<Self> {
        Arc::new(Settings {
            table: paths::Table::new(&config.passthrough),
            knobs: config.balance,
            // Where what is missing costs nothing, nobody has to know it.
            peeker: Peeker {
                limits: config.peek,
                memory,
                blocks: blocks.filter(|_| config.balance.missing > 0.0),
                sessions: config.sessions.clone(),
                routes: Routes::new(&config.routes, fleet),
            },
            timeouts: config.timeouts,
            retry: config.retry,
            wait: config.queue.wait,
            header_bytes: config.limits.header_bytes,
            expose: config.expose,
            trusted_proxies: config.trusted_proxies.clone(),
            sample: config.log.bodies.then_some(config.log.truncate),
        })
    }
}
