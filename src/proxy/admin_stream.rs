//! Sends an answer of the admin API that has no end. It ends when the client leaves or does not read, and
//! when the listeners close, so that a shutdown does not wait for it.

use std::time::Duration;

use http::{Response, header};
use http_body_util::BodyExt;
use pingora::http::ResponseHeader;
use pingora::protocols::http::date::get_cached_date;
use pingora::{Error, ErrorType, Result};
use tokio::time::timeout;

use super::admin_service::AdminBody;
use super::client::{Client, ClientEvent};
use super::headers::frame_answer;
use super::request::RequestScope;
use crate::names::PRODUCT;

/// How long a client may leave a piece of the stream unread. A client that has left without a word is noticed
/// no later.
const MAX_STREAM_STALL: Duration = Duration::from_secs(10);

/// Sends the stream until it ends, the client leaves or the listeners close.
pub(super) async fn send(
    scope: &RequestScope<'_>,
    client: &mut Client<'_>,
    answer: Response<AdminBody>,
) -> Result<()> {
    let (parts, mut body) = answer.into_parts();
    let mut head = ResponseHeader::build(parts.status, Some(parts.headers.len() + 4))?;
    head.insert_header(header::DATE, get_cached_date())?;
    head.insert_header(header::SERVER, PRODUCT)?;
    for (name, value) in &parts.headers {
        head.append_header(name.clone(), value)?;
    }
    frame_answer(&mut head, client)?;
    // The stream ends with its listener.
    client.close_after();
    client.write_head(head, &[], false).await?;
    let closed = scope.shared.shutdown.streams_over();
    tokio::pin!(closed);
    loop {
        let frame = tokio::select! {
            biased;
            () = &mut closed => break,
            event = client.next(true, true) => match event? {
                ClientEvent::Abandoned | ClientEvent::Piece(_) => continue,
            },
            frame = body.frame() => frame,
        };
        let Some(Ok(frame)) = frame else { break };
        let Ok(piece) = frame.into_data() else { continue };
        tokio::select! {
            biased;
            written = timeout(MAX_STREAM_STALL, client.write(&piece)) => match written {
                Ok(written) => written?,
                Err(_) => return Err(Error::new_down(ErrorType::WriteTimedout)),
            },
            // The piece is cut, and so is the stream.
            () = &mut closed => return Err(Error::new_down(ErrorType::ConnectionClosed)),
        }
    }
    client.finish().await
}
