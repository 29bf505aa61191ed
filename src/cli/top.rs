//! `vllm-lb top`: a balancer's overview in a terminal.

use std::time::Duration;

use clap::Args;

use super::traces;
use crate::config::secret::Secret;
use crate::config::types::UpstreamUrl;
use crate::config::values;

const TOP: &str = "\
Keys: q quits, arrows select an upstream, s changes the order, / filters, d drains, u undrains, ? explains.

Examples:
  vllm-lb top                                the balancer of this machine
  vllm-lb top http://10.0.0.7:9090           another one, with VLLM_LB_ADMIN_TOKEN
  vllm-lb top --once | grep -v ready         one look, as text

Exit codes: 0 after q, 64 when the arguments are wrong, 1 when something fails.";

/// Show the upstreams and the traffic of a balancer in a terminal
#[derive(Clone, Debug, Args)]
#[command(after_help = TOP)]
pub struct TopArgs {
    /// Admin listener of the balancer: host:port, http://host:port, unix:/path, or local: at VLLM_LB_ADMIN,
    /// or http://127.0.0.1:9090
    #[arg(
        value_name = "ADMIN_URL",
        default_value = traces::LOCAL,
        value_parser = traces::admin,
        verbatim_doc_comment
    )]
    pub admin: UpstreamUrl,
    /// Token of the admin listener [env: VLLM_LB_ADMIN_TOKEN]
    #[arg(long, value_name = "TOKEN", value_parser = traces::token)]
    pub token: Option<Secret>,
    /// Print one screen as text, and end. Lines are not cut where the output is no terminal, unless COLUMNS
    /// is set
    #[arg(long, verbatim_doc_comment)]
    pub once: bool,
    /// Seconds between two screens, 0.5 to 60
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    values::number_in(0.5..=60.0)(text).map(Duration::from_secs_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Args, Command, parse};

    fn top(line: &str) -> Result<TopArgs, u8> {
        let words = ["vllm-lb", "top"].into_iter().chain(line.split_whitespace());
        let args: Args = parse(words.map(Into::into)).map_err(|ending| ending.code)?;
        match args.command {
            Some(Command::Top(args)) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn shows_the_balancer_of_this_machine_unless_another_is_named() {
        let default = top("").expect("no argument is needed");
        assert_eq!(default.admin.display(), "http://127.0.0.1:9090");
        assert_eq!((default.once, default.interval), (false, Duration::from_secs(1)));
        let other = top("unix:/run/admin.sock --once --interval 0.5 --token s").expect("fine");
        assert_eq!(other.admin.unix, Some("/run/admin.sock".into()));
        assert_eq!((other.once, other.interval), (true, Duration::from_millis(500)));
    }

    #[test]
    fn wrong_arguments_end_with_the_code_of_usage() {
        for line in ["https://a:9090", "nonsense", "--interval 0.1", "--interval often", "--token=", "a b"] {
            assert_eq!(top(line).map(|args| format!("{args:?}")), Err(64), "{line}");
        }
    }
}
