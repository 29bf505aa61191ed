//! The changes of a peeked body for its session and for its capture.
//!
//! Never: a refusal because of a capture alone, but for a body that is too large to be held.

use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::body_facts::FactsReader;
use super::peek::{HeadFacts, PeekReader};
use crate::observe::Observer;
use crate::proxy::capture::{CaptureIntent, PreparedCapture, trace_api};
use crate::proxy::client::Client;
use crate::proxy::request_end::RequestEnd;
use crate::proxy::settings::Peeker;
use crate::proxy::usage_injection::UsageInjection;
use crate::reject::Reject;
use crate::route::capture::{capture_question, memory_needed, session_edit};
use crate::route::dialect::BodyDialect;
use crate::route::edit::MAX_WORKER_BYTES;
use crate::traces::record::SessionSettings;

impl Peeker {
    /// Whether the request's call is captured, or changed for its session. A body may name its session
    /// anywhere: it is read as a whole where no other part of the request names one.
    pub(super) async fn capture_intent(
        &self,
        client: &mut Client<'_>,
        head: HeadFacts<'_>,
        reader: &mut PeekReader,
    ) -> Result<Option<CaptureIntent>, RequestEnd> {
        let FactsReader::Json(_, api) = &reader.facts else { return Ok(None) };
        let in_path = head.session.is_some();
        if trace_api(*api).is_none() || !head.traces.may_capture(in_path) {
            return Ok(None);
        }
        let mut named = self.session(client, head, reader, None);
        let in_head = named.as_ref().is_some_and(|(session, _)| session.source.is_before_body());
        if !in_head && !reader.body.is_complete() {
            reader.read_all(client).await?;
            named = self.session(client, head, reader, None);
        }
        let label = named.map(|(_, label)| label);
        Ok(CaptureIntent::of(head.traces, label.as_deref(), in_path, head.random).await)
    }
}

impl PeekReader {
    /// Sets what the operator has set for the session, before the body's model is read.
    pub(super) async fn edit_for_session(&mut self, settings: &SessionSettings) -> Result<(), RequestEnd> {
        let FactsReader::Json(scanner, api) = &self.facts else { return Ok(()) };
        let body = self.body.replay();
        let mut working = self.body.reservation_beside();
        working.reserve_edit(memory_needed(body.len(), settings.written_bytes()), body.len())?;
        let edited = if body.len() > MAX_WORKER_BYTES {
            let (settings, body) = (settings.clone(), body.clone());
            let edit = move || session_edit(&body, &settings.sampling_params, settings.model.as_deref());
            // It goes on when its client disconnects, and holds its memory as long.
            let edited = spawn_blocking(move || (edit(), working)).await;
            edited.map_or(Err(Reject::Internal), |(edited, _)| edited)
        } else {
            session_edit(&body, &settings.sampling_params, settings.model.as_deref())
        };
        let Some(edited) = edited? else { return Ok(()) };
        self.facts = FactsReader::Json(scanner.of_edited(&body, &edited), *api);
        self.facts.read(&edited);
        if self.body.replace(Bytes::from(edited)) { Ok(()) } else { Err(Reject::Memory.into()) }
    }

    /// Requests token ids and log-probabilities in a body that is complete and has been read.
    pub(super) fn inject_capture_question(
        &mut self,
        intent: CaptureIntent,
        usage: Option<&UsageInjection>,
        observer: &Observer,
    ) -> Option<Box<PreparedCapture>> {
        let FactsReader::Json(scanner, api) = &self.facts else { return None };
        let (api, dialect) = (trace_api(*api)?, BodyDialect::of(*api));
        let mut held = self.body.reservation_beside();
        if !self.body.is_complete() || !held.grow_to(self.body.len()) {
            observer.traces_dropped(1, "memory");
            return None;
        }
        // The scanner has read the body as it was before a change in its midst.
        let is_read = usage.is_none_or(|usage| usage.is_inserted());
        let question = capture_question(self.body.bytes(), is_read.then_some(scanner), dialect);
        if let Some(question) = &question {
            self.body.insert(question.at, question.text);
        }
        let CaptureIntent { session_id, client_model, .. } = intent;
        let request = self.body.replay();
        let prepared = PreparedCapture { session_id, client_model, api, dialect, question, request, held };
        Some(Box::new(prepared))
    }
}
