//! From what was written to what runs: reads every key, fills in defaults, reports every problem.
//!
//! Two steps. `read` makes a `Draft` of the file; then what the command line and the environment say is laid
//! over it; `finish` checks what only the whole can tell (is there an upstream at all, does every `to` name
//! one) and gives the `Config`. Pure: the environment comes in as a function, and files that the
//! configuration names are not opened here; the code that loads them reports problems with them.

mod fleet;
mod listen;
mod routes;
mod sessions;
mod source;
mod traces;

pub use fleet::{upstream_alone, weight};
pub use routes::warnings;
pub use traces::store as trace_store;

use std::ops::RangeInclusive;
use std::time::Duration;

use super::expand::{EnvLookup, expand};
use super::problem::seen;
use super::problem::{ConfigPlace, Problem};
use super::raw::{self, YamlNode};
use super::section::Section;
use super::types::{
    Balance, Breaker, ClientLimits, Config, Health, LogFormat, LogLevel, Peek, PrefixIndex, Preset,
    QueueConfig, RedisOptions, Retry, RetryOn, Timeouts, TrustedProxies,
};
use super::values::{
    ReadResult, boolean, duration_in, file_path, integer_in, number_in, plain, secret, show_duration,
    show_size, size_in, trusted_proxy, url_path,
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;

/// Between two probes, and for one of them.
const PROBE: RangeInclusive<Duration> = Duration::from_millis(10)..=HOUR;
const PROBES_IN_A_ROW: RangeInclusive<u32> = 1..=1000;
const FAILURES: RangeInclusive<u32> = 1..=1000;
const BREAKER: RangeInclusive<Duration> = Duration::from_millis(10)..=HOUR;
const EJECTED: RangeInclusive<f64> = 0.0..=1.0;
const QUEUE: RangeInclusive<usize> = 0..=1_000_000;
const QUEUED: RangeInclusive<Duration> = Duration::ZERO..=HOUR;
const CONNECT: RangeInclusive<Duration> = Duration::from_millis(1)..=SECOND.saturating_mul(600);
const WAIT: RangeInclusive<Duration> = Duration::ZERO..=HOUR.saturating_mul(24 * 7);
const ATTEMPTS: RangeInclusive<u32> = 0..=7;
const BACKOFF: RangeInclusive<Duration> = Duration::ZERO..=SECOND.saturating_mul(60);
const BUDGET: RangeInclusive<f64> = 0.0..=10.0;
const EXCHANGE: RangeInclusive<Duration> = Duration::from_millis(1)..=SECOND.saturating_mul(60);
const GAUGES: RangeInclusive<Duration> = Duration::from_millis(100)..=HOUR;
const STREAM: RangeInclusive<u64> = 100..=100_000_000;
/// Within `gauge_ttl` a balancer is to be heard so often.
const HEARTBEATS: u32 = 3;
const BALANCE: RangeInclusive<f64> = 0.0..=1e6;
const INDEX: RangeInclusive<usize> = 0..=100_000_000;
const BLOCK: RangeInclusive<usize> = 64..=65_536;
const BODY: RangeInclusive<u64> = KIB..=64 * GIB;
const MEMORY: RangeInclusive<u64> = KIB..=1024 * GIB;
const BONUS: RangeInclusive<f64> = 0.0..=1000.0;
const TTL: RangeInclusive<Duration> = SECOND..=HOUR.saturating_mul(24 * 7);
const CONNECTIONS: RangeInclusive<usize> = 0..=10_000_000;
const HEADER: RangeInclusive<u64> = KIB..=1024 * KIB;
const THREADS: RangeInclusive<usize> = 0..=1024;
const TRUNCATE: RangeInclusive<usize> = 0..=1_000_000;
const GRACE: RangeInclusive<Duration> = Duration::ZERO..=HOUR.saturating_mul(24 * 7);
const DRAIN: RangeInclusive<Duration> = Duration::ZERO..=HOUR;

/// A configuration that is still being put together.
pub struct Draft {
    pub config: Config,
    pub problems: Vec<Problem>,
    /// Where the admin address was written, for the message when a listener has it too.
    admin: ConfigPlace,
    /// Something was said about upstreams, right or wrong.
    upstreams_given: bool,
    /// The names of all upstreams as far as they are known; `None` when some upstream has no readable name,
    /// or some are to be discovered.
    names: Option<Vec<String>>,
    /// Names that must be an upstream's, and where they were written.
    references: Vec<fleet::Reference>,
}

/// The whole way for a file alone.
pub fn check(text: &str, env: EnvLookup<'_>) -> Result<Config, Vec<Problem>> {
    read(text, env).finish()
}

/// Reads a file; it may say nothing at all.
pub fn read(text: &str, env: EnvLookup<'_>) -> Draft {
    let mut problems = Vec::new();
    let parsed = raw::parse(text, &mut problems);
    let unreadable = parsed.is_none();
    let mut root = parsed.unwrap_or_else(YamlNode::null);
    let place = ConfigPlace { path: String::new(), line: None };
    expand(&mut root, &place, env, &mut problems);
    let mut draft = Draft {
        config: Config::default(),
        problems: Vec::new(),
        admin: place.key("admin", None).key("address", None),
        // What cannot be read may well hold upstreams.
        upstreams_given: unreadable,
        names: Some(Vec::new()),
        references: Vec::new(),
    };
    let mut root = Section::open(&root, place, &mut problems);
    file(&mut root, &mut draft);
    let base = (draft.config.timeouts, draft.config.retry);
    draft.config.routes = routes::read(&mut root, base, &mut draft.references);
    draft.problems = problems;
    draft
}

fn file(root: &mut Section<'_, '_>, draft: &mut Draft) {
    listen::read(root, &mut draft.config.listen);
    admin(root.section("admin"), draft);
    draft.config.redis = root.get("redis", super::redis::url);
    redis_options(root.section("redis_options"), &mut draft.config.redis_options);
    fleet::upstreams(root, draft);
    fleet::passthrough(root, draft);
    let config = &mut draft.config;
    balance(root.section("balance"), &mut config.balance, &mut config.index);
    peek(root.section("peek"), &mut config.peek);
    health(root.section("health"), &mut config.health);
    timeouts(root.section("timeouts"), &mut config.timeouts);
    retry(root.section("retry"), &mut config.retry);
    breaker(root.section("breaker"), &mut config.breaker);
    queue(root.section("queue"), &mut config.queue);
    limits(root.section("limits"), &mut config.limits);
    if let Some(proxies) = root.list("trusted_proxies", trusted_proxy) {
        config.trusted_proxies = TrustedProxies::new(proxies);
    }
    set(&mut config.threads, root.get("threads", integer_in(THREADS)));
    set(&mut config.upgrade_socket, root.get("upgrade_socket", file_path));
    sessions::read(root.section("sessions"), &mut config.sessions);
    traces::read(root.section("traces"), &mut config.traces);
    log(root.section("log"), &mut config.log);
    shutdown(root.section("shutdown"), &mut config.shutdown);
    set(&mut config.expose, root.get("expose", boolean));
}

/// Takes what was written in place of the default.
fn set<T>(target: &mut T, written: Option<T>) {
    if let Some(value) = written {
        *target = value;
    }
}

fn admin(mut section: Section<'_, '_>, draft: &mut Draft) {
    if let Some(address) = section.get("address", super::values::address) {
        draft.config.admin.address = address;
        draft.admin = section.place_of("address");
    }
    draft.config.admin.token = section.get("token", secret);
}

fn redis_options(mut section: Section<'_, '_>, options: &mut RedisOptions) {
    set(&mut options.interval, section.get("interval", duration_in(EXCHANGE)));
    set(&mut options.prefix, section.get("prefix", plain));
    set(&mut options.gauge_ttl, section.get("gauge_ttl", duration_in(GAUGES)));
    set(&mut options.stream_length, section.get("stream_length", integer_in(STREAM)));
    if options.interval * HEARTBEATS > options.gauge_ttl {
        let (small, large) = (show_duration(options.interval), show_duration(options.gauge_ttl));
        let what = format!("{small} is more than a third of redis_options.gauge_ttl, which is {large}");
        section.problem("interval", what);
    }
}

/// The preset gives all weights; a weight that is written goes before the preset's.
fn balance(mut section: Section<'_, '_>, balance: &mut Balance, index: &mut PrefixIndex) {
    if let Some(preset) = section.choose("preset", &Preset::NAMES, Preset::parse) {
        *balance = preset.balance();
    }
    set(&mut balance.backlog, section.get("backlog", number_in(BALANCE)));
    set(&mut balance.missing, section.get("missing", number_in(BALANCE)));
    set(&mut balance.stall, section.get("stall", number_in(BALANCE)));
    set(&mut balance.share, section.get("share", number_in(BALANCE)));
    set(&mut balance.active, section.get("active", number_in(BALANCE)));
    set(&mut balance.context, section.get("context", number_in(BALANCE)));
    set(&mut index.blocks, section.get("index_blocks", integer_in(INDEX)));
    set(&mut index.block_bytes, section.get("block_bytes", integer_in(BLOCK)));
}

fn peek(mut section: Section<'_, '_>, peek: &mut Peek) {
    set(&mut peek.bytes, section.get("bytes", size_in(BODY)));
    set(&mut peek.max_body, section.get("max_body", size_in(BODY)));
    set(&mut peek.memory, section.get("memory", size_in(MEMORY)));
    let order = [
        ("bytes", peek.bytes, "max_body", peek.max_body),
        ("max_body", peek.max_body, "memory", peek.memory),
    ];
    for (smaller, small, larger, large) in order {
        if small > large {
            let (small, large) = (show_size(small), show_size(large));
            section.problem(smaller, format!("{small} is more than peek.{larger}, which is {large}"));
        }
    }
}

fn health(mut section: Section<'_, '_>, health: &mut Health) {
    set(&mut health.path, section.get("path", url_path));
    set(&mut health.interval, section.get("interval", duration_in(PROBE)));
    set(&mut health.timeout, section.get("timeout", duration_in(PROBE)));
    set(&mut health.fall, section.get("fall", integer_in(PROBES_IN_A_ROW)));
    set(&mut health.rise, section.get("rise", integer_in(PROBES_IN_A_ROW)));
    set(&mut health.metrics, section.get("metrics", boolean));
}

/// 0 stands for none in all but the first.
fn timeouts(mut section: Section<'_, '_>, timeouts: &mut Timeouts) {
    set(&mut timeouts.connect, section.get("connect", duration_in(CONNECT)));
    let optional = |text: &str| {
        let read = duration_in(WAIT)(text)?;
        Ok((!read.is_zero()).then_some(read))
    };
    set(&mut timeouts.first_byte, section.get("first_byte", optional));
    set(&mut timeouts.idle, section.get("idle", optional));
    set(&mut timeouts.total, section.get("total", optional));
}

fn retry(mut section: Section<'_, '_>, retry: &mut Retry) {
    set(&mut retry.attempts, section.get("attempts", integer_in(ATTEMPTS)));
    set(&mut retry.backoff, section.get("backoff", duration_in(BACKOFF)));
    set(&mut retry.max_backoff, section.get("max_backoff", duration_in(BACKOFF)));
    set(&mut retry.budget, section.get("budget", number_in(BUDGET)));
    let known = |text: &str| match RetryOn::NAMES.iter().find(|name| **name == text) {
        Some(name) => Ok(*name),
        None => Err(format!("{} is none of {}", seen(text), RetryOn::NAMES.join(", "))),
    };
    if let Some(names) = section.list("on", known) {
        retry.on = RetryOn::NOTHING;
        for name in names {
            if let Some(on) = retry.on.switch(name) {
                *on = true;
            }
        }
    }
    if retry.backoff > retry.max_backoff {
        let (small, large) = (show_duration(retry.backoff), show_duration(retry.max_backoff));
        section.problem("backoff", format!("{small} is more than retry.max_backoff, which is {large}"));
    }
}

fn breaker(mut section: Section<'_, '_>, breaker: &mut Breaker) {
    set(&mut breaker.failures, section.get("failures", integer_in(FAILURES)));
    set(&mut breaker.window, section.get("window", duration_in(BREAKER)));
    set(&mut breaker.open, section.get("open", duration_in(BREAKER)));
    set(&mut breaker.max_open, section.get("max_open", duration_in(BREAKER)));
    set(&mut breaker.max_ejected, section.get("max_ejected", number_in(EJECTED)));
    if breaker.open > breaker.max_open {
        let (open, most) = (show_duration(breaker.open), show_duration(breaker.max_open));
        section.problem("open", format!("{open} is more than breaker.max_open, which is {most}"));
    }
}

fn queue(mut section: Section<'_, '_>, queue: &mut QueueConfig) {
    set(&mut queue.size, section.get("size", integer_in(QUEUE)));
    set(&mut queue.wait, section.get("wait", duration_in(QUEUED)));
}

fn limits(mut section: Section<'_, '_>, limits: &mut ClientLimits) {
    set(&mut limits.connections, section.get("connections", integer_in(CONNECTIONS)));
    set(&mut limits.header_bytes, section.get("header_bytes", size_in(HEADER)));
}

fn log(mut section: Section<'_, '_>, log: &mut super::types::LogConfig) {
    log.format = section.choose("format", &LogFormat::NAMES, LogFormat::parse);
    set(&mut log.level, section.choose("level", &LogLevel::NAMES, LogLevel::parse));
    set(&mut log.bodies, section.get("bodies", boolean));
    set(&mut log.truncate, section.get("truncate", integer_in(TRUNCATE)));
}

fn shutdown(mut section: Section<'_, '_>, shutdown: &mut super::types::ShutdownConfig) {
    set(&mut shutdown.grace, section.get("grace", duration_in(GRACE)));
    set(&mut shutdown.drain, section.get("drain", duration_in(DRAIN)));
}

// === impl Draft: what the command line and the environment say ===

impl Draft {
    /// Listens on these addresses in place of the file's. `from` is the flag or variable.
    pub fn listen<S: AsRef<str>>(&mut self, from: &str, addresses: &[S]) {
        self.config.listen = listen::from_texts(from, addresses, &mut self.problems);
    }

    pub fn admin(&mut self, from: &str, address: &str) {
        let place = ConfigPlace::named(from);
        if let Some(address) = self.take(&place, super::values::address(address)) {
            self.config.admin.address = address;
        }
        self.admin = place;
    }

    /// Meets siblings there, in place of the file's.
    pub fn redis(&mut self, from: &str, url: &str) {
        let url = self.take(&ConfigPlace::named(from), super::redis::url(url));
        self.config.redis = url.or(self.config.redis.take());
    }

    /// Balances over these upstreams in place of the file's.
    pub fn upstreams<S: AsRef<str>>(&mut self, from: &str, urls: &[S]) {
        self.config.upstreams.clear();
        self.config.sources.clear();
        self.names = Some(Vec::new());
        self.upstreams_given = true;
        fleet::from_texts(from, urls, self);
    }

    /// The upstreams will be simulated ones, whatever the file says.
    pub fn upstreams_come_later(&mut self) {
        self.config.upstreams.clear();
        self.config.sources.clear();
        self.names = Some(Vec::new());
        self.upstreams_given = true;
    }

    /// The value, or its problem at this place.
    pub fn take<T>(&mut self, place: &ConfigPlace, value: ReadResult<T>) -> Option<T> {
        value.map_err(|what| self.problems.push(Problem::new(place, what))).ok()
    }

    /// The configuration, or every problem there is, in the order of the file.
    pub fn finish(mut self) -> Result<Config, Vec<Problem>> {
        if !self.upstreams_given {
            let text = "there is none: name them on the command line (vllm-lb http://gpu-0:8000), list them \
                        under upstreams in the file, or try --demo";
            self.problems.push(Problem::new(&ConfigPlace::named("upstreams"), text));
        }
        fleet::references(&mut self);
        if !listen::shareable(&self.config.admin.address)
            && self.config.listen.iter().any(|listen| listen.address == self.config.admin.address)
        {
            let text = format!("{} is an address of listen too", self.config.admin.address);
            self.problems.push(Problem::new(&self.admin, text));
        }
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        self.problems.sort_by_key(|problem| problem.place.line.unwrap_or(usize::MAX));
        Err(self.problems)
    }
}
