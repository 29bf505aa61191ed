//! `vllm-lb doctor`: what is wrong with a set-up, and what mends it.
//!
//! ```text
//! vllm-lb doctor -c /etc/vllm-lb/lb.yaml
//! vllm-lb doctor http://gpu-0:8000 http://gpu-1:8000 --request
//! ```

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::values::{MINUTE, duration_in};

const EXAMPLES: &str = "\
Nothing is changed, and no request is sent to a model without --request. A balancer that runs with the
same configuration is asked how well it sees each upstream; with --admin, one must answer.

Examples:
  vllm-lb doctor -c /etc/vllm-lb/lb.yaml
  vllm-lb doctor http://gpu-0:8000 http://gpu-1:8000 --request
  vllm-lb doctor -c /etc/vllm-lb/lb.yaml --admin 127.0.0.1:9092
  vllm-lb doctor -c lb.yaml --json | jq '.findings[] | select(.severity == \"error\")'

Exit codes: 0 without a finding of severity error, 1 with one, 64 when the configuration is wrong.";

/// Report what is wrong with upstreams and Redis, with the remedy
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// vLLM servers to check: http://host:port, https://host:port, unix:/path; in place of the file's list
    #[arg(value_name = "URL", verbatim_doc_comment)]
    pub upstreams: Vec<String>,
    /// Configuration file [env: VLLM_LB_CONFIG]
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Redis to check, in place of the file's [env: VLLM_LB_REDIS, VLLM_PXY_REDIS]
    #[arg(short = 'R', long, value_name = "URL")]
    pub redis: Option<String>,
    /// Admin address of the running balancer to ask, in place of the file's [env: VLLM_LB_ADMIN] [default:
    /// 127.0.0.1:9090]
    #[arg(short, long, value_name = "ADDR", verbatim_doc_comment)]
    pub admin: Option<String>,
    /// Send two short prompts to each upstream, to learn whether answers report cached tokens
    #[arg(long, verbatim_doc_comment)]
    pub request: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
    /// Time limit of each question, 100ms to 1m
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = timeout)]
    pub timeout: Duration,
}

// === impl DoctorArgs ===

impl Default for DoctorArgs {
    fn default() -> Self {
        DoctorArgs {
            upstreams: Vec::new(),
            config: None,
            redis: None,
            admin: None,
            request: false,
            json: false,
            timeout: DEFAULT_TIMEOUT,
        }
    }
}

/// The time limit of `--online`, as of the flag.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);

/// Parses a time limit.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    duration_in(Duration::from_millis(100)..=MINUTE)(text)
}
