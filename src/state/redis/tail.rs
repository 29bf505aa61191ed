//! Reads the tail of a stream from its end, for a balancer that starts.

use redis::Value;

use super::SiblingExchange;
use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::RedisFailure;
use super::reply::{self, StreamId};

/// The end of a stream.
pub(super) struct UnreadEntries {
    /// The newest entry.
    pub newest: StreamId,
    /// The stream was emptied or replaced since the last read: all its entries are new.
    pub was_replaced: bool,
    /// The answers to read from the last to the first; entries in an answer are in that order too. Empty when
    /// an earlier read has come to the stream's end.
    pub pages: Vec<Value>,
}

impl SiblingExchange {
    /// Reads at most about `max_bytes` of the tail in pages of `page_entries`; nothing when entries up to
    /// `last` were read before.
    pub(super) async fn tail(
        &self,
        key: &str,
        last: Option<StreamId>,
        (page_entries, max_bytes): (usize, usize),
        link: &mut RedisLink,
    ) -> Result<UnreadEntries, RedisFailure> {
        let newest = page(key, None, 1, link).await?;
        let newest = reply::entries(&newest).first().map(|entry| entry.id);
        let was_replaced = last.is_some_and(|last| newest.is_none_or(|newest| newest < last));
        let mut tail = UnreadEntries { newest: newest.unwrap_or_default(), was_replaced, pages: Vec::new() };
        let (mut bytes, mut until) = (0, newest.filter(|_| last.is_none()));
        while let Some(id) = until.filter(|_| bytes < max_bytes) {
            let page = page(key, Some(id), page_entries, link).await?;
            let entries = reply::entries(&page);
            bytes += entries.iter().map(|entry| entry.bytes.len()).sum::<usize>();
            until = entries
                .last()
                .and_then(|oldest| oldest.id.before())
                .filter(|_| entries.len() == page_entries);
            tail.pages.push(page);
        }
        Ok(tail)
    }
}

async fn page(
    key: &str,
    until: Option<StreamId>,
    count: usize,
    link: &mut RedisLink,
) -> Result<Value, RedisFailure> {
    let until = until.map_or_else(|| "+".to_string(), |id| id.to_string());
    let mut command = redis::cmd("XREVRANGE");
    command.arg(key).arg(until).arg("-").arg("COUNT").arg(count);
    link.call(&command, COMMAND_TIMEOUT).await
}
