//! Asks upstreams and sources once for all that `vllm-lb doctor` judges, with the settings and the client of
//! the probes. Every question has a time limit and a limit on the size of its answer.
//!
//! Never: changes an upstream. Only with `sends_prompts` a model computes anything.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use serde::Deserialize;
use serde_json::json;

use super::authorities::ReadAuthorities;
use super::client::{FetchError, UpstreamClient};
use super::discover::{self, PlannedSource};
use super::probe::MAX_VERSION_CHARS;
use super::queue::Queue;
use super::upstream::Upstream;
use crate::aggregate::{ModelCard, parse_engine_info, parse_engine_metrics, parse_models};
use crate::config::types::{AdminConfig, Config, DiscoverySource, ListenAddress, UpstreamConfig};
use crate::config::url;
use crate::doctor::facts::{
    ClockDifference, EnginePage, MissingBalancer, QuestionFailure, SightReading, SourceFacts, UpstreamFacts,
    UsageReading,
};
use crate::names::cut;
use crate::observe::Observer;

/// The time limit of an answer to a prompt, as a multiple of that of other questions.
const PROMPT_TIMEOUT_FACTOR: u32 = 10;

/// The words of the prompt that is sent twice: more than the blocks of any cache have tokens.
const MAX_PROMPT_WORDS: u64 = 400;

/// The largest part of a model's context that the prompt takes is one in this number.
const PROMPT_CONTEXT_DIVISOR: u64 = 8;

/// The most of a refusal that is shown, in bytes.
const MAX_REFUSAL_BYTES: usize = 200;

/// A `date` header may be this much older than its answer, in seconds: servers write it once a second.
const DATE_ERROR: f64 = 1.0;

/// Asks upstreams.
pub(crate) struct Inspector {
    client: UpstreamClient,
    queue: Arc<Queue>,
    health_path: String,
    timeout: Duration,
    sends_prompts: bool,
}

/// A row of the list of upstreams of a running balancer.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct BalancerRow {
    pub url: String,
    sight: String,
    sight_reason: Option<String>,
    /// Absent at older releases.
    #[serde(default)]
    drained: bool,
}

/// A balancer that runs on this machine.
pub(crate) struct FoundBalancer {
    /// The URL of its admin listener.
    pub admin: String,
    pub rows: Vec<BalancerRow>,
}

#[derive(Deserialize)]
struct VersionDocument {
    version: String,
}

#[derive(Deserialize)]
struct SleepDocument {
    #[serde(rename = "is_sleeping")]
    _is_sleeping: bool,
}

#[derive(Deserialize)]
struct CompletionDocument {
    usage: CompletionUsage,
}

#[derive(Deserialize)]
struct CompletionUsage {
    prompt_tokens: Option<u64>,
    prompt_tokens_details: Option<CompletionDetails>,
}

#[derive(Deserialize)]
struct CompletionDetails {
    cached_tokens: Option<u64>,
}

// === impl Inspector ===

impl Inspector {
    /// Builds an inspector with the health path of the configuration; each question has `timeout`.
    pub(crate) fn new(config: &Config, timeout: Duration, sends_prompts: bool) -> Self {
        let queue = Queue::new(0, Observer::default());
        let health_path = config.health.path.clone();
        Inspector { client: UpstreamClient, queue, health_path, timeout, sends_prompts }
    }

    /// Asks one upstream. Takes at most two time limits, and with prompts those of two prompts more.
    pub(crate) async fn upstream(&self, config: UpstreamConfig) -> UpstreamFacts {
        let begun = Instant::now();
        let mut facts = UpstreamFacts::unasked(config.clone());
        match self.connection_to(config) {
            Ok(upstream) => self.ask(&upstream, &mut facts).await,
            Err(why) => facts.health = Err(QuestionFailure::Settings(why)),
        }
        facts.took = begun.elapsed();
        facts
    }

    /// Builds the connection settings of an upstream, with the files that they name.
    fn connection_to(&self, config: UpstreamConfig) -> Result<Upstream, String> {
        let read = ReadAuthorities::read_blocking([&config]);
        Upstream::new(0, config, self.queue.clone(), &read)
    }

    async fn ask(&self, upstream: &Upstream, facts: &mut UpstreamFacts) {
        let sent = SystemTime::now();
        let health = self.get(upstream, &self.health_path).await;
        facts.address = upstream.address();
        match health {
            Ok(answer) => {
                facts.clock = clock(answer.headers(), sent, SystemTime::now());
                facts.health = Ok(());
            }
            Err(failure) => {
                facts.health = Err(failure);
                return;
            }
        }
        let (models, version, metrics, has_dev_routes) = tokio::join!(
            self.models(upstream),
            self.version(upstream),
            self.metrics(upstream),
            self.has_dev_routes(upstream)
        );
        (facts.models, facts.version, facts.metrics) = (models, version, metrics);
        facts.has_dev_routes = has_dev_routes;
        let is_asleep = facts.page().is_some_and(|page| page.info.asleep == Some(true));
        // An engine that sleeps would not answer.
        if self.sends_prompts
            && !is_asleep
            && let Some(card) = facts.cards().iter().find(|card| card.parent.is_none()).cloned()
        {
            facts.usage = Some(self.usage(upstream, &card).await);
        }
    }

    async fn get(&self, upstream: &Upstream, path: &str) -> Result<Response<Bytes>, QuestionFailure> {
        expected(self.client.small(upstream, path, self.timeout).await)
    }

    async fn models(&self, upstream: &Upstream) -> Result<Vec<ModelCard>, QuestionFailure> {
        let named = upstream.config.discovered.as_ref().and_then(|discovered| discovered.model.as_ref());
        match self.get(upstream, "/v1/models").await {
            Ok(list) => parse_models(list.body()).map_err(QuestionFailure::Garbled),
            // The source has named the model.
            Err(QuestionFailure::Status(404 | 405 | 501, _)) if named.is_some() => {
                Err(QuestionFailure::NotAsked)
            }
            Err(failure) => Err(failure),
        }
    }

    async fn version(&self, upstream: &Upstream) -> Option<String> {
        let answer = self.get(upstream, "/version").await.ok()?;
        let document: VersionDocument = serde_json::from_slice(answer.body()).ok()?;
        Some(document.version.chars().take(MAX_VERSION_CHARS).collect())
    }

    async fn metrics(&self, upstream: &Upstream) -> Result<EnginePage, QuestionFailure> {
        let page = expected(self.client.scrape(upstream, "/metrics", self.timeout).await)?;
        Ok(EnginePage { metrics: parse_engine_metrics(page.body()), info: parse_engine_info(page.body()) })
    }

    /// Whether the routes of the development mode answer; of these one only reads.
    async fn has_dev_routes(&self, upstream: &Upstream) -> bool {
        let answer = self.get(upstream, "/is_sleeping").await;
        answer.is_ok_and(|answer| serde_json::from_slice::<SleepDocument>(answer.body()).is_ok())
    }

    /// Sends a prompt twice: older versions report cached tokens only when there are some.
    async fn usage(&self, upstream: &Upstream, card: &ModelCard) -> Result<UsageReading, QuestionFailure> {
        let most = card.max_model_len.map_or(MAX_PROMPT_WORDS, |length| length / PROMPT_CONTEXT_DIVISOR);
        let words = usize::try_from(most.min(MAX_PROMPT_WORDS)).unwrap_or(1).max(1);
        let prompt = vec!["hello"; words].join(" ");
        let body = json!({"model": card.id, "prompt": prompt, "max_tokens": 1, "temperature": 0});
        let body = Bytes::from(body.to_string());
        let mut reading = UsageReading::default();
        for _ in 0..2 {
            let request = Request::post("/v1/completions")
                .header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
                .body(body.clone())
                .map_err(|error| QuestionFailure::Settings(error.to_string()))?;
            let limit = self.timeout * PROMPT_TIMEOUT_FACTOR;
            let answer = expected(self.client.request(upstream, request, limit).await)?;
            let document: CompletionDocument = serde_json::from_slice(answer.body())
                .map_err(|error| QuestionFailure::Garbled(error.to_string()))?;
            let cached = document.usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
            reading.prompt_tokens = document.usage.prompt_tokens.or(reading.prompt_tokens);
            reading.cached_tokens = cached.or(reading.cached_tokens);
        }
        Ok(reading)
    }

    /// Asks a source. Returns the upstreams that it lists, too.
    pub(crate) async fn source(&self, source: &DiscoverySource) -> (SourceFacts, Vec<UpstreamConfig>) {
        let label = source.ask.label();
        let server = PlannedSource::server(source);
        let server = server.map(|server| self.connection_to(server).map(Arc::new)).transpose();
        let polled = match server {
            Ok(server) => {
                let planned = PlannedSource::new(source.clone(), server);
                let found = discover::poll(&planned, &self.client, self.timeout).await;
                found.map(|found| planned.upstreams(&found)).map_err(|failure| failure.text)
            }
            Err(why) => Err(why),
        };
        match polled {
            Ok(upstreams) => (SourceFacts { label, listed: Ok(upstreams.len()) }, upstreams),
            Err(why) => (SourceFacts { label, listed: Err(why) }, Vec::new()),
        }
    }

    /// Returns the balancer that answers at the admin address.
    pub(crate) async fn running_balancer(
        &self,
        admin: &AdminConfig,
    ) -> Result<FoundBalancer, MissingBalancer> {
        let Some(address) = reachable(&admin.address) else {
            let failure = QuestionFailure::Settings("the address has no port that can be asked".into());
            return Err(MissingBalancer { admin: admin.address.to_string(), failure });
        };
        match self.balancer_rows(&address, admin).await {
            Ok(rows) => Ok(FoundBalancer { admin: address, rows }),
            Err(failure) => Err(MissingBalancer { admin: address, failure }),
        }
    }

    /// Requests the upstreams of the balancer with this URL.
    async fn balancer_rows(
        &self,
        address: &str,
        admin: &AdminConfig,
    ) -> Result<Vec<BalancerRow>, QuestionFailure> {
        let url = url::upstream(address).map_err(|problem| QuestionFailure::Settings(problem.to_string()))?;
        let config = UpstreamConfig { api_key: admin.token.clone(), ..UpstreamConfig::new(url) };
        let listener = self.connection_to(config).map_err(QuestionFailure::Settings)?;
        let answer = expected(self.client.get(&listener, "/admin/upstreams", self.timeout).await)?;
        let no_list = |_| QuestionFailure::Garbled("the answer is no balancer's list of upstreams".into());
        serde_json::from_slice(answer.body()).map_err(no_list)
    }
}

// === impl BalancerRow ===

impl BalancerRow {
    /// How the balancer sees the upstream.
    pub(crate) fn reading(&self) -> SightReading {
        let reason = self.sight_reason.clone().unwrap_or_default();
        SightReading { sight: self.sight.clone(), reason, drained: self.drained }
    }
}

/// Returns the URL of an admin listener on this machine; `None` where the system chose the port.
fn reachable(address: &ListenAddress) -> Option<String> {
    let address = match address {
        ListenAddress::Unix(path) => return Some(format!("unix:{}", path.display())),
        ListenAddress::Tcp(address) => address,
    };
    let (host, port) = address.rsplit_once(':').filter(|(_, port)| *port != "0")?;
    let host = match host {
        "0.0.0.0" | "" => "127.0.0.1",
        "[::]" => "[::1]",
        host => host,
    };
    Some(format!("http://{host}:{port}"))
}

/// Returns an answer with status 200, or the failure.
fn expected(answer: Result<Response<Bytes>, FetchError>) -> Result<Response<Bytes>, QuestionFailure> {
    let answer = answer.map_err(|error| failure(&error))?;
    if answer.status() == StatusCode::OK {
        return Ok(answer);
    }
    let text = String::from_utf8_lossy(&answer.body()[..answer.body().len().min(MAX_REFUSAL_BYTES)]);
    Err(QuestionFailure::Status(answer.status().as_u16(), cut(&text, MAX_REFUSAL_BYTES).concat()))
}

fn failure(error: &FetchError) -> QuestionFailure {
    let text = error.to_string();
    match error {
        FetchError::Timeout(_) => QuestionFailure::Silent(text),
        FetchError::Http(error) if error.is_parse() => {
            QuestionFailure::Garbled(format!("what answers is not HTTP: {error}"))
        }
        FetchError::Http(error)
            if error.is_canceled() || error.is_closed() || error.is_incomplete_message() =>
        {
            QuestionFailure::Unreached("the connection ended without an answer".into())
        }
        FetchError::Answer(_) => QuestionFailure::Garbled(text),
        FetchError::Request(_) => QuestionFailure::Settings(text),
        FetchError::Resolve(_) | FetchError::Connect(_) | FetchError::Http(_) => {
            QuestionFailure::Unreached(text)
        }
    }
}

/// Compares the `date` of an answer with the middle of its round trip.
fn clock(headers: &HeaderMap, sent: SystemTime, received: SystemTime) -> Option<ClockDifference> {
    let date = headers.get(header::DATE)?.to_str().ok()?;
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs_f64());
    let date = seconds(httpdate::parse_http_date(date).ok()?)?;
    let (sent, received) = (seconds(sent)?, seconds(received)?);
    let trip = (received - sent).max(0.0);
    // The date has whole seconds, and stands for the middle of one.
    let ahead = date + 0.5 - (sent + trip / 2.0);
    Some(ClockDifference { ahead, error: trip / 2.0 + DATE_ERROR })
}

#[cfg(test)]
mod tests;
