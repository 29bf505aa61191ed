//! Spans of requests, exported to a collector of OpenTelemetry by OTLP over HTTP.
//!
//! ```text
//! finish        a request has ended: its facts go into a bounded queue; a full queue drops them
//! worker::run   takes batches from the queue, makes messages of them, sends them again after a failure
//! collector     one connection to the collector
//! ```
//!
//! A request never waits for the collector; messages are made outside of the request. Each request has
//! a span of the kind server, with child spans for its phases (`spans`).
//!
//! Never: decide whether a request is sampled (`trace_context`), name a metric (`observe`).

mod collector;
mod spans;
mod state;
pub(crate) mod trace_context;
mod worker;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::config::types::OtlpConfig;
use crate::observe::Observer;
use crate::observe::request::Done;
use spans::SpanRecord;
use state::ExportState;
use trace_context::RequestTrace;
use worker::{ExportWorker, MAX_BATCH_RECORDS};

/// The most requests whose spans wait for the collector.
const MAX_WAITING_RECORDS: usize = 8192;

/// The outcomes of answers, whether by an upstream or by the balancer.
const ANSWER_OUTCOMES: [&str; 3] = ["ok", "client_error", "server_error"];

/// Takes the spans of requests that have ended.
pub(crate) struct SpanExporter {
    records: mpsc::Sender<SpanRecord>,
    state: Arc<ExportState>,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

// === impl SpanExporter ===

impl SpanExporter {
    /// Starts the worker, which is idle while no endpoint is configured.
    pub(crate) fn start(config: &OtlpConfig, observer: Observer) -> Arc<Self> {
        let (records, waiting) = mpsc::channel(MAX_WAITING_RECORDS);
        let (stop, stopped) = watch::channel(false);
        let state = Arc::new(ExportState::new(config, observer));
        let instance = format!("{:016x}", RandomState::new().hash_one(0u64));
        let task = tokio::spawn(ExportWorker::new(state.clone(), waiting, stopped, instance).run());
        Arc::new(SpanExporter { records, state, stop, task: Mutex::new(Some(task)) })
    }

    /// Applies settings to the exports that follow.
    pub(crate) fn reload(&self, config: &OtlpConfig) {
        self.state.settings.store(Arc::new(config.clone()));
    }

    /// Takes the spans of an ended request, if they are sampled. Calls of the admin API have none, nor
    /// has an answer of the balancer's own in a trace that begins with it, such as a health check.
    pub(crate) fn finish(&self, trace: &RequestTrace, done: &Done<'_>) {
        // A refusal has its reason as the outcome.
        let is_own_answer = done.upstream.is_none() && ANSWER_OUTCOMES.contains(&done.outcome);
        if !trace.is_sampled() || done.admin || (is_own_answer && trace.is_root()) {
            return;
        }
        self.take(SpanRecord::new(trace, done));
    }

    /// Puts the spans of a request into the queue, or drops them.
    fn take(&self, record: SpanRecord) {
        let spans = record.span_count();
        // Counted first, since the worker subtracts.
        self.state.open_spans.fetch_add(spans, Ordering::Relaxed);
        if self.records.try_send(record).is_err() {
            self.state.drop_spans(spans, "full");
        } else if self.records.capacity() <= MAX_WAITING_RECORDS - MAX_BATCH_RECORDS {
            self.state.batch_waits.notify_one();
        }
    }

    /// Exports what waits, for at most `limit`; what is left then is lost.
    pub(crate) async fn stop(&self, limit: Duration) {
        self.stop.send_replace(true);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut task) = task else { return };
        if tokio::time::timeout(limit, &mut task).await.is_err() {
            task.abort();
            // It ends at its next pause.
            drop(task.await);
        }
        let lost = self.state.open_spans.swap(0, Ordering::Relaxed);
        self.state.observer.spans_lost_at_stop(lost);
    }
}

#[cfg(test)]
mod tests;
