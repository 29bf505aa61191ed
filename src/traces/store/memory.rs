//! The store in memory: bounded in bytes, with each shared part kept and counted once.
//!
//! Never: an await under the lock, a record rebuilt under the lock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::task::spawn_blocking;

use super::contents::{CREATED_STEP, StoreError, StoreLimits, StoredTrace, metadata_text};
use super::prompts::{PromptNode, allocation};
use crate::traces::record::{ChoiceRecord, SessionSettings, SessionSummary, TraceRecord};

/// The conversations of one session that a new prompt is compared with: subagents take turns.
const MAX_BRANCHES: usize = 4;

/// The share of the maps in the memory of a trace and of a session.
const ENTRY_BYTES: u64 = 256;

/// Traces in memory.
pub struct MemoryStore {
    held: Mutex<HeldTraces>,
    /// The bytes of what is held, as of the last change: metrics read it without the lock.
    bytes: AtomicU64,
    pub(super) limits: ArcSwap<StoreLimits>,
}

/// The lock on the held traces; publishes their size when it is dropped.
struct HeldGuard<'a> {
    held: MutexGuard<'a, HeldTraces>,
    told_bytes: &'a AtomicU64,
}

#[derive(Default)]
struct HeldTraces {
    sessions: HashMap<Arc<str>, HeldSession>,
    traces: HashMap<Box<str>, Arc<HeldTrace>>,
    /// The sessions in the order of their last activity, the least recent first.
    activity: BTreeMap<u64, Arc<str>>,
    /// The number of the next activity.
    tick: u64,
    weight_version: Option<i64>,
    bytes: u64,
    /// The number of traces evicted for lack of memory since the last report.
    evicted: u64,
}

struct HeldSession {
    settings: Option<SessionSettings>,
    settings_bytes: u64,
    traces: VecDeque<Arc<HeldTrace>>,
    /// The last trace of each conversation, the most recent last.
    branches: Vec<Arc<HeldTrace>>,
    tick: u64,
    last_at: f64,
}

/// A record whose prompt and first token ids are in its node.
struct HeldTrace {
    created_at: f64,
    record: TraceRecord,
    token_texts: Vec<PackedTexts>,
    prompt: Arc<PromptNode>,
    bytes: u64,
}

/// Many short texts in one allocation.
#[derive(Default)]
struct PackedTexts {
    text: Box<str>,
    ends: Box<[usize]>,
}

// === impl MemoryStore ===

impl MemoryStore {
    /// An empty store with these limits.
    pub fn new(limits: StoreLimits) -> Self {
        let limits = ArcSwap::from_pointee(limits);
        MemoryStore { held: Mutex::default(), bytes: AtomicU64::new(0), limits }
    }

    fn held(&self) -> HeldGuard<'_> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        HeldGuard { held, told_bytes: &self.bytes }
    }

    /// Stores a batch, and then drops traces above the limit.
    pub fn put(&self, batch: &[Arc<TraceRecord>], now: f64) {
        let max_bytes = self.limits.load().max_bytes;
        // One lock for each record: a reader waits for one, not for the batch.
        for (place, record) in batch.iter().enumerate() {
            // Sessions that begin in one batch have an order, too.
            self.held().put(record, now + CREATED_STEP * place as f64, max_bytes);
        }
    }

    /// Lists sessions with traces, as `Store::sessions` does.
    pub fn sessions(&self, since: Option<f64>, limit: Option<usize>) -> Vec<SessionSummary> {
        let held = self.held();
        let recent = |session: &HeldSession| since.is_none_or(|since| session.last_at >= since);
        let mut found: Vec<(f64, &Arc<str>, &HeldSession)> = held
            .sessions
            .iter()
            .filter(|(_, session)| recent(session))
            .filter_map(|(id, session)| Some((session.traces.front()?.created_at, id, session)))
            .collect();
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let wanted = found.into_iter().take(limit.unwrap_or(usize::MAX));
        wanted.map(|(_, id, session)| session.summary(id)).collect()
    }

    pub fn session(&self, id: &str) -> Option<SessionSummary> {
        self.held().sessions.get(id).map(|session| session.summary(id))
    }

    /// Rebuilt on a thread that no request waits for: of a long session that takes a while.
    pub async fn traces(
        &self,
        session: &str,
        since: Option<f64>,
        limit: Option<usize>,
    ) -> Result<Vec<StoredTrace>, StoreError> {
        let wanted: Vec<Arc<HeldTrace>> = {
            let held = self.held();
            let Some(session) = held.sessions.get(session) else { return Ok(Vec::new()) };
            let first =
                since.map_or(0, |since| session.traces.partition_point(|trace| trace.created_at < since));
            session.traces.iter().skip(first).take(limit.unwrap_or(usize::MAX)).cloned().collect()
        };
        let rebuilt = spawn_blocking(move || wanted.iter().map(|trace| trace.rebuild()).collect()).await;
        rebuilt.map_err(|error| StoreError::Database { reason: error.to_string() })
    }

    /// The trace of this id.
    pub fn trace(&self, trace_id: &str) -> Option<StoredTrace> {
        let trace = self.held().traces.get(trace_id).cloned()?;
        Some(trace.rebuild())
    }

    /// The most recently stored trace of a session.
    pub fn latest_trace(&self, session: &str) -> Option<StoredTrace> {
        let trace = self.held().sessions.get(session)?.traces.back().cloned()?;
        Some(trace.rebuild())
    }

    /// Deletes sessions with their settings. Returns the number of deleted traces.
    pub fn delete_sessions(&self, ids: &[String]) -> u64 {
        ids.iter().map(|id| self.held().remove_session(id)).sum()
    }

    /// Replaces the settings of a session.
    pub fn put_session(&self, settings: &SessionSettings) {
        let mut held = self.held();
        let session = held.touch(&Arc::from(settings.session_id.as_str()));
        let before = std::mem::replace(&mut session.settings_bytes, settings_bytes(settings));
        let after = session.settings_bytes;
        session.settings = Some(settings.clone());
        session.last_at = session.last_at.max(settings.created_at);
        held.bytes = held.bytes + after - before;
        held.shrink(self.limits.load().max_bytes);
    }

    pub fn load_session(&self, id: &str) -> Option<SessionSettings> {
        self.held().sessions.get(id)?.settings.clone()
    }

    pub fn set_weight_version(&self, version: Option<i64>) {
        self.held().weight_version = version;
    }

    pub fn weight_version(&self) -> Option<i64> {
        self.held().weight_version
    }

    /// Drops sessions whose last activity is too old. Returns the number of traces dropped since the last
    /// call, including those evicted for lack of memory.
    pub fn expire(&self, now: f64) -> u64 {
        let oldest = now - self.limits.load().keep.as_secs_f64();
        let old: Vec<String> = {
            let held = self.held();
            let old = held.sessions.iter().filter(|(_, session)| session.last_at < oldest);
            old.map(|(id, _)| id.to_string()).collect()
        };
        // A session that became active in between stays.
        let expired = |held: &HeldTraces, id: &str| held.sessions.get(id).is_some_and(|s| s.last_at < oldest);
        let drop_one = |id: String| {
            let mut held = self.held();
            if expired(&held, &id) { held.remove_session(&id) } else { 0 }
        };
        let expired: u64 = old.into_iter().map(drop_one).sum();
        expired + std::mem::take(&mut self.held().evicted)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

// === impl HeldGuard ===

impl Deref for HeldGuard<'_> {
    type Target = HeldTraces;

    fn deref(&self) -> &HeldTraces {
        &self.held
    }
}

impl DerefMut for HeldGuard<'_> {
    fn deref_mut(&mut self) -> &mut HeldTraces {
        &mut self.held
    }
}

impl Drop for HeldGuard<'_> {
    fn drop(&mut self) {
        self.told_bytes.store(self.held.bytes, Ordering::Relaxed);
    }
}

// === impl HeldTraces ===

impl HeldTraces {
    fn put(&mut self, record: &TraceRecord, now: f64, limit: u64) {
        if self.traces.contains_key(record.facts.trace_id.as_str()) {
            return;
        }
        let id: Arc<str> = record.facts.session_id.as_str().into();
        let session = self.touch(&id);
        let last = session.traces.back().map(|trace| trace.created_at);
        let created_at = last.map_or(now, |last| now.max(last + CREATED_STEP));
        let (prompt, continued) = PromptNode::new(record, session.branches.iter().map(|trace| &trace.prompt));
        let trace = Arc::new(HeldTrace::new(record, prompt, created_at));
        session.last_at = session.last_at.max(created_at);
        session.traces.push_back(trace.clone());
        session.follow(&trace, continued);
        self.bytes += trace.bytes + trace.prompt.bytes();
        self.traces.insert(record.facts.trace_id.as_str().into(), trace);
        self.shrink(limit);
    }

    /// Makes a session the most recently active one; a new one when there is none yet.
    fn touch(&mut self, id: &Arc<str>) -> &mut HeldSession {
        self.tick += 1;
        let tick = self.tick;
        let (bytes, activity) = (&mut self.bytes, &mut self.activity);
        let session = self.sessions.entry(id.clone()).or_insert_with(|| {
            *bytes += session_bytes(id);
            HeldSession::empty()
        });
        activity.remove(&session.tick);
        session.tick = tick;
        activity.insert(tick, id.clone());
        session
    }

    /// Drops the oldest traces of the least recently active session, then of the next, until the rest fits.
    fn shrink(&mut self, limit: u64) {
        while self.bytes > limit {
            let Some(id) = self.activity.first_entry().map(|entry| entry.get().clone()) else { break };
            let Some(session) = self.sessions.get_mut(&id) else { break };
            match session.traces.pop_front() {
                Some(trace) => {
                    session.branches.retain(|branch| !Arc::ptr_eq(branch, &trace));
                    let is_empty = session.traces.is_empty() && session.settings.is_none();
                    self.forget(&trace);
                    self.evicted += 1;
                    if is_empty {
                        self.remove_session(&id);
                    }
                }
                None => self.evicted += self.remove_session(&id),
            }
        }
    }

    fn forget(&mut self, trace: &HeldTrace) {
        self.traces.remove(trace.record.facts.trace_id.as_str());
        self.bytes -= trace.bytes + trace.prompt.release();
    }

    fn remove_session(&mut self, id: &str) -> u64 {
        let Some(session) = self.sessions.remove(id) else { return 0 };
        self.activity.remove(&session.tick);
        self.bytes -= session_bytes(id) + session.settings_bytes;
        // The newest first: an ancestor goes when its last descendant has gone.
        session.traces.iter().rev().for_each(|trace| self.forget(trace));
        session.traces.len() as u64
    }
}

// === impl HeldSession ===

impl HeldSession {
    fn empty() -> Self {
        HeldSession {
            settings: None,
            settings_bytes: 0,
            traces: VecDeque::new(),
            branches: Vec::new(),
            tick: 0,
            last_at: f64::NEG_INFINITY,
        }
    }

    /// Makes a trace the last one of the conversation that it goes on with, else of a new one.
    fn follow(&mut self, trace: &Arc<HeldTrace>, continued: Option<usize>) {
        if let Some(place) = continued {
            self.branches.remove(place);
        }
        self.branches.push(trace.clone());
        if self.branches.len() > MAX_BRANCHES {
            self.branches.remove(0);
        }
    }

    fn summary(&self, id: &str) -> SessionSummary {
        let settings = self.settings.as_ref();
        let first = self.traces.front().map_or(0.0, |trace| trace.created_at);
        SessionSummary {
            session_id: id.into(),
            trace_count: self.traces.len() as u64,
            created_at: settings.map_or(first, |settings| settings.created_at),
            metadata: settings.map_or_else(|| "{}".into(), metadata_text),
        }
    }
}

fn session_bytes(id: &str) -> u64 {
    allocation(id.len()) + ENTRY_BYTES
}

fn settings_bytes(settings: &SessionSettings) -> u64 {
    let fields = [&settings.metadata, &settings.sampling_params];
    // A map of JSON takes a few times its text.
    let text: usize = fields.iter().map(|map| serde_json::to_string(map).map_or(0, |text| text.len())).sum();
    ENTRY_BYTES + 4 * text as u64 + settings.model.as_ref().map_or(0, |model| allocation(model.len()))
}

// === impl HeldTrace ===

impl HeldTrace {
    fn new(record: &TraceRecord, prompt: PromptNode, created_at: f64) -> Self {
        let mut request = record.request.clone();
        if let (Some(document), Some(text)) = (&mut request, prompt.request()) {
            document.text = text.clone();
        }
        let token_texts = record.choices.iter().map(|choice| PackedTexts::new(&choice.token_texts)).collect();
        let slim = |(place, choice): (usize, &ChoiceRecord)| ChoiceRecord {
            index: choice.index,
            message: choice.message.clone(),
            token_ids: if place == 0 { Vec::new() } else { choice.token_ids.clone() },
            logprobs: choice.logprobs.clone(),
            token_texts: Vec::new(),
            finish_reason: choice.finish_reason.clone(),
            routed_experts: choice.routed_experts.clone(),
            extra: choice.extra.clone(),
        };
        let record = TraceRecord {
            facts: record.facts.clone(),
            model: record.model.clone(),
            turns: Vec::new(),
            request,
            prompt_token_ids: Vec::new(),
            choices: record.choices.iter().enumerate().map(slim).collect(),
            tokens: record.tokens,
            response: record.response.clone(),
        };
        let mut trace = HeldTrace { created_at, record, token_texts, prompt: Arc::new(prompt), bytes: 0 };
        trace.bytes = trace.own_bytes();
        trace
    }

    /// The memory of the trace without its prompt.
    fn own_bytes(&self) -> u64 {
        let facts = &self.record.facts;
        let optional = [&facts.client_model, &facts.upstream, &facts.cumulative];
        let texts =
            [&facts.trace_id, &facts.trace_id, &facts.session_id, &facts.request_id, &self.record.model];
        let texts = texts.into_iter().chain(optional.into_iter().flatten());
        let documents = [&self.record.request, &self.record.response].into_iter().flatten();
        let choice_bytes = |choice: &ChoiceRecord| {
            allocation(choice.message.len())
                + allocation(choice.token_ids.len() * 4)
                + allocation(choice.logprobs.len() * 8)
                + allocation(choice.finish_reason.as_ref().map_or(0, String::len))
                + allocation(choice.routed_experts.as_ref().map_or(0, |text| text.len()))
                + allocation(choice.extra.as_ref().map_or(0, |text| text.len()))
                + size_of::<ChoiceRecord>() as u64
        };
        allocation(size_of::<HeldTrace>())
            + ENTRY_BYTES
            + texts.map(|text| allocation(text.len())).sum::<u64>()
            + documents.map(|document| allocation(size_of_val(document.gaps.as_slice()))).sum::<u64>()
            + self.record.response.as_ref().map_or(0, |document| allocation(document.text.len()))
            + self.record.choices.iter().map(choice_bytes).sum::<u64>()
            + self.token_texts.iter().map(PackedTexts::bytes).sum::<u64>()
    }

    fn rebuild(&self) -> StoredTrace {
        let mut record = self.record.clone();
        record.turns = self.prompt.all_turns();
        record.prompt_token_ids = self.prompt.all_ids();
        if let Some(first) = record.choices.first_mut() {
            first.token_ids = self.prompt.answer_ids().to_vec();
        }
        for (choice, texts) in record.choices.iter_mut().zip(&self.token_texts) {
            choice.token_texts = texts.unpack();
        }
        StoredTrace { record: Arc::new(record), created_at: self.created_at }
    }
}

// === impl PackedTexts ===

impl PackedTexts {
    fn new(texts: &[Box<str>]) -> Self {
        let mut end = 0;
        let ends = texts.iter().map(|text| {
            end += text.len();
            end
        });
        PackedTexts { ends: ends.collect(), text: texts.concat().into() }
    }

    fn unpack(&self) -> Vec<Box<str>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| self.text[start..*end].into()).collect()
    }

    fn bytes(&self) -> u64 {
        size_of::<Self>() as u64 + allocation(self.text.len()) + allocation(size_of_val(&*self.ends))
    }
}

#[cfg(test)]
mod tests;
