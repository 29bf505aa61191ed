//! Deletes sessions that are too old or too much, the least recently active first.
//!
//! Never: a transaction that keeps the writer from the batches for long.

use std::sync::atomic::Ordering;

use super::link::{SqlPool, SqlValue};
use super::{SESSIONS_AT_ONCE, SqlStore, session_key};
use crate::traces::store::StoreError;

/// How often the size is brought down and measured again before the rest waits for the next call.
const MAX_ROUNDS: usize = 64;

/// The free pages that SQLite gives back in one statement.
const PAGES_AT_ONCE: usize = 4096;

impl SqlStore {
    /// Deletes what the limits do not allow. Answers the number of traces that went.
    pub async fn expire(&self, now: f64) -> Result<u64, StoreError> {
        let mut deleted = self.expire_old(now - self.keep_seconds).await?;
        let mut size = self.measure().await?;
        for _ in 0..MAX_ROUNDS {
            if size <= self.max_bytes {
                break;
            }
            let gone = self.delete_least_recent(size - self.max_bytes).await?;
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
            for mut row in self.read().await?.rows(sql, &values).await? {
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
        let mut rows = self.read().await?.rows(sql, &[SqlValue::integer(SESSIONS_AT_ONCE)]).await?;
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
        let mut link = self.write().await?;
        let mut deleted = 0;
        for (id, last_at) in &sessions {
            let sql = "DELETE FROM sessions WHERE session_id = $1 AND last_at <= $2 RETURNING trace_count";
            let values = [SqlValue::text(session_key(id)), SqlValue::real(*last_at)];
            if let Some(mut row) = link.row(sql, &values).await? {
                deleted += row.count()?;
            }
        }
        link.commit().await?;
        let mut parents = self.parents();
        sessions.iter().for_each(|(id, _)| parents.forget(id));
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
        let row = self.read().await?.row(sql, &[]).await?;
        row.map_or(Ok(0), |mut row| row.count())
    }

    /// Makes the file of SQLite shorter. PostgreSQL vacuums by itself.
    async fn give_back(&self) -> Result<(), StoreError> {
        if self.writes.is_postgres() {
            return Ok(());
        }
        let free = async || -> Result<u64, StoreError> {
            let row = self.read().await?.row("SELECT freelist_count FROM pragma_freelist_count", &[]).await?;
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
        self.writes
            .acquire(self.timeouts.statement)
            .await?
            .rows("PRAGMA wal_checkpoint(TRUNCATE)", &[])
            .await?;
        Ok(())
    }
}
