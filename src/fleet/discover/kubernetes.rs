//! Watches the EndpointSlices of a Kubernetes service, and reports its engines at each change.
//!
//! ```text
//! list the slices, page by page          the list replaces the one before as a whole
//! watch from the version of the list     each event changes one slice and moves the version
//!   the watch ends, or breaks off        watch again from the last version: no event is lost
//!   410, an event that cannot be read    list again
//! ```
//!
//! A list or a watch that fails keeps the engines. An empty list that the server gives is an answer, unlike
//! one of DNS: a service that was scaled to zero, or that does not exist, has no engines. Rounds are paced: a
//! round that brought no event doubles the pause before the next one.

mod api;
mod credentials;
mod failure;
mod files;
mod messages;
mod slices;

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use kube::client::Body;

use super::engine::{DiscoveredEngine, FoundEngine};
use super::source::{FailureReason, SourceFailure, SourceReporter};
use crate::config::types::KubernetesService;
use crate::fleet::now;
use api::{SliceApi, WATCH_SECONDS};
use failure::ApiFailure;
use files::FILE_PATIENCE;
use messages::{GONE_STATUS, LineBuffer, SliceEvent};
use slices::{ServiceEndpoints, SliceEngine, SliceStore};

/// The pause after the first round without an event; it doubles with each further one.
const MIN_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause between two rounds.
const MAX_PAUSE: Duration = Duration::from_secs(15);

/// The longest pause that a `retry-after` of the server asks for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// A watch that has lived as long is a success although no event came.
const MIN_STEADY_WATCH: Duration = Duration::from_secs(5);

/// The time that a connection may be silent after the server should have ended the watch.
const SILENCE_GRACE: Duration = Duration::from_secs(5);

/// The longest event of a watch. An object of the API server has at most 1.5 MiB.
const MAX_EVENT_BYTES: usize = 8 << 20;

/// The largest number of pages of one list; every page but the last is full.
const MAX_PAGES: usize = 100;

/// How a watch ended without a failure.
enum WatchEnd {
    /// The server ended it, or the connection broke off.
    Over,
    /// The version is too old.
    Expired,
}

/// The slices of a service as they are known.
struct ServiceWatch<'a> {
    service: &'a KubernetesService,
    reporter: SourceReporter,
    store: SliceStore,
    /// The version to watch from; `None`: list first.
    resource_version: Option<String>,
    /// The last report, unless that was a failure.
    reported: Option<ServiceEndpoints>,
    /// The service had endpoints without IP addresses in the last report.
    has_unaddressed: bool,
    /// The round has brought an event, or its watch has lived long.
    steady: bool,
}

/// Follows a service until dropped.
pub(super) async fn follow(service: &KubernetesService, reporter: SourceReporter) {
    let mut watch = ServiceWatch {
        service,
        reporter,
        store: SliceStore::default(),
        resource_version: None,
        reported: None,
        has_unaddressed: false,
        steady: false,
    };
    let (mut api, mut fruitless) = (None, 0);
    loop {
        let failure = watch.round(&mut api).await.err();
        let steady = std::mem::take(&mut watch.steady) && failure.is_none();
        fruitless = if steady { 0 } else { fruitless + 1 };
        let mut wait = pause(fruitless, watch.reporter.draw());
        if let Some(failure) = failure {
            wait = wait.max(failure.retry_after().unwrap_or_default().min(MAX_RETRY_AFTER));
            // The next client reads the credentials again.
            api = None;
            watch.fail(failure);
        }
        tokio::time::sleep(wait).await;
    }
}

/// Lists the engines of a service once.
pub(super) async fn poll(
    service: &KubernetesService,
    limit: Duration,
) -> Result<Vec<DiscoveredEngine>, SourceFailure> {
    let deadline = tokio::time::Instant::now() + limit;
    let opened = tokio::time::timeout_at(deadline, SliceApi::open(service, &mut || {})).await;
    let api = opened.unwrap_or(Err(ApiFailure::CredentialsHang(limit)))?;
    let listed = async {
        let (store, _) = list(&api).await?;
        store.read(service).map_err(ApiFailure::Invalid)
    };
    let listed = tokio::time::timeout_at(deadline, listed).await.unwrap_or(Err(ApiFailure::Silent(limit)));
    Ok(discovered(listed?.engines))
}

/// The pause after so many rounds without an event: doubling, of which a random half is left out, so that
/// balancers that lost the API server at one time do not come back at one time.
fn pause(fruitless: u32, draw: f64) -> Duration {
    let doubled = MIN_PAUSE.saturating_mul(1 << fruitless.saturating_sub(1).min(16));
    doubled.min(MAX_PAUSE).mul_f64(0.5 + draw / 2.0)
}

/// Requests the slices, and the version of the list.
async fn list(api: &SliceApi) -> Result<(SliceStore, String), ApiFailure> {
    let (mut store, mut key) = (SliceStore::default(), None);
    for _ in 0..MAX_PAGES {
        let page = api.page(key.as_deref()).await?;
        let resource_version = page.metadata.resource_version.clone();
        let (slices, next) = page.into_parts();
        for slice in slices {
            store.put(slice).map_err(ApiFailure::Invalid)?;
        }
        key = next;
        if key.is_none() && resource_version.is_empty() {
            return Err(ApiFailure::Invalid("the list of slices has no resourceVersion".into()));
        }
        if key.is_none() {
            return Ok((store, resource_version));
        }
    }
    Err(ApiFailure::Invalid(format!("the list of slices has more than {MAX_PAGES} pages")))
}

fn discovered(engines: Vec<SliceEngine>) -> Vec<DiscoveredEngine> {
    let found = |SliceEngine { name, url, model, host }| {
        FoundEngine { name: Some(name), model, host, ..FoundEngine::at(url) }.into()
    };
    engines.into_iter().map(found).collect()
}

// === impl ServiceWatch ===

impl ServiceWatch<'_> {
    /// Watches once, after a list where one is due. Lists a second time only when the watch cannot start from
    /// the version of an earlier round.
    async fn round(&mut self, api: &mut Option<SliceApi>) -> Result<(), ApiFailure> {
        let api = match api {
            Some(api) if !api.is_due() => api,
            _ => api.insert(self.open().await?),
        };
        if self.resource_version.is_some() && matches!(self.watch(api).await?, WatchEnd::Over) {
            return Ok(());
        }
        self.resource_version = None;
        let (store, resource_version) = list(api).await?;
        (self.store, self.resource_version) = (store, Some(resource_version));
        self.publish().await;
        if matches!(self.watch(api).await?, WatchEnd::Expired) {
            self.resource_version = None;
        }
        Ok(())
    }

    /// Reads the credentials, and makes a client. A read that takes long is a failure of the source, which is
    /// reported at once, and is waited for.
    async fn open(&mut self) -> Result<SliceApi, ApiFailure> {
        let service = self.service;
        SliceApi::open(service, &mut || self.fail(ApiFailure::CredentialsHang(FILE_PATIENCE))).await
    }

    /// Applies the events of one watch.
    async fn watch(&mut self, api: &SliceApi) -> Result<WatchEnd, ApiFailure> {
        let from = self.resource_version.clone().unwrap_or_default();
        let body = match api.watch(&from).await {
            Err(ApiFailure::Expired) => return Ok(WatchEnd::Expired),
            opened => opened?,
        };
        // The server answers again, and may have nothing to tell for a while.
        if self.reported.is_none() {
            self.publish().await;
        }
        let started = now();
        let end = self.read(body, started, api.namespace()).await;
        self.steady |= now().saturating_duration_since(started) >= MIN_STEADY_WATCH;
        end
    }

    async fn read(
        &mut self,
        mut body: Body,
        started: Instant,
        namespace: &str,
    ) -> Result<WatchEnd, ApiFailure> {
        let mut buffer = LineBuffer::default();
        let over = started + Duration::from_secs(WATCH_SECONDS.into()) + SILENCE_GRACE;
        // Ends with an error of the connection, with silence, and with an event that was cut: the next watch
        // has the event.
        while let Ok(Some(Ok(frame))) = tokio::time::timeout_at(over.into(), body.frame()).await {
            let Ok(bytes) = frame.into_data() else { continue };
            let lines = buffer.push(&bytes, MAX_EVENT_BYTES).map_err(ApiFailure::Invalid)?;
            // A large event has many frames.
            if lines.is_empty() {
                continue;
            }
            for line in lines {
                if self.apply(&line, namespace)? == Some(GONE_STATUS) {
                    return Ok(WatchEnd::Expired);
                }
            }
            self.publish().await;
        }
        // A server that ends a watch has accepted its version: the slices are known up to now.
        self.publish().await;
        Ok(WatchEnd::Over)
    }

    /// Applies an event. Returns the status of an event that ends the watch because of its version.
    fn apply(&mut self, line: &[u8], namespace: &str) -> Result<Option<u16>, ApiFailure> {
        let event = messages::event(line).map_err(ApiFailure::Invalid)?;
        let version = event.resource_version().to_string();
        match event {
            SliceEvent::Put(slice) => self.store.put(slice).map_err(ApiFailure::Invalid)?,
            SliceEvent::Delete(slice) => self.store.delete(&slice.metadata.name),
            SliceEvent::Bookmark(_) => {}
            SliceEvent::Failed(status) if status.code == GONE_STATUS => return Ok(Some(GONE_STATUS)),
            SliceEvent::Failed(status) => {
                return Err(ApiFailure::Refused { why: status.explain(namespace), retry_after: None });
            }
        }
        self.steady = true;
        if !version.is_empty() {
            self.resource_version = Some(version);
        }
        Ok(None)
    }

    /// Reports the engines.
    async fn publish(&mut self) {
        let found = match self.store.read(self.service) {
            Ok(found) => found,
            Err(why) => {
                self.reported = None;
                return self.reporter.failed(&SourceFailure::new(FailureReason::Invalid, why));
            }
        };
        if self.reported.as_ref() == Some(&found) {
            return self.reporter.confirmed(found.engines.len());
        }
        if found.engines.is_empty() {
            self.reporter.empty(&found.why_empty(self.service));
        }
        let had_unaddressed = std::mem::replace(&mut self.has_unaddressed, found.unaddressed > 0);
        if self.has_unaddressed && !had_unaddressed {
            self.reporter.unaddressed(found.unaddressed);
        }
        self.reported = Some(found.clone());
        // The discoverer that has ended drops this task, too.
        self.reporter.listed(discovered(found.engines)).await;
    }

    fn fail(&mut self, failure: ApiFailure) {
        if !failure.keeps_version() {
            self.resource_version = None;
        }
        self.reported = None;
        self.reporter.failed(&failure.into());
    }
}

#[cfg(test)]
mod tests;
