//! Orders the steps, and maps failures to exit codes: 0 after a clean end, 64 for an invalid configuration,
//! 1 for any other failure and for errors that the doctor found.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;

use vllm_lb::app::traces_export::ExportError;
use vllm_lb::cli::doctor::DoctorArgs;
use vllm_lb::cli::health::HealthArgs;
use vllm_lb::cli::load::{self, LoadMode, Loaded};
use vllm_lb::cli::simulate::SimulateArgs;
use vllm_lb::cli::top::TopArgs;
use vllm_lb::cli::traces::{ADMIN_TOKEN, ExportArgs};
use vllm_lb::cli::{self, Args};
use vllm_lb::config::types::Config;
use vllm_lb::{app, logging};

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let args = match cli::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(ending) if ending.code == 0 => {
            print!("{}", ending.text);
            return ExitCode::SUCCESS;
        }
        Err(ending) => {
            eprint!("{}", ending.text);
            return ExitCode::from(ending.code);
        }
    };
    match load::load(args.clone(), &cli::environment, &|path| std::fs::read_to_string(path)) {
        Ok(loaded) => carry_out(loaded, args),
        Err(problems) => {
            eprint!("{problems}");
            ExitCode::from(cli::EXIT_USAGE)
        }
    }
}

fn carry_out(loaded: Loaded, args: Args) -> ExitCode {
    let Loaded { config, mode, demo, upgrade, warnings } = loaded;
    if let LoadMode::Doctor(args) = mode {
        warnings.iter().for_each(|warning| eprintln!("{warning}"));
        return doctor(&config, &args);
    }
    if let LoadMode::Test = mode {
        warnings.iter().for_each(|warning| eprintln!("{warning}"));
        return test(&config);
    }
    match mode {
        LoadMode::Simulate(args) => return simulate(&args),
        LoadMode::Export(args) => return export(&args),
        LoadMode::Top(args) => return top(&args),
        LoadMode::Health(args) => return health(&args),
        _ => {}
    }
    // Dropped last, also where this thread panics.
    let _flush = match logging::init(&config.log, std::io::stdout().is_terminal()) {
        Ok(flush) => flush,
        Err(error) => {
            eprintln!("cannot start the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    warnings.iter().for_each(|warning| log::warn!("{warning}"));
    let threads = app::threads(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let ended = match runtime {
        Err(error) => Err(format!("cannot start threads: {error}")),
        Ok(runtime) => {
            let ended = runtime.block_on(async {
                match mode {
                    LoadMode::Engine(args) => {
                        cli::engine::run(*args).await.map_err(|error| error.to_string())
                    }
                    _ => app::run::run(config, demo, upgrade, Arc::new(move || load::again(&args))).await,
                }
            });
            // A pending name lookup must not delay the end of the process.
            runtime.shutdown_background();
            ended
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!(error = error; "cannot go on");
            ExitCode::FAILURE
        }
    }
}

/// Reads the files that a start would read; the rest of the configuration is good.
fn test(config: &Config) -> ExitCode {
    let problems = app::files::problems(config);
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    if !problems.is_empty() {
        return ExitCode::from(cli::EXIT_USAGE);
    }
    println!("configuration ok");
    ExitCode::SUCCESS
}

/// Prints the table of a simulation, without a log; every error is one of the arguments.
fn simulate(args: &SimulateArgs) -> ExitCode {
    match app::simulate::run(args, &mut std::io::stdout(), &mut std::io::stderr()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::from(cli::EXIT_USAGE)
        }
    }
}

/// Exports captured calls as lines, without a log.
fn export(args: &ExportArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let exported =
        runtime.map_err(|error| ExportError::Failed(format!("cannot start: {error}"))).and_then(|runtime| {
            let token = cli::environment(ADMIN_TOKEN);
            runtime.block_on(app::traces_export::run(args, token.as_deref(), &mut std::io::stdout()))
        });
    match exported {
        Ok(summary) => {
            summary.empty.iter().for_each(|session| eprintln!("session {session} has no traces"));
            ExitCode::SUCCESS
        }
        Err(ExportError::OutputClosed) => ExitCode::SUCCESS,
        Err(ExportError::Failed(problem)) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

/// Shows a balancer's overview, without a log.
fn top(args: &TopArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let shown = runtime.map_err(|error| format!("cannot start: {error}")).and_then(|runtime| {
        let shown =
            runtime.block_on(app::top::run(args, cli::environment(ADMIN_TOKEN), cli::environment("COLUMNS")));
        // A thread may still wait for a key.
        runtime.shutdown_background();
        shown
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

/// Asks a health check, without a log. A pending name lookup must not delay the end.
fn health(args: &HealthArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let checked = runtime.map_err(|error| format!("cannot start: {error}")).and_then(|runtime| {
        let checked = runtime.block_on(app::health::run(args));
        runtime.shutdown_background();
        checked
    });
    match checked {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

/// Prints what is wrong with the set-up, without a log. A pending name lookup must not delay the end.
fn doctor(config: &Config, args: &DoctorArgs) -> ExitCode {
    let mut out = std::io::stdout();
    let colours = out.is_terminal() && cli::environment("NO_COLOR").is_none_or(|set| set.is_empty());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let has_errors = runtime.and_then(|runtime| {
        let has_errors = runtime.block_on(app::doctor::run(config, args, colours, &mut out));
        runtime.shutdown_background();
        has_errors
    });
    match has_errors {
        Ok(false) => ExitCode::SUCCESS,
        Ok(true) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot print: {error}");
            ExitCode::FAILURE
        }
    }
}
