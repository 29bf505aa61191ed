//! The binary. Replaced by the whole one.

use clap::Parser;

#[derive(clap::Parser)]
enum Command {
    Engine(vllm_lb::cli::engine::EngineArgs),
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let Command::Engine(args) = Command::parse();
    vllm_lb::cli::engine::run(args).await
}
