//! The order of the steps, and the exit codes.

use std::process::ExitCode;

use vllm_lb::cli::{self, Mode};

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
            loaded.warnings.iter().for_each(|warning| eprintln!("{warning}"));
            if matches!(loaded.mode, Mode::Test) {
                println!("configuration ok");
            }
            ExitCode::SUCCESS
        }
        Err(problems) => {
            eprint!("{problems}");
            ExitCode::from(cli::EXIT_USAGE)
        }
    }
}
