//! What is wrong with a set-up: rules that turn facts about upstreams, Redis and the configuration into
//! findings with remedies.
//!
//! `app::doctor` collects the facts. Each rule reads them and adds findings; no rule depends on another, so
//! that each fault gives one finding. An upstream that does not answer gives only that finding: what was not
//! asked is unknown, not wrong.
//!
//! Pure: no connections, no clock. Texts of servers are shown only through `report`, which makes them safe
//! for a terminal.

mod comparison;
pub(crate) mod facts;
pub(crate) mod finding;
mod redis_rules;
pub(crate) mod report;
mod setup_rules;
mod upstream_rules;

use facts::SetupFacts;
use finding::Finding;

/// Returns the findings, the severest first; those of one severity in the order of the configuration.
pub(crate) fn diagnose(facts: &SetupFacts<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    for upstream in &facts.upstreams {
        upstream_rules::add(facts, upstream, &mut found);
    }
    comparison::add(&facts.upstreams, &mut found);
    setup_rules::add(facts, &mut found);
    if let Some(redis) = &facts.redis {
        redis_rules::add(redis, facts.config, &mut found);
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

#[cfg(test)]
mod tests;
