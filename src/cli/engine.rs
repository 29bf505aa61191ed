//! Stub: comes with its own change.

#[derive(Clone, Debug, clap::Args)]
pub struct EngineArgs {}

pub async fn run(_args: EngineArgs) -> Result<(), String> {
    Ok(())
}
