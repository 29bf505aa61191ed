//! The rules for one upstream.

use super::facts::{QuestionFailure, SetupFacts, UpstreamFacts};
use super::finding::Finding;

/// The largest difference between two clocks that is no finding, in seconds.
pub(super) const MAX_CLOCK_DIFFERENCE: f64 = 2.0;

/// Adds the findings of one upstream.
pub(super) fn add(facts: &SetupFacts<'_>, upstream: &UpstreamFacts, found: &mut Vec<Finding>) {
    found.extend(drained(upstream));
    if let Err(failure) = &upstream.health {
        found.extend(health(upstream, &facts.config.health.path, failure));
        return;
    }
    found.extend(models(upstream));
    found.extend(metrics(upstream, facts.config.health.metrics));
    found.extend(cache(upstream));
    found.extend(usage(upstream));
    found.extend(sight(upstream));
    if upstream.has_dev_routes {
        let seen = "GET /is_sleeping answers: each client that reaches vLLM can stop or empty it";
        let remedy = "start vLLM without VLLM_SERVER_DEV_MODE=1, or let only the balancer reach it";
        found.push(Finding::warning("dev_routes", upstream.name(), seen, remedy));
    }
    if let Some(clock) = upstream.clock.filter(|clock| clock.differs_by(MAX_CLOCK_DIFFERENCE)) {
        let direction = if clock.ahead > 0.0 { "ahead of" } else { "behind" };
        let seen = format!("its clock is {:.0} s {direction} this machine's", clock.ahead.abs());
        let remedy = "synchronise the clocks (chrony, systemd-timesyncd)";
        found.push(Finding::warning("clock", upstream.name(), seen, remedy));
    }
}

/// The note that an operator drains the upstream: whether it answers or not, it gets no new requests.
fn drained(upstream: &UpstreamFacts) -> Option<Finding> {
    let name = upstream.name();
    let seen = "the running balancer: an operator drains it, so that it gets no new requests";
    let remedy = format!("PATCH /admin/upstreams/{name} with {{\"drain\": false}}, when it is to get some");
    upstream.is_drained().then(|| Finding::note("drained", name, seen, &remedy))
}

fn health(upstream: &UpstreamFacts, path: &str, failure: &QuestionFailure) -> Option<Finding> {
    let name = upstream.name();
    let get = |text: &str| format!("GET {path}: {text}");
    Some(match failure {
        QuestionFailure::Unreached(text) => {
            let remedy = "start vLLM there, or correct upstreams[].url (and upstreams[].tls)";
            Finding::error("unreachable", name, get(text), remedy)
        }
        QuestionFailure::Silent(text) => {
            let remedy = "see the log of vLLM, and what is in between; --timeout waits longer";
            Finding::error("silent", name, get(text), remedy)
        }
        QuestionFailure::Garbled(text) => {
            let remedy = "correct upstreams[].url: no vLLM answers so (https:// is for TLS)";
            Finding::error("not_vllm", name, get(text), remedy)
        }
        QuestionFailure::Status(status, _) => {
            let remedy = "see the log of vLLM, whose engine may have died; health.path is another path";
            Finding::error("unhealthy", name, get(&format!("status {status}")), remedy)
        }
        QuestionFailure::Settings(text) => {
            Finding::error("settings", name, text.as_str(), "correct the settings of the upstream")
        }
        QuestionFailure::NotAsked => return None,
    })
}

fn models(upstream: &UpstreamFacts) -> Vec<Finding> {
    let (name, config) = (upstream.name(), &upstream.config);
    let has_key = config.api_key.is_some() || config.api_key_env.is_some();
    let cards = match &upstream.models {
        Ok(cards) => cards,
        // The balancer does not read the list of an upstream with configured models, and the keys of clients
        // may be right.
        Err(_) if config.models.is_some() && !has_key => return Vec::new(),
        Err(QuestionFailure::Status(status @ (401 | 403), _)) => {
            let seen = format!("GET /v1/models: status {status}");
            let remedy = match has_key {
                true => "upstreams[].api_key must be the key of vLLM's --api-key",
                false => "set upstreams[].api_key to the key of vLLM's --api-key",
            };
            return vec![Finding::error("key_refused", name, seen, remedy)];
        }
        Err(_) if config.models.is_some() => return Vec::new(),
        Err(failure) => {
            let seen = format!("GET /v1/models: {}", text_of(failure));
            let remedy = "correct upstreams[].url, or list the models in upstreams[].models";
            return vec![Finding::error("models_unreadable", name, seen, remedy)];
        }
    };
    if cards.is_empty() {
        let remedy = "start vLLM with a model, or correct upstreams[].url";
        return vec![Finding::error("no_models", name, "GET /v1/models lists no model", remedy)];
    }
    let is_missing = |model: &&String| !cards.iter().any(|card| card.id == **model);
    let missing: Vec<&str> = config.models.iter().flatten().filter(is_missing).map(String::as_str).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    let served: Vec<&str> = cards.iter().map(|card| card.id.as_str()).collect();
    let seen = format!("does not serve {}: it serves {}", quoted(&missing), quoted(&served));
    let remedy = "correct upstreams[].models, or vLLM's --served-model-name";
    vec![Finding::error("model_missing", name, seen, remedy)]
}

fn metrics(upstream: &UpstreamFacts, are_read: bool) -> Option<Finding> {
    let seen = match &upstream.metrics {
        _ if !are_read => return None,
        Ok(page) if page.info.has_engine => return None,
        Ok(_) => "GET /metrics has no metric of the engine".to_string(),
        Err(QuestionFailure::NotAsked) => return None,
        Err(failure) => format!("GET /metrics: {}", text_of(failure)),
    };
    let remedy = "start vLLM without --disable-log-stats, and let the balancer reach /metrics; else set \
                  health.metrics: false";
    Some(Finding::warning("no_metrics", upstream.name(), seen, remedy))
}

fn cache(upstream: &UpstreamFacts) -> Option<Finding> {
    let (name, page) = (upstream.name(), upstream.page()?);
    if page.info.asleep == Some(true) {
        let remedy = "POST /wake_up to vLLM, or drain the upstream while it sleeps";
        return Some(Finding::error("asleep", name, "the engine sleeps, by its metrics", remedy));
    }
    if page.metrics.prefix_caching == Some(false) {
        let seen = "prefix caching is off: enable_prefix_caching=\"False\" in its metrics";
        let remedy = "start vLLM with --enable-prefix-caching, and without --no-enable-prefix-caching";
        return Some(Finding::warning("prefix_caching_off", name, seen, remedy));
    }
    None
}

fn usage(upstream: &UpstreamFacts) -> Option<Finding> {
    let name = upstream.name();
    let usage = match upstream.usage.as_ref()? {
        Ok(usage) => usage,
        // A pooling model has no completions.
        Err(QuestionFailure::Status(404 | 405, _) | QuestionFailure::NotAsked) => return None,
        Err(QuestionFailure::Status(status, body)) => {
            let seen = format!("POST /v1/completions: status {status}: {body}");
            return Some(Finding::warning("request_failed", name, seen, "see the log of vLLM"));
        }
        Err(failure) => {
            let seen = format!("POST /v1/completions: {}", text_of(failure));
            return Some(Finding::warning("request_failed", name, seen, "see the log of vLLM"));
        }
    };
    let caching = upstream.page().and_then(|page| page.metrics.prefix_caching);
    match usage.cached_tokens {
        None if caching != Some(false) => {
            Some(usage_details_off(name, "answers have no cached tokens in usage.prompt_tokens_details"))
        }
        Some(0) if caching.is_none() => {
            let seen = "the same prompt twice, and no token of the second one was cached";
            let remedy = "start vLLM with --enable-prefix-caching";
            Some(Finding::warning("prefix_caching_off", name, seen, remedy))
        }
        _ => None,
    }
}

fn usage_details_off(name: &str, seen: &str) -> Finding {
    let remedy = "start vLLM with --enable-prompt-tokens-details";
    Finding::warning("usage_details_off", name, seen, remedy)
}

/// The finding of a running balancer, where no other rule has it.
fn sight(upstream: &UpstreamFacts) -> Option<Finding> {
    let reading = upstream.sight.as_ref()?;
    let (name, seen) = (upstream.name(), format!("the running balancer: {}", reading.reason));
    if reading.reason.starts_with("no usage details") {
        return upstream.usage.is_none().then(|| usage_details_off(name, &seen));
    }
    let is_known = reading.reason.starts_with("prefix caching is off");
    if reading.sight != "blind" || is_known {
        return None;
    }
    let remedy = "see \"How well the balancer sees\" in docs/routing.md";
    Some(Finding::warning("sight_blind", name, seen, remedy))
}

/// The text of a failure.
pub(super) fn text_of(failure: &QuestionFailure) -> String {
    match failure {
        QuestionFailure::Unreached(text)
        | QuestionFailure::Silent(text)
        | QuestionFailure::Garbled(text)
        | QuestionFailure::Settings(text) => text.clone(),
        QuestionFailure::Status(status, _) => format!("status {status}"),
        QuestionFailure::NotAsked => "not asked".into(),
    }
}

/// The first names of a list, in quotes.
pub(super) fn quoted(names: &[&str]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("{name:?}")).collect();
    let more = names.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}
