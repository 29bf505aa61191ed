//! The rules for the configuration as a whole, its sources, and this process.

use super::facts::{MissingBalancer, QuestionFailure, SetupFacts, UpstreamFacts};
use super::finding::Finding;
use super::upstream_rules::{quoted, text_of};
use crate::config::types::RouteConfig;

/// The least number of files that a busy balancer needs: two connections for each request.
const MIN_OPEN_FILES: u64 = 4096;

/// Adds the findings of routes, sources, the running balancer and this process.
pub(super) fn add(facts: &SetupFacts<'_>, found: &mut Vec<Finding>) {
    found.extend(facts.missing_balancer.as_ref().map(no_balancer));
    for source in &facts.sources {
        match &source.listed {
            Ok(0) => {
                let remedy = "start its engines; it is asked again";
                found.push(Finding::warning("source_empty", &source.label, "it lists no engine", remedy));
            }
            Ok(_) => {}
            Err(why) => {
                let remedy = match source.label.split(' ').next() {
                    Some("file") => "write the list, or correct upstreams[].file",
                    Some("dns") => "correct upstreams[].dns, its records, or upstreams[].resolver",
                    Some("kubernetes") => "correct upstreams[].kubernetes, or the rights of the balancer",
                    _ => "start the model server, or correct upstreams[].gym",
                };
                found.push(Finding::error("source_unreadable", &source.label, why.as_str(), remedy));
            }
        }
    }
    for problem in &facts.unusable_certificates {
        let remedy = "correct listen[].tls, or the files; the balancer does not start like this";
        found.push(Finding::error("certificate_unusable", "the configuration", problem, remedy));
    }
    for (index, route) in facts.config.routes.iter().enumerate() {
        found.extend(unserved(index, route, &facts.upstreams));
    }
    if let Some(files) = facts.open_files.filter(|files| *files < MIN_OPEN_FILES) {
        let seen = format!("a process may open {files} files, and each request takes two connections");
        let remedy = "ulimit -n 65536, or LimitNOFILE=65536 in the unit of the service";
        found.push(Finding::warning("open_files", "this machine", seen, remedy));
    }
}

/// The finding for the address of `--admin`, at which no balancer answered.
fn no_balancer(missing: &MissingBalancer) -> Finding {
    let remedy = match &missing.failure {
        QuestionFailure::Unreached(_) => {
            "start the balancer, or correct --admin: the address is admin.address of the running balancer"
        }
        QuestionFailure::Status(401 | 403, _) => {
            "set VLLM_LB_ADMIN_TOKEN or admin.token to that of the running balancer"
        }
        QuestionFailure::Silent(_) => {
            "see the log of the balancer, and what is in between; --timeout waits longer"
        }
        _ => "correct --admin: the address is admin.address of the running balancer, not listen",
    };
    let seen = format!("GET /admin/upstreams: {}", text_of(&missing.failure));
    Finding::error("no_balancer", &missing.admin, seen, remedy)
}

/// Finds a route that leads to a model of no upstream. Upstreams that could not be read may serve it.
fn unserved(index: usize, route: &RouteConfig, upstreams: &[UpstreamFacts]) -> Option<Finding> {
    let model = route.to.as_ref()?;
    let is_allowed = |upstream: &&UpstreamFacts| {
        let source = upstream.config.discovered.as_ref().map(|discovered| &discovered.source);
        let is_named = |name: &String| *name == upstream.config.name || Some(name) == source;
        route.upstreams.as_ref().is_none_or(|names| names.iter().any(is_named))
    };
    let allowed: Vec<&UpstreamFacts> = upstreams.iter().filter(is_allowed).collect();
    let serves = |upstream: &&UpstreamFacts| match &upstream.config.models {
        Some(models) => models.contains(model),
        None => upstream.cards().iter().any(|card| card.id == *model),
    };
    let is_unknown = |upstream: &&UpstreamFacts| {
        upstream.config.models.is_none()
            && !matches!(upstream.models, Ok(_) | Err(QuestionFailure::Status(..)))
    };
    if allowed.is_empty() || allowed.iter().any(serves) || allowed.iter().any(is_unknown) {
        return None;
    }
    let mut served: Vec<&str> =
        allowed.iter().flat_map(|upstream| upstream.cards()).map(|card| &*card.id).collect();
    served.sort_unstable();
    served.dedup();
    let seen = format!("leads to {model:?}, which no upstream of it serves: they serve {}", quoted(&served));
    let remedy = "correct to, or start a vLLM with this --served-model-name";
    Some(Finding::error("route_unserved", &format!("routes[{index}]"), seen, remedy))
}
