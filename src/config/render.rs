//! What runs, as a person reads it: the effective configuration with every default and no secret.
//!
//! `GET /admin/config` and a Debug record at the start show it. The shape is that of the file.

mod route;

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::secret::Secret;
use super::types::{
    Breaker, CaptureScope, Config, Discover, DiscoverySource, Listen, Passthrough, PassthroughTo, Retry,
    SessionConfig, Timeouts, TraceStore, TracesConfig, UpstreamConfig, UpstreamTls,
};
use super::values::{show_duration, show_size};
use super::{keys, postgres};

/// The configuration as JSON, keys in the manual's order.
pub fn json(config: &Config) -> Value {
    let redis = &config.redis_options;
    let (balance, peek, health) = (&config.balance, &config.peek, &config.health);
    json!({
        "listen": config.listen.iter().map(listen).collect::<Vec<_>>(),
        "admin": {"address": config.admin.address.to_string(), "token": mask(config.admin.token.as_ref())},
        "redis": config.redis.as_ref().map(ToString::to_string),
        "redis_options": {
            "interval": show_duration(redis.interval),
            "prefix": redis.prefix,
            "gauge_ttl": show_duration(redis.gauge_ttl),
            "stream_length": redis.stream_length,
        },
        "upstreams": upstreams(config),
        "routes": config.routes.iter().map(route::json).collect::<Vec<_>>(),
        "balance": {
            "preset": balance.preset.name(),
            "backlog": number(balance.backlog),
            "missing": number(balance.missing),
            "stall": number(balance.stall),
            "share": number(balance.share),
            "active": number(balance.active),
            "context": number(balance.context),
            "index_blocks": config.index.blocks,
            "block_bytes": config.index.block_bytes,
        },
        "peek": {
            "bytes": show_size(peek.bytes),
            "max_body": show_size(peek.max_body),
            "memory": show_size(peek.memory),
        },
        "health": {
            "path": health.path,
            "interval": show_duration(health.interval),
            "timeout": show_duration(health.timeout),
            "fall": health.fall,
            "rise": health.rise,
            "metrics": health.metrics,
        },
        "breaker": breaker(&config.breaker),
        "timeouts": timeouts(&config.timeouts),
        "retry": retry(&config.retry),
        "queue": {"size": config.queue.size, "wait": show_duration(config.queue.wait)},
        "limits": {
            "connections": config.limits.connections,
            "header_bytes": show_size(config.limits.header_bytes),
        },
        "trusted_proxies": config.trusted_proxies.names(),
        "threads": config.threads,
        "passthrough": config.passthrough.iter().map(passthrough).collect::<Vec<_>>(),
        "upgrade_socket": config.upgrade_socket.display().to_string(),
        "sessions": sessions(&config.sessions),
        "traces": traces(&config.traces),
        "log": {
            "format": config.log.format.map(|format| format.name()),
            "level": config.log.level.name(),
            "bodies": config.log.bodies,
            "truncate": config.log.truncate,
        },
        "shutdown": {
            "grace": show_duration(config.shutdown.grace),
            "drain": show_duration(config.shutdown.drain),
        },
        "expose": config.expose,
    })
}

fn breaker(breaker: &Breaker) -> Value {
    json!({
        "failures": breaker.failures,
        "window": show_duration(breaker.window),
        "open": show_duration(breaker.open),
        "max_open": show_duration(breaker.max_open),
        "max_ejected": number(breaker.max_ejected),
    })
}

fn timeouts(timeouts: &Timeouts) -> Value {
    let optional = |limit: Option<Duration>| show_duration(limit.unwrap_or_default());
    json!({
        "connect": show_duration(timeouts.connect),
        "first_byte": optional(timeouts.first_byte),
        "idle": optional(timeouts.idle),
        "total": optional(timeouts.total),
    })
}

fn retry(retry: &Retry) -> Value {
    json!({
        "attempts": retry.attempts,
        "backoff": show_duration(retry.backoff),
        "max_backoff": show_duration(retry.max_backoff),
        "budget": number(retry.budget),
        "on": retry.on.names(),
    })
}

fn sessions(sessions: &SessionConfig) -> Value {
    let cookie = match sessions.cookies.as_slice() {
        [] => json!("none"),
        [name] => json!(name),
        names => json!(names),
    };
    json!({
        "headers": sessions.headers,
        "body": sessions.body,
        "cookie": cookie,
        "subagents": sessions.subagents.name(),
        "bonus": number(sessions.bonus),
        "ttl": show_duration(sessions.ttl),
    })
}

/// The kind of a store and where it is, without a password.
pub fn trace_store(store: &TraceStore) -> String {
    match store {
        TraceStore::None => "none".into(),
        TraceStore::Memory => "memory".into(),
        TraceStore::Sqlite(None) => "sqlite".into(),
        TraceStore::Sqlite(Some(path)) => format!("sqlite:{}", path.display()),
        TraceStore::Postgres(url) => postgres::shown(url.expose()),
    }
}

fn traces(traces: &TracesConfig) -> Value {
    let capture = match traces.capture {
        CaptureScope::Sessions => "sessions".into(),
        CaptureScope::All => "all".into(),
        CaptureScope::Share(share) => number(share),
    };
    json!({
        "store": trace_store(&traces.store),
        "memory": show_size(traces.memory),
        "capture": capture,
        "keep": show_duration(traces.keep),
        "max_bytes": show_size(traces.max_bytes),
        "queue": traces.queue,
        "sync": traces.sync,
        "cumulative": traces.cumulative,
    })
}

/// The same as YAML, which can be read as a file again, secrets apart.
pub fn yaml(config: &Config) -> String {
    let mut text = String::new();
    if let Value::Object(map) = json(config) {
        yaml_map(&map, 0, &mut text);
    }
    text
}

fn listen(listen: &Listen) -> Value {
    let tls = listen.tls.as_ref();
    let show = |path: &Path| path.display().to_string();
    let tls = tls.map(|tls| json!({"certificate": show(&tls.certificate), "key": show(&tls.key)}));
    json!({"address": listen.address.to_string(), "tls": tls})
}

fn upstreams(config: &Config) -> Vec<Value> {
    config.upstreams.iter().map(upstream).chain(config.sources.iter().map(source)).collect()
}

fn source(source: &DiscoverySource) -> Value {
    let mut value = match &source.ask {
        Discover::Gym(url) => json!({"gym": url.display()}),
    };
    value["every"] = json!(show_duration(source.every));
    value["weight"] = number(source.weight);
    value["max_active"] = json!(source.max_active);
    value["tls"] = tls(&source.tls);
    value
}

fn tls(tls: &UpstreamTls) -> Value {
    json!({
        "ca": tls.ca.as_ref().map(|ca| ca.display().to_string()),
        "verify": tls.verify,
        "sni": tls.sni,
    })
}

fn upstream(upstream: &UpstreamConfig) -> Value {
    // The keys of `tls` mean nothing without TLS, and the file refuses them there.
    let tls = upstream.url.https.then(|| tls(&upstream.tls));
    json!({
        "url": upstream.url.display(),
        "name": upstream.name,
        "models": upstream.models,
        "weight": number(upstream.weight),
        "api_key": mask(upstream.api_key.as_ref()),
        "max_active": upstream.max_active,
        "tls": tls,
    })
}

/// Renders an upstream with its key, for siblings that send requests to it.
pub fn upstream_with_key(config: &UpstreamConfig) -> Value {
    let mut value = upstream(config);
    value["api_key"] = json!(config.api_key.as_ref().map(Secret::expose));
    value
}

fn passthrough(passthrough: &Passthrough) -> Value {
    let to = match &passthrough.to {
        PassthroughTo::All => "all",
        PassthroughTo::Upstream(name) => name,
    };
    json!({"path": passthrough.path, "to": to})
}

fn mask(secret: Option<&Secret>) -> Option<String> {
    secret.map(Secret::to_string)
}

/// A whole number without its point, as it would be written.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn yaml_map(map: &Map<String, Value>, indent: usize, text: &mut String) {
    for (index, (key, value)) in map.iter().enumerate() {
        // The first key of a list's item stands behind the dash.
        if index > 0 || !text.ends_with("- ") {
            text.push_str(&" ".repeat(indent));
        }
        text.push_str(key);
        text.push(':');
        match value {
            // JSON is YAML; a dollar sign would begin a variable.
            Value::Object(_) if keys::FREE.contains(&key.as_str()) => {
                text.push_str(&format!(" {}\n", dollars_doubled(value)));
            }
            Value::Object(inner) => {
                text.push('\n');
                yaml_map(inner, indent + 2, text);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                text.push('\n');
                for item in items {
                    text.push_str(&format!("{}- ", " ".repeat(indent + 2)));
                    if let Value::Object(inner) = item {
                        yaml_map(inner, indent + 4, text);
                    }
                }
            }
            // JSON's scalars and lists of scalars are YAML.
            other => text.push_str(&format!(" {other}\n")),
        }
    }
}

fn dollars_doubled(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace('$', "$$")),
        Value::Array(items) => items.iter().map(dollars_doubled).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), dollars_doubled(value))).collect(),
        scalar => scalar.clone(),
    }
}
