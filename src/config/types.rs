//! The configuration that runs: every type of it with its default and its rows of the table of settings.
//!
//! A value of these types is always valid. `config::check` makes them from a file, flags and the environment;
//! the other modules read them. To add a key, add a field, its default and its row here, and describe the
//! key in `conf/lb.yaml`.

mod balance;
mod dns_name;
mod health;
mod kubernetes;
mod limits;
mod listen;
mod logging;
mod otlp;
mod passthrough;
mod redis;
mod redis_access;
mod retry;
mod route;
mod sessions;
mod shutdown;
mod source;
mod source_keys;
mod timeouts;
mod traces;
mod trusted;
mod upstream;
mod upstream_item;
mod upstream_tls;

use std::path::PathBuf;

use serde_json::json;

pub use balance::{Balance, PrefixIndex, Preset, SloRule};
pub use dns_name::DnsName;
pub use health::{Breaker, Health};
pub use kubernetes::KubernetesService;
pub use limits::{ClientLimits, ConnectionLimits, Peek, QueueConfig};
pub use listen::{AdminConfig, Listen, ListenAddress, ListenTls};
pub use logging::{LogConfig, LogFormat, LogLevel};
pub use otlp::OtlpConfig;
pub use passthrough::{ALL_UPSTREAMS, Passthrough, PassthroughTarget};
pub use redis::RedisOptions;
pub use redis_access::{RedisTls, SentinelAccess};
pub use retry::{Retry, RetryOn};
pub use route::{BodyEdits, HeaderEdits, OverflowPolicy, RouteConfig, UpstreamForm, changed_header};
pub use sessions::{SessionConfig, SubagentSessions};
pub use shutdown::ShutdownConfig;
pub use source::{DiscoveryMethod, DiscoveryOrigin, DiscoverySource, DnsLookup, ListedFile};
pub use source_keys::{SOURCE_KINDS, why_not_of_source};
pub use timeouts::Timeouts;
pub use traces::{CaptureScope, TraceStore, TracesConfig};
pub use trusted::{IpNetwork, TrustedProxies, TrustedProxy};
pub use upstream::UpstreamConfig;
pub use upstream_item::{UpstreamItem, parse_weight, show_upstream};
pub use upstream_tls::UpstreamTls;

use super::redis::url as redis_url;
use super::setting::{
    NamedChoice, SettingRow, SettingsTable, choice, integer, items, list, maybe, number, parse_choice, path,
    row, section, section_of, switch, text, value, words,
};

pub use super::redis::{RedisTopology, RedisUrl};
pub use super::url::UpstreamUrl;

/// In the directory that systemd makes for `RuntimeDirectory=vllm-lb`.
const UPGRADE_SOCKET: &str = "/run/vllm-lb/upgrade.sock";

/// All settings of one running balancer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub listen: Vec<Listen>,
    pub admin: AdminConfig,
    /// Where siblings meet; `None` without siblings.
    pub redis: Option<RedisUrl>,
    pub redis_options: RedisOptions,
    pub upstreams: Vec<UpstreamConfig>,
    /// The sources of further upstreams.
    pub sources: Vec<DiscoverySource>,
    pub routes: Vec<RouteConfig>,
    pub balance: Balance,
    /// `balance.slo`.
    pub slo: SloRule,
    pub index: PrefixIndex,
    pub peek: Peek,
    pub health: Health,
    pub breaker: Breaker,
    pub timeouts: Timeouts,
    pub retry: Retry,
    pub queue: QueueConfig,
    pub limits: ClientLimits,
    pub trusted_proxies: TrustedProxies,
    /// Worker threads; 0 is one a core.
    pub threads: usize,
    pub passthrough: Vec<Passthrough>,
    /// The socket on which a successor process requests the listening sockets.
    pub upgrade_socket: PathBuf,
    pub sessions: SessionConfig,
    pub traces: TracesConfig,
    pub log: LogConfig,
    pub otlp: OtlpConfig,
    pub shutdown: ShutdownConfig,
    /// Answers carry `x-vllm-lb-upstream`, `x-vllm-lb-attempts`, `x-vllm-lb-reason`, `x-vllm-lb-hit` and
    /// `x-vllm-lb-forecast-ms`.
    pub expose: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: vec![Listen::default()],
            admin: AdminConfig::default(),
            redis: None,
            redis_options: RedisOptions::default(),
            upstreams: Vec::new(),
            sources: Vec::new(),
            routes: Vec::new(),
            balance: Balance::default(),
            slo: SloRule::default(),
            index: PrefixIndex::default(),
            peek: Peek::default(),
            health: Health::default(),
            breaker: Breaker::default(),
            timeouts: Timeouts::default(),
            retry: Retry::default(),
            queue: QueueConfig::default(),
            limits: ClientLimits::default(),
            trusted_proxies: TrustedProxies::default(),
            threads: 0,
            passthrough: Vec::new(),
            upgrade_socket: UPGRADE_SOCKET.into(),
            sessions: SessionConfig::default(),
            traces: TracesConfig::default(),
            log: LogConfig::default(),
            otlp: OtlpConfig::default(),
            shutdown: ShutdownConfig::default(),
            expose: false,
        }
    }
}

impl SettingsTable for Config {
    const TABLE: &'static [SettingRow<Self>] = &[
        row("listen", "The listeners for clients.", &items(|config: &mut Self| &mut config.listen)).restart(),
        row("admin", "The listener for operators.", &section(|config: &mut Self| &mut config.admin)),
        row(
            "redis",
            "Redis on which several balancers meet: local, or the URL of a server, sentinels or a cluster.",
            &value(
                |config: &mut Self| &mut config.redis,
                maybe(text("Redis URL", redis_url).partly_masked()),
            ),
        )
        .restart(),
        row(
            "redis_options",
            "The exchange on the Redis.",
            &section(|config: &mut Self| &mut config.redis_options),
        )
        .restart(),
        row(
            "upstreams",
            "The vLLM servers, and the sources of further ones.",
            &upstream_item::UpstreamsField {
                upstreams: |config: &mut Self| &mut config.upstreams,
                sources: |config: &mut Self| &mut config.sources,
            },
        ),
        row("routes", "The virtual models.", &items(|config: &mut Self| &mut config.routes)),
        row("balance", "How an upstream is chosen.", &section_of(|config: &mut Self| config, BALANCE_TABLE)),
        row("peek", "How much of a request is held.", &section(|config: &mut Self| &mut config.peek)),
        row("health", "Probes of the upstreams.", &section(|config: &mut Self| &mut config.health)),
        row("breaker", "The circuit breaker.", &section(|config: &mut Self| &mut config.breaker)),
        row("timeouts", "Time limits of requests.", &section(|config: &mut Self| &mut config.timeouts)),
        row("retry", "Retries on other upstreams.", &section(|config: &mut Self| &mut config.retry)),
        row("queue", "Requests that wait for room.", &section(|config: &mut Self| &mut config.queue)),
        row("limits", "Limits of connections.", &section(|config: &mut Self| &mut config.limits)),
        row(
            "trusted_proxies",
            "Networks, addresses and `unix` whose x-forwarded-* and x-data-parallel-rank are kept.",
            &value(
                |config: &mut Self| &mut config.trusted_proxies,
                list("list of networks", TrustedProxy::parse, TrustedProxies::new, |all| json!(all.names())),
            ),
        ),
        row(
            "threads",
            "Threads that serve requests; 0 is one a core.",
            &value(|config: &mut Self| &mut config.threads, integer(0, 1024)),
        )
        .restart(),
        row(
            "passthrough",
            "Control paths of vLLM that are let through.",
            &items(|config: &mut Self| &mut config.passthrough),
        ),
        row(
            "upgrade_socket",
            "Unix socket on which a successor process requests the listening sockets.",
            &value(|config: &mut Self| &mut config.upgrade_socket, path()),
        )
        .restart(),
        row("sessions", "Sessions of requests.", &section(|config: &mut Self| &mut config.sessions)),
        row("traces", "Recorded calls.", &section(|config: &mut Self| &mut config.traces)),
        row("log", "The log.", &section(|config: &mut Self| &mut config.log)),
        row("otlp", "Spans for OpenTelemetry.", &section(|config: &mut Self| &mut config.otlp)),
        row("shutdown", "The end of the process.", &section(|config: &mut Self| &mut config.shutdown)),
        row(
            "expose",
            "Whether answers carry x-vllm-lb-balancer, -upstream, -attempts, -reason, -hit and -forecast-ms.",
            &value(|config: &mut Self| &mut config.expose, switch()),
        ),
    ];

    fn defaults() -> Self {
        Config::default()
    }
}

/// The largest weight of the formula.
const MAX_TERM_WEIGHT: f64 = 1e6;

/// The section `balance`, whose keys fill the weights and the prefix index. The preset comes first: a weight
/// that is given goes before the preset's.
const BALANCE_TABLE: &[SettingRow<Config>] = &[
    row(
        "preset",
        "Set of weights: work, prefix, least-requests or round-robin.",
        &value(
            |config: &mut Config| &mut config.balance,
            words(
                Preset::NAMES,
                |text| parse_choice(text).map(Preset::balance),
                |balance| json!(balance.preset.name()),
            ),
        ),
    ),
    row(
        "backlog",
        "Weight of the prompt tokens that were sent and not answered with a first token yet.",
        &value(|config: &mut Config| &mut config.balance.backlog, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "missing",
        "Weight of the prompt tokens that the upstream does not have in its cache.",
        &value(|config: &mut Config| &mut config.balance.missing, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "stall",
        "Weight of the same tokens for each request in flight, whose answer pauses meanwhile.",
        &value(|config: &mut Config| &mut config.balance.stall, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "share",
        "Conversations per upstream from which on a common beginning of prompts counts less.",
        &value(|config: &mut Config| &mut config.balance.share, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "active",
        "Weight of a request in flight, in tokens.",
        &value(|config: &mut Config| &mut config.balance.active, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "context",
        "Weight of the prompt tokens of the requests in flight.",
        &value(|config: &mut Config| &mut config.balance.context, number(0.0, MAX_TERM_WEIGHT)),
    ),
    row(
        "sight_error",
        "Share of the cached tokens by which predictions may be wrong before an upstream's sight is blind.",
        &value(|config: &mut Config| &mut config.balance.sight_error, number(0.0, 1.0)),
    ),
    row(
        "slo",
        "What becomes of a request whose x-slo-ttft-ms no upstream meets: ignore, queue or reject.",
        &value(|config: &mut Config| &mut config.slo, choice()),
    ),
    row(
        "index_blocks",
        "Remembered blocks of prompts, for each upstream; 0 none; unset: as the engines' caches hold.",
        &value(|config: &mut Config| &mut config.index.blocks, maybe(integer(0, 100_000_000))),
    )
    .restart(),
    row(
        "block_bytes",
        "Bytes of prompt text in one block; all balancers on a Redis need the same.",
        &value(|config: &mut Config| &mut config.index.block_bytes, integer(64, 65_536)),
    )
    .restart(),
];
