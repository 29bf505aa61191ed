//! Takes the spans of requests from the queue and exports them in batches.
//!
//! A batch is sent when it is full, or a second after its first request. After a failure that may pass, the
//! same batch is sent again, with growing pauses and for a limited time, while the queue takes what it can.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::collector::CollectorLink;
use super::spans::{SpanRecord, text};
use super::state::ExportState;
use crate::config::types::OtlpConfig;

/// The most requests whose spans are sent in one export.
pub(super) const MAX_BATCH_RECORDS: usize = 512;

/// How long the first request of a batch waits for others.
const BATCH_TIME: Duration = Duration::from_secs(1);

/// The pause before a batch is sent again; it doubles.
const FIRST_RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The longest pause of our own before a batch is sent again.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(15);

/// How long after its first failure a batch is sent again.
const MAX_RETRY_TIME: Duration = Duration::from_secs(60);

/// Exports what the queue has.
pub(super) struct ExportWorker {
    state: Arc<ExportState>,
    records: mpsc::Receiver<SpanRecord>,
    stopped: watch::Receiver<bool>,
    link: CollectorLink,
    /// Tells this process from others of the same service.
    instance: String,
}

// === impl ExportWorker ===

impl ExportWorker {
    pub(super) fn new(
        state: Arc<ExportState>,
        records: mpsc::Receiver<SpanRecord>,
        stopped: watch::Receiver<bool>,
        instance: String,
    ) -> Self {
        ExportWorker { state, records, stopped, link: CollectorLink::default(), instance }
    }

    /// Exports until the stop, and then what is left in the queue.
    pub(super) async fn run(mut self) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                biased;
                count = self.records.recv_many(&mut batch, MAX_BATCH_RECORDS) => if count == 0 { return },
                () = stop(&mut self.stopped) => return,
            }
            if batch.len() < MAX_BATCH_RECORDS {
                tokio::select! {
                    () = sleep(BATCH_TIME) => {}
                    () = self.state.batch_waits.notified() => {}
                    () = stop(&mut self.stopped) => {}
                }
            }
            while batch.len() < MAX_BATCH_RECORDS
                && let Ok(record) = self.records.try_recv()
            {
                batch.push(record);
            }
            self.export(&batch).await;
            batch.clear();
        }
    }

    /// Exports a batch, or drops it.
    async fn export(&mut self, batch: &[SpanRecord]) {
        let spans = batch.iter().map(SpanRecord::span_count).sum();
        let (mut pause, mut give_up) = (FIRST_RETRY_PAUSE, None);
        let mut made: Option<(Arc<OtlpConfig>, Bytes)> = None;
        loop {
            let config = self.state.settings.load_full();
            // A reload has ended the export.
            let Some(endpoint) = &config.endpoint else { return self.state.drop_spans(spans, "off") };
            let body = match made.take() {
                Some((made_for, body)) if Arc::ptr_eq(&made_for, &config) => body,
                _ => self.message(&config, batch),
            };
            let failure = match self.link.send(&config, endpoint, &body).await {
                Ok(rejected) => {
                    let rejected = usize::try_from(rejected).unwrap_or(spans).min(spans);
                    self.state.open_spans.fetch_sub(spans, Ordering::Relaxed);
                    return self.state.observer.spans_exported(spans - rejected, rejected);
                }
                Err(failure) => failure,
            };
            self.state.observer.span_export_failed(&failure);
            let pause_now = pause.max(failure.retry_after().unwrap_or_default());
            let last = *give_up.get_or_insert_with(|| Instant::now() + MAX_RETRY_TIME);
            // A collector may name any pause: the sum of a time and the longest one cannot be expressed.
            let in_time = pause_now < last.saturating_duration_since(Instant::now());
            if !failure.is_temporary() || !in_time || *self.stopped.borrow() {
                return self.state.drop_spans(spans, "collector");
            }
            tokio::select! {
                () = sleep(pause_now) => {}
                // One last time.
                () = stop(&mut self.stopped) => {}
            }
            pause = (pause * 2).min(MAX_RETRY_PAUSE);
            made = Some((config, body));
        }
    }

    fn message(&self, config: &OtlpConfig, batch: &[SpanRecord]) -> Bytes {
        let version = env!("CARGO_PKG_VERSION");
        let resource = Resource {
            attributes: vec![
                text("service.name", &config.service_name),
                text("service.version", version),
                text("service.instance.id", &self.instance),
            ],
            ..Resource::default()
        };
        let scope = InstrumentationScope {
            name: env!("CARGO_PKG_NAME").into(),
            version: version.into(),
            ..InstrumentationScope::default()
        };
        let spans = batch.iter().flat_map(|record| record.spans(config.gen_ai)).collect();
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, ..ScopeSpans::default() }];
        let spans = ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() };
        ExportTraceServiceRequest { resource_spans: vec![spans] }.encode_to_vec().into()
    }
}

/// Waits for the stop.
async fn stop(stopped: &mut watch::Receiver<bool>) {
    // The sender outlives the worker, or the process ends.
    drop(stopped.wait_for(|stopped| *stopped).await);
}
