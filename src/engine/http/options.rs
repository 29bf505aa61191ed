//! The settings of a simulated server.

use std::time::Duration;

use super::usage::CachedReport;
use crate::engine::batch::{EngineLimits, Timing};

/// The settings of one simulated server, named as vLLM's flags where vLLM has one.
#[derive(Debug, Clone)]
pub struct Options {
    /// Served model names: the first is the name in answers and metrics, the rest are aliases.
    pub models: Vec<String>,
    pub loras: Vec<String>,
    /// The `root` of the model's card, its path; `None`: `/models/` and the name.
    pub root: Option<String>,
    pub max_model_len: usize,
    pub api_key: Option<String>,
    pub timing: Timing,
    pub cache_tokens: usize,
    pub block_size: usize,
    pub max_num_seqs: usize,
    pub max_num_queued_reqs: Option<usize>,
    /// The seed of random ids, so that those of several engines differ.
    pub seed: u64,
    /// Whether usage reports cached tokens (`--enable-prompt-tokens-details`).
    pub prompt_tokens_details: bool,
    /// Whether usage reports no cached tokens where there are none, as older versions do.
    pub omits_cached_zero: bool,
    /// Whether prompts are cached (`--no-enable-prefix-caching`).
    pub prefix_caching: bool,
    /// The algorithm of block hashes in `/metrics` (`--prefix-caching-hash-algo`).
    pub hash_algo: String,
    /// Whether `/metrics` has the engine's metrics (`--disable-log-stats`).
    pub log_stats: bool,
    /// By how many seconds the clock of the `date` header is ahead.
    pub clock_skew: i64,
    /// Whether answers carry `x-request-id` (`--enable-request-id-headers`).
    pub request_id_headers: bool,
    /// Whether the routes of `VLLM_SERVER_DEV_MODE=1` exist.
    pub dev_mode: bool,
    /// Whether pooling routes exist. Real servers have pooling or generation; this one can have both.
    pub embeddings: bool,
    pub transcription: bool,
    pub realtime: bool,
    /// Whether the Responses API exists: older vLLM, and other engines, have only chats.
    pub responses: bool,
    /// Whether Messages exist, and the count of their tokens.
    pub messages: bool,
    /// Whether completions exist: other engines may have only chats.
    pub completions: bool,
    pub tokenize: bool,
    /// Whether Responses are kept (`VLLM_ENABLE_RESPONSES_API_STORE=1`).
    pub responses_store: bool,
    /// Whether `/load` counts (`--enable-server-load-tracking`).
    pub server_load: bool,
    /// Whether an answer that ends by itself has an end-of-turn token, as with real models.
    pub end_token: bool,
    /// Whether each word of an answer is two tokens, although the tokenizer would make one of its text.
    pub split_words: bool,
    pub version: String,
    /// Idle connections are closed after this long (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`).
    pub keep_alive: Duration,
    /// Whether the routes under `/sim/…` exist.
    pub control: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            models: vec!["sim".to_owned()],
            loras: Vec::new(),
            root: None,
            max_model_len: 32_768,
            api_key: None,
            timing: Timing::default(),
            cache_tokens: 262_144,
            block_size: 16,
            max_num_seqs: 256,
            max_num_queued_reqs: None,
            seed: 0,
            prompt_tokens_details: true,
            omits_cached_zero: false,
            prefix_caching: true,
            hash_algo: "sha256".to_owned(),
            log_stats: true,
            clock_skew: 0,
            request_id_headers: false,
            dev_mode: false,
            embeddings: true,
            transcription: true,
            realtime: true,
            responses: true,
            messages: true,
            completions: true,
            tokenize: true,
            responses_store: true,
            server_load: true,
            end_token: false,
            split_words: false,
            version: "0.32.0".to_owned(),
            keep_alive: Duration::from_secs(5),
            control: true,
        }
    }
}

impl Options {
    /// The limits of the engine's batches and cache.
    pub(super) fn limits(&self) -> EngineLimits {
        EngineLimits {
            block_size: self.block_size,
            cache_tokens: self.cache_tokens,
            max_running: self.max_num_seqs,
            max_waiting: self.max_num_queued_reqs,
            ..EngineLimits::default()
        }
    }

    /// When usage reports cached tokens.
    pub(super) fn cached_report(&self) -> CachedReport {
        match (self.prompt_tokens_details, self.omits_cached_zero) {
            (false, _) => CachedReport::Never,
            (true, true) => CachedReport::Hits,
            (true, false) => CachedReport::Always,
        }
    }

    /// Resolves a model name; `None` when it is not served. No name means the base model.
    pub(super) fn resolve<'a>(&'a self, model: Option<&'a str>) -> Option<Served<'a>> {
        let base = self.models.first().map_or("", String::as_str);
        match model {
            None | Some("") => Some(Served { name: base, lora: None }),
            Some(model) if self.models.iter().any(|served| served == model) => {
                // As in vLLM, the answer has the first alias, whichever the request names.
                Some(Served { name: base, lora: None })
            }
            Some(model) => {
                let lora = self.loras.iter().find(|lora| *lora == model)?;
                Some(Served { name: lora, lora: Some(lora) })
            }
        }
    }
}

/// A served model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Served<'a> {
    pub name: &'a str,
    pub lora: Option<&'a str>,
}
