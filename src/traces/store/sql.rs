//! Traces in SQLite or PostgreSQL.
//!
//! A row of `traces` holds what its prompt adds to the prompt and the answer of the row of `parent_id`:
//! `shared_turns` leading turns, `shared_prompt_ids` leading token ids (of the parent's prompt, then of its
//! `completion_token_ids`), and the first `request_lead` and last `request_tail` characters of the request
//! are the parent's. Lists are JSON. The parent is in the same session and older; delete sessions, not rows.
//!
//! The turns of the trace `?1`, with SQLite:
//!
//! ```sql
//! WITH RECURSIVE chain AS (
//!   SELECT trace_id, parent_id, shared_turns, turns, 9223372036854775807 AS keep
//!   FROM traces WHERE trace_id = ?1
//!   UNION ALL
//!   SELECT t.trace_id, t.parent_id, t.shared_turns, t.turns, min(c.keep, c.shared_turns)
//!   FROM chain c JOIN traces t ON t.trace_id = c.parent_id)
//! SELECT c.shared_turns + j.key AS place, j.value AS turn FROM chain c, json_each(c.turns) j
//! WHERE c.shared_turns + j.key < c.keep ORDER BY place
//! ```
//!
//! The token ids of its prompt:
//!
//! ```sql
//! WITH RECURSIVE chain AS (
//!   SELECT trace_id, parent_id, shared_prompt_ids, prompt_token_ids AS ids, 9223372036854775807 AS keep
//!   FROM traces WHERE trace_id = ?1
//!   UNION ALL
//!   SELECT t.trace_id, t.parent_id, t.shared_prompt_ids,
//!     replace(replace('[' || trim(t.prompt_token_ids, '[]') || ',' ||
//!       trim(coalesce(t.completion_token_ids, ''), '[]') || ']', '[,', '['), ',]', ']'),
//!     min(c.keep, c.shared_prompt_ids)
//!   FROM chain c JOIN traces t ON t.trace_id = c.parent_id)
//! SELECT c.shared_prompt_ids + j.key AS place, j.value AS id FROM chain c, json_each(c.ids) j
//! WHERE c.shared_prompt_ids + j.key < c.keep ORDER BY place
//! ```
//!
//! Several balancers share one PostgreSQL database. The row of a session is locked while its traces are
//! stored or deleted, so that a parent cannot go while a row that needs it comes.
//!
//! Never: a part of a batch, a statement without a time limit, a panic on what a database answers.

mod link;
mod open;
mod parents;
mod reading;
mod retention;
mod rows;
mod schema;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::OnceCell;

use self::link::{SqlLink, SqlPool, SqlValue};
use self::parents::{KnownParents, RowDelta};
use self::rows::EncodedRow;
use super::contents::{CREATED_STEP, StoreError, StoreLimits, StoreTimeouts, metadata_text};
use crate::traces::record::{SessionSettings, TraceRecord};

/// The longest id of a session in a database, in bytes: an index of PostgreSQL does not take longer ones. Of
/// a longer id the beginning counts.
const MAX_SESSION_ID_BYTES: usize = 1024;

/// The sessions that are read to be deleted at a time.
const SESSIONS_AT_ONCE: usize = 100;

/// Traces in a database.
pub struct SqlStore {
    /// For lists, which take long.
    reads: SqlPool,
    /// For what is read shortly: upkeep and requests do not wait for lists.
    lookups: SqlPool,
    writes: SqlPool,
    parents: Mutex<KnownParents>,
    /// The schema is the newest.
    migrated: OnceCell<()>,
    /// The file of SQLite, and its log.
    files: Option<[PathBuf; 2]>,
    /// The size of the traces when it was last measured.
    measured: AtomicU64,
    pub(super) limits: ArcSwap<StoreLimits>,
    timeouts: StoreTimeouts,
}

// === impl SqlStore ===

impl SqlStore {
    fn parents(&self) -> MutexGuard<'_, KnownParents> {
        self.parents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn migrated(&self) -> Result<(), StoreError> {
        let migrate = || schema::migrate(&self.writes, self.timeouts.statement);
        self.migrated.get_or_try_init(migrate).await.map(|_| ())
    }

    /// A connection for reading.
    async fn read(&self) -> Result<SqlLink, StoreError> {
        self.migrated().await?;
        self.reads.acquire(self.timeouts.statement).await
    }

    /// A connection for reading a few rows.
    async fn look_up(&self) -> Result<SqlLink, StoreError> {
        self.migrated().await?;
        self.lookups.acquire(self.timeouts.statement).await
    }

    /// A transaction for writing.
    async fn write(&self) -> Result<SqlLink, StoreError> {
        self.migrated().await?;
        self.writes.begin(self.timeouts.statement).await
    }

    /// Stores a batch in one transaction.
    pub async fn put(&self, batch: &[Arc<TraceRecord>], now: f64) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        // In the order of their ids: two balancers that lock the same sessions do not wait for each other.
        let mut sessions: BTreeMap<&str, SessionRows> = BTreeMap::new();
        for (place, record) in batch.iter().enumerate() {
            let delta = self.parents().follow(record);
            let session = session_key(&record.facts.session_id);
            let rows = sessions.entry(session).or_insert_with(|| SessionRows { place, rows: Vec::new() });
            rows.rows.push(EncodedRow::new(record, delta));
        }
        let stored = self.put_sessions(&sessions, now).await;
        if stored.is_err() {
            let mut parents = self.parents();
            batch.iter().for_each(|record| parents.forget(&record.facts.session_id));
        }
        stored
    }

    async fn put_sessions(&self, sessions: &BTreeMap<&str, SessionRows>, now: f64) -> Result<(), StoreError> {
        let mut link = self.write().await?;
        for (session, SessionRows { place, rows }) in sessions {
            // Sessions that begin in one batch have an order, too.
            let now = now + CREATED_STEP * *place as f64;
            // The time of a row is known later; it is as long as any other.
            let values: Vec<_> = rows.iter().map(|row| row.values(session, now)).collect();
            let expected: usize = values.iter().flatten().map(SqlValue::bytes).sum();
            let last_at = lock_session(&mut link, session, (rows.len(), expected), now).await?;
            let (mut count, mut bytes) = (0, 0);
            for (place, (row, values)) in rows.iter().zip(values).enumerate() {
                let created_at = last_at - CREATED_STEP * (rows.len() - 1 - place) as f64;
                if let Some(written) = insert(&mut link, session, row, values, created_at).await? {
                    count += 1;
                    bytes += written;
                }
            }
            if (count, bytes) != (rows.len(), expected) {
                let more = |found: usize, counted: usize| found as i64 - counted as i64;
                let sql = "UPDATE sessions SET trace_count = trace_count + $2, bytes = bytes + $3 \
                     WHERE session_id = $1";
                let count = SqlValue::integer(more(count, rows.len()));
                link.execute(
                    sql,
                    &[SqlValue::text(session), count, SqlValue::integer(more(bytes, expected))],
                )
                .await?;
            }
        }
        link.commit().await
    }

    /// Deletes sessions with their settings. Returns the number of deleted traces.
    pub async fn delete_sessions(&self, ids: &[String]) -> Result<u64, StoreError> {
        let mut sorted: Vec<&str> = ids.iter().map(|id| session_key(id)).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let whenever: Vec<(&str, f64)> = sorted.into_iter().map(|id| (id, f64::MAX)).collect();
        let deleted = self.delete_inactive(&whenever).await;
        let mut parents = self.parents();
        ids.iter().for_each(|id| parents.forget(id));
        deleted
    }

    /// Replaces the settings of a session.
    pub async fn put_session(&self, settings: &SessionSettings) -> Result<(), StoreError> {
        let sampling_params = serde_json::to_string(&settings.sampling_params).unwrap_or_default();
        let metadata = metadata_text(settings);
        let mut link = self.write().await?;
        let sql = "INSERT INTO sessions (session_id, trace_count, bytes, last_at, created_at, metadata, \
             sampling_params, model) VALUES ($1, 0, 0, $2, $2, $3, $4, $5) \
             ON CONFLICT (session_id) DO UPDATE SET created_at = excluded.created_at, \
             metadata = excluded.metadata, sampling_params = excluded.sampling_params, \
             model = excluded.model, \
             last_at = CASE WHEN sessions.last_at < excluded.last_at THEN excluded.last_at \
             ELSE sessions.last_at END";
        let values = [
            SqlValue::text(session_key(&settings.session_id)),
            SqlValue::real(settings.created_at),
            SqlValue::text(&metadata),
            SqlValue::text(&sampling_params),
            SqlValue::optional_text(settings.model.as_deref()),
        ];
        link.execute(sql, &values).await?;
        link.commit().await
    }

    /// Stores the weight version.
    pub async fn set_weight_version(&self, version: Option<i64>) -> Result<(), StoreError> {
        let text = version.map(|version| version.to_string());
        let mut link = self.write().await?;
        match &text {
            Some(text) => {
                let sql = "INSERT INTO trace_settings (name, value) VALUES ('weight_version', $1) \
                     ON CONFLICT (name) DO UPDATE SET value = excluded.value";
                link.execute(sql, &[SqlValue::text(text)]).await?
            }
            None => link.execute("DELETE FROM trace_settings WHERE name = 'weight_version'", &[]).await?,
        };
        link.commit().await
    }

    /// The size of the file and its log, or what was measured last.
    pub fn bytes(&self) -> u64 {
        let of_file = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
        match &self.files {
            Some([file, log]) => of_file(file) + of_file(log),
            None => self.measured.load(Ordering::Relaxed),
        }
    }

    /// Closes the connections after their statements in progress.
    pub async fn close(&self) {
        self.reads.close().await;
        self.lookups.close().await;
        self.writes.close().await;
    }
}

/// The part of an id that counts.
fn session_key(id: &str) -> &str {
    let mut end = id.len().min(MAX_SESSION_ID_BYTES);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    &id[..end]
}

/// The rows of one session in a batch.
struct SessionRows {
    /// The place of the first in the batch.
    place: usize,
    rows: Vec<EncodedRow>,
}

/// Locks the row of a session, which is made where there is none, for so many traces and bytes, which it
/// counts. Answers the time of the last trace.
async fn lock_session(
    link: &mut SqlLink,
    session: &str,
    (count, bytes): (usize, usize),
    now: f64,
) -> Result<f64, StoreError> {
    let sql = "INSERT INTO sessions (session_id, trace_count, bytes, first_at, last_at) \
         VALUES ($1, $6, $7, $2, $3) ON CONFLICT (session_id) DO UPDATE SET \
         trace_count = sessions.trace_count + excluded.trace_count, \
         bytes = sessions.bytes + excluded.bytes, \
         first_at = COALESCE(sessions.first_at, CASE WHEN sessions.last_at < $2 THEN $2 \
         ELSE sessions.last_at + $4 END), \
         last_at = CASE WHEN sessions.last_at < $2 THEN $3 ELSE sessions.last_at + $5 END \
         RETURNING last_at";
    let values = [
        SqlValue::text(session),
        SqlValue::real(now),
        SqlValue::real(now + CREATED_STEP * count.saturating_sub(1) as f64),
        SqlValue::real(CREATED_STEP),
        SqlValue::real(CREATED_STEP * count as f64),
        SqlValue::integer(count),
        SqlValue::integer(bytes),
    ];
    let row = link.row(sql, &values).await?;
    row.map_or(Ok(now), |mut row| row.real())
}

/// Inserts a row of these values, whole when its parent is gone. Answers its bytes; `None`: the trace is
/// stored already.
async fn insert(
    link: &mut SqlLink,
    session: &str,
    row: &EncodedRow,
    mut values: Vec<SqlValue<'_>>,
    created_at: f64,
) -> Result<Option<usize>, StoreError> {
    values[schema::CREATED_COLUMN] = SqlValue::real(created_at);
    if link.execute(&schema::INSERT, &values).await? == 1 {
        return Ok(Some(values.iter().map(SqlValue::bytes).sum()));
    }
    if !row.has_parent() {
        return Ok(None);
    }
    let whole = EncodedRow::new(row.record(), RowDelta::default());
    let values = whole.values(session, created_at);
    let inserted = link.execute(&schema::INSERT, &values).await?;
    Ok((inserted == 1).then(|| values.iter().map(SqlValue::bytes).sum()))
}
