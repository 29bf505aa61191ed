//! The queue of records on their way to standard output, and its one writer.
//!
//! What reads standard output may stall: a pipe is full after 64 KiB. Then only the writer waits. The queue
//! fills, further records are dropped and counted, and one record in their place reports how many.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// The interval between two attempts to write to a pipe that is full and does not block.
const FULL_PIPE_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The most that the queue holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogQueueLimits {
    pub records: usize,
    /// The bytes of all formatted records; one larger record alone fits.
    pub bytes: usize,
}

/// The queue of formatted records.
pub(super) struct LogQueue {
    limits: LogQueueLimits,
    /// Locked for a moment; never while a record is formatted or written.
    state: Mutex<LogQueueState>,
    /// Notified when the queue is no longer empty.
    filled: Condvar,
    /// Notified when an entry has been written.
    written: Condvar,
    /// The records that were dropped since the start.
    dropped: AtomicU64,
}

#[derive(Default)]
struct LogQueueState {
    entries: VecDeque<LogQueueEntry>,
    /// The bytes of the records in `entries`.
    bytes: usize,
    /// The records that were dropped after the last entry.
    dropped: u64,
    /// The entries that were put in since the start, and those that the writer has done.
    entered: u64,
    done: u64,
}

#[derive(Debug, PartialEq, Eq)]
enum LogQueueEntry {
    Record(String),
    /// So many records were dropped here.
    Dropped(u64),
}

/// Standard output, as the writer uses it.
struct LineOutput<W> {
    output: W,
    /// The last record was written in part.
    is_torn: bool,
}

// === impl LogQueue ===

impl LogQueue {
    pub(super) fn new(limits: LogQueueLimits) -> Self {
        LogQueue {
            limits,
            state: Mutex::default(),
            filled: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
        }
    }

    /// Puts a record in, or drops it when the queue is full. Never waits for the writer.
    pub(super) fn push(&self, record: String) {
        if self.state().push(record, self.limits) {
            self.filled.notify_one();
        } else {
            self.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Returns the number of records that were dropped since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }

    /// Waits until all that was logged before is written, for at most `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let state = self.state();
        // A report of dropped records is an entry that the writer makes.
        let goal = state.entered + u64::from(state.dropped > 0);
        // The result is the guard, whether the time was enough or not.
        drop(self.written.wait_timeout_while(state, limit, |state| state.done < goal));
    }

    /// Writes the records for ever. `report` formats the record of so many dropped ones.
    pub(super) fn write_to(&self, output: impl Write, report: impl Fn(u64) -> String) -> ! {
        let mut output = LineOutput { output, is_torn: false };
        let mut unreported = 0;
        loop {
            let record = match self.next() {
                LogQueueEntry::Record(record) => Some(record),
                LogQueueEntry::Dropped(count) => {
                    unreported += count;
                    None
                }
            };
            if unreported > 0 && output.write_line(&report(unreported)).is_ok() {
                unreported = 0;
            }
            // As with a full disk. The next record is the next attempt.
            if record.is_some_and(|record| output.write_line(&record).is_err()) {
                unreported += 1;
                self.dropped.fetch_add(1, Relaxed);
            }
            self.state().done += 1;
            self.written.notify_all();
        }
    }

    /// Waits for the next entry.
    fn next(&self) -> LogQueueEntry {
        let mut state = self.state();
        loop {
            if let Some(entry) = state.take() {
                return entry;
            }
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, LogQueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl LogQueueState ===

impl LogQueueState {
    /// Returns whether the record was put in.
    fn push(&mut self, record: String, limits: LogQueueLimits) -> bool {
        let is_full = if self.dropped > 0 {
            // Until there is much room again; otherwise half of what is written would be reports.
            self.entries.len() > limits.records / 2 || self.bytes > limits.bytes / 2
        } else {
            let bytes = self.bytes.saturating_add(record.len());
            self.entries.len() >= limits.records || !self.entries.is_empty() && bytes > limits.bytes
        };
        if is_full {
            self.dropped += 1;
            return false;
        }
        self.enter_dropped();
        self.bytes += record.len();
        self.entered += 1;
        self.entries.push_back(LogQueueEntry::Record(record));
        true
    }

    fn take(&mut self) -> Option<LogQueueEntry> {
        if self.entries.is_empty() {
            self.enter_dropped();
        }
        let entry = self.entries.pop_front()?;
        if let LogQueueEntry::Record(record) = &entry {
            self.bytes = self.bytes.saturating_sub(record.len());
        }
        Some(entry)
    }

    /// Puts the number of dropped records in where they are missing.
    fn enter_dropped(&mut self) {
        if self.dropped > 0 {
            self.entries.push_back(LogQueueEntry::Dropped(std::mem::take(&mut self.dropped)));
            self.entered += 1;
        }
    }
}

// === impl LineOutput ===

impl<W: Write> LineOutput<W> {
    /// Writes a record, which has its line end. Waits for room in a pipe.
    fn write_line(&mut self, line: &str) -> io::Result<()> {
        if self.is_torn {
            self.write_all(b"\n")?;
            self.is_torn = false;
        }
        self.write_all(line.as_bytes())
    }

    #[allow(clippy::disallowed_methods, reason = "the thread of the writer has no runtime")]
    fn write_all(&mut self, mut rest: &[u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match self.output.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    self.is_torn = !rest.is_empty();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process that has the same pipe may have made it so that writes do not block.
                Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(FULL_PIPE_POLL_INTERVAL),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
