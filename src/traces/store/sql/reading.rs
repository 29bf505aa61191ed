//! Reads sessions and traces from a database.
//!
//! Never: a lock, a transaction: each answer is that of one statement.

use std::collections::HashMap;
use std::sync::LazyLock;

use tokio::task::spawn_blocking;

use super::link::{SqlRow, SqlValue};
use super::rows::RowDecoder;
use super::schema::{COLUMNS, CREATED_COLUMN, PARENT_COLUMN};
use super::{SqlStore, session_key};
use crate::traces::record::{SessionSettings, SessionSummary};
use crate::traces::store::contents::{StoreError, StoredTrace};

/// The columns of a summary.
const SUMMARY: &str = "session_id, trace_count, COALESCE(created_at, first_at, last_at), metadata";

/// The rows that were chosen and those that they need, each after its parent.
fn with_parents(chosen: &str) -> String {
    format!(
        "WITH RECURSIVE chosen AS (SELECT trace_id, parent_id FROM traces {chosen}), \
         needed AS (SELECT trace_id, parent_id FROM chosen UNION \
         SELECT t.trace_id, t.parent_id FROM traces t JOIN needed n ON t.trace_id = n.parent_id) \
         SELECT {COLUMNS} FROM traces WHERE trace_id IN (SELECT trace_id FROM needed) ORDER BY created_at"
    )
}

static SESSION_TRACES: LazyLock<String> = LazyLock::new(|| {
    format!("SELECT {COLUMNS} FROM traces WHERE session_id = $1 ORDER BY created_at LIMIT $2")
});

static RECENT_TRACES: LazyLock<String> =
    LazyLock::new(|| with_parents("WHERE session_id = $1 AND created_at >= $3 ORDER BY created_at LIMIT $2"));

static ONE_TRACE: LazyLock<String> = LazyLock::new(|| with_parents("WHERE trace_id = $1"));

static LATEST_TRACE: LazyLock<String> =
    LazyLock::new(|| with_parents("WHERE session_id = $1 ORDER BY created_at DESC LIMIT 1"));

fn count_limit(limit: Option<usize>) -> SqlValue<'static> {
    SqlValue::integer(limit.unwrap_or(usize::MAX))
}

/// The traces of rows that were stored at `since` or later, made on a thread that no request waits for: a row
/// of a long session takes all rows before it.
async fn decode(rows: Vec<SqlRow>, since: f64) -> Result<Vec<StoredTrace>, StoreError> {
    let decoded = spawn_blocking(move || decode_rows(rows, since)).await;
    decoded.map_err(|error| StoreError::Database { reason: error.to_string() })?
}

fn decode_rows(rows: Vec<SqlRow>, since: f64) -> Result<Vec<StoredTrace>, StoreError> {
    let parents: Result<Vec<_>, _> = rows.iter().map(|row| row.text_at(*PARENT_COLUMN)).collect();
    let parents = parents?;
    let mut needed: HashMap<&str, usize> = HashMap::new();
    parents.iter().flatten().for_each(|parent| *needed.entry(parent).or_default() += 1);
    let (mut decoder, mut traces) = (RowDecoder::default(), Vec::new());
    for (row, parent) in rows.into_iter().zip(&parents) {
        let trace = decoder.decode(row)?;
        let id = trace.record.facts.trace_id.as_str();
        if !needed.contains_key(id) {
            decoder.forget(id);
        }
        if let Some(parent) = parent.as_deref()
            && let Some(count) = needed.get_mut(parent)
        {
            *count -= 1;
            if *count == 0 {
                decoder.forget(parent);
            }
        }
        if trace.created_at >= since {
            traces.push(trace);
        }
    }
    Ok(traces)
}

/// The last trace of rows that only it needs.
async fn decode_last(rows: Vec<SqlRow>) -> Result<Option<StoredTrace>, StoreError> {
    let last = match rows.last() {
        Some(row) => row.real_at(CREATED_COLUMN)?,
        None => return Ok(None),
    };
    Ok(decode(rows, last).await?.pop())
}

fn summary(mut row: SqlRow) -> Result<SessionSummary, StoreError> {
    Ok(SessionSummary {
        session_id: row.text()?,
        trace_count: row.count()?,
        created_at: row.real()?,
        metadata: row.optional_text()?.unwrap_or_else(|| "{}".into()),
    })
}

impl SqlStore {
    /// Lists sessions with traces.
    pub async fn sessions(
        &self,
        since: Option<f64>,
        limit: Option<usize>,
    ) -> Result<Vec<SessionSummary>, StoreError> {
        let sql = format!(
            "SELECT {SUMMARY} FROM sessions WHERE trace_count > 0 AND last_at >= $1 \
             ORDER BY first_at DESC, session_id LIMIT $2"
        );
        let values = [SqlValue::real(since.unwrap_or(f64::MIN)), count_limit(limit)];
        let rows = self.read().await?.rows(&sql, &values).await?;
        rows.into_iter().map(summary).collect()
    }

    /// A session that has settings or traces.
    pub async fn session(&self, id: &str) -> Result<Option<SessionSummary>, StoreError> {
        let sql = format!("SELECT {SUMMARY} FROM sessions WHERE session_id = $1");
        let row = self.look_up().await?.row(&sql, &[SqlValue::text(session_key(id))]).await?;
        row.map(summary).transpose()
    }

    /// The traces of a session since a time, the oldest first.
    pub async fn traces(
        &self,
        session: &str,
        since: Option<f64>,
        limit: Option<usize>,
    ) -> Result<Vec<StoredTrace>, StoreError> {
        let (id, count) = (SqlValue::text(session_key(session)), count_limit(limit));
        let mut link = self.read().await?;
        let Some(since) = since else {
            let rows = link.rows(&SESSION_TRACES, &[id, count]).await?;
            drop(link);
            return decode(rows, f64::MIN).await;
        };
        let rows = link.rows(&RECENT_TRACES, &[id, count, SqlValue::real(since)]).await?;
        drop(link);
        decode(rows, since).await
    }

    /// The trace of this id.
    pub async fn trace(&self, trace_id: &str) -> Result<Option<StoredTrace>, StoreError> {
        let rows = self.read().await?.rows(&ONE_TRACE, &[SqlValue::text(trace_id)]).await?;
        decode_last(rows).await
    }

    /// The most recently stored trace of a session.
    pub async fn latest_trace(&self, session: &str) -> Result<Option<StoredTrace>, StoreError> {
        let rows = self.look_up().await?.rows(&LATEST_TRACE, &[SqlValue::text(session_key(session))]).await?;
        decode_last(rows).await
    }

    /// The settings of a session.
    pub async fn load_session(&self, id: &str) -> Result<Option<SessionSettings>, StoreError> {
        let sql = "SELECT session_id, created_at, metadata, sampling_params, model FROM sessions \
             WHERE session_id = $1 AND created_at IS NOT NULL";
        let row = self.look_up().await?.row(sql, &[SqlValue::text(session_key(id))]).await?;
        let Some(mut row) = row else { return Ok(None) };
        let object =
            |text: Option<String>| serde_json::from_str(&text.unwrap_or_default()).unwrap_or_default();
        Ok(Some(SessionSettings {
            session_id: row.text()?,
            created_at: row.real()?,
            metadata: object(row.optional_text()?),
            sampling_params: object(row.optional_text()?),
            model: row.optional_text()?,
        }))
    }

    /// The stored weight version.
    pub async fn weight_version(&self) -> Result<Option<i64>, StoreError> {
        let sql = "SELECT value FROM trace_settings WHERE name = 'weight_version'";
        let row = self.look_up().await?.row(sql, &[]).await?;
        Ok(row.map(|mut row| row.text()).transpose()?.and_then(|text| text.parse().ok()))
    }
}
