//! `GET /metrics`: vLLM's names, labels and order of lines, for the metrics that the simulation has.
//!
//! Every counter has a `_created` gauge, as `prometheus_client` writes them, so that readers that match
//! names by their beginning fail in tests.

use std::fmt::Write;

use super::fault::NoMetrics;
use super::latency::Histogram;
use super::reply::{self, Reply};
use super::run::EngineCall;
use std::sync::atomic::Ordering;

/// The page under construction.
struct MetricsPage {
    text: String,
    model: String,
    created: f64,
}

/// Answers `GET /metrics`.
pub(super) async fn answer(call: &EngineCall) -> Reply {
    match call.shared.faults.metrics() {
        None => page(call),
        Some(NoMetrics::Status(status)) => reply::empty(status),
        Some(NoMetrics::Stall) => std::future::pending().await,
    }
}

fn page(call: &EngineCall) -> Reply {
    let shared = &call.shared;
    let model = shared.options.models.first().cloned().unwrap_or_default();
    let mut page = MetricsPage { text: String::with_capacity(16 * 1_024), model, created: shared.started() };
    page.process();
    if shared.options.log_stats {
        page.engine(call);
        page.counters(call);
        page.histograms(call);
        page.cache_config(call);
    }
    page.traffic(call);
    reply::text("text/plain; version=1.0.0; charset=utf-8", page.text)
}

// === impl MetricsPage ===

impl MetricsPage {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Writes one line of a metric. Labels are in alphabetical order, so the labels `before` and `after`
    /// `model_name` are separate arguments.
    fn line(&mut self, name: &str, before: &str, after: &str, value: f64) {
        let value = number(value);
        let _ = writeln!(
            self.text,
            "{name}{{engine=\"0\",{before}model_name=\"{}\"{after}}} {value}",
            self.model
        );
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.line(name, "", "", value);
    }

    fn counter(&mut self, name: &str, help: &str, lines: &[(&str, &str, u64)]) {
        let (total, created) = (format!("{name}_total"), format!("{name}_created"));
        self.head(&total, help, "counter");
        for (before, after, value) in lines {
            self.line(&total, before, after, *value as f64);
        }
        self.head(&created, help, "gauge");
        for (before, after, _) in lines {
            self.line(&created, before, after, self.created);
        }
    }

    fn process(&mut self) {
        let name = "process_start_time_seconds";
        self.head(name, "Start time of the process since unix epoch in seconds.", "gauge");
        let _ = writeln!(self.text, "{name} {}", number(self.created));
    }

    fn engine(&mut self, call: &EngineCall) {
        let gauges = call.shared.driver.gauges();
        let asleep = call.shared.sleep.load(Ordering::SeqCst);
        let waiting = "vllm:num_requests_waiting";
        self.gauge(
            "vllm:num_requests_running",
            "Number of requests in model execution batches.",
            gauges.running as f64,
        );
        self.gauge(waiting, "Number of requests waiting to be processed.", gauges.waiting as f64);
        let by_reason = "vllm:num_requests_waiting_by_reason";
        self.head(by_reason, "Number of waiting requests by reason.", "gauge");
        self.line(by_reason, "", ",reason=\"capacity\"", gauges.waiting as f64);
        self.line(by_reason, "", ",reason=\"deferred\"", 0.0);
        let state = "vllm:engine_sleep_state";
        self.head(state, "Engine sleep state; awake = 0 means engine is sleeping.", "gauge");
        for (level, name) in ["awake", "weights_offloaded", "discard_all"].iter().enumerate() {
            // Level 0 keeps the weights loaded, so only `awake` changes.
            let is_so = if level == 0 { asleep == 0 } else { asleep == level + 1 };
            self.line(state, "", &format!(",sleep_state=\"{name}\""), f64::from(u8::from(is_so)));
        }
        self.gauge("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", gauges.kv_usage);
    }

    fn counters(&mut self, call: &EngineCall) {
        let c = call.shared.driver.gauges().counters;
        let computed = c.prefix_queries.saturating_sub(c.prefix_hits);
        self.counter(
            "vllm:prefix_cache_queries",
            "Prefix cache queries, in terms of number of queried tokens.",
            &[("", "", c.prefix_queries)],
        );
        self.counter(
            "vllm:prefix_cache_hits",
            "Prefix cache hits, in terms of number of cached tokens.",
            &[("", "", c.prefix_hits)],
        );
        self.counter(
            "vllm:num_preemptions",
            "Cumulative number of preemption from the engine.",
            &[("", "", 0)],
        );
        self.counter(
            "vllm:prompt_tokens",
            "Number of prefill tokens processed.",
            &[("", "", c.prompt_tokens)],
        );
        self.counter(
            "vllm:prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            &[
                ("", ",source=\"local_compute\"", computed),
                ("", ",source=\"local_cache_hit\"", c.prefix_hits),
                ("", ",source=\"external_kv_transfer\"", 0),
            ],
        );
        self.counter(
            "vllm:prompt_tokens_cached",
            "Number of cached prompt tokens (local + external).",
            &[("", "", c.prefix_hits)],
        );
        self.counter(
            "vllm:generation_tokens",
            "Number of generation tokens processed.",
            &[("", "", c.generation_tokens)],
        );
        // A request of a client that disconnects is not counted: real servers leave `abort` at zero too.
        self.counter(
            "vllm:request_success",
            "Count of successfully processed requests.",
            &[
                ("finished_reason=\"stop\",", "", c.finished_stop),
                ("finished_reason=\"length\",", "", c.finished_length),
                ("finished_reason=\"abort\",", "", 0),
                ("finished_reason=\"error\",", "", 0),
                ("finished_reason=\"repetition\",", "", 0),
            ],
        );
        self.rejections(c.refused);
    }

    /// Writes the only metric of vLLM without an `engine` label.
    fn rejections(&mut self, refused: u64) {
        let help = "Number of admission attempts rejected by a queue limit, by reason.";
        for (name, kind) in
            [("vllm:admission_rejections_total", "counter"), ("vllm:admission_rejections_created", "gauge")]
        {
            self.head(name, help, kind);
            for (reason, count) in [("max_num_queued_reqs", refused), ("max_num_queued_tokens", 0)] {
                let value = if kind == "counter" { count as f64 } else { self.created };
                let _ = writeln!(
                    self.text,
                    "{name}{{model_name=\"{}\",reason=\"{reason}\"}} {}",
                    self.model,
                    number(value)
                );
            }
        }
    }

    fn histograms(&mut self, call: &EngineCall) {
        let all = call.shared.driver.latencies();
        for (name, help, histogram) in [
            (
                "time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                &all.time_to_first_token,
            ),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", &all.inter_token),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", &all.e2e),
            (
                "request_queue_time_seconds",
                "Histogram of time spent in WAITING phase for request.",
                &all.queue,
            ),
            (
                "request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                &all.inference,
            ),
            (
                "request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                &all.prefill,
            ),
            (
                "request_decode_time_seconds",
                "Histogram of time spent in DECODE phase for request.",
                &all.decode,
            ),
            ("request_prompt_tokens", "Number of prefill tokens processed.", &all.prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", &all.generation_tokens),
        ] {
            self.histogram(&format!("vllm:{name}"), help, histogram);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let bucket = format!("{name}_bucket");
        let mut total = 0;
        for (at, count) in histogram.counts.iter().enumerate() {
            total += count;
            let bound = histogram.bounds.get(at).map_or_else(|| "+Inf".to_owned(), |&bound| number(bound));
            self.line(&bucket, &format!("le=\"{bound}\","), "", total as f64);
        }
        self.line(&format!("{name}_count"), "", "", total as f64);
        self.line(&format!("{name}_sum"), "", "", histogram.sum);
        let created = format!("{name}_created");
        self.head(&created, help, "gauge");
        self.line(&created, "", "", self.created);
    }

    fn cache_config(&mut self, call: &EngineCall) {
        let options = &call.shared.options;
        let blocks = call.shared.driver.gauges().blocks;
        let tokens = blocks * options.block_size;
        let block = options.block_size;
        let caching = if options.prefix_caching { "True" } else { "False" };
        let algorithm = &options.hash_algo;
        let concurrency = tokens as f64 / options.max_model_len.max(1) as f64;
        self.head("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", "gauge");
        let _ = writeln!(
            self.text,
            "vllm:cache_config_info{{block_size=\"{block}\",cache_dtype=\"auto\",\
             effective_attention_block_size=\"{block}\",enable_prefix_caching=\"{caching}\",engine=\"0\",\
             gpu_memory_utilization=\"0.92\",hash_block_size=\"None\",\
             kv_cache_max_concurrency=\"{concurrency}\",kv_cache_size_tokens=\"{tokens}\",\
             num_cpu_blocks=\"None\",num_gpu_blocks=\"{blocks}\",\
             prefix_caching_hash_algo=\"{algorithm}\",prefix_match_unit=\"None\"}} 1.0"
        );
    }

    fn traffic(&mut self, call: &EngineCall) {
        self.head(
            "http_requests_total",
            "Total number of requests by method, status and handler.",
            "counter",
        );
        for ((route, method, status), count) in call.shared.traffic.all() {
            let _ = writeln!(
                self.text,
                "http_requests_total{{handler=\"{route}\",method=\"{method}\",status=\"{status}\"}} {}",
                number(count as f64)
            );
        }
    }
}

/// Formats a number as Python formats a float: `3.0`, `1.79515492581e+09`.
fn number(value: f64) -> String {
    if value >= 1e6 {
        let digits = format!("{value:e}");
        let (mantissa, exponent) = digits.split_once('e').unwrap_or((&digits, "0"));
        return format!("{mantissa}e+{exponent:0>2}");
    }
    if value.fract() == 0.0 { format!("{value:.1}") } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn formats_numbers_as_python_does() {
        for (value, expected) in
            [(0.0, "0.0"), (202.0, "202.0"), (0.025, "0.025"), (1.79515492581e9, "1.79515492581e+09")]
        {
            assert_eq!(number(value), expected);
        }
    }
}
