//! Connections to SQLite and PostgreSQL behind one set of texts, values and rows.
//!
//! Each statement has a time limit. A connection that is dropped within a transaction, or within a statement,
//! is closed: the database rolls back, and the pool opens another one.
//!
//! Never: a statement without a limit, a connection that goes back to its pool with an open transaction.

use std::borrow::Cow;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{PgPool, Postgres, Row, Sqlite, SqlitePool};
use tokio::time::timeout;

use crate::traces::store::contents::StoreError;

/// The connections to one database.
pub(super) enum SqlPool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// A connection that was taken from its pool.
pub(super) struct SqlLink {
    connection: SqlConnection,
    limit: Duration,
    /// Neither in a transaction nor in a statement.
    settled: bool,
    in_transaction: bool,
}

enum SqlConnection {
    Sqlite(PoolConnection<Sqlite>),
    Postgres(PoolConnection<Postgres>),
}

/// A value of a statement.
#[derive(Clone, Debug)]
pub(super) enum SqlValue<'a> {
    Text(Option<Cow<'a, str>>),
    Integer(Option<i64>),
    Real(Option<f64>),
    Flag(bool),
}

/// A row of a result, read from its first column to its last.
pub(super) struct SqlRow {
    row: SqlRowKind,
    next: usize,
}

enum SqlRowKind {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

/// Runs an expression for either database.
macro_rules! either {
    ($kind:ident, $value:expr, $inner:ident => $run:expr) => {
        match $value {
            $kind::Sqlite($inner) => $run,
            $kind::Postgres($inner) => $run,
        }
    };
}

/// A query with its values.
macro_rules! query {
    ($sql:expr, $values:expr) => {{
        let mut query = sqlx::query($sql);
        for value in $values {
            query = match value {
                SqlValue::Text(text) => query.bind(text.as_deref()),
                SqlValue::Integer(number) => query.bind(*number),
                SqlValue::Real(number) => query.bind(*number),
                SqlValue::Flag(flag) => query.bind(*flag),
            };
        }
        query
    }};
}

// === impl SqlPool ===

impl SqlPool {
    /// A connection whose statements may take as long as `limit`.
    pub(super) async fn acquire(&self, limit: Duration) -> Result<SqlLink, StoreError> {
        let connection = match self {
            SqlPool::Sqlite(pool) => SqlConnection::Sqlite(pool.acquire().await?),
            SqlPool::Postgres(pool) => SqlConnection::Postgres(pool.acquire().await?),
        };
        Ok(SqlLink { connection, limit, settled: true, in_transaction: false })
    }

    /// A connection in a transaction that writes.
    pub(super) async fn begin(&self, limit: Duration) -> Result<SqlLink, StoreError> {
        let mut link = self.acquire(limit).await?;
        link.in_transaction = true;
        let begin = match self {
            // The lock for writing at once: a transaction that reads first could not wait for it later.
            SqlPool::Sqlite(_) => "BEGIN IMMEDIATE",
            SqlPool::Postgres(_) => "BEGIN",
        };
        link.execute(begin, &[]).await?;
        Ok(link)
    }

    pub(super) fn is_postgres(&self) -> bool {
        matches!(self, SqlPool::Postgres(_))
    }

    pub(super) async fn close(&self) {
        either!(SqlPool, self, pool => pool.close().await);
    }
}

// === impl SqlLink ===

impl SqlLink {
    /// Runs a statement. Answers the number of rows that it changed.
    pub(super) async fn execute(&mut self, sql: &str, values: &[SqlValue<'_>]) -> Result<u64, StoreError> {
        self.settled = false;
        let done = match &mut self.connection {
            SqlConnection::Sqlite(connection) => {
                let run = timeout(self.limit, query!(sql, values).execute(&mut **connection)).await;
                run.map(|result| result.map(|done| done.rows_affected()))
            }
            SqlConnection::Postgres(connection) => {
                let run = timeout(self.limit, query!(sql, values).execute(&mut **connection)).await;
                run.map(|result| result.map(|done| done.rows_affected()))
            }
        };
        self.settle(done)
    }

    /// Runs a query. Answers all of its rows.
    pub(super) async fn rows(
        &mut self,
        sql: &str,
        values: &[SqlValue<'_>],
    ) -> Result<Vec<SqlRow>, StoreError> {
        self.settled = false;
        let row = |row| SqlRow { row, next: 0 };
        let rows = match &mut self.connection {
            SqlConnection::Sqlite(connection) => {
                let run = timeout(self.limit, query!(sql, values).fetch_all(&mut **connection)).await;
                run.map(|rows| rows.map(|rows| rows.into_iter().map(SqlRowKind::Sqlite).map(row).collect()))
            }
            SqlConnection::Postgres(connection) => {
                let run = timeout(self.limit, query!(sql, values).fetch_all(&mut **connection)).await;
                run.map(|rows| rows.map(|rows| rows.into_iter().map(SqlRowKind::Postgres).map(row).collect()))
            }
        };
        self.settle(rows)
    }

    /// The first row of a query's result.
    pub(super) async fn row(
        &mut self,
        sql: &str,
        values: &[SqlValue<'_>],
    ) -> Result<Option<SqlRow>, StoreError> {
        Ok(self.rows(sql, values).await?.into_iter().next())
    }

    /// Commits the transaction.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        self.execute("COMMIT", &[]).await?;
        self.in_transaction = false;
        Ok(())
    }

    fn settle<T>(
        &mut self,
        result: Result<Result<T, sqlx::Error>, tokio::time::error::Elapsed>,
    ) -> Result<T, StoreError> {
        let result = result.map_err(|_| StoreError::Timeout { limit: self.limit })?;
        self.settled = true;
        Ok(result?)
    }
}

impl Drop for SqlLink {
    fn drop(&mut self) {
        if self.in_transaction || !self.settled {
            either!(SqlConnection, &mut self.connection, connection => connection.close_on_drop());
        }
    }
}

// === impl SqlValue ===

impl<'a> SqlValue<'a> {
    /// A text without the character NUL, which PostgreSQL's texts cannot hold: SUBSTITUTE, as long in bytes,
    /// stands in its place.
    pub(super) fn text(text: &'a str) -> Self {
        SqlValue::Text(Some(match text.contains('\0') {
            true => text.replace('\0', "\u{1a}").into(),
            false => text.into(),
        }))
    }

    pub(super) fn optional_text(text: Option<&'a str>) -> Self {
        text.map_or(SqlValue::Text(None), SqlValue::text)
    }

    /// The largest number that fits where it does not.
    pub(super) fn integer(number: impl TryInto<i64>) -> Self {
        SqlValue::Integer(Some(number.try_into().unwrap_or(i64::MAX)))
    }

    pub(super) fn real(number: f64) -> Self {
        SqlValue::Real(Some(number))
    }

    /// The bytes of its content.
    pub(super) fn bytes(&self) -> usize {
        match self {
            SqlValue::Text(text) => text.as_ref().map_or(0, |text| text.len()),
            SqlValue::Integer(_) | SqlValue::Real(_) => 8,
            SqlValue::Flag(_) => 1,
        }
    }
}

// === impl SqlRow ===

macro_rules! next_column {
    ($row:expr, $kind:ty) => {{
        let column = $row.next;
        $row.next += 1;
        either!(SqlRowKind, &$row.row, row => row.try_get::<$kind, _>(column))?
    }};
}

impl SqlRow {
    /// The text of a column, whatever was read before.
    pub(super) fn text_at(&self, column: usize) -> Result<Option<String>, StoreError> {
        Ok(either!(SqlRowKind, &self.row, row => row.try_get(column))?)
    }

    /// The number of a column, whatever was read before.
    pub(super) fn real_at(&self, column: usize) -> Result<f64, StoreError> {
        Ok(either!(SqlRowKind, &self.row, row => row.try_get(column))?)
    }

    pub(super) fn text(&mut self) -> Result<String, StoreError> {
        Ok(next_column!(self, String))
    }

    pub(super) fn optional_text(&mut self) -> Result<Option<String>, StoreError> {
        Ok(next_column!(self, Option<String>))
    }

    pub(super) fn integer(&mut self) -> Result<i64, StoreError> {
        Ok(next_column!(self, i64))
    }

    pub(super) fn optional_integer(&mut self) -> Result<Option<i64>, StoreError> {
        Ok(next_column!(self, Option<i64>))
    }

    /// A number that cannot be negative.
    pub(super) fn count(&mut self) -> Result<u64, StoreError> {
        Ok(u64::try_from(self.integer()?).unwrap_or(0))
    }

    pub(super) fn real(&mut self) -> Result<f64, StoreError> {
        Ok(next_column!(self, f64))
    }

    pub(super) fn optional_real(&mut self) -> Result<Option<f64>, StoreError> {
        Ok(next_column!(self, Option<f64>))
    }

    pub(super) fn flag(&mut self) -> Result<bool, StoreError> {
        Ok(next_column!(self, bool))
    }
}

// === impl StoreError ===

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        StoreError::Database { reason: error.to_string() }
    }
}
