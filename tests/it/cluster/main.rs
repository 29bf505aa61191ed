//! Several balancers and their surroundings: Redis, siblings, stored responses, discovery.

#[path = "../common/mod.rs"]
mod common;
mod discovery;
mod doctor;
mod exchange;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod members;
mod probers;
mod redis_chaos;
mod session_turns;
mod siblings;
mod stored;
