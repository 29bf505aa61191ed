//! `vllm-lb engine`: simulated vLLM servers in one process, to try a balancer without a GPU.
//!
//! ```text
//! vllm-lb engine --port 8101,8102 --model tiny --speed 10
//! ```

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::engine::batch::Timing;
use crate::engine::http::{EngineServer, Options};

/// The largest skew of the simulated clock, in seconds: the header has years of four digits.
const MAX_CLOCK_SKEW: i64 = 1_000_000_000;

/// Run simulated vLLM servers, without a model and without a GPU
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// Ports to listen on, one server each; 0 takes a free one
    #[arg(long, value_delimiter = ',', default_value = "8000")]
    pub port: Vec<u16>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Listen on this unix socket instead of on ports
    #[arg(long, conflicts_with = "port")]
    pub uds: Option<PathBuf>,
    /// Served model names: the first is the name, others are aliases
    #[arg(long = "model", value_delimiter = ',', default_value = "sim")]
    pub models: Vec<String>,
    /// Names of LoRA adapters
    #[arg(long = "lora", value_delimiter = ',')]
    pub loras: Vec<String>,
    /// How many times faster than about one H100
    #[arg(long, default_value_t = 1.0)]
    pub speed: f64,
    /// Take no time at all
    #[arg(long, conflicts_with = "speed")]
    pub instant: bool,
    /// Tokens the prefix cache holds
    #[arg(long, default_value_t = 262_144)]
    pub cache_tokens: usize,
    /// Tokens in a block of the cache
    #[arg(long, default_value_t = 16)]
    pub block_size: usize,
    /// Longest prompt and answer together, in tokens
    #[arg(long, default_value_t = 32_768)]
    pub max_model_len: usize,
    /// Sequences in a batch
    #[arg(long, default_value_t = 256)]
    pub max_num_seqs: usize,
    /// Refuse requests beyond so many waiting ones
    #[arg(long)]
    pub max_num_queued_reqs: Option<usize>,
    /// Key that clients must send as `Authorization: Bearer`
    #[arg(long)]
    pub api_key: Option<String>,
    /// Send `x-request-id` with every answer
    #[arg(long)]
    pub enable_request_id_headers: bool,
    /// Have the routes of VLLM_SERVER_DEV_MODE=1
    #[arg(long)]
    pub dev_mode: bool,
    /// Have no /v1/responses, as older servers have none
    #[arg(long)]
    pub no_responses: bool,
    /// Have no /v1/messages, as older servers have none
    #[arg(long)]
    pub no_messages: bool,
    /// Leave cached tokens out of usage
    #[arg(long)]
    pub no_prompt_tokens_details: bool,
    /// Read every prompt whole
    #[arg(long)]
    pub no_enable_prefix_caching: bool,
    /// The algorithm of block hashes to report
    #[arg(long, default_value = "sha256")]
    pub prefix_caching_hash_algo: String,
    /// Leave the engine's metrics out of /metrics
    #[arg(long)]
    pub disable_log_stats: bool,
    /// The path of the model to report [default: /models/ and the name]
    #[arg(long)]
    pub model_root: Option<String>,
    /// Seconds by which the clock of answers is ahead; may be negative
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    pub clock_skew: i64,
    /// Answer health checks with this status
    #[arg(long, value_parser = clap::value_parser!(u16).range(200..=599))]
    pub health_status: Option<u16>,
    /// Sleep from the start, as after /sleep
    #[arg(long)]
    pub asleep: bool,
    /// Seconds after which an idle connection is closed
    #[arg(long, default_value_t = 5.0)]
    pub keep_alive: f64,
    /// The version to report
    #[arg(long, default_value = "0.32.0")]
    pub report_version: String,
}

// === impl EngineArgs ===

impl EngineArgs {
    /// Returns the settings of the server with this number.
    fn options(&self, number: usize) -> io::Result<Options> {
        let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidInput, error);
        if !self.speed.is_finite() || self.speed <= 0.0 {
            return Err(invalid(format!("--speed must be above zero, got {}", self.speed)));
        }
        if self.block_size == 0 {
            return Err(invalid("--block-size must be above zero, got 0".to_owned()));
        }
        let keep_alive = Duration::try_from_secs_f64(self.keep_alive)
            .map_err(|error| invalid(format!("--keep-alive: {error}, got {}", self.keep_alive)))?;
        Ok(Options {
            models: self.models.clone(),
            loras: self.loras.clone(),
            max_model_len: self.max_model_len,
            api_key: self.api_key.clone(),
            timing: if self.instant { Timing::instant() } else { Timing::faster(self.speed) },
            cache_tokens: self.cache_tokens,
            block_size: self.block_size,
            max_num_seqs: self.max_num_seqs,
            max_num_queued_reqs: self.max_num_queued_reqs,
            seed: number as u64,
            prompt_tokens_details: !self.no_prompt_tokens_details,
            prefix_caching: !self.no_enable_prefix_caching,
            hash_algo: self.prefix_caching_hash_algo.clone(),
            log_stats: !self.disable_log_stats,
            root: self.model_root.clone(),
            clock_skew: self.clock_skew.clamp(-MAX_CLOCK_SKEW, MAX_CLOCK_SKEW),
            responses: !self.no_responses,
            messages: !self.no_messages,
            request_id_headers: self.enable_request_id_headers,
            dev_mode: self.dev_mode,
            version: self.report_version.clone(),
            keep_alive,
            ..Options::default()
        })
    }

    async fn start(&self) -> io::Result<Vec<EngineServer>> {
        if let Some(path) = &self.uds {
            return Ok(vec![EngineServer::start_unix(path, self.options(0)?)?]);
        }
        let mut engines = Vec::new();
        for (number, &port) in self.port.iter().enumerate() {
            let address = format!("{}:{port}", self.host);
            let listener = TcpListener::bind(&address).await.map_err(|error| {
                io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
            })?;
            engines.push(EngineServer::start_on(listener, self.options(number)?)?);
        }
        Ok(engines)
    }
}

/// Runs until SIGTERM or SIGINT; prints one URL a line when all servers listen.
pub async fn run(args: EngineArgs) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let engines = args.start().await?;
    for engine in &engines {
        engine.set_health(args.health_status);
        if args.asleep {
            engine.sleep();
        }
        println!("{}", engine.url());
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    for engine in engines {
        engine.stop().await;
    }
    Ok(())
}
