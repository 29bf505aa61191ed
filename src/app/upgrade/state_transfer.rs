//! The state that a process hands over to its successor: run-time changes and the prefix index.
//!
//! ```text
//! new process                             running process
//!   one byte                 -------->
//!                            <--------    records of run-time changes, as JSON
//!                            <--------    messages with chains, as siblings exchange them
//!                            <--------    a frame without bytes: the end
//! ```
//!
//! Every frame is preceded by its length. The frames have a socket of their own, so that a failure affects
//! nothing else: the successor starts with what it has received. It learns the frames from the last to the
//! first, since the most recent chains are sent first.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::member::{MemberRecord, entry_hash, keyed_entry_hash};
use crate::config::types::UpstreamConfig;
use crate::state::State;
use crate::state::exchange::{ChainAdmission, FingerprintFilter, Message};
use crate::state::members::{MemberText, Members};

/// The longest time that the running process waits for the request, and the one in which it answers.
const SERVE_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest time that a new process waits for the state; then it starts with what it has.
const MAX_RECEIVE_TIME: Duration = Duration::from_secs(5);

/// The largest state in bytes: more than 16 million blocks.
const MAX_STATE_BYTES: usize = 160 << 20;

/// The largest frame with chains in bytes.
const MAX_FRAME_BYTES: usize = 16 << 20;

/// The largest frame with records in bytes: 10,000 names with long lists of models.
const MAX_RECORDS_BYTES: usize = 256 << 20;

/// The frames that are built before they are sent.
const MAX_WAITING_FRAMES: usize = 4;

/// The parts that a process hands over.
#[derive(Clone)]
pub(crate) struct StateSource {
    pub state: Arc<State>,
    pub members: Arc<Members>,
    /// The upstreams of the file.
    pub upstreams: Vec<UpstreamConfig>,
    /// How chains are made: see `exchange::fingerprint`.
    pub fingerprint: u64,
}

/// The records of run-time changes, and the file that they are changes of.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TransferredMembers {
    /// The records with their revisions, by name.
    records: HashMap<String, String>,
    /// A hash of each upstream's settings in the file, by name: see `keyed_entry_hash`.
    entries: BTreeMap<String, u64>,
}

/// What a process has received.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct ReceivedState {
    pub members: TransferredMembers,
    /// Messages with chains, the most recent first.
    frames: Vec<Vec<u8>>,
    /// Nothing is missing.
    pub is_whole: bool,
}

// === the running process ===

impl StateSource {
    /// Waits for the request of the successor, and sends the state.
    pub(crate) async fn serve(self, mut stream: UnixStream) -> io::Result<()> {
        let served = async {
            // The end of the stream is that of a process that takes no state.
            stream.read_u8().await?;
            let (frames, mut built) = mpsc::channel(MAX_WAITING_FRAMES);
            let members = serde_json::to_vec(&self.transferred_members())?;
            // Ends with the receiver of the frames.
            tokio::task::spawn_blocking(move || self.build_frames(&frames));
            send_frame(&mut stream, &members).await?;
            while let Some(frame) = built.recv().await {
                send_frame(&mut stream, &frame).await?;
            }
            send_frame(&mut stream, &[]).await
        };
        timeout(SERVE_TIMEOUT, served).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    fn transferred_members(&self) -> TransferredMembers {
        let records = self.members.revisions().into_iter().map(|(name, text)| (name, text.write()));
        let entries = self.upstreams.iter().map(|entry| (entry.name.clone(), keyed_entry_hash(entry)));
        TransferredMembers { records: records.collect(), entries: entries.collect() }
    }

    fn build_frames(&self, frames: &mpsc::Sender<Vec<u8>>) {
        let mut bytes = 0;
        self.state.export_chains(|chains| {
            let message = Message { chains, fingerprint: Some(self.fingerprint), ..Message::default() };
            let frame = message.encode();
            bytes += frame.len();
            bytes <= MAX_STATE_BYTES && frames.blocking_send(frame).is_ok()
        });
    }
}

async fn send_frame(stream: &mut UnixStream, frame: &[u8]) -> io::Result<()> {
    let length = u32::try_from(frame.len()).map_err(|_| io::Error::other("a frame is too long"))?;
    stream.write_u32(length).await?;
    stream.write_all(frame).await
}

// === the new process ===

/// Requests the state, and receives it for at most `MAX_RECEIVE_TIME`.
pub(super) async fn receive(mut stream: UnixStream) -> io::Result<ReceivedState> {
    let deadline = Instant::now() + MAX_RECEIVE_TIME;
    stream.write_u8(1).await?;
    let first = timeout_at(deadline, receive_frame(&mut stream, MAX_RECORDS_BYTES)).await;
    let first = first.map_err(|_| io::ErrorKind::TimedOut)?;
    let members = serde_json::from_slice(&first?)?;
    let mut received = ReceivedState { members, ..ReceivedState::default() };
    let mut bytes = 0;
    while bytes < MAX_STATE_BYTES {
        match timeout_at(deadline, receive_frame(&mut stream, MAX_FRAME_BYTES)).await {
            Ok(Ok(frame)) if frame.is_empty() => {
                received.is_whole = true;
                break;
            }
            Ok(Ok(frame)) => {
                bytes += frame.len();
                received.frames.push(frame);
            }
            // What came before is of use.
            Ok(Err(_)) | Err(_) => break,
        }
    }
    Ok(received)
}

async fn receive_frame(stream: &mut UnixStream, max_bytes: usize) -> io::Result<Vec<u8>> {
    let length = stream.read_u32().await? as usize;
    if length > max_bytes {
        return Err(io::Error::other("a frame is too long"));
    }
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

impl TransferredMembers {
    /// Returns the records that hold for the upstreams of this file. A record ends where the entry of its
    /// upstream in the file is new or another: as after a reload, the upstream is as the file has it.
    pub(crate) fn lasting(&self, upstreams: &[UpstreamConfig]) -> Vec<(String, MemberText)> {
        let has_ended = |name: &str| {
            let entry = upstreams.iter().find(|upstream| upstream.name == name);
            entry.is_some_and(|entry| match self.entries.get(name) {
                Some(before) => self.is_outdated(*before, entry),
                None => true,
            })
        };
        let lasting = self.records.iter().filter(|(name, _)| !has_ended(name));
        lasting.map(|(name, text)| (name.clone(), MemberText::read(text.clone()))).collect()
    }

    /// Returns the names whose changes end because their entries in both files differ.
    pub(crate) fn ended<'s>(&'s self, upstreams: &'s [UpstreamConfig]) -> impl Iterator<Item = &'s str> {
        let is_changed = |entry: &&UpstreamConfig| {
            self.entries.get(&entry.name).is_some_and(|before| self.is_outdated(*before, entry))
        };
        let has_changes = |name: &&str| self.record(name) != MemberRecord::default();
        upstreams.iter().filter(is_changed).map(|entry| entry.name.as_str()).filter(has_changes)
    }

    /// Whether the entry of an upstream has changed, and the upstream's record was not made for the new one.
    fn is_outdated(&self, before: u64, entry: &UpstreamConfig) -> bool {
        before != keyed_entry_hash(entry) && !self.record(&entry.name).outlasts(entry_hash(entry))
    }

    /// Returns the record of an upstream; one that cannot be read changes nothing.
    fn record(&self, name: &str) -> MemberRecord {
        let text = self.records.get(name).map(|text| MemberText::read(text.clone()).text);
        text.and_then(|text| MemberRecord::read(&text).ok()).unwrap_or_default()
    }
}

impl ReceivedState {
    /// Learns the chains; returns the number of frames that could not be used.
    pub(crate) fn learn(&self, state: &State, fingerprint: u64) -> usize {
        let mut filter = FingerprintFilter::new(fingerprint);
        let mut unusable = 0;
        for frame in self.frames.iter().rev() {
            match Message::decode(frame) {
                Ok(message) if filter.check(&message) == ChainAdmission::Applicable => {
                    for chain in &message.chains {
                        state.apply_chain(chain);
                    }
                }
                _ => unusable += 1,
            }
        }
        unusable
    }
}

#[cfg(test)]
mod tests;
