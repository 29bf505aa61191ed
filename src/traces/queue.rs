//! The queue between requests and the writer of traces.
//!
//! The queue is bounded in calls and in bytes, including the buffers of captures. When it is full, its oldest
//! call is dropped together with that call's later messages: a client never waits for a trace.
//!
//! Messages gather for a moment, unless a caller waits for one of them: the writer wakes up once for many
//! messages, which saves the requests the cost of waking it each time.
//!
//! Never: an await in a request's path, a message of a dropped call that reaches the writer.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

use super::assemble::AnswerBuffer;
use super::cumulative::PendingTurn;
use super::record::{CallFacts, TraceApi};

/// The most bytes that wait in the queue.
const MAX_QUEUED_BYTES: usize = 256 << 20;

/// The number of flushes in the queue above which flushes without a waiting caller are removed.
const MAX_FLUSHES: usize = 64;

/// The time for which messages without a waiting caller gather.
const MAX_GATHER_TIME: Duration = Duration::from_millis(20);

/// The bytes of the messages above which they do not gather any longer.
const MAX_GATHERED_BYTES: usize = 8 << 20;

/// What a message takes beside its bytes.
const MESSAGE_BYTES: usize = 512;

/// Identifies a call among the messages.
#[derive(Debug)]
pub(super) struct CaptureMark {
    pub id: u64,
    dropped: AtomicBool,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AnswerForm {
    pub api: TraceApi,
    pub stream: bool,
    pub status: u16,
}

/// A call that has ended.
#[derive(Debug)]
pub(super) struct EndedCall {
    pub facts: CallFacts,
    /// The body as it went to the upstream.
    pub request: Bytes,
    /// A text that was sent inside of it, and where.
    pub inserted: Option<(usize, &'static [u8])>,
    /// `None`: there was no answer of an upstream.
    pub answer: Option<AnswerForm>,
    /// The part of the answer behind those of earlier messages.
    pub rest: AnswerBuffer,
    /// The error of the upstream, of an answer that the balancer has given in its place.
    pub replaced: Option<Box<[u8]>>,
    /// Notified once the trace is stored.
    pub stored: Option<oneshot::Sender<()>>,
    /// The session's next turn waits for this one while it is held.
    pub pending: Option<PendingTurn>,
}

/// A message to the writer.
#[derive(Debug)]
pub(super) enum TraceMessage {
    /// A piece of a long answer.
    Piece {
        mark: Arc<CaptureMark>,
        form: AnswerForm,
        part: AnswerBuffer,
    },
    End {
        mark: Arc<CaptureMark>,
        call: Box<EndedCall>,
    },
    /// Notified once all earlier messages are stored.
    Flush(oneshot::Sender<()>),
}

#[derive(Default)]
struct QueueState {
    messages: VecDeque<TraceMessage>,
    bytes: usize,
    /// Ended calls among the messages.
    calls: usize,
    flushes: usize,
    /// The number of messages for which a caller waits.
    urgent: usize,
    /// The time until which the messages may gather; `None`: the queue is empty.
    gather_until: Option<Instant>,
    /// The messages took more than half of a bound: they gather no longer.
    is_pressed: bool,
    closed: bool,
}

/// See the module.
pub(super) struct CaptureQueue {
    /// Held for a push or a take, never across an await.
    state: Mutex<QueueState>,
    arrived: Notify,
    max_calls: AtomicUsize,
    max_bytes: usize,
    /// The bytes in the buffers of captures, which come into the queue when they are full.
    buffered: AtomicUsize,
    dropped: AtomicUsize,
    /// The answers given up for another attempt's answer.
    discarded: AtomicUsize,
}

// === impl CaptureMark ===

impl CaptureMark {
    pub(super) fn new(id: u64) -> Arc<Self> {
        Arc::new(CaptureMark { id, dropped: AtomicBool::new(false) })
    }

    /// Marks the call as dropped: its messages are skipped.
    pub(super) fn discard(&self) {
        self.dropped.store(true, Ordering::Release);
    }

    pub(super) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }
}

// === impl TraceMessage ===

impl TraceMessage {
    fn mark(&self) -> Option<&CaptureMark> {
        match self {
            TraceMessage::Piece { mark, .. } | TraceMessage::End { mark, .. } => Some(mark),
            TraceMessage::Flush(_) => None,
        }
    }

    /// No message of its call is of use any more.
    pub(super) fn is_dropped(&self) -> bool {
        self.mark().is_some_and(CaptureMark::is_dropped)
    }

    fn bytes(&self) -> usize {
        let bytes = match self {
            TraceMessage::Piece { part, .. } => part.capacity(),
            TraceMessage::End { call, .. } => {
                let replaced = call.replaced.as_ref().map_or(0, |error| error.len());
                call.request.len() + call.rest.capacity() + replaced
            }
            TraceMessage::Flush(_) => 0,
        };
        MESSAGE_BYTES + bytes
    }

    fn is_end(&self) -> bool {
        matches!(self, TraceMessage::End { .. })
    }

    /// A client or another caller waits until it is taken, or may soon.
    fn is_urgent(&self) -> bool {
        match self {
            TraceMessage::Piece { .. } => false,
            TraceMessage::End { call, .. } => call.stored.is_some() || call.pending.is_some(),
            TraceMessage::Flush(_) => true,
        }
    }
}

// === impl CaptureQueue ===

impl CaptureQueue {
    pub(super) fn new(max_calls: usize) -> Self {
        Self::bounded(max_calls, MAX_QUEUED_BYTES)
    }

    fn bounded(max_calls: usize, max_bytes: usize) -> Self {
        CaptureQueue {
            state: Mutex::default(),
            arrived: Notify::new(),
            max_calls: AtomicUsize::new(max_calls),
            max_bytes,
            buffered: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            discarded: AtomicUsize::new(0),
        }
    }

    /// Counts the growth of a capture's buffer.
    pub(super) fn buffer_grows(&self, bytes: usize) {
        self.buffered.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Subtracts a buffer that was moved to the queue or freed.
    pub(super) fn buffer_goes(&self, bytes: usize) {
        self.buffered.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_max_calls(&self, max_calls: usize) {
        self.max_calls.store(max_calls, Ordering::Relaxed);
    }

    /// Appends a message. Returns how many calls were dropped for it.
    pub(super) fn push(&self, message: TraceMessage) -> usize {
        if message.mark().is_some_and(CaptureMark::is_dropped) {
            return 0;
        }
        let mut state = self.lock();
        if matches!(message, TraceMessage::Flush(_)) {
            // Callers that have given up leave nothing behind.
            state.remove_abandoned();
        }
        if state.closed {
            let lost = usize::from(message.mark().is_some());
            if let Some(mark) = message.mark() {
                mark.discard();
            }
            return self.count(lost);
        }
        let (was_empty, was_due) = (state.messages.is_empty(), state.is_due());
        state.add(message);
        let max_calls = self.max_calls.load(Ordering::Relaxed);
        // Dropping a call frees no buffer of another one: messages keep a share whatever the buffers take.
        let max_bytes = self.max_bytes.saturating_sub(self.buffered.load(Ordering::Relaxed));
        let max_bytes = max_bytes.max(self.max_bytes / 4);
        state.is_pressed |= state.calls > max_calls / 2 || state.bytes > max_bytes / 2;
        let mut lost = 0;
        while state.calls > max_calls || state.bytes > max_bytes {
            let Some(is_first) = state.drop_oldest() else { break };
            lost += usize::from(is_first);
        }
        // The writer waits for the first message, and then for the time at which they are due.
        let is_news = was_empty || (!was_due && state.is_due());
        drop(state);
        if is_news {
            self.arrived.notify_one();
        }
        self.count(lost)
    }

    /// Waits for messages, and moves up to `most` of them to `batch`. False: the queue is closed and empty.
    pub(super) async fn take(&self, batch: &mut Vec<TraceMessage>, most: usize) -> bool {
        loop {
            let arrived = self.arrived.notified();
            let gather_until = {
                let mut state = self.lock();
                let gather_until =
                    state.gather_until.filter(|until| !state.is_due() && Instant::now() < *until);
                while gather_until.is_none()
                    && batch.len() < most
                    && let Some(message) = state.remove_first()
                {
                    if !message.mark().is_some_and(CaptureMark::is_dropped) {
                        batch.push(message);
                    }
                }
                if !batch.is_empty() {
                    return true;
                }
                if state.closed {
                    return false;
                }
                gather_until
            };
            match gather_until {
                None => arrived.await,
                // An error: the time is over.
                Some(until) => drop(timeout_at(until, arrived).await),
            }
        }
    }

    /// Accepts no more messages; the writer takes those that are there.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_one();
    }

    /// Drops what waits. Returns the number of ended calls.
    pub(super) fn clear(&self) -> usize {
        let mut state = self.lock();
        let calls = state.calls;
        *state = QueueState { closed: state.closed, ..QueueState::default() };
        self.count(calls)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Calls that wait, and the bytes that they and the buffers of captures take.
    pub(super) fn size(&self) -> (usize, usize) {
        let state = self.lock();
        (state.calls, state.bytes + self.buffered.load(Ordering::Relaxed))
    }

    /// The number of calls dropped so far.
    pub(super) fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Acquire)
    }

    /// Gives up the answer of an attempt, for the answer of another one.
    pub(super) fn discard(&self, mark: &CaptureMark) {
        mark.discard();
        self.discarded.fetch_add(1, Ordering::AcqRel);
    }

    /// Changes whenever a mark was dropped.
    pub(super) fn discards(&self) -> usize {
        self.dropped() + self.discarded.load(Ordering::Acquire)
    }

    fn count(&self, lost: usize) -> usize {
        if lost > 0 {
            self.dropped.fetch_add(lost, Ordering::AcqRel);
        }
        lost
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueState {
    fn add(&mut self, message: TraceMessage) {
        self.bytes += message.bytes();
        self.calls += usize::from(message.is_end());
        self.flushes += usize::from(message.mark().is_none());
        self.urgent += usize::from(message.is_urgent());
        self.gather_until.get_or_insert_with(|| Instant::now() + MAX_GATHER_TIME);
        self.messages.push_back(message);
    }

    /// The messages gather no longer.
    fn is_due(&self) -> bool {
        self.urgent > 0 || self.is_pressed || self.closed || self.bytes >= MAX_GATHERED_BYTES
    }

    fn remove_first(&mut self) -> Option<TraceMessage> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.bytes();
        self.calls -= usize::from(message.is_end());
        self.flushes -= usize::from(message.mark().is_none());
        self.removed(usize::from(message.is_urgent()));
        Some(message)
    }

    /// Removes flushes for which nothing waits any more.
    fn remove_abandoned(&mut self) {
        if self.flushes < MAX_FLUSHES {
            return;
        }
        let is_abandoned =
            |message: &TraceMessage| matches!(message, TraceMessage::Flush(told) if told.is_closed());
        let before = self.messages.len();
        self.messages.retain(|message| !is_abandoned(message));
        let removed = before - self.messages.len();
        self.flushes -= removed;
        self.bytes -= removed * MESSAGE_BYTES;
        self.removed(removed);
    }

    /// Messages were removed, so many of which were urgent.
    fn removed(&mut self, urgent: usize) {
        self.urgent -= urgent;
        if self.messages.is_empty() {
            (self.gather_until, self.is_pressed) = (None, false);
        }
    }

    /// Removes the first message of a call, and drops its call: true if it was not dropped before. Its other
    /// messages are skipped when they are taken. `None`: there is no message of a call.
    fn drop_oldest(&mut self) -> Option<bool> {
        let at = self.messages.iter().position(|message| message.mark().is_some())?;
        let message = self.messages.remove(at)?;
        self.bytes -= message.bytes();
        self.calls -= usize::from(message.is_end());
        self.removed(usize::from(message.is_urgent()));
        let mark = message.mark()?;
        let is_first = !mark.is_dropped();
        mark.discard();
        Some(is_first)
    }
}

#[cfg(test)]
mod tests;
