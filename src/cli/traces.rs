//! `vllm-lb traces`: commands for captured calls, beside the admin API.
//!
//! ```text
//! vllm-lb traces export --session rollout-17 > calls.jsonl
//! vllm-lb traces export --store sqlite:/var/lib/vllm-lb/traces.db --since 1760000000 --output calls.jsonl
//! ```

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::environment::environment;
use crate::config::secret::Secret;
use crate::config::types::{ListenAddress, TraceStore, UpstreamUrl};
use crate::config::{url, values};

/// The environment variable with the token of the admin listener.
pub const ADMIN_TOKEN: &str = "VLLM_LB_ADMIN_TOKEN";

const EXPORT: &str = "\
Each line is one recorded call, in the form of GET /sessions/{id}/traces; the sessions come oldest first,
and the calls of a session in their order. `vllm-lb simulate --trace` reads the file.

Examples:
  vllm-lb traces export > calls.jsonl
  vllm-lb traces export --admin http://10.0.0.7:9090 --session rollout-17 --session rollout-18
  vllm-lb traces export --store sqlite:/var/lib/vllm-lb/traces.db --output calls.jsonl

Exit codes: 0 when everything was written, 64 when the arguments are wrong, 1 when something fails.";

/// Read recorded calls
#[derive(Clone, Debug, Args)]
pub struct TracesArgs {
    #[command(subcommand)]
    pub command: TracesCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum TracesCommand {
    /// Write recorded calls as JSON lines
    Export(ExportArgs),
}

/// Write recorded calls as JSON lines
#[derive(Clone, Debug, Args)]
#[command(after_help = EXPORT)]
pub struct ExportArgs {
    /// Admin listener of the balancer to read from: http://host:port, unix:/path, or local: at VLLM_LB_ADMIN,
    /// or http://127.0.0.1:9090
    #[arg(long, value_name = "URL", default_value = LOCAL, value_parser = admin, verbatim_doc_comment)]
    pub admin: UpstreamUrl,
    /// Token of the admin listener [env: VLLM_LB_ADMIN_TOKEN]
    #[arg(long, value_name = "TOKEN", conflicts_with = "store", value_parser = token)]
    pub token: Option<Secret>,
    /// Read this store instead of a balancer: sqlite:PATH or postgres://...
    #[arg(long, value_name = "URL", conflicts_with = "admin", value_parser = store)]
    pub store: Option<TraceStore>,
    /// Export only this session; repeatable
    #[arg(long = "session", value_name = "ID")]
    pub sessions: Vec<String>,
    /// Export only what was stored since then, in seconds since 1970
    #[arg(long, value_name = "UNIX", value_parser = since)]
    pub since: Option<f64>,
    /// Write to this file, which is there once everything is in it
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// The URL of the balancer of this machine: its address is in `VLLM_LB_ADMIN`, or is the default.
pub(super) const LOCAL: &str = "local";

/// The address that a balancer listens on by default.
const DEFAULT_ADMIN: &str = "127.0.0.1:9090";

/// Parses the URL of an admin listener.
pub(super) fn admin(text: &str) -> Result<UpstreamUrl, String> {
    if text == LOCAL {
        return local_admin(environment("VLLM_LB_ADMIN").filter(|address| !address.is_empty()));
    }
    let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
    let is_address = !text.contains("://") && matches!(port, Some(Ok(_)));
    let url = if is_address { url::upstream(&format!("http://{text}"))? } else { url::upstream(text)? };
    if url.https { Err("the admin listener speaks http: write http://host:port".into()) } else { Ok(url) }
}

/// The URL of the admin listener at this address. One on all addresses of the machine is reached at loopback.
fn local_admin(address: Option<String>) -> Result<UpstreamUrl, String> {
    let address = address.as_deref().unwrap_or(DEFAULT_ADMIN);
    let fault = |error: String| format!("VLLM_LB_ADMIN: {error}");
    match ListenAddress::parse(address).map_err(fault)? {
        ListenAddress::Unix(path) => url::upstream(&format!("unix:{}", path.display())).map_err(fault),
        ListenAddress::Tcp(address) => {
            let reached = match address.rsplit_once(':') {
                Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
                Some(("[::]", port)) => format!("[::1]:{port}"),
                _ => address,
            };
            url::upstream(&format!("http://{reached}")).map_err(fault)
        }
    }
}

/// Parses a token.
pub(super) fn token(text: &str) -> Result<Secret, String> {
    values::secret(text)
}

fn store(text: &str) -> Result<TraceStore, String> {
    match TraceStore::parse(text)? {
        store @ (TraceStore::Sqlite(Some(_)) | TraceStore::Postgres(_)) => Ok(store),
        _ => Err("only sqlite:PATH and postgres://… can be read without a balancer".into()),
    }
}

fn since(text: &str) -> Result<f64, String> {
    values::number_in(0.0..=1e12)(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Args, Command, parse};

    fn export(line: &str) -> Result<ExportArgs, u8> {
        let words = ["vllm-lb", "traces", "export"].into_iter().chain(line.split_whitespace());
        let args: Args = parse(words.map(Into::into)).map_err(|ending| ending.code)?;
        match args.command {
            Some(Command::Traces(TracesArgs { command: TracesCommand::Export(args) })) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_balancer_of_this_machine_is_reached_where_it_listens() {
        for (address, url) in [
            (None, "http://127.0.0.1:9090"),
            (Some("0.0.0.0:9191"), "http://127.0.0.1:9191"),
            (Some("[::]:9191"), "http://[::1]:9191"),
            (Some("10.1.2.3:80"), "http://10.1.2.3:80"),
            (Some("unix:/run/admin.sock"), "unix:/run/admin.sock"),
        ] {
            let found = local_admin(address.map(str::to_owned)).map(|url| url.display());
            assert_eq!(found.as_deref(), Ok(url), "{address:?}");
        }
        let fault = local_admin(Some("9191".into())).expect_err("is no address");
        assert!(fault.starts_with("VLLM_LB_ADMIN: "), "{fault}");
    }

    #[test]
    fn an_export_reads_a_balancer_or_a_store() {
        let default = export("").expect("no argument is needed");
        assert_eq!((default.admin.display().as_str(), &default.store), ("http://127.0.0.1:9090", &None));
        let some = export("--session a --session b/c:1 --since 1760000000.5 --output x.jsonl").expect("fine");
        assert_eq!((some.sessions, some.since), (vec!["a".into(), "b/c:1".into()], Some(1_760_000_000.5)));
        let unix = export("--admin unix:/run/admin.sock --token s").expect("fine");
        assert_eq!(unix.admin.unix, Some("/run/admin.sock".into()));
        let store = export("--store sqlite:/a/traces.db").expect("fine").store;
        assert_eq!(store, Some(TraceStore::Sqlite(Some("/a/traces.db".into()))));
    }

    #[test]
    fn wrong_arguments_end_with_the_code_of_usage() {
        for line in [
            "--admin https://a:9090",
            "--admin nonsense",
            "--store memory",
            "--store sqlite",
            "--store none",
            "--store mysql://a",
            "--store sqlite:/a --admin http://b:1",
            "--store sqlite:/a --token t",
            "--since yesterday",
            "--since -1",
            "--token=",
            "more",
        ] {
            assert_eq!(export(line).map(|args| format!("{args:?}")), Err(64), "{line}");
        }
    }
}
