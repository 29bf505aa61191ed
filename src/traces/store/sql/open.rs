//! Opens a database: the file of SQLite with its directory, or a PostgreSQL server.
//!
//! Never: a connection of a request's path, a file that others can read.

use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwap;
use log::LevelFilter;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::SqlStore;
use super::link::SqlPool;
use super::parents::KnownParents;
use crate::config::types::TracesConfig;
use crate::observe::Observer;
use crate::traces::store::contents::{StoreError, StoreTimeouts, database_limits};

/// The most memory of what is known of the last traces of sessions, in bytes.
const MAX_PARENT_BYTES: usize = 64 << 20;

/// The connections that read lists at a time.
const MAX_READERS: u32 = 4;

/// The connections that read a few rows at a time.
const MAX_LOOKUPS: u32 = 4;

/// The connections that write to PostgreSQL at a time. SQLite has one writer.
const MAX_WRITERS: u32 = 2;

/// How long the start waits for a server.
const MAX_FIRST_CONNECT: Duration = Duration::from_secs(1);

/// The size to which SQLite cuts its log after a checkpoint.
const MAX_LOG_BYTES: u64 = 16 << 20;

/// How long a connection stays open without use.
const MAX_IDLE: Duration = Duration::from_secs(300);

/// The time by which a server ends a statement before this side gives up.
const SERVER_MARGIN: Duration = Duration::from_secs(1);

impl SqlStore {
    fn new(pools: [SqlPool; 3], config: &TracesConfig, timeouts: StoreTimeouts) -> Self {
        let [reads, lookups, writes] = pools;
        SqlStore {
            reads,
            lookups,
            writes,
            parents: Mutex::new(KnownParents::new(MAX_PARENT_BYTES)),
            migrated: OnceCell::new(),
            files: None,
            measured: AtomicU64::new(0),
            limits: ArcSwap::from_pointee(database_limits(config)),
            timeouts,
        }
    }

    /// Opens a file, which is made where there is none.
    pub async fn open_sqlite(
        path: &Path,
        config: &TracesConfig,
        timeouts: StoreTimeouts,
    ) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError::Open { place: path.display().to_string(), reason };
        make_file(path).map_err(|error| failed(error.to_string()))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .busy_timeout(timeouts.busy)
            .foreign_keys(true)
            .pragma("journal_size_limit", MAX_LOG_BYTES.to_string())
            .pragma("temp_store", "MEMORY")
            .synchronous(if config.sync { SqliteSynchronous::Full } else { SqliteSynchronous::Normal })
            .disable_statement_logging();
        prepare_file(path, &options).await.map_err(|error| failed(error.to_string()))?;
        let pool = || {
            SqlitePoolOptions::new()
                .acquire_timeout(timeouts.acquire)
                .acquire_slow_level(LevelFilter::Off)
                .idle_timeout(MAX_IDLE)
        };
        let reading = options.clone().pragma("query_only", "ON");
        let pools =
            [(MAX_READERS, &reading), (MAX_LOOKUPS, &reading), (1, &options)].map(|(most, options)| {
                SqlPool::Sqlite(pool().max_connections(most).connect_lazy_with(options.clone()))
            });
        let mut store = Self::new(pools, config, timeouts);
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        store.files = Some([path.to_path_buf(), log.into()]);
        store.migrated().await.map_err(|error| match error {
            StoreError::NewerSchema { .. } => error,
            error => failed(error.to_string()),
        })?;
        Ok(store)
    }

    /// Opens a server's database. A server that is not there yet is no error: what is stored then fails until
    /// it is.
    pub async fn open_postgres(
        url: &str,
        config: &TracesConfig,
        timeouts: StoreTimeouts,
        observer: &Observer,
    ) -> Result<Self, StoreError> {
        let failed = |reason: String| StoreError::Open { place: "the PostgreSQL database".into(), reason };
        let limit = timeouts.statement.saturating_sub(SERVER_MARGIN).max(SERVER_MARGIN / 4);
        let millis = limit.as_millis().to_string();
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| failed(error.to_string()))?
            .application_name("vllm-lb")
            .options([("statement_timeout", &millis), ("idle_in_transaction_session_timeout", &millis)])
            .disable_statement_logging();
        let pool = || {
            PgPoolOptions::new()
                .acquire_timeout(timeouts.acquire)
                .acquire_slow_level(LevelFilter::Off)
                .idle_timeout(MAX_IDLE)
        };
        let pools = [MAX_READERS, MAX_LOOKUPS, MAX_WRITERS]
            .map(|most| SqlPool::Postgres(pool().max_connections(most).connect_lazy_with(options.clone())));
        let store = Self::new(pools, config, timeouts);
        // A pool tries again and again, and does not tell why it fails: one connection does.
        let first = match timeout(MAX_FIRST_CONNECT, options.connect()).await {
            Ok(Ok(connection)) => connection.close().await.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no connection within {MAX_FIRST_CONNECT:?}")),
        };
        if let Err(reason) = first {
            observer.trace_store_failed(&StoreError::Database { reason });
            return Ok(store);
        }
        match store.migrated().await {
            Err(error @ StoreError::NewerSchema { .. }) => Err(error),
            _ => Ok(store),
        }
    }
}

/// Sets what a file keeps, on a connection of its own: these statements write, and wait for locks.
async fn prepare_file(path: &Path, options: &SqliteConnectOptions) -> Result<(), sqlx::Error> {
    let mut options = options.clone().journal_mode(SqliteJournalMode::Wal);
    if std::fs::metadata(path)?.len() == 0 {
        // Before the first table: a file without it does not shrink.
        options = options.auto_vacuum(SqliteAutoVacuum::Incremental);
    }
    options.connect().await?.close().await
}

/// Makes the file and its directory, for this user alone. SQLite gives its other files the mode of the first.
fn make_file(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    if !path.exists() {
        std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    }
    Ok(())
}
