//! `vllm-lb health`: the health check of a container. With it the image needs no other HTTP client.
//!
//! ```text
//! vllm-lb health http://127.0.0.1:9090/live
//! ```

use std::time::Duration;

use clap::Args;

use super::{doctor, traces};
use crate::config::types::UpstreamUrl;

const EXAMPLES: &str = "\
Examples:
  vllm-lb health                               the balancer of this machine is ready
  vllm-lb health http://127.0.0.1:9090/live    its process runs, whatever its upstreams do
  vllm-lb health http://127.0.0.1:8101/health  a vLLM server, or a simulated one

Exit codes: 0 when the status of the answer is 200 to 299, 1 when it is not or none comes, 64 when the
arguments are wrong.";

/// Ask for the health of a balancer or a vLLM server: exit code 0 or 1
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct HealthArgs {
    /// What to ask: host:port, http://host:port/path, unix:/path of a socket, or local: the balancer at
    /// VLLM_LB_ADMIN, or at http://127.0.0.1:9090; /ready where no path is named
    #[arg(
        value_name = "URL",
        default_value = traces::LOCAL,
        value_parser = traces::admin,
        verbatim_doc_comment
    )]
    pub url: UpstreamUrl,
    /// Time limit of the whole check, 100ms to 1m
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = doctor::timeout)]
    pub timeout: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Args, Command, parse};

    fn health(line: &str) -> Result<HealthArgs, u8> {
        let words = ["vllm-lb", "health"].into_iter().chain(line.split_whitespace());
        let args: Args = parse(words.map(Into::into)).map_err(|ending| ending.code)?;
        match args.command {
            Some(Command::Health(args)) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn asks_the_balancer_of_this_machine_unless_another_is_named() {
        let default = health("").expect("no argument is needed");
        assert_eq!(default.url.display(), "http://127.0.0.1:9090");
        assert_eq!(default.timeout, Duration::from_secs(3));
        for address in ["10.0.0.7:9091", "http://10.0.0.7:9091"] {
            assert_eq!(health(address).expect("an address will do").url.display(), "http://10.0.0.7:9091");
        }
        let live = health("http://[::1]:9090/live --timeout 500ms").expect("fine");
        assert_eq!((live.url.prefix.as_str(), live.timeout), ("/live", Duration::from_millis(500)));
        let unix = health("unix:/run/admin.sock").expect("fine");
        assert_eq!(unix.url.unix, Some("/run/admin.sock".into()));
    }

    #[test]
    fn wrong_arguments_end_with_the_code_of_usage() {
        for line in ["https://a:9090/live", "nonsense", "--timeout 0s", "http://a:1 http://b:2"] {
            assert_eq!(health(line).map(|args| format!("{args:?}")), Err(64), "{line}");
        }
    }
}
