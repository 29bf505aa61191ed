//! The tables of traces, and their way from one version of the schema to the next.
//!
//! Never: a change of a migration that was released; a further one is appended.

use std::sync::LazyLock;
use std::time::Duration;

use super::link::{SqlLink, SqlPool, SqlValue};
use crate::traces::store::contents::StoreError;

/// The statements that lead to each version, the first to version 1. SQLite and PostgreSQL take the same
/// text.
const MIGRATIONS: &[&[&str]] = &[FIRST_TABLES, &["ALTER TABLE traces ADD COLUMN choice_extra TEXT"]];

const FIRST_TABLES: &[&str] = &[
    // What the traces of a session have in common. `last_at` is the time of its last activity, `bytes` what
    // its traces take, `created_at` and what follows the settings that were made by an operator.
    "CREATE TABLE sessions (
        session_id TEXT NOT NULL PRIMARY KEY,
        trace_count BIGINT NOT NULL,
        bytes BIGINT NOT NULL,
        first_at DOUBLE PRECISION,
        last_at DOUBLE PRECISION NOT NULL,
        created_at DOUBLE PRECISION,
        metadata TEXT,
        sampling_params TEXT,
        model TEXT)",
    "CREATE INDEX sessions_by_last_at ON sessions (last_at)",
    "CREATE INDEX sessions_by_first_at ON sessions (first_at)",
    "CREATE TABLE traces (
        trace_id TEXT NOT NULL PRIMARY KEY,
        session_id TEXT NOT NULL REFERENCES sessions (session_id) ON DELETE CASCADE,
        created_at DOUBLE PRECISION NOT NULL,
        arrived_at DOUBLE PRECISION NOT NULL,
        api TEXT NOT NULL,
        model TEXT NOT NULL,
        client_model TEXT,
        request_id TEXT NOT NULL,
        upstream TEXT,
        attempts BIGINT NOT NULL,
        status BIGINT NOT NULL,
        error TEXT,
        stream BOOLEAN NOT NULL,
        partial BOOLEAN NOT NULL,
        cumulative TEXT,
        finish_reason TEXT,
        weight_version BIGINT,
        latency_ms DOUBLE PRECISION NOT NULL,
        ttft_ms DOUBLE PRECISION,
        queue_ms DOUBLE PRECISION,
        prompt_tokens BIGINT,
        completion_tokens BIGINT,
        cached_tokens BIGINT,
        reasoning_tokens BIGINT,
        parent_id TEXT,
        shared_turns BIGINT NOT NULL,
        turns TEXT NOT NULL,
        shared_prompt_ids BIGINT NOT NULL,
        prompt_token_ids TEXT NOT NULL,
        choice_index BIGINT,
        response_message TEXT,
        completion_token_ids TEXT,
        logprobs TEXT,
        token_texts TEXT,
        routed_experts TEXT,
        more_choices TEXT,
        request_lead BIGINT NOT NULL,
        request_tail BIGINT NOT NULL,
        request TEXT,
        request_gaps TEXT,
        response TEXT,
        response_gaps TEXT)",
    "CREATE INDEX traces_by_session ON traces (session_id, created_at)",
    "CREATE TABLE trace_settings (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
];

/// The columns of `traces`, in the order in which rows are written and read.
pub(super) const COLUMNS: &str = "trace_id, session_id, created_at, arrived_at, api, model, client_model, \
     request_id, upstream, attempts, status, error, stream, partial, cumulative, finish_reason, \
     weight_version, latency_ms, ttft_ms, queue_ms, prompt_tokens, completion_tokens, cached_tokens, \
     reasoning_tokens, parent_id, shared_turns, turns, shared_prompt_ids, prompt_token_ids, \
     choice_index, response_message, completion_token_ids, logprobs, token_texts, routed_experts, \
     more_choices, choice_extra, request_lead, request_tail, request, request_gaps, response, response_gaps";

/// The place of `created_at` among the columns.
pub(super) const CREATED_COLUMN: usize = 2;

/// The place of `parent_id` among the columns.
pub(super) static PARENT_COLUMN: LazyLock<usize> =
    LazyLock::new(|| COLUMNS.split(',').position(|column| column.trim() == "parent_id").unwrap_or_default());

/// Inserts a row unless its parent is gone or its trace is stored already.
pub(super) static INSERT: LazyLock<String> = LazyLock::new(|| {
    let count = COLUMNS.split(',').count();
    let parent = *PARENT_COLUMN + 1;
    let values: Vec<String> = (1..=count).map(|place| format!("${place}")).collect();
    format!(
        "INSERT INTO traces ({COLUMNS}) SELECT {} WHERE ${parent} IS NULL \
         OR EXISTS (SELECT 1 FROM traces WHERE trace_id = ${parent}) ON CONFLICT (trace_id) DO NOTHING",
        values.join(", ")
    )
});

/// The lock under which one of several balancers migrates a PostgreSQL database; any number, always this one.
const MIGRATION_LOCK: i64 = 0x766c_6c6d_2d6c_6201;

/// Brings the database to the newest version.
pub(super) async fn migrate(pool: &SqlPool, limit: Duration) -> Result<(), StoreError> {
    // A database of the newest version is not written to, so that one that cannot be is still read.
    if version(&mut pool.acquire(limit).await?).await.is_ok_and(|found| found == MIGRATIONS.len()) {
        return Ok(());
    }
    let mut link = pool.begin(limit).await?;
    if pool.is_postgres() {
        link.execute("SELECT pg_advisory_xact_lock($1)", &[SqlValue::integer(MIGRATION_LOCK)]).await?;
    }
    link.execute("CREATE TABLE IF NOT EXISTS trace_schema (version BIGINT NOT NULL PRIMARY KEY)", &[])
        .await?;
    let found = version(&mut link).await?;
    if found > MIGRATIONS.len() {
        return Err(StoreError::NewerSchema { found, known: MIGRATIONS.len() });
    }
    for (place, statements) in MIGRATIONS.iter().enumerate().skip(found) {
        for statement in *statements {
            link.execute(statement, &[]).await?;
        }
        let version = SqlValue::integer(place + 1);
        link.execute("INSERT INTO trace_schema (version) VALUES ($1)", &[version]).await?;
    }
    link.commit().await
}

/// The version of the schema; 0: there is none yet.
async fn version(link: &mut SqlLink) -> Result<usize, StoreError> {
    let row = link.row("SELECT COALESCE(MAX(version), 0) FROM trace_schema", &[]).await?;
    let found = row.map_or(Ok(0), |mut row| row.count())?;
    Ok(usize::try_from(found).unwrap_or(usize::MAX))
}
