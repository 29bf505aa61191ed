//! The command line: its flags, its help, and the one place where the environment is read.
//!
//! `parse` parses the arguments, `load` builds a configuration from flags, environment and file, `main` only
//! orders the steps. This module starts nothing, and has no defaults except in help texts.

pub mod doctor;
pub mod engine;
mod environment;
pub mod health;
pub mod load;
pub mod simulate;
pub mod top;
pub mod traces;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ErrorKind};
use clap::{ArgAction, CommandFactory, Parser, Subcommand};

pub use environment::environment;

/// The exit code for an error of the command line, the environment or the file (`EX_USAGE`).
pub const EXIT_USAGE: u8 = 64;

const ABOUT: &str = "The load balancer to put in front of vLLM: several servers, one API";

const EXAMPLES: &str = "\
Examples:
  vllm-lb http://gpu-0:8000 http://gpu-1:8000     balance over two vLLM servers
  vllm-lb --demo                                  try it without a GPU
  vllm-lb -c lb.yaml -l 127.0.0.1:8080 -v         a file, another address, one step louder
  vllm-lb -c lb.yaml -t                           check the file and say every problem
  vllm-lb doctor -c lb.yaml                       check the servers and the Redis too
  vllm-lb unix:/run/vllm.sock -L json             a vLLM behind a unix socket, log as JSON

Flags go before the environment, the environment before the file. Exit codes: 0 after a clean end,
64 when the configuration is wrong. Signals: SIGTERM lets requests in flight finish, a second one ends
at once; SIGHUP reads the configuration again. -u needs none.";

#[derive(Clone, Debug, Parser)]
#[command(
    name = "vllm-lb",
    version,
    about = ABOUT,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// vLLM servers to balance over: http://host:port, https://host:port, unix:/path; in place of the file's
    /// list
    #[arg(value_name = "UPSTREAM_URL", verbatim_doc_comment)]
    pub upstreams: Vec<String>,

    /// Configuration file; conf/lb.yaml documents every key [env: VLLM_LB_CONFIG]
    #[arg(short, long, value_name = "FILE", verbatim_doc_comment)]
    pub config: Option<PathBuf>,

    /// Address to serve on; repeatable, in place of the file's [env: VLLM_LB_LISTEN, separated by commas]
    /// [default: 0.0.0.0:8000]
    #[arg(short, long, value_name = "ADDR", verbatim_doc_comment)]
    pub listen: Vec<String>,

    /// Address of the admin listener [env: VLLM_LB_ADMIN; its token: VLLM_LB_ADMIN_TOKEN]
    /// [default: 127.0.0.1:9090]
    #[arg(short, long, value_name = "ADDR", verbatim_doc_comment)]
    pub admin: Option<String>,

    /// Redis over which several balancers act as one: local, or a URL redis://, rediss://, unix://,
    /// redis+sentinel://, redis-cluster:// [env: VLLM_LB_REDIS, VLLM_PXY_REDIS] [default: none]
    #[arg(short = 'R', long, value_name = "URL", verbatim_doc_comment)]
    pub redis: Option<String>,

    /// One step louder of: quiet, error, warning, info, debug, verbose, loud; repeatable [env:
    /// VLLM_LB_VERBOSITY, VLLM_PXY_VERBOSITY] [default: info]
    #[arg(short, long, action = ArgAction::Count, global = true, verbatim_doc_comment)]
    pub verbose: u8,

    /// One step quieter; repeatable
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub quiet: u8,

    /// Form of log records: txt, json, yaml or yml [env: VLLM_LB_LOGFORMAT, VLLM_PXY_LOGFORMAT] [default:
    /// txt on a terminal, else json]
    #[arg(short = 'L', long, value_name = "FORMAT", global = true, verbatim_doc_comment)]
    pub log_format: Option<String>,

    /// Check the configuration and the files it names, print every problem, and end: with 0 when there is
    /// none, else with 64
    #[arg(short, long, verbatim_doc_comment)]
    pub test: bool,

    /// With --test, also ask upstreams and Redis, and report what is wrong: see vllm-lb doctor
    #[arg(long, requires = "test", verbatim_doc_comment)]
    pub online: bool,

    /// Take the listening sockets over from the process that runs with these arguments; it lets its requests
    /// end, and is gone
    #[arg(short, long, verbatim_doc_comment)]
    pub upgrade: bool,

    /// Start N simulated vLLM servers in the process and balance over them, and over nothing else [N: 2]
    #[arg(
        long,
        value_name = "N",
        num_args = 0..=1,
        default_missing_value = "2",
        value_parser = clap::value_parser!(u16).range(1..=64),
        conflicts_with = "upstreams",
        verbatim_doc_comment
    )]
    pub demo: Option<u16>,

    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Simulated vLLM servers: try, test and demonstrate without a GPU
    Engine(engine::EngineArgs),
    /// Replay traffic through the routing code on a virtual clock, one row a policy
    Simulate(simulate::SimulateArgs),
    /// Show the upstreams and the traffic of a balancer in a terminal
    Top(top::TopArgs),
    /// Read recorded calls
    Traces(traces::TracesArgs),
    /// Report what is wrong with upstreams and Redis, with the remedy
    Doctor(doctor::DoctorArgs),
    /// Ask for the health of a balancer or a vLLM server: exit code 0 or 1
    Health(health::HealthArgs),
}

/// The text to print and the exit code with which to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CliExit {
    pub text: String,
    /// 0 for `--help` and `--version`, whose text belongs on standard output; else `EXIT_USAGE`.
    pub code: u8,
}

/// Parses a command line; the first item is the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, CliExit> {
    let args = Args::try_parse_from(arguments).map_err(|error| {
        let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
        let tip = if names_address(&error) { ADDRESS_TIP } else { "" };
        CliExit { text: masked(&error.render().to_string()) + tip, code }
    })?;
    match args.upstreams.iter().find(|upstream| Args::command().find_subcommand(upstream).is_some()) {
        Some(name) => {
            let text = format!(
                "error: {name} is a command and comes first, its options after it: vllm-lb {name} --help\n"
            );
            Err(CliExit { text, code: EXIT_USAGE })
        }
        None => Ok(args),
    }
}

/// What other servers call an option that is one here.
const ADDRESS_TIP: &str = "\n  tip: --listen HOST:PORT is the address to serve on\n";

/// Whether the error is about an unknown option for an address.
fn names_address(error: &clap::Error) -> bool {
    let name = error.get(ContextKind::InvalidArg).map(ToString::to_string);
    error.kind() == ErrorKind::UnknownArgument && matches!(name.as_deref(), Some("--port" | "--host" | "-p"))
}

/// Removes credentials: a mistyped flag may hold a Redis URL, so no message shows the text between `://`
/// and `@`.
fn masked(text: &str) -> String {
    text.split_inclusive(char::is_whitespace).map(crate::config::url::masked).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, CliExit> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_definition_is_sound() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn urls_and_the_subcommand_do_not_clash() {
        let urls = args("vllm-lb http://a http://b").expect("two upstreams");
        assert_eq!((urls.upstreams.len(), urls.command.is_none()), (2, true));
        let engine = args("vllm-lb engine").expect("the subcommand");
        assert!(matches!(engine.command, Some(Command::Engine(_))) && engine.upstreams.is_empty());
        let louder = args("vllm-lb engine -v -L json").expect("global flags");
        assert_eq!((louder.verbose, louder.log_format.as_deref()), (1, Some("json")));
    }

    /// The command was said to be neither a command nor a URL.
    #[test]
    fn a_command_behind_other_arguments_is_named() {
        for line in ["-c lb.yaml health", "http://a engine", "--redis local doctor"] {
            let ending = args(&format!("vllm-lb {line}")).expect_err(line);
            let command = line.rsplit(' ').next().unwrap();
            assert_eq!(ending.code, EXIT_USAGE);
            assert!(
                ending.text.contains(&format!("{command} is a command and comes first")),
                "{}",
                ending.text
            );
        }
        assert_eq!(args("vllm-lb help").expect_err("is the help").code, 0);
    }

    #[test]
    fn an_option_for_an_address_leads_to_listen() {
        for line in ["--port 8000 http://a", "--host=0.0.0.0"] {
            let ending = args(&format!("vllm-lb {line}")).expect_err(line);
            assert!(ending.text.contains("--listen HOST:PORT"), "{}", ending.text);
        }
        let ending = args("vllm-lb --nonsense").expect_err("is no option");
        assert!(!ending.text.contains("--listen HOST:PORT"), "{}", ending.text);
    }

    #[test]
    fn demo_takes_a_number_or_none() {
        let demo = |line: &str| args(line).map(|args| args.demo).map_err(|ending| ending.code);
        assert_eq!(demo("vllm-lb"), Ok(None));
        assert_eq!(demo("vllm-lb --demo"), Ok(Some(2)));
        assert_eq!(demo("vllm-lb --demo 5"), Ok(Some(5)));
        assert_eq!(demo("vllm-lb --demo -v"), Ok(Some(2)));
        assert_eq!(demo("vllm-lb --demo 0"), Err(EXIT_USAGE));
        assert_eq!(demo("vllm-lb http://a --demo"), Err(EXIT_USAGE));
    }

    #[test]
    fn endings() {
        for (line, code) in
            [("--help", 0), ("--version", 0), ("engine --help", 0), ("--nonsense", 64), ("-c", 64)]
        {
            let ending = args(&format!("vllm-lb {line}")).expect_err(line);
            assert_eq!(ending.code, code, "{line}");
            assert!(!ending.text.is_empty());
        }
        let ending = args("vllm-lb --redsi=redis://u:hunter2@h").expect_err("is no flag");
        assert!(!ending.text.contains("hunter2"), "{}", ending.text);
    }
}
