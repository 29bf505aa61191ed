//! Ends a connection so that its client receives what was written to it.
//!
//! Closing a socket with unread bytes resets the connection, and discards bytes that the client has not
//! received yet. So the balancer ends its own side first, then reads and discards the client's bytes, for a
//! bounded time and up to a bounded number.

use std::time::Duration;

use pingora::protocols::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, sink};
use tokio::time::timeout;

/// The most bytes that are read and discarded.
const MAX_DISCARDED_BYTES: u64 = 64 << 10;

/// The time for the whole.
const MAX_LINGERING: Duration = Duration::from_secs(1);

/// Ends the connection of `stream`, whose written bytes have been flushed.
pub(super) async fn linger(mut stream: Stream) {
    let end = async {
        AsyncWriteExt::shutdown(&mut stream).await?;
        copy(&mut (&mut stream).take(MAX_DISCARDED_BYTES), &mut sink()).await
    };
    // The connection ends in any case.
    drop(timeout(MAX_LINGERING, end).await);
}
