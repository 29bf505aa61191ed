//! Waits for the balancer's own work while the client is watched.

use std::future::Future;

use super::client::{Client, ClientEvent};
use super::request::ClientRequest;
use super::request_end::{RequestEnd, client_failure};
use super::watch::RequestWatch;
use crate::reject::Reject;
use crate::retry::EndReason;

fn reject_of(reason: EndReason) -> Reject {
    if reason == EndReason::SlowUpload { Reject::Slow } else { Reject::NoTime }
}

/// Waits for the balancer's own work while the client is watched: the client's disconnect and the request's
/// deadlines end the wait. Bytes that the client sends meanwhile are held with the rest of its body, unless
/// the client is not to be read; its upload is not measured then.
pub(super) async fn watched<T>(
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    watch: &mut RequestWatch,
    reads: bool,
    waiting: impl Future<Output = T>,
) -> Result<T, RequestEnd> {
    tokio::pin!(waiting);
    if let (Some(upload), false) = (watch.upload(), reads) {
        upload.pause();
    }
    loop {
        let complete = request.body.is_complete() || client.is_body_done();
        let event = tokio::select! {
            biased;
            event = client.next(complete, reads) => event,
            done = &mut waiting => {
                if let Some(upload) = watch.upload() {
                    upload.resume();
                }
                return Ok(done);
            }
            reason = watch.end() => return Err(reject_of(reason).into()),
        };
        match event.map_err(client_failure)? {
            ClientEvent::Abandoned => watch.abandon(),
            ClientEvent::Piece(None) => request.body.complete(),
            ClientEvent::Piece(Some(piece)) => {
                watch.record_upload(piece.len());
                let limit = request.body.max_held();
                if request.body.len() + piece.len() as u64 > limit {
                    return Err(Reject::TooLarge { limit }.into());
                }
                request.body.read_on(&piece)?;
                request.body.hold_if_possible(&piece);
                if !request.body.is_replayable() {
                    return Err(Reject::Memory.into());
                }
            }
        }
        if request.body.is_complete() || client.is_body_done() {
            request.body.complete();
            watch.set_upload(None);
        }
    }
}
