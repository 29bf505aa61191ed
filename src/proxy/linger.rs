//! Ends a connection so that its client receives what was written to it.
//!
//! A socket that is closed while bytes of its client wait unread resets the connection, and takes with it
//! what the client has not received yet. So the balancer ends its own side first, and reads and forgets what
//! comes.
//!
//! Never: more than a bounded number of bytes, or a bounded time.

use std::time::Duration;

use pingora::protocols::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, sink};
use tokio::time::timeout;

/// The bytes that are read and forgotten.
const MAX_DISCARDED: u64 = 64 << 10;

/// The time for the whole.
const MAX_LINGERING: Duration = Duration::from_secs(1);

/// See the module. What was written has been flushed.
pub async fn linger(mut stream: Stream) {
    let end = async {
        AsyncWriteExt::shutdown(&mut stream).await?;
        copy(&mut (&mut stream).take(MAX_DISCARDED), &mut sink()).await
    };
    // However that ends, the connection does.
    drop(timeout(MAX_LINGERING, end).await);
}
