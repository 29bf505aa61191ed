//! The order of the steps, and the exit codes.

use std::io::IsTerminal;
use std::process::ExitCode;

use vllm_lb::cli::{self, Mode};
use vllm_lb::config::render;
use vllm_lb::logging;

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
    match cli::load(args, &cli::environment, &|path| std::fs::read_to_string(path)) {
        Ok(loaded) => {
            if matches!(loaded.mode, Mode::Test) {
                println!("configuration ok");
                return ExitCode::SUCCESS;
            }
            let terminal = std::io::stdout().is_terminal();
            logging::init(&loaded.config.log, terminal).expect("it is the first logger of the process");
            loaded.warnings.iter().for_each(|warning| log::warn!(reason = warning; "a setting was ignored"));
            log::debug!(config = render::json(&loaded.config).to_string(); "effective configuration");
            ExitCode::SUCCESS
        }
        Err(problems) => {
            eprint!("{problems}");
            ExitCode::from(cli::EXIT_USAGE)
        }
    }
}
