//! What happens when upstreams fail, are full or restart, and when the balancer reloads or upgrades.

#[path = "../common/mod.rs"]
mod common;
mod failover;
mod overload;
mod probes;
mod proper_ends;
mod queue;
mod regressions;
mod reload;
mod restart;
mod stalled_files;
mod stalled_output;
mod trips;
mod upgrade;
mod upgrade_state;
