//! What runs: the configuration after it was read and checked, and the one home of every default.
//!
//! Nothing here knows YAML, flags or environment; `config::check` makes these values from what was written,
//! and all other modules only read them. A value of these types is always valid.

use std::fmt;
mod balance;
mod limits;
mod redis;
mod retry;
mod route;
mod sessions;
mod source;
mod traces;
mod trusted;

use std::path::PathBuf;
use std::time::Duration;

pub use balance::{Balance, PrefixIndex, Preset};
pub use limits::ConnectionLimits;
pub use redis::{RedisForm, RedisOptions, RedisUrl};
pub use retry::{Retry, RetryOn};
pub use route::{BodyEdits, HeaderEdits, Overflow, RouteConfig, UpstreamForm};
pub use sessions::{SessionConfig, SubagentSessions};
pub use source::{Discover, Discovered, DiscoverySource};
pub use traces::{CaptureScope, TraceStore, TracesConfig};
pub use trusted::{Network, TrustedProxies, TrustedProxy};

use super::secret::Secret;

/// Under what systemd calls `RuntimeDirectory`.
const UPGRADE_SOCKET: &str = "/run/vllm-lb/upgrade.sock";

/// All settings of one running balancer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub listen: Vec<Listen>,
    pub admin: AdminConfig,
    /// `None`: there are no siblings.
    pub redis: Option<RedisUrl>,
    pub redis_options: RedisOptions,
    pub upstreams: Vec<UpstreamConfig>,
    /// The sources that are polled for further upstreams.
    pub sources: Vec<DiscoverySource>,
    pub routes: Vec<RouteConfig>,
    pub balance: Balance,
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
    /// Where a process that is to follow this one asks for its listening sockets.
    pub upgrade_socket: PathBuf,
    pub sessions: SessionConfig,
    pub traces: TracesConfig,
    pub log: LogConfig,
    pub shutdown: ShutdownConfig,
    /// Answers carry `x-vllm-lb-upstream`, `x-vllm-lb-attempts`, `x-vllm-lb-reason` and `x-vllm-lb-hit`.
    pub expose: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: vec![Listen { address: ListenAddress::Tcp("0.0.0.0:8000".into()), tls: None }],
            admin: AdminConfig::default(),
            redis: None,
            redis_options: RedisOptions::default(),
            upstreams: Vec::new(),
            sources: Vec::new(),
            routes: Vec::new(),
            balance: Balance::default(),
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
            shutdown: ShutdownConfig::default(),
            expose: false,
        }
    }
}

/// Where a socket listens: `host:port`, or `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    Tcp(String),
    Unix(PathBuf),
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => f.write_str(address),
            ListenAddress::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub address: ListenAddress,
    pub tls: Option<ListenTls>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    pub address: ListenAddress,
    /// With a token, admin calls need `Authorization: Bearer`.
    pub token: Option<Secret>,
}

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { address: ListenAddress::Tcp("127.0.0.1:9090".into()), token: None }
    }
}

/// One vLLM server as it was configured.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    /// Unique; `host:port` unless given.
    pub name: String,
    pub url: UpstreamUrl,
    /// `None`: learnt from `GET /v1/models`.
    pub models: Option<Vec<String>>,
    /// Divides the cost; above 0.
    pub weight: f64,
    /// Sent as `Authorization: Bearer` in place of the client's.
    pub api_key: Option<Secret>,
    /// At this many requests in flight the upstream is no candidate.
    pub max_active: Option<u32>,
    pub tls: UpstreamTls,
    /// `None`: the operator named it in the file, on the command line or at run time.
    pub discovered: Option<Discovered>,
}

impl UpstreamConfig {
    /// An upstream with every option at its default, named after its host and port.
    pub fn new(url: UpstreamUrl) -> Self {
        UpstreamConfig {
            name: url.authority(),
            url,
            models: None,
            weight: 1.0,
            api_key: None,
            max_active: None,
            tls: UpstreamTls::default(),
            discovered: None,
        }
    }
}

/// Where an upstream is reached. A trailing `/v1` has been taken off.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UpstreamUrl {
    pub https: bool,
    pub host: String,
    pub port: u16,
    /// With a path the connection goes to a unix socket; host and port only name it.
    pub unix: Option<PathBuf>,
    /// `""`, or a prefix as `/team-a` that goes before every path.
    pub prefix: String,
}

impl UpstreamUrl {
    /// `host:port`, with brackets around an IPv6 address; a unix socket's path.
    pub fn authority(&self) -> String {
        match &self.unix {
            Some(path) => path.display().to_string(),
            None if self.host.contains(':') => format!("[{}]:{}", self.host, self.port),
            None => format!("{}:{}", self.host, self.port),
        }
    }

    /// The URL as a person would write it.
    pub fn display(&self) -> String {
        match &self.unix {
            Some(path) => format!("unix:{}", path.display()),
            None => {
                let scheme = if self.https { "https" } else { "http" };
                format!("{scheme}://{}{}", self.authority(), self.prefix)
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// PEM file with the authorities to trust in place of the system's.
    pub ca: Option<PathBuf>,
    pub verify: bool,
    /// Name sent and checked; the URL's host unless given.
    pub sni: Option<String>,
}

impl Default for UpstreamTls {
    fn default() -> Self {
        UpstreamTls { ca: None, verify: true, sni: None }
    }
}

/// How much of a request's body is read, and held, before an upstream is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peek {
    /// Read before choosing.
    pub bytes: u64,
    /// The largest body there may be; larger ones get 413.
    pub max_body: u64,
    /// Held for all requests together.
    pub memory: u64,
}

impl Default for Peek {
    fn default() -> Self {
        Peek { bytes: 2 << 20, max_body: 64 << 20, memory: 2 << 30 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    pub path: String,
    pub interval: Duration,
    pub timeout: Duration,
    /// Failed probes in a row after which an upstream is down.
    pub fall: u32,
    /// Good probes in a row after which it is ready again.
    pub rise: u32,
    /// Whether the upstream's own metrics are read too.
    pub metrics: bool,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            path: "/health".into(),
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(2),
            fall: 3,
            rise: 1,
            metrics: true,
        }
    }
}

/// When an upstream that answers, and fails requests, gets none for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Breaker {
    /// So many failures within `window`, if they are also half of the answers or more.
    pub failures: u32,
    pub window: Duration,
    /// How long no request is sent; after that one is, to find out.
    pub open: Duration,
    /// While that one fails too, `open` doubles up to this.
    pub max_open: Duration,
    /// The largest share of the upstreams of a model that get no request because of this. The last one that
    /// could have a request always may.
    pub max_ejected: f64,
}

impl Default for Breaker {
    fn default() -> Self {
        Breaker {
            failures: 5,
            window: Duration::from_secs(10),
            open: Duration::from_secs(5),
            max_open: Duration::from_secs(60),
            max_ejected: 0.5,
        }
    }
}

/// Where requests wait while every upstream that could have them is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// The most that wait, for all models together; 0 is no queue.
    pub size: usize,
    /// The longest that one waits.
    pub wait: Duration,
}

impl Default for QueueConfig {
    fn default() -> Self {
        QueueConfig { size: 1024, wait: Duration::from_secs(30) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// From sending a request to the first event, or byte, of its answer.
    pub first_byte: Option<Duration>,
    /// Between two pieces of an answer.
    pub idle: Option<Duration>,
    /// From a request's head to its answer's end.
    pub total: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { connect: Duration::from_secs(2), first_byte: None, idle: None, total: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// The most connections of clients at once; 0 is no limit.
    pub connections: usize,
    /// The largest request head; a larger one gets 431.
    pub header_bytes: u64,
    pub connection: ConnectionLimits,
}

impl Default for ClientLimits {
    fn default() -> Self {
        ClientLimits { connections: 0, header_bytes: 64 << 10, connection: ConnectionLimits::default() }
    }
}

/// A control path of vLLM that is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passthrough {
    pub path: String,
    pub to: PassthroughTo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PassthroughTo {
    All,
    Upstream(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// `None`: txt on a terminal, else json.
    pub format: Option<LogFormat>,
    pub level: LogLevel,
    /// Log the beginnings of request and answer bodies at Debug.
    pub bodies: bool,
    /// Characters of a body that a record shows.
    pub truncate: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { format: None, level: LogLevel::Info, bodies: false, truncate: 180 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Txt,
    Json,
    Yaml,
}

impl LogFormat {
    /// The names that a configuration may use, for messages.
    pub const NAMES: [&'static str; 4] = ["txt", "json", "yaml", "yml"];

    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "txt" => Some(LogFormat::Txt),
            "json" => Some(LogFormat::Json),
            "yaml" | "yml" => Some(LogFormat::Yaml),
            _ => None,
        }
    }

    /// By the first letter alone, as the command line and the environment have it.
    pub fn from_initial(text: &str) -> Option<Self> {
        match text.chars().next()?.to_ascii_lowercase() {
            't' => Some(LogFormat::Txt),
            'j' => Some(LogFormat::Json),
            'y' => Some(LogFormat::Yaml),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            LogFormat::Txt => "txt",
            LogFormat::Json => "json",
            LogFormat::Yaml => "yaml",
        }
    }
}

/// The seven steps of verbosity, quietest first; errors are never silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Quiet,
    Error,
    Warning,
    Info,
    Debug,
    Verbose,
    Loud,
}

impl LogLevel {
    /// Quietest first, as the variants stand.
    pub const ALL: [LogLevel; 7] = [
        LogLevel::Quiet,
        LogLevel::Error,
        LogLevel::Warning,
        LogLevel::Info,
        LogLevel::Debug,
        LogLevel::Verbose,
        LogLevel::Loud,
    ];

    /// The names that a configuration may use, for messages.
    pub const NAMES: [&'static str; 7] = ["quiet", "error", "warning", "info", "debug", "verbose", "loud"];

    pub fn parse(name: &str) -> Option<Self> {
        LogLevel::ALL.into_iter().find(|level| level.name().eq_ignore_ascii_case(name))
    }

    /// By the first character alone, as the environment has it; `0` and `1` are the predecessor's.
    pub fn from_initial(text: &str) -> Option<Self> {
        match text.chars().next()?.to_ascii_lowercase() {
            'q' => Some(LogLevel::Quiet),
            'e' | '0' => Some(LogLevel::Error),
            'w' => Some(LogLevel::Warning),
            'i' => Some(LogLevel::Info),
            'd' => Some(LogLevel::Debug),
            'v' => Some(LogLevel::Verbose),
            'l' | '1' => Some(LogLevel::Loud),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        LogLevel::NAMES[self as usize]
    }

    /// So many steps louder, or quieter when below zero; stops at the ends.
    pub fn step(self, steps: i32) -> Self {
        let last = LogLevel::ALL.len() as i32 - 1;
        LogLevel::ALL[(self as i32).saturating_add(steps).clamp(0, last) as usize]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownConfig {
    /// How long requests in flight may go on once nothing new is accepted.
    pub grace: Duration,
    /// How long to go on accepting after SIGTERM, while health says no.
    pub drain: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        ShutdownConfig { grace: Duration::from_secs(180), drain: Duration::ZERO }
    }
}
