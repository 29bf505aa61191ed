//! One item of `upstreams`: an upstream, or a source of upstreams.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::dns_name::{DnsName, dns_server};
use super::kubernetes::KubernetesService;
use super::passthrough::ALL_UPSTREAMS;
use super::source::{DEFAULT_INTERVAL, DiscoveryMethod, DiscoverySource, DnsLookup, ListedFile};
use super::source_keys::{SOURCE_KEYS, why_not_of_source};
use super::upstream::{MAX_WEIGHT, MIN_WEIGHT, UpstreamConfig};
use super::upstream_tls::UpstreamTls;
use crate::config::problem::seen;
use crate::config::secret::Secret;
use crate::config::setting::{
    KeyRow, MapPlace, MapSource, SettingField, SettingRow, SettingsTable, custom, describe_rows, duration,
    integer, list, maybe, maybe_texts, number, optional_section, path, row, secret, section, show, text,
    value,
};
use crate::config::url::{self, UpstreamUrl};
use crate::config::values::{HOUR, ReadResult, number_in, plain};

/// The longest name of an upstream, in bytes: metrics and admin calls carry it.
const MAX_NAME_BYTES: usize = 128;
/// The longest name of a variable, in bytes.
const MAX_VARIABLE_BYTES: usize = 128;

/// The beginning of the names of variables that hold keys. An admin call and a record of a sibling can name
/// such a variable, and so must not reach any other.
const KEY_VARIABLE_PREFIX: &str = "VLLM_LB_KEY_";

/// The keys of all kinds of items. An item has a `url`, or names a source.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamItem {
    pub url: Option<UpstreamUrl>,
    /// A NeMo Gym model server.
    pub gym: Option<UpstreamUrl>,
    pub dns: Option<DnsName>,
    /// The DNS servers of a `dns`; empty: those of the system.
    pub resolver: Vec<SocketAddr>,
    pub kubernetes: Option<KubernetesService>,
    /// A file with further items, as it was written.
    pub file: Option<PathBuf>,
    /// How often a source is polled; `None` where the file says nothing.
    pub every: Option<Duration>,
    pub name: Option<String>,
    pub models: Option<Vec<String>>,
    pub weight: f64,
    pub api_key: Option<Secret>,
    pub api_key_env: Option<String>,
    pub max_active: Option<u32>,
    pub tls: UpstreamTls,
}

/// The field of the list `upstreams`, which is kept as two lists. Code of its own reads it.
pub(super) struct UpstreamsField<S: 'static> {
    pub upstreams: fn(&mut S) -> &mut Vec<UpstreamConfig>,
    pub sources: fn(&mut S) -> &mut Vec<DiscoverySource>,
}

// === impl UpstreamItem ===

impl UpstreamItem {
    /// An item to read a map into.
    pub fn unread() -> Self {
        UpstreamItem { every: None, ..UpstreamItem::defaults() }
    }

    /// The upstream, if the item has a URL.
    pub fn upstream(self) -> Option<UpstreamConfig> {
        let upstream = UpstreamConfig::new(self.url?);
        let UpstreamItem { models, weight, api_key, api_key_env, max_active, tls, .. } = self;
        let name = self.name.unwrap_or(upstream.name);
        Some(UpstreamConfig { name, models, weight, api_key, api_key_env, max_active, tls, ..upstream })
    }

    /// The source, if the item has one.
    pub fn source(self) -> Option<DiscoverySource> {
        let UpstreamItem { gym, dns, kubernetes, file, resolver, .. } = self;
        let ask = gym
            .map(DiscoveryMethod::Gym)
            .or(dns.map(|name| DiscoveryMethod::Dns(DnsLookup { name, servers: resolver })))
            .or(kubernetes.map(DiscoveryMethod::Kubernetes))
            .or(file.map(|path| DiscoveryMethod::File(ListedFile::new(path))))?;
        let source = DiscoverySource::new(ask);
        let UpstreamItem { models, weight, api_key, api_key_env, max_active, tls, .. } = self;
        let every = self.every.unwrap_or(source.every);
        Some(DiscoverySource { every, models, weight, api_key, api_key_env, max_active, tls, ..source })
    }

    fn of_upstream(upstream: &UpstreamConfig) -> Self {
        UpstreamItem {
            url: Some(upstream.url.clone()),
            name: Some(upstream.name.clone()),
            models: upstream.models.clone(),
            weight: upstream.weight,
            api_key: upstream.api_key.clone(),
            api_key_env: upstream.api_key_env.clone(),
            max_active: upstream.max_active,
            tls: upstream.tls.clone(),
            ..UpstreamItem::defaults()
        }
    }

    fn of_source(source: &DiscoverySource) -> Self {
        let mut item = UpstreamItem {
            every: Some(source.every),
            models: source.models.clone(),
            weight: source.weight,
            api_key: source.api_key.clone(),
            api_key_env: source.api_key_env.clone(),
            max_active: source.max_active,
            tls: source.tls.clone(),
            ..UpstreamItem::defaults()
        };
        match &source.ask {
            DiscoveryMethod::Gym(url) => item.gym = Some(url.clone()),
            DiscoveryMethod::Dns(lookup) => {
                item.dns = Some(lookup.name.clone());
                item.resolver.clone_from(&lookup.servers);
            }
            DiscoveryMethod::Kubernetes(service) => item.kubernetes = Some(service.clone()),
            DiscoveryMethod::File(file) => item.file = Some(file.written.clone()),
        }
        item
    }

    /// The item as the file would hold it, with these keys alone.
    fn shown(&self, has: impl Fn(&str) -> bool) -> Value {
        let mut shown = show(self);
        if let Value::Object(map) = &mut shown {
            map.retain(|key, _| has(key));
        }
        shown
    }
}

impl SettingsTable for UpstreamItem {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "url",
            "URL of a vLLM server; a path goes before every request's path, a trailing /v1 is removed.",
            &value(|item: &mut Self| &mut item.url, maybe(custom("upstream URL", url::upstream, shown_url))),
        )
        .required(),
        row(
            "gym",
            "URL of a NeMo Gym model server, in place of `url`: its engines are upstreams.",
            &value(|item: &mut Self| &mut item.gym, maybe(custom("upstream URL", url::upstream, shown_url))),
        ),
        row(
            "dns",
            "DNS name in a URL, in place of `url`: its addresses are upstreams; srv+http:// for SRV records.",
            &value(|item: &mut Self| &mut item.dns, maybe(custom("DNS name", DnsName::parse, shown_dns))),
        ),
        row(
            "resolver",
            "DNS servers of a `dns`, in place of those of /etc/resolv.conf.",
            &value(
                |item: &mut Self| &mut item.resolver,
                list(
                    "list of addresses",
                    dns_server,
                    |servers| servers,
                    |servers| match servers.is_empty() {
                        true => Value::Null,
                        false => json!(servers),
                    },
                )
                .not_empty("leave the key out for the servers of /etc/resolv.conf"),
            ),
        ),
        row(
            "kubernetes",
            "Service in Kubernetes, in place of `url`: its endpoints are upstreams.",
            &optional_section(|item: &mut Self| &mut item.kubernetes),
        ),
        row(
            "file",
            "File with a list in the form of `upstreams`, in place of `url`; it is read again.",
            &value(|item: &mut Self| &mut item.file, maybe(path())),
        ),
        row(
            "every",
            "Time between two requests to a `gym`, two reads of a `file` (1s), at most between two of `dns`.",
            &value(|item: &mut Self| &mut item.every, maybe(duration(Duration::from_millis(100), HOUR))),
        ),
        row(
            "name",
            "Unique name in logs, metrics and the admin API; host and port of the URL by default.",
            &value(|item: &mut Self| &mut item.name, maybe(text("upstream name", upstream_name))),
        ),
        row(
            "models",
            "Models that the upstream serves; requested from GET /v1/models by default.",
            &value(
                |item: &mut Self| &mut item.models,
                maybe_texts("list of model names", plain).not_empty("leave the key out to ask the upstream"),
            ),
        ),
        row(
            "weight",
            "Capacity beside the other upstreams; divides the cost of a choice.",
            &value(|item: &mut Self| &mut item.weight, number(MIN_WEIGHT, MAX_WEIGHT)),
        ),
        row(
            "api_key",
            "Key that is sent as `Authorization: Bearer` in place of the client's.",
            &value(|item: &mut Self| &mut item.api_key, maybe(secret())),
        ),
        row(
            "api_key_env",
            "Variable that holds the key, in place of `api_key`; its name begins with VLLM_LB_KEY_.",
            &value(|item: &mut Self| &mut item.api_key_env, maybe(text("name of a variable", key_variable))),
        ),
        row(
            "max_active",
            "Requests in flight from this balancer at which the upstream gets no more.",
            &value(|item: &mut Self| &mut item.max_active, maybe(integer(1, 1_000_000))),
        ),
        row("tls", "TLS towards the upstream.", &section(|item: &mut Self| &mut item.tls)),
    ];

    fn defaults() -> Self {
        UpstreamItem {
            url: None,
            gym: None,
            dns: None,
            resolver: Vec::new(),
            kubernetes: None,
            file: None,
            every: Some(DEFAULT_INTERVAL),
            name: None,
            models: None,
            weight: 1.0,
            api_key: None,
            api_key_env: None,
            max_active: None,
            tls: UpstreamTls::default(),
        }
    }

    fn contradictions(&self, report: &mut dyn FnMut(&'static str, String)) {
        if self.api_key.is_some() && self.api_key_env.is_some() {
            report("api_key_env", "stands beside api_key: an upstream has one of them".into());
        }
    }
}

/// Parses the name of a variable that holds a key.
fn key_variable(text: &str) -> ReadResult<String> {
    let clean = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let rest = text.strip_prefix(KEY_VARIABLE_PREFIX).filter(|rest| !rest.is_empty());
    if text.len() > MAX_VARIABLE_BYTES || !rest.is_some_and(|rest| rest.chars().all(clean)) {
        let what = format!("letters, digits and _ behind {KEY_VARIABLE_PREFIX}");
        return Err(format!("{} is no name of a variable for a key: allowed are {what}", seen(text)));
    }
    Ok(text.into())
}

/// Parses the weight of an upstream as the file holds it.
pub fn parse_weight(text: &str) -> ReadResult<f64> {
    number_in(MIN_WEIGHT..=MAX_WEIGHT)(text)
}

/// An upstream as the file would hold it, secrets masked.
pub fn show_upstream(upstream: &UpstreamConfig) -> Value {
    let mut shown = UpstreamItem::of_upstream(upstream).shown(|key| !SOURCE_KEYS.contains(&key));
    // The file rejects `tls` for a URL without TLS.
    if !upstream.url.https {
        shown["tls"] = Value::Null;
    }
    shown
}

fn show_source(source: &DiscoverySource) -> Value {
    let kind = source.ask.key();
    let mut shown = UpstreamItem::of_source(source).shown(|key| why_not_of_source(kind, key).is_none());
    // As in `show_upstream`. The engines of a `gym` have URLs of their own.
    if let DiscoveryMethod::Dns(DnsLookup { name, .. }) = &source.ask
        && !name.url.https
    {
        shown["tls"] = Value::Null;
    }
    shown
}

fn shown_url(url: &UpstreamUrl) -> Value {
    json!(url.display())
}

fn shown_dns(name: &DnsName) -> Value {
    json!(name.display())
}

fn upstream_name(text: &str) -> ReadResult<String> {
    let clean = |c: char| c.is_ascii_alphanumeric() || "._:/-[]".contains(c);
    if text == ALL_UPSTREAMS {
        return Err(format!("{} means every upstream: choose another name", seen(text)));
    }
    if text.is_empty() || text.len() > MAX_NAME_BYTES || !text.chars().all(clean) {
        let allowed = format!("1 to {MAX_NAME_BYTES} letters, digits and . _ : / -");
        return Err(format!("{} is no name: allowed are {allowed}", seen(text)));
    }
    Ok(text.into())
}

// === impl UpstreamsField ===

impl<S> SettingField<S> for UpstreamsField<S> {
    fn read(&self, _key: &str, _from: &mut dyn MapSource, _into: &mut S) {}

    fn show(&self, of: &mut S) -> Value {
        let mut shown: Vec<Value> = (self.upstreams)(of).iter().map(show_upstream).collect();
        shown.extend((self.sources)(of).iter().map(show_source));
        Value::Array(shown)
    }

    fn differs(&self, old: &mut S, new: &mut S) -> bool {
        (self.upstreams)(old) != (self.upstreams)(new) || (self.sources)(old) != (self.sources)(new)
    }

    fn copy(&self, from: &mut S, to: &mut S) {
        (self.upstreams)(to).clone_from((self.upstreams)(from));
        (self.sources)(to).clone_from((self.sources)(from));
    }

    fn describe(&self, row: KeyRow, _defaults: &mut S, rows: &mut Vec<KeyRow>) {
        let path = format!("{}[]", row.path);
        describe_rows(UpstreamItem::TABLE, &MapPlace { path: &path, ..row.map() }, rows);
    }
}
