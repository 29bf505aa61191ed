//! Publishes chains, behind the urgent messages: in messages of bounded size, as fast as Redis accepts them.

use std::convert::Infallible;

use redis::Pipeline;

use super::connect::RedisLink;
use super::failure::RedisFailure;
use super::publisher::FULL_RETRY_PAUSE;
use super::{SiblingExchange, now};
use crate::state::exchange::Message;

/// The largest size of the events in one message of chains, in bytes; a longer chain has its own message.
const MAX_CHAIN_MESSAGE_BYTES: usize = 64 << 10;

/// The largest number of messages in one pipeline. An urgent message waits behind one pipeline at most.
const MAX_MESSAGES_AT_ONCE: usize = 4;

/// The state of the publisher.
#[derive(Default)]
pub(super) struct ChainPublisher {
    sequence: u64,
    /// The position of the stream that is next in turn.
    next: usize,
    /// The messages that Redis has not confirmed. After a failure the same bytes are published again: Redis
    /// may have accepted them without an answer, and siblings recognise a message that comes twice.
    unconfirmed: Vec<UnconfirmedMessage>,
}

/// A message of chains on its way to Redis.
struct UnconfirmedMessage {
    /// The position of its stream.
    stream: usize,
    bytes: Vec<u8>,
}

impl SiblingExchange {
    /// Publishes waiting chains until a failure.
    pub(super) async fn publish_chains_forever(
        &self,
        publisher: &mut ChainPublisher,
        link: &mut RedisLink,
    ) -> Result<Infallible, RedisFailure> {
        loop {
            match self.publish_chains(publisher, link).await {
                Ok(true) => {}
                Ok(false) => self.chains_waiting.notified().await,
                Err(failure) if !failure.is_full() => return Err(failure),
                Err(failure) => {
                    if !self.relieve(&failure, link).await? {
                        self.failures.report(&failure, now());
                        tokio::time::sleep(FULL_RETRY_PAUSE).await;
                    }
                }
            }
        }
    }

    /// Publishes messages with the oldest waiting chains of each stream in turn. Returns whether there were
    /// any.
    async fn publish_chains(
        &self,
        publisher: &mut ChainPublisher,
        link: &mut RedisLink,
    ) -> Result<bool, RedisFailure> {
        if publisher.unconfirmed.is_empty() {
            self.take_chains(publisher);
        }
        if publisher.unconfirmed.is_empty() {
            return Ok(false);
        }
        let mut commands = Pipeline::new();
        for message in &publisher.unconfirmed {
            self.add_entry(&mut commands, &self.streams.chains[message.stream].stream, &message.bytes);
        }
        link.pipe(&commands).await?;
        for message in publisher.unconfirmed.drain(..) {
            self.observer.exchange_sent(message.bytes.len());
        }
        Ok(true)
    }

    /// Makes messages of the oldest waiting chains.
    fn take_chains(&self, publisher: &mut ChainPublisher) {
        let streams = &self.streams.chains;
        let mut empty_streams = 0;
        while publisher.unconfirmed.len() < MAX_MESSAGES_AT_ONCE && empty_streams < streams.len() {
            let stream = publisher.next;
            publisher.next = (publisher.next + 1) % streams.len();
            let events = streams[stream].waiting.take(MAX_CHAIN_MESSAGE_BYTES);
            if events.is_empty() {
                empty_streams += 1;
                continue;
            }
            empty_streams = 0;
            publisher.sequence += 1;
            let head = Message::new(self.id, publisher.sequence);
            let mut message = Message { fingerprint: Some(self.settings.fingerprint), ..head };
            events.iter().for_each(|event| event.fill(&mut message));
            publisher.unconfirmed.push(UnconfirmedMessage { stream, bytes: message.encode() });
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::state::exchange::{Binding, BindingUpdate, ChainUpdate, GaugeUpdate, Message, SiblingLoad};

    /// The sizes from which the table in docs/operating.md is computed. They are of a balancer over 64
    /// upstreams with as many requests a second, each with a session and 16 new blocks, in 20 ms.
    #[test]
    fn message_sizes_of_the_sizing_table() {
        let names: Vec<String> = (0..64).map(|number| format!("vllm-{number:02}:8000")).collect();
        let load = SiblingLoad { active: 12, backlog: 40_000, context: 90_000 };
        let keys: Vec<String> = (0..20u64).map(|key| format!("{:x}", u64::MAX - key)).collect();
        let size = |rows: usize, requests: usize| {
            let rows = names.iter().take(rows).map(|name| (name.as_str(), load)).collect();
            let bound = keys.iter().zip(&names).take(requests).map(|(key, upstream)| BindingUpdate {
                kind: Binding::Session,
                key,
                upstream,
                number: 20_000,
            });
            let chains = names.iter().take(requests).map(|upstream| ChainUpdate {
                upstream,
                parent: Some(1),
                depth: 100,
                hashes: vec![7; 16].into(),
                end: Some(2),
            });
            let gauges = Some(GaugeUpdate { whole: false, rows });
            let urgent = Message { gauges, bound: bound.collect(), ..Message::new(1, 100_000) };
            let head = Message::new(1, 100_000);
            let chains = Message { fingerprint: Some(1), chains: chains.collect(), ..head };
            (urgent.encode().len(), chains.encode().len())
        };
        for (rows, requests, urgent, chains) in [(6, 2, 190, 350), (45, 20, 1_400, 3_250)] {
            let found = size(rows, requests);
            let is_near = |found: usize, wanted: usize| found.abs_diff(wanted) * 50 < wanted;
            assert!(is_near(found.0, urgent) && is_near(found.1, chains), "{found:?}");
        }
    }
}
