//! An upgraded connection (`/v1/realtime`): bytes both ways, until one side ends or the watch does.
//!
//! The same deadlines and watches as for any answer: what moves either way counts. Never: read the
//! bytes.

use std::time::Duration;

use pingora::Error;
use tokio::time::{Instant, sleep_until};

use super::attempt::connection::UpstreamConnection;
use super::client::{Client, ClientEvent};
use super::placement::Placement;
use super::relay::PreparedAnswer;
use super::request::{ClientRequest, RequestScope};
use super::request_end::RequestEnd;
use super::request_report::{RequestReport, report_failure};
use super::watch::RequestWatch;
use crate::fleet::Outcome;
use crate::retry::{AttemptFailure, EndReason};

/// How long the upstream may take to close its side after the client has closed its own.
const MAX_CLOSE_TIME: Duration = Duration::from_secs(10);

/// Carries an upgraded connection to its end.
pub(super) async fn carry(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    answer: Box<PreparedAnswer>,
    watch: &mut RequestWatch,
    report: &mut RequestReport,
) -> Result<(), RequestEnd> {
    if client.sends_more() {
        // Its first bytes came before the switch, and were read as the beginning of another request.
        client.close_after();
        return Err(RequestEnd::Disconnected(Error::new_down(pingora::ErrorType::ConnectionClosed)));
    }
    let (mut connection, head) = answer.into_upgrade();
    placement.conclude(scope, request, true);
    let now = std::time::Instant::now();
    placement.end_prefill(false, now);
    report.status = 101;
    watch.record_first_byte(now);
    client.write_head(head, &[], false).await.map_err(RequestEnd::Disconnected)?;
    client.wait_without_limit();
    watch.record_answer_piece();
    let failure = match pass(client, request, &mut connection, watch).await? {
        // Either side may be silent: the limit of silence ends the connection, and no upstream has failed.
        None | Some(AttemptFailure::Ended(EndReason::Idle)) => {
            report.outcome = Some(Outcome::Answered(101));
            return Ok(());
        }
        Some(failure) => failure,
    };
    report_failure(scope, placement, failure, report);
    scope.shared.observer.stream_broken(scope.id, placement.upstream().name(), failure.label());
    Err(RequestEnd::Broken(Error::new_up(pingora::ErrorType::ConnectionClosed)))
}

/// Waits until `MAX_CLOSE_TIME` after the client closed its side.
async fn closed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Passes bytes both ways. Returns the failure if the upstream ended the connection in an error.
async fn pass(
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    connection: &mut UpstreamConnection,
    watch: &mut RequestWatch,
) -> Result<Option<AttemptFailure>, RequestEnd> {
    let (room, mut closing) = (connection.outgoing().clone(), None);
    loop {
        let reads = connection.takes_more(false);
        // Unbiased: one busy side must not starve the other.
        tokio::select! {
            piece = connection.read_piece() => match piece {
                Ok(Some(piece)) => {
                    client.write(piece).await.map_err(RequestEnd::Disconnected)?;
                }
                Ok(None) => return Ok(None),
                Err(_) => return Ok(Some(AttemptFailure::Reset)),
            },
            event = client.next(false, reads), if closing.is_none() => match event {
                Ok(ClientEvent::Piece(Some(piece))) => {
                    request.forwarded += piece.len() as u64;
                    connection.pass(piece);
                }
                // What is on its way, and the upstream's own end, still pass.
                Ok(ClientEvent::Piece(None) | ClientEvent::Abandoned) => {
                    closing = Some(Instant::now() + MAX_CLOSE_TIME);
                }
                Err(error) => return Err(RequestEnd::Disconnected(error)),
            },
            () = room.room(), if !reads => {}
            () = closed(closing) => return Ok(None),
            reason = watch.end() => return Ok(Some(AttemptFailure::Ended(reason))),
        }
        watch.record_answer_piece();
        if let Some(reason) = watch.passed() {
            return Ok(Some(AttemptFailure::Ended(reason)));
        }
    }
}
