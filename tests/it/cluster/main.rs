//! Several balancers and their surroundings: Redis, siblings, stored responses, discovery.

#[path = "../common/mod.rs"]
mod common;
mod discovery;
mod doctor;
mod exchange;
mod members;
mod probers;
mod redis_chaos;
mod siblings;
mod stored;
