//! Reports a finished request to logs, metrics and spans.

use std::fmt::Display;

use pingora::ErrorType;
use pingora::protocols::http::ServerSession;

use super::carry::FinishedRequest;
use super::client_address::ClientAddress;
use super::context::RequestContext;
use super::request::RequestedModel;
use super::shared::ProxyShared;
use crate::fleet::Outcome;
use crate::observe::request::Done;

/// Writes the record of a finished request.
pub(super) fn write(
    shared: &ProxyShared,
    session: &ServerSession,
    context: &RequestContext,
    finished: &FinishedRequest,
) {
    let FinishedRequest { request, report, times, error, .. } = finished;
    let (head, settings) = (session.req_header(), &*context.settings);
    let client = ClientAddress { peer: session.client_addr(), headers: &head.headers, settings };
    let snapshot = shared.fleet.snapshot();
    let model = match &request.model {
        RequestedModel::Named(name) if snapshot.serves_model(name) => Some(name.as_str()),
        _ => None,
    };
    // A refusal is reported by its label; as an error it would be reported twice.
    let error = error.as_deref().filter(|error| !matches!(error.etype(), ErrorType::Custom(_)));
    let outcome = report.outcome.unwrap_or(Outcome::Broken);
    let done = Done {
        id: &context.id,
        client: Some(&client),
        method: head.method.as_str(),
        path: head.uri.path(),
        model,
        client_model: request.client_model(),
        route: request.route_name(),
        session: request.session_label.as_deref(),
        usage: report.usage,
        upstream: report.upstream.as_ref().map(|upstream| upstream.name()),
        status: report.status,
        outcome: report.refused.unwrap_or(outcome.label()),
        attempts: report.attempts,
        times: *times,
        forecast: report.forecast,
        total: context.started.elapsed(),
        received: report.bytes_received,
        sent: report.bytes_sent,
        error: error.map(|error| error as &dyn Display),
        admin: request.admin,
        logged: settings.logs_requests && !request.admin,
    };
    shared.observer.request_done(&done);
    if let Some(trace) = &context.trace {
        shared.spans.finish(trace, &done);
    }
    if let Some(samples) = &request.samples {
        let text = |sample: &[u8]| String::from_utf8_lossy(sample).into_owned();
        shared.observer.bodies(&context.id, &text(&samples.request), &text(&samples.answer));
    }
}
