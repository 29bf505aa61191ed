//! An upgraded connection (`/v1/realtime`): bytes both ways, until one side ends or the watch does.
//!
//! The same deadlines and watches as for any answer: what moves either way counts. Never: a look at what is
//! sent.

use std::time::Duration;

use pingora::Error;
use tokio::time::{Instant, sleep_until};

use super::attempt::connection::UpstreamConnection;
use super::client::{Client, ClientEvent};
use super::exchange::{Report, Stop, report_failure};
use super::prompt_work::Placement;
use super::relay::PreparedAnswer;
use super::request::{ClientRequest, Scope};
use super::watch::Watch;
use crate::fleet::Outcome;
use crate::observe;
use crate::retry::AttemptFailure;

/// The time that the upstream has to end its side once the client has ended its own.
const MAX_CLOSING: Duration = Duration::from_secs(10);

/// Carries an upgraded connection to its end.
pub async fn carry(
    scope: &Scope<'_>,
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    placement: &mut Placement,
    answer: Box<PreparedAnswer>,
    watch: &mut Watch,
    report: &mut Report,
) -> Result<(), Stop> {
    let (mut connection, head) = answer.into_upgrade();
    placement.conclude(scope, request, true);
    placement.end_prefill(false);
    report.status = 101;
    report.first_byte = Some(scope.begun.elapsed());
    client.write_head(head, &[], false).await.map_err(Stop::Disconnected)?;
    client.wait_without_limit();
    watch.moved();
    let failure = match pass(client, request, &mut connection, watch).await? {
        None => {
            report.outcome = Some(Outcome::Answered(101));
            return Ok(());
        }
        Some(failure) => failure,
    };
    report_failure(scope, placement, failure, report);
    observe::stream_broken(scope.id, placement.upstream().name(), failure.label());
    Err(Stop::Broken(Error::new_up(pingora::ErrorType::ConnectionClosed)))
}

/// Waits until the time of a client that has ended its side is over.
async fn closed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Passes bytes on. Returns why the upstream ended it, where it did not end as it should.
async fn pass(
    client: &mut Client<'_>,
    request: &mut ClientRequest,
    connection: &mut UpstreamConnection,
    watch: &mut Watch,
) -> Result<Option<AttemptFailure>, Stop> {
    let (room, mut closing) = (connection.outgoing().clone(), None);
    loop {
        let reads = connection.takes_more(false);
        // Not in order: a side that is always ahead must not silence the other.
        tokio::select! {
            piece = connection.read_piece() => match piece {
                Ok(Some(piece)) => {
                    client.write(piece).await.map_err(Stop::Disconnected)?;
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
                    closing = Some(Instant::now() + MAX_CLOSING);
                }
                Err(error) => return Err(Stop::Disconnected(error)),
            },
            () = room.room(), if !reads => {}
            () = closed(closing) => return Ok(None),
            reason = watch.end() => return Ok(Some(AttemptFailure::Ended(reason))),
        }
        watch.moved();
        if let Some(reason) = watch.passed() {
            return Ok(Some(AttemptFailure::Ended(reason)));
        }
    }
}
