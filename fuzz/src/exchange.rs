//! `state::exchange`: a message that can be read is written and read again as the same message, and reading
//! takes no memory that the bytes do not account for.

use vllm_lb::state::exchange::Message;

/// Bytes of memory that a byte of a message may stand for.
const MEMORY: usize = 64;

pub fn run(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    let chains = message.chains.iter().map(|chain| chain.hashes.len());
    let take_backs = message.take_backs.iter().map(|chain| chain.hashes.len());
    let hashes = 8 * chains.chain(take_backs).sum::<usize>();
    let rows = message.gauges.as_ref().map_or(0, |update| update.rows.len());
    let entries = rows + message.chain_count() + message.bound.len() + message.chain_requests.len();
    assert!(hashes <= data.len() * MEMORY, "{hashes} bytes of hashes out of {}", data.len());
    assert!(entries <= data.len(), "{entries} entries out of {} bytes", data.len());
    let written = message.encode();
    let again = Message::decode(&written).expect("what is written can be read");
    assert_eq!(again, message);
    assert_eq!(again.encode(), written);
}
