//! The writer: takes captured calls from the queue, assembles their records and stores them.
//!
//! It runs on a thread of its own, so that neither a long answer nor a slow disk takes time from requests.
//! Records are stored in batches; a store that fails is tried again with the same batch, while the queue
//! behind it keeps its bound by dropping the oldest calls.
//!
//! Never: more than one batch beside the queue, a trace that is stored twice.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use super::assemble::{self, AnswerAssembler};
use super::known_prompts::KnownPrompts;
use super::queue::{AnswerForm, CaptureMark, EndedCall, TraceMessage};
use super::record::{ChoiceRecord, TraceRecord};
use super::shared::{NO_VERSION, SharedTraces, now};
use super::store::{Store, StoreError};
use crate::config::types::TraceStore;
use crate::observe::Observer;

/// The most records of one batch.
const MAX_BATCH_RECORDS: usize = 256;

/// The memory of records, about, with which a batch is full: a record may take a multiple of the bytes that
/// it was made of.
const MAX_BATCH_BYTES: usize = 64 << 20;

/// The most messages that are taken at a time.
const MAX_TAKEN: usize = 256;

/// How long a record may wait for others of its batch.
const MAX_BATCH_WAIT: Duration = Duration::from_millis(100);

/// The memory of answers that have not ended, above which the largest is given up.
const MAX_ASSEMBLING_BYTES: usize = 512 << 20;

/// The pause before a failed store is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// A failure that takes longer is one of the store, not of a record.
const MAX_QUICK_FAILURE: Duration = Duration::from_secs(1);

/// The number of tries of a batch after which its oldest record is dropped: that record may cause the
/// failure.
const MAX_TRIES: u32 = 60;

/// The longest time for reading the settings of siblings.
const MAX_REFRESH: Duration = Duration::from_millis(500);

/// How long a batch is tried when the balancer is ending.
const MAX_LAST_TRIES: Duration = Duration::from_secs(3);

/// Between two looks at whether the balancer is ending, while a store is slow.
const CLOSE_CHECK: Duration = Duration::from_millis(100);

/// Between two looks at what is too old, and at what siblings have set.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(30);
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// The thread of a writer.
#[derive(Default)]
pub(super) struct WriterThread {
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

impl WriterThread {
    /// Starts the thread.
    pub(super) fn start(&self, traces: &Arc<SharedTraces>) -> Result<(), String> {
        let (ends, ended) = oneshot::channel();
        let traces = traces.clone();
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("no runtime for traces: {error}"))?;
        let work = move || {
            runtime.block_on(run(&traces));
            ends.send(()).ok();
        };
        let thread = std::thread::Builder::new().name("traces".into()).spawn(work);
        thread.map_err(|error| format!("no thread for traces: {error}"))?;
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        Ok(())
    }

    /// Waits until the thread has ended, `grace` at the most.
    pub(super) async fn join(&self, grace: Duration) {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended {
            timeout(grace, ended).await.ok();
        }
    }
}

/// Ends the queue with the writer, also with one that panics: nothing waits for it then.
struct QueueGuard<'a>(&'a SharedTraces);

impl Drop for QueueGuard<'_> {
    fn drop(&mut self) {
        let SharedTraces { queue, observer, .. } = self.0;
        queue.close();
        observer.traces_lost_at_stop(queue.clear());
    }
}

/// An answer of which more is to come.
struct OpenAnswer {
    mark: Arc<CaptureMark>,
    assembler: AnswerAssembler,
}

/// The state between two takes.
#[derive(Default)]
struct WriterBatch {
    open: HashMap<u64, OpenAnswer>,
    open_bytes: usize,
    records: Vec<Arc<TraceRecord>>,
    /// The memory of the records, about.
    bytes: usize,
    /// Notified once the records are stored.
    waiting: Vec<oneshot::Sender<()>>,
    /// The time of the first record.
    since: Option<Instant>,
    /// Dropped calls of the queue that have been looked for.
    dropped: usize,
}

/// Work on the store beside the batches, which do not wait for it: one task of each kind at a time.
#[derive(Default)]
struct StoreUpkeep {
    expiry: Option<JoinHandle<()>>,
    refresh: Option<JoinHandle<()>>,
}

/// Begins a task unless the one before it still runs.
fn begin(task: &mut Option<JoinHandle<()>>, work: impl Future<Output = ()> + Send + 'static) {
    if task.as_ref().is_none_or(JoinHandle::is_finished) {
        *task = Some(tokio::spawn(work));
    }
}

impl StoreUpkeep {
    /// Ends what still runs, while there is a runtime to give connections back on.
    async fn end(self) {
        for task in [self.expiry, self.refresh].into_iter().flatten() {
            task.abort();
            task.await.ok();
        }
    }
}

async fn run(traces: &Arc<SharedTraces>) {
    let (_guard, mut upkeep) = (QueueGuard(traces), StoreUpkeep::default());
    write_batches(traces, &mut upkeep).await;
    upkeep.end().await;
}

/// Takes and stores calls until the queue is closed.
async fn write_batches(traces: &Arc<SharedTraces>, upkeep: &mut StoreUpkeep) {
    let (mut batch, mut messages) = (WriterBatch::default(), Vec::new());
    let (mut expires, mut refreshes) = (interval(EXPIRE_INTERVAL), interval(REFRESH_INTERVAL));
    // After an outage once, and not once for each time that was missed.
    expires.set_missed_tick_behavior(MissedTickBehavior::Delay);
    refreshes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let wait = batch.remaining_wait();
        let open = tokio::select! {
            open = traces.queue.take(&mut messages, MAX_TAKEN) => open,
            () = sleep(wait.unwrap_or_default()), if wait.is_some() => true,
            _ = expires.tick() => {
                begin(&mut upkeep.expiry, expire(traces.clone()));
                true
            }
            _ = refreshes.tick() => {
                begin(&mut upkeep.refresh, refresh(traces.clone()));
                true
            }
        };
        for message in messages.drain(..) {
            batch.add(traces, message);
            if batch.bytes > MAX_BATCH_BYTES {
                batch.store(traces, false).await;
            }
        }
        batch.forget_dropped(traces);
        let is_stored = if batch.is_due() || !open { batch.store(traces, !open).await } else { true };
        if !is_stored && traces.queue.is_closed() {
            // The store is gone, and the balancer waits.
            return;
        }
        if !open {
            return;
        }
    }
}

impl WriterBatch {
    fn add(&mut self, traces: &SharedTraces, message: TraceMessage) {
        // Given up since it was taken: what is left of it would be stored as if it were all.
        if message.is_dropped() {
            return;
        }
        match message {
            TraceMessage::Flush(told) => self.waiting.push(told),
            TraceMessage::Piece { mark, form, part } => {
                let open = self
                    .open
                    .entry(mark.id)
                    .or_insert_with(|| OpenAnswer { mark, assembler: assembler(form) });
                let before = open.assembler.bytes();
                open.assembler.read(&part);
                self.open_bytes = self.open_bytes + open.assembler.bytes() - before;
                if self.open_bytes > MAX_ASSEMBLING_BYTES {
                    self.give_up_largest(&traces.observer);
                }
            }
            TraceMessage::End { mark, call } => {
                let open = self.open.remove(&mark.id);
                if let Some(open) = &open {
                    self.open_bytes -= open.assembler.bytes();
                }
                let mut call = call;
                let pending = call.pending.take();
                let known = &traces.known_prompts;
                let (record, stored) = assembled(*call, open.map(|open| open.assembler), known);
                if let Some(pending) = pending {
                    traces.last_turns.keep(&record);
                    pending.taken();
                }
                self.bytes += bytes_of(&record);
                self.records.push(Arc::new(record));
                self.waiting.extend(stored);
                self.since.get_or_insert_with(Instant::now);
            }
        }
    }

    fn give_up_largest(&mut self, observer: &Observer) {
        let largest = self.open.iter().max_by_key(|(_, open)| open.assembler.bytes()).map(|(id, _)| *id);
        if let Some(open) = largest.and_then(|id| self.open.remove(&id)) {
            self.open_bytes -= open.assembler.bytes();
            open.mark.discard();
            observer.traces_dropped(1, "memory");
        }
    }

    /// Frees what was assembled of calls that the queue has dropped since.
    fn forget_dropped(&mut self, traces: &SharedTraces) {
        let dropped = traces.queue.discards();
        if dropped != self.dropped {
            self.dropped = dropped;
            self.open.retain(|_, open| !open.mark.is_dropped());
            self.open_bytes = self.open.values().map(|open| open.assembler.bytes()).sum();
        }
    }

    fn is_due(&self) -> bool {
        !self.waiting.is_empty()
            || self.records.len() >= MAX_BATCH_RECORDS
            || self.remaining_wait().is_some_and(|wait| wait.is_zero())
    }

    fn remaining_wait(&self) -> Option<Duration> {
        self.since.map(|since| (since + MAX_BATCH_WAIT).saturating_duration_since(Instant::now()))
    }

    /// Stores the records and notifies waiting callers. `last`: the balancer is ending. False: some are lost.
    async fn store(&mut self, traces: &SharedTraces, last: bool) -> bool {
        let records = std::mem::take(&mut self.records);
        (self.since, self.bytes) = (None, 0);
        let deadline = last.then(|| Instant::now() + MAX_LAST_TRIES);
        let is_stored = records.is_empty() || store_batch(traces, &records, deadline).await;
        for told in self.waiting.drain(..) {
            told.send(()).ok();
        }
        is_stored
    }
}

/// The memory of a record, about.
fn bytes_of(record: &TraceRecord) -> usize {
    /// An allocation with what points at it.
    const ENTRY_BYTES: usize = 48;
    let choice = |choice: &ChoiceRecord| {
        let texts: usize = choice.token_texts.iter().map(|text| text.len() + ENTRY_BYTES).sum();
        choice.message.len() + 4 * choice.token_ids.len() + 8 * choice.logprobs.len() + texts
    };
    let documents = [&record.request, &record.response].into_iter().flatten();
    record.turns.iter().map(|turn| turn.len() + ENTRY_BYTES).sum::<usize>()
        + 4 * record.prompt_token_ids.len()
        + record.choices.iter().map(choice).sum::<usize>()
        + documents.map(|document| document.text.len()).sum::<usize>()
}

fn assembler(form: AnswerForm) -> AnswerAssembler {
    AnswerAssembler::new(form.api, form.stream, form.status)
}

fn assembled(
    call: EndedCall,
    open: Option<AnswerAssembler>,
    known: &KnownPrompts,
) -> (TraceRecord, Option<oneshot::Sender<()>>) {
    let EndedCall { facts, request, inserted, answer, rest, replaced, stored, pending: _ } = call;
    let mut answer = answer.map(|form| {
        let mut assembler = open.unwrap_or_else(|| assembler(form));
        assembler.read(&rest);
        let mut prompt = known.take(&facts.session_id);
        let answer = assembler.finish_after(&mut prompt);
        known.keep(&facts.session_id, prompt);
        answer
    });
    if let (Some(answer), Some(error)) = (&mut answer, replaced) {
        answer.response = assemble::read_error(facts.api, &error);
    }
    let sent = inserted.map(|(at, text)| [&request[..at], text, &request[at..]].concat());
    let request = assemble::read_request(facts.api, sent.as_deref().unwrap_or(&request));
    (assemble::record(facts, request, answer), stored)
}

/// Stores a batch, again and again while the store cannot take it, until `deadline`. False: some are lost.
async fn store_batch(traces: &SharedTraces, records: &[Arc<TraceRecord>], deadline: Option<Instant>) -> bool {
    let (mut left, mut deadline, mut tries) = (records.to_vec(), deadline, 0);
    loop {
        let begun = Instant::now();
        let result = tokio::select! {
            result = put(traces, &left) => Some(result),
            () = last_moment(traces, &mut deadline) => None,
        };
        let error = match result {
            Some(Ok(())) => return true,
            Some(Err(error)) => error,
            None => {
                traces.observer.traces_lost_at_stop(left.len());
                return false;
            }
        };
        traces.observer.trace_store_failed(&error);
        // It failed at once: because of one record, or of the store, which the others show.
        if left.len() > 1 && begun.elapsed() < MAX_QUICK_FAILURE {
            left = store_one_by_one(traces, left).await;
        }
        tries += 1;
        if tries % MAX_TRIES == 0 && !left.is_empty() {
            left.remove(0);
            traces.observer.traces_dropped(1, "store");
        }
        if left.is_empty() {
            return tries < MAX_TRIES;
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Waits for the deadline of a balancer that is ending, which begins when the queue is closed.
async fn last_moment(traces: &SharedTraces, deadline: &mut Option<Instant>) {
    while deadline.is_none() {
        if traces.queue.is_closed() {
            *deadline = Some(Instant::now() + MAX_LAST_TRIES);
        } else {
            sleep(CLOSE_CHECK).await;
        }
    }
    if let Some(deadline) = deadline {
        sleep_until(*deadline).await;
    }
}

async fn put(traces: &SharedTraces, records: &[Arc<TraceRecord>]) -> Result<(), StoreError> {
    let store = open_store(traces).await?;
    store.put(records, now()).await?;
    traces.observer.traces_stored(records.len());
    Ok(())
}

/// Returns the records that the store does not take.
async fn store_one_by_one(traces: &SharedTraces, records: Vec<Arc<TraceRecord>>) -> Vec<Arc<TraceRecord>> {
    let (mut left, mut records) = (Vec::new(), records.into_iter());
    for record in records.by_ref() {
        let begun = Instant::now();
        let failed = put(traces, std::slice::from_ref(&record)).await.is_err();
        if failed {
            left.push(record);
        }
        if failed && begun.elapsed() >= MAX_QUICK_FAILURE {
            break;
        }
    }
    left.extend(records);
    left
}

/// The store, which is opened here when it could not be before.
async fn open_store(traces: &SharedTraces) -> Result<Arc<Store>, StoreError> {
    if let Some(store) = traces.store.load_full() {
        return Ok(store);
    }
    let store = Arc::new(Store::open(&traces.settings.load(), &traces.observer).await?);
    traces.store.store(Some(store.clone()));
    Ok(store)
}

async fn expire(traces: Arc<SharedTraces>) {
    let Some(store) = traces.store.load_full() else { return };
    let mut deadline = None;
    let expired = tokio::select! {
        expired = store.expire(now()) => expired,
        () = last_moment(&traces, &mut deadline) => return,
    };
    match expired {
        Ok(0) => {}
        Ok(expired) => traces.observer.traces_expired(expired),
        Err(error) => traces.observer.trace_store_failed(&error),
    }
}

/// Applies the settings that siblings have written to a shared store.
async fn refresh(traces: Arc<SharedTraces>) {
    if !matches!(traces.settings.load().store, TraceStore::Postgres(_)) {
        return;
    }
    let Some(store) = traces.store.load_full() else { return };
    let version = timeout(MAX_REFRESH, store.weight_version()).await;
    if let Ok(Ok(Some(version))) = version {
        debug_assert_ne!(version, NO_VERSION, "it stands for none");
        traces.weight_version.store(version, Ordering::Release);
    }
}

#[cfg(test)]
mod tests;
