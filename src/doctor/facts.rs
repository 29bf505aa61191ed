//! The facts about a set-up: what upstreams, sources and Redis answered.

use std::net::SocketAddr;
use std::time::Duration;

use crate::aggregate::{EngineInfo, EngineMetrics, ModelCard};
use crate::config::types::{Config, UpstreamConfig};

/// Everything that the rules read.
#[derive(Clone, Debug)]
pub(crate) struct SetupFacts<'a> {
    pub config: &'a Config,
    pub upstreams: Vec<UpstreamFacts>,
    pub sources: Vec<SourceFacts>,
    /// `None` without a configured Redis.
    pub redis: Option<RedisFacts>,
    /// Why the certificates of listeners cannot be used.
    pub unusable_certificates: Vec<String>,
    /// The largest number of files that this process may open.
    pub open_files: Option<u64>,
    /// The admin address of the running balancer that has upstreams of this configuration; `None` when no
    /// balancer answered there.
    pub balancer: Option<String>,
    /// `None` where a balancer answered at the admin address that the operator named, or no address was
    /// named.
    pub missing_balancer: Option<MissingBalancer>,
}

/// An admin address at which no balancer answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MissingBalancer {
    /// The URL, or the address where no URL can be made of it.
    pub admin: String,
    pub failure: QuestionFailure,
}

/// What one upstream answered.
#[derive(Clone, Debug)]
pub(crate) struct UpstreamFacts {
    pub config: UpstreamConfig,
    pub address: Option<SocketAddr>,
    pub health: Result<(), QuestionFailure>,
    pub models: Result<Vec<ModelCard>, QuestionFailure>,
    pub version: Option<String>,
    pub metrics: Result<EnginePage, QuestionFailure>,
    /// Whether the routes of `VLLM_SERVER_DEV_MODE=1` answer.
    pub has_dev_routes: bool,
    pub clock: Option<ClockDifference>,
    /// The answers to two equal prompts; `None` when they were not sent.
    pub usage: Option<Result<UsageReading, QuestionFailure>>,
    /// How a running balancer sees the upstream.
    pub sight: Option<SightReading>,
    /// The time that all questions took.
    pub took: Duration,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum QuestionFailure {
    /// No connection.
    Unreached(String),
    /// No answer within the time limit.
    Silent(String),
    /// An answer that cannot be read.
    Garbled(String),
    /// An answer with an unexpected status.
    Status(u16, String),
    /// The settings of the upstream cannot be used.
    Settings(String),
    /// Not asked, since an earlier question failed.
    NotAsked,
}

/// What a page of metrics says.
#[derive(Clone, Debug, Default)]
pub(crate) struct EnginePage {
    pub metrics: EngineMetrics,
    pub info: EngineInfo,
}

/// A clock beside the clock of this machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ClockDifference {
    /// By how many seconds the other clock is ahead.
    pub ahead: f64,
    /// The largest error of that, in seconds.
    pub error: f64,
}

/// The usage of the second of two equal prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct UsageReading {
    pub prompt_tokens: Option<u64>,
    /// The cached tokens, where one of the answers has a number.
    pub cached_tokens: Option<u64>,
}

/// The row of a running balancer's list of upstreams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SightReading {
    pub sight: String,
    pub reason: String,
    /// An operator drains the upstream.
    pub drained: bool,
}

/// What a source of upstreams answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceFacts {
    pub label: String,
    /// The number of upstreams, or the failure.
    pub listed: Result<usize, String>,
}

/// What Redis answered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RedisFacts {
    /// The URL, with its password masked.
    pub url: String,
    pub server: Result<RedisServer, RedisRefusal>,
}

/// Why Redis did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RedisRefusal {
    /// Whether it refused the credentials, or a command that the user may not call.
    pub denies_access: bool,
    pub text: String,
}

/// The answers of a Redis; each is `None` when Redis does not report it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct RedisServer {
    /// Redis, or a program that calls itself otherwise.
    pub product: Option<String>,
    pub version: Option<String>,
    pub role: Option<String>,
    pub max_memory: Option<u64>,
    pub memory_policy: Option<String>,
    pub clock: Option<ClockDifference>,
    /// The refusal of `INFO`, where the user may not call it.
    pub info_refused: Option<String>,
}

// === impl UpstreamFacts ===

impl UpstreamFacts {
    /// The facts before the first question.
    pub(crate) fn unasked(config: UpstreamConfig) -> Self {
        UpstreamFacts {
            config,
            address: None,
            health: Err(QuestionFailure::NotAsked),
            models: Err(QuestionFailure::NotAsked),
            version: None,
            metrics: Err(QuestionFailure::NotAsked),
            has_dev_routes: false,
            clock: None,
            usage: None,
            sight: None,
            took: Duration::ZERO,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    /// The models that the upstream lists; none when the list is unknown.
    pub(crate) fn cards(&self) -> &[ModelCard] {
        self.models.as_deref().unwrap_or_default()
    }

    /// The name of the base model.
    pub(crate) fn base(&self) -> Option<&str> {
        self.cards().iter().find(|card| card.parent.is_none()).map(|card| card.id.as_str())
    }

    /// Whether an operator drains the upstream at the running balancer.
    pub(crate) fn is_drained(&self) -> bool {
        self.sight.as_ref().is_some_and(|reading| reading.drained)
    }

    /// The page of metrics, where there is one.
    pub(crate) fn page(&self) -> Option<&EnginePage> {
        self.metrics.as_ref().ok()
    }
}

// === impl ClockDifference ===

impl ClockDifference {
    /// Whether the clocks differ by more than `most` seconds, whatever the error of the reading.
    pub(crate) fn differs_by(&self, most: f64) -> bool {
        self.ahead.abs() > most + self.error
    }
}
