//! Builds the configuration: flags over environment over file over defaults. Returns it, or every problem.
//!
//! The environment and the file system come in as functions, so that tests need no process. An environment
//! variable that is set but empty counts as not set.

mod sources;

use std::fmt;
use std::io;
use std::path::Path;

use super::doctor::DoctorArgs;
use super::engine::EngineArgs;
use super::health::HealthArgs;
use super::simulate::SimulateArgs;
use super::top::TopArgs;
use super::traces::{ExportArgs, TracesCommand};
use super::{Args, Command};
use crate::config::check::{self, ConfigDraft};
use crate::config::expand::EnvLookup;
use crate::config::problem::{ConfigPlace, ConfigProblem, seen};
use crate::config::setting::NamedChoice;
use crate::config::types::{Config, LogFormat, LogLevel, TraceStore};
use crate::traces::store::sqlite_path;

/// A function that reads a file.
pub type ReadFile<'a> = &'a dyn Fn(&Path) -> io::Result<String>;

/// The mode of the process, and its configuration.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub mode: LoadMode,
    /// The number of simulated upstreams to start and balance over; then `config.upstreams` is empty.
    pub demo: Option<u16>,
    /// The listening sockets are inherited from a running process.
    pub upgrade: bool,
    /// Warnings, each logged as soon as the log is initialised.
    pub warnings: Vec<String>,
}

/// What the command line requests.
#[derive(Debug)]
pub enum LoadMode {
    Serve,
    /// Report that the configuration is valid, and end.
    Test,
    Engine(Box<EngineArgs>),
    Simulate(Box<SimulateArgs>),
    Export(Box<ExportArgs>),
    /// Ask upstreams and Redis, and report what is wrong.
    Doctor(Box<DoctorArgs>),
    /// Show the overview of a balancer.
    Top(Box<TopArgs>),
    /// Ask one health check.
    Health(Box<HealthArgs>),
}

/// All problems, one line each; the exit code is `EXIT_USAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundProblems(pub Vec<ConfigProblem>);

impl fmt::Display for FoundProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|problem| writeln!(f, "{problem}"))
    }
}

impl std::error::Error for FoundProblems {}

/// Builds the configuration. Another call with the same arguments reads the file again.
pub fn load(mut args: Args, env: EnvLookup<'_>, read: ReadFile<'_>) -> Result<Loaded, FoundProblems> {
    let mut warnings = Vec::new();
    let doctor = doctor(&mut args);
    let Args { command, demo, test, upgrade, .. } = &args;
    let (demo, upgrade, simulated) = (*demo, *upgrade, command.is_some());
    let path = config_path(&args, env).filter(|_| !simulated);
    let mut draft = match &path {
        Some((from, path)) => file(from, path, env, read),
        None => check::read("", env),
    };
    logging(&args, env, &mut draft, &mut warnings);
    if simulated {
        // A simulation has no upstreams, no listeners and no state to share.
        draft.upstreams_come_later();
    } else {
        addresses(&args, env, &mut draft);
        redis(&args, env, &mut draft);
    }
    let mode = if *test { LoadMode::Test } else { LoadMode::Serve };
    let mut config = draft.finish().map_err(FoundProblems)?;
    sources::resolve(&mut config.sources, path.as_ref().map(|(_, path)| path.as_path()));
    let mut problems = sources::unbuilt(&config.sources);
    if *test && doctor.is_none() {
        problems.extend(sources::check_files(&config.sources, read, &mut warnings));
    }
    if !problems.is_empty() {
        return Err(FoundProblems(problems));
    }
    if let TraceStore::Sqlite(path) = &mut config.traces.store {
        *path = Some(sqlite_path(path.as_deref(), env));
    }
    warnings.extend(check::warnings(&config).iter().map(ToString::to_string));
    let mode = match args.command {
        Some(Command::Engine(engine)) => LoadMode::Engine(Box::new(engine)),
        Some(Command::Simulate(simulate)) => LoadMode::Simulate(Box::new(simulate)),
        Some(Command::Top(top)) => LoadMode::Top(Box::new(top)),
        Some(Command::Health(health)) => LoadMode::Health(Box::new(health)),
        Some(Command::Traces(traces)) => match traces.command {
            TracesCommand::Export(export) => LoadMode::Export(Box::new(export)),
        },
        Some(Command::Doctor(_)) | None => doctor.map_or(mode, |doctor| LoadMode::Doctor(Box::new(doctor))),
    };
    Ok(Loaded { config, mode, demo, upgrade, warnings })
}

/// Takes the doctor's arguments out of the command line: it reads the configuration that a balancer would.
fn doctor(args: &mut Args) -> Option<DoctorArgs> {
    if args.online {
        return Some(DoctorArgs::default());
    }
    match args.command.take() {
        Some(Command::Doctor(mut doctor)) => {
            args.upstreams = std::mem::take(&mut doctor.upstreams);
            (args.config, args.redis) = (doctor.config.take(), doctor.redis.take());
            args.admin = doctor.admin.clone();
            Some(doctor)
        }
        other => {
            args.command = other;
            None
        }
    }
}

/// Builds the configuration again, as at the start. Returns it with its warnings, or its problems.
pub fn again(args: &Args) -> Result<(Config, Vec<String>), Vec<String>> {
    let loaded = load(args.clone(), &super::environment, &|path| std::fs::read_to_string(path));
    match loaded {
        Ok(loaded) => Ok((loaded.config, loaded.warnings)),
        Err(FoundProblems(problems)) => Err(problems.iter().map(ToString::to_string).collect()),
    }
}

/// Reads a variable by its name or an older one. Returns the value and the name that was set.
fn variable(names: &[&'static str], env: EnvLookup<'_>) -> Option<(&'static str, String)> {
    names.iter().find_map(|name| Some((*name, env(name).filter(|value| !value.is_empty())?)))
}

/// Returns the path of the configuration file, and where the path was given.
fn config_path(args: &Args, env: EnvLookup<'_>) -> Option<(String, std::path::PathBuf)> {
    if let Some(path) = &args.config {
        return Some(("--config".into(), path.clone()));
    }
    variable(&["VLLM_LB_CONFIG"], env).map(|(name, path)| (name.into(), path.into()))
}

fn file(from: &str, path: &Path, env: EnvLookup<'_>, read: ReadFile<'_>) -> ConfigDraft {
    match read(path) {
        Ok(text) => check::read(&text, env),
        Err(error) => {
            let mut draft = check::read("", env);
            // The unreadable file may list upstreams, so missing upstreams are not reported too.
            draft.upstreams_come_later();
            let text = format!("cannot read {}: {error}", seen(&path.display().to_string()));
            draft.problems.push(ConfigProblem::new(&ConfigPlace::named(from), text));
            draft
        }
    }
}

fn addresses(args: &Args, env: EnvLookup<'_>, draft: &mut ConfigDraft) {
    if !args.listen.is_empty() {
        draft.listen("--listen", &args.listen);
    } else if let Some((name, value)) = variable(&["VLLM_LB_LISTEN"], env) {
        draft.listen(name, &value.split(',').map(str::trim).collect::<Vec<_>>());
    }
    if let Some(address) = &args.admin {
        draft.admin("--admin", address);
    } else if let Some((name, value)) = variable(&["VLLM_LB_ADMIN"], env) {
        draft.admin(name, &value);
    }
    if let Some((name, value)) = variable(&[super::traces::ADMIN_TOKEN], env) {
        draft.admin_token(name, &value);
    }
    if args.demo.is_some() {
        draft.upstreams_come_later();
    } else if let Some(word) = args.upstreams.iter().find(|text| is_word(text)) {
        draft.upstreams_come_later();
        let text = format!(
            "{} is neither a command (vllm-lb --help lists them) nor a URL such as http://gpu-0:8000",
            seen(word)
        );
        draft.take::<()>(&ConfigPlace::named("UPSTREAM_URL"), Err(text));
    } else if !args.upstreams.is_empty() {
        draft.upstreams("UPSTREAM_URL", &args.upstreams);
    }
}

/// Whether the text may be a misspelt command: an upstream is a URL.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

fn redis(args: &Args, env: EnvLookup<'_>, draft: &mut ConfigDraft) {
    if let Some(url) = &args.redis {
        draft.redis("--redis", url);
    } else if let Some((name, url)) = variable(&["VLLM_LB_REDIS", "VLLM_PXY_REDIS"], env) {
        draft.redis(name, &url);
    }
}

/// Reads the level and the form of the log. An invalid variable is ignored with a warning, so that the
/// balancer starts; an invalid flag is a problem.
fn logging(args: &Args, env: EnvLookup<'_>, draft: &mut ConfigDraft, warnings: &mut Vec<String>) {
    if let Some((name, value)) = variable(&["VLLM_LB_VERBOSITY", "VLLM_PXY_VERBOSITY"], env) {
        match LogLevel::from_initial(&value) {
            Some(level) => draft.config.log.level = level,
            None => warnings.push(ignored(name, &value, LogLevel::NAMES)),
        }
    }
    let steps = i32::from(args.verbose) - i32::from(args.quiet);
    draft.config.log.level = draft.config.log.level.step(steps);
    if let Some(text) = &args.log_format {
        let unknown = || format!("{} is unknown: allowed are {}", seen(text), LogFormat::NAMES.join(", "));
        let format = LogFormat::from_initial(text).ok_or_else(unknown);
        draft.config.log.format = draft.take(&ConfigPlace::named("--log-format"), format);
    } else if let Some((name, value)) = variable(&["VLLM_LB_LOGFORMAT", "VLLM_PXY_LOGFORMAT"], env) {
        match LogFormat::from_initial(&value) {
            Some(format) => draft.config.log.format = Some(format),
            None => warnings.push(ignored(name, &value, LogFormat::NAMES)),
        }
    }
}

fn ignored(name: &str, value: &str, allowed: &[&str]) -> String {
    format!("{name}: {} is unknown and was ignored: allowed are {}", seen(value), allowed.join(", "))
}

#[cfg(test)]
mod tests;
