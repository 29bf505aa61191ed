//! Deletes sessions that are too old or above the size limit, the least recently active first.
//!
//! Never: a transaction that delays the writer for long.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::link::{SqlLink, SqlPool, SqlValue};
use super::{SESSIONS_AT_ONCE, SqlStore, session_key};
use crate::traces::store::contents::{StoreError, StoreLimits};

/// The largest number of rounds of deleting and measuring in one call.
const MAX_ROUNDS: usize = 64;

/// The rows of traces that are deleted in one transaction, for which the writer waits.
const MAX_ROWS_AT_ONCE: u64 = 512;

/// The free pages that SQLite gives back in one statement.
const PAGES_AT_ONCE: usize = 4096;

/// The time for which a checkpoint waits for readers of SQLite; the writer waits for it.
const MAX_CHECKPOINT_WAIT: Duration = Duration::from_millis(200);

impl SqlStore {
    /// Deletes sessions beyond the limits. Returns the number of deleted traces.
    pub async fn expire(&self, now: f64) -> Result<u64, StoreError> {
        let StoreLimits { keep, max_bytes } = **self.limits.load();
        let mut deleted = self.expire_old(now - keep.as_secs_f64()).await?;
        let mut size = self.measure().await?;
        for _ in 0..MAX_ROUNDS {
            if size <= max_bytes {
                break;
            }
            let gone = self.delete_least_recent(size - max_bytes).await?;
            deleted += gone;
            size = self.measure().await?;
            if gone == 0 {
                break;
            }
        }
        if deleted > 0 {
            self.give_back().await?;
        }
        self.measured.store(size, Ordering::Relaxed);
        Ok(deleted)
    }

    async fn expire_old(&self, oldest: f64) -> Result<u64, StoreError> {
        let mut deleted = 0;
        loop {
            let sql = "SELECT session_id, last_at FROM sessions WHERE last_at < $1 ORDER BY last_at LIMIT $2";
            let values = [SqlValue::real(oldest), SqlValue::integer(SESSIONS_AT_ONCE)];
            let mut old = Vec::new();
            for mut row in self.look_up().await?.rows(sql, &values).await? {
                old.push((row.text()?, row.real()?));
            }
            if old.is_empty() {
                return Ok(deleted);
            }
            deleted += self.delete_unless_active(old).await?;
        }
    }

    /// Deletes the least recently active sessions whose traces take as much as `excess` together.
    async fn delete_least_recent(&self, excess: u64) -> Result<u64, StoreError> {
        let sql =
            "SELECT session_id, last_at, bytes FROM sessions WHERE trace_count > 0 ORDER BY last_at LIMIT $1";
        let mut rows = self.look_up().await?.rows(sql, &[SqlValue::integer(SESSIONS_AT_ONCE)]).await?;
        let (mut chosen, mut bytes) = (Vec::new(), 0);
        for row in &mut rows {
            if bytes >= excess {
                break;
            }
            chosen.push((row.text()?, row.real()?));
            bytes += row.count()?;
        }
        self.delete_unless_active(chosen).await
    }

    /// Deletes sessions that had no activity since they were read.
    async fn delete_unless_active(&self, mut sessions: Vec<(String, f64)>) -> Result<u64, StoreError> {
        // The order in which batches lock them.
        sessions.sort_by(|a, b| a.0.cmp(&b.0));
        let chosen: Vec<(&str, f64)> = sessions.iter().map(|(id, last)| (session_key(id), *last)).collect();
        let deleted = self.delete_inactive(&chosen).await;
        let mut parents = self.parents();
        sessions.iter().for_each(|(id, _)| parents.forget(id));
        deleted
    }

    /// Deletes sessions, each with the time after which it had no activity, in transactions of so many rows
    /// that the writer does not wait long for one. Answers the number of traces that went.
    pub(super) async fn delete_inactive(&self, sessions: &[(&str, f64)]) -> Result<u64, StoreError> {
        let (mut deleted, mut left) = (0, sessions);
        while !left.is_empty() {
            let mut link = self.write().await?;
            let (mut rows, mut visited) = (0, 0);
            while let Some((id, last_at)) = left.first()
                && rows < MAX_ROWS_AT_ONCE
                && visited < SESSIONS_AT_ONCE
            {
                let (gone, is_whole) = delete_piece(&mut link, id, *last_at, MAX_ROWS_AT_ONCE - rows).await?;
                (rows, visited) = (rows + gone, visited + 1);
                if is_whole {
                    left = &left[1..];
                }
            }
            link.commit().await?;
            deleted += rows;
        }
        Ok(deleted)
    }

    /// The bytes that the traces take.
    async fn measure(&self) -> Result<u64, StoreError> {
        let sql = match &self.reads {
            SqlPool::Sqlite(_) => {
                "SELECT (p.page_count - f.freelist_count) * s.page_size \
                 FROM pragma_page_count p, pragma_freelist_count f, pragma_page_size s"
            }
            // The relation does not shrink when rows are deleted, and is compressed. So the less of both.
            SqlPool::Postgres(_) => {
                "SELECT LEAST(pg_total_relation_size('traces'), \
                 (SELECT COALESCE(SUM(bytes), 0) FROM sessions))::BIGINT"
            }
        };
        let row = self.look_up().await?.row(sql, &[]).await?;
        row.map_or(Ok(0), |mut row| row.count())
    }

    /// Makes the file of SQLite shorter. PostgreSQL vacuums by itself.
    async fn give_back(&self) -> Result<(), StoreError> {
        if self.writes.is_postgres() {
            return Ok(());
        }
        let free = async || -> Result<u64, StoreError> {
            let row =
                self.look_up().await?.row("SELECT freelist_count FROM pragma_freelist_count", &[]).await?;
            row.map_or(Ok(0), |mut row| row.count())
        };
        let vacuum = format!("PRAGMA incremental_vacuum({PAGES_AT_ONCE})");
        let mut before = free().await?;
        while before > 0 {
            self.writes.acquire(self.timeouts.statement).await?.rows(&vacuum, &[]).await?;
            let after = free().await?;
            if after >= before {
                break;
            }
            before = after;
        }
        // The file itself is cut when the log is copied into it.
        // While a reader holds a snapshot it cannot be: the next expiry cuts it then.
        let mut link = self.writes.acquire(self.timeouts.statement).await?;
        link.rows(&busy_timeout(MAX_CHECKPOINT_WAIT), &[]).await?;
        let cut = link.rows("PRAGMA wal_checkpoint(TRUNCATE)", &[]).await;
        link.rows(&busy_timeout(self.timeouts.busy), &[]).await?;
        cut.map(drop)
    }
}

fn busy_timeout(time: Duration) -> String {
    format!("PRAGMA busy_timeout = {}", time.as_millis())
}

/// Deletes a session of at most so many traces, or as many of a longer one: the newest, since rows depend on
/// older ones. Answers the number of traces that went, and whether nothing is left to delete.
async fn delete_piece(
    link: &mut SqlLink,
    id: &str,
    last_at: f64,
    most: u64,
) -> Result<(u64, bool), StoreError> {
    let sql = "UPDATE sessions SET last_at = last_at WHERE session_id = $1 AND last_at <= $2 \
         RETURNING trace_count";
    let locked = link.row(sql, &[SqlValue::text(id), SqlValue::real(last_at)]).await?;
    let count = locked.map(|mut row| row.count()).transpose()?;
    let Some(count) = count else { return Ok((0, true)) };
    if count > most {
        let sql = "DELETE FROM traces WHERE trace_id IN (SELECT trace_id FROM traces \
             WHERE session_id = $1 ORDER BY created_at DESC LIMIT $2)";
        let gone = link.execute(sql, &[SqlValue::text(id), SqlValue::integer(most)]).await?;
        if gone > 0 && gone < count {
            let sql = "UPDATE sessions SET bytes = bytes - bytes * $2 / trace_count, \
                 trace_count = trace_count - $2 WHERE session_id = $1";
            link.execute(sql, &[SqlValue::text(id), SqlValue::integer(gone)]).await?;
            return Ok((gone, false));
        }
    }
    link.execute("DELETE FROM sessions WHERE session_id = $1", &[SqlValue::text(id)]).await?;
    Ok((count, true))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::config::types::TracesConfig;
    use crate::traces::store::contents::StoreTimeouts;
    use crate::traces::store::contract::{START_TIME, arcs};
    use crate::traces::store::samples::record;

    const ROWS: u64 = 2 * MAX_ROWS_AT_ONCE + 100;

    async fn store(folder: &tempfile::TempDir) -> SqlStore {
        let timeouts = StoreTimeouts { acquire: Duration::from_secs(2), ..StoreTimeouts::default() };
        let file = folder.path().join("traces.db");
        SqlStore::open_sqlite(&file, &TracesConfig::default(), timeouts).await.expect("opens")
    }

    async fn put_long_session(store: &SqlStore) {
        let text = "x".repeat(100);
        let records = (0..ROWS).map(|at| record("long", &at.to_string(), &[&text], &[1], &[2]));
        store.put(&arcs(records.collect()), START_TIME).await.expect("is stored");
    }

    #[tokio::test]
    async fn batches_are_stored_while_a_long_session_is_deleted() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = store(&folder).await;
        put_long_session(&store).await;
        let order = std::sync::Mutex::new(Vec::new());
        let delete = async {
            let deleted = store.delete_sessions(&["long".into()]).await.expect("is deleted");
            order.lock().unwrap().push("deleted");
            deleted
        };
        let put = async {
            store
                .put(&arcs(vec![record("other", "o", &["{}"], &[1], &[2])]), START_TIME)
                .await
                .expect("is stored");
            order.lock().unwrap().push("stored");
        };
        assert_eq!(tokio::join!(delete, put).0, ROWS);
        assert_eq!(*order.lock().unwrap(), ["stored", "deleted"]);
        let left = store.sessions(None, None).await.expect("is read");
        assert_eq!(left.iter().map(|session| session.session_id.as_str()).collect::<Vec<_>>(), ["other"]);
    }

    #[tokio::test]
    async fn what_is_left_of_a_long_session_is_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = store(&folder).await;
        put_long_session(&store).await;
        let mut link = store.write().await.expect("a connection");
        let piece = delete_piece(&mut link, "long", f64::MAX, 100).await.expect("is deleted");
        link.commit().await.expect("is deleted");
        assert_eq!(piece, (100, false));
        let summary = store.session("long").await.expect("is read").expect("is there");
        let left = store.traces("long", None, None).await.expect("every parent is there");
        assert_eq!((summary.trace_count, left.len() as u64), (ROWS - 100, ROWS - 100));
        assert_eq!(
            left.last().map(|trace| trace.record.facts.trace_id.clone()),
            Some((ROWS - 101).to_string())
        );
        let mut link = store.write().await.expect("a connection");
        let active = delete_piece(&mut link, "long", START_TIME - 1.0, 100).await.expect("is read");
        assert_eq!(active, (0, true), "a session that is active again stays");
    }

    #[tokio::test]
    async fn upkeep_does_not_wait_for_lists() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = store(&folder).await;
        store.set_weight_version(Some(7)).await.expect("is stored");
        let mut lists = Vec::new();
        while let Ok(Ok(link)) = timeout(Duration::from_millis(100), store.read()).await {
            lists.push(link);
        }
        assert!(!lists.is_empty());
        let upkeep = async {
            assert_eq!(store.weight_version().await.expect("is read"), Some(7));
            assert!(store.load_session("s").await.expect("is read").is_none());
            assert_eq!(store.expire(START_TIME).await.expect("is measured"), 0);
        };
        timeout(Duration::from_secs(1), upkeep).await.expect("there are connections for it");
    }
}
