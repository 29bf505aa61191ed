//! The export of spans to a collector of OpenTelemetry.

use std::time::Duration;

use serde_json::json;

use super::route::changed_header;
use crate::config::secret::Secret;
use crate::config::setting::{
    SettingRow, SettingsTable, custom, duration, maybe, number, partly_masked_pairs, row, switch, text, value,
};
use crate::config::url::{self, UpstreamUrl};
use crate::config::values::{MINUTE, ReadResult, plain};

/// The settings of the export of spans.
#[derive(Clone, Debug, PartialEq)]
pub struct OtlpConfig {
    /// Where a collector takes OTLP over HTTP; `None`: no spans are made.
    pub endpoint: Option<UpstreamUrl>,
    /// Fields of each export, such as the key of a vendor.
    pub headers: Vec<(String, String)>,
    /// The share of the traces that begin here which is sampled.
    pub sample: f64,
    /// The time limit of one export.
    pub timeout: Duration,
    /// Whether attributes have the names of the conventions for generative AI where these have one.
    pub gen_ai: bool,
    /// The name of this service in spans.
    pub service_name: String,
}

impl Default for OtlpConfig {
    fn default() -> Self {
        OtlpConfig {
            endpoint: None,
            headers: Vec::new(),
            sample: 1.0,
            timeout: Duration::from_secs(10),
            gen_ai: false,
            service_name: "vllm-lb".into(),
        }
    }
}

// === impl OtlpConfig ===

impl SettingsTable for OtlpConfig {
    const TABLE: &'static [SettingRow<Self>] = &[
        row(
            "endpoint",
            "URL of a collector that takes OTLP over HTTP; without it no spans are made.",
            &value(
                |otlp: &mut Self| &mut otlp.endpoint,
                maybe(custom("URL", collector_url, |url| json!(url.display()))),
            ),
        ),
        row(
            "header",
            "Headers of each export, such as the key of a vendor; their values are never shown.",
            &value(
                |otlp: &mut Self| &mut otlp.headers,
                partly_masked_pairs("map of header values", changed_header, |_, value| {
                    Secret::new(value).to_string()
                }),
            ),
        ),
        row(
            "sample",
            "Share of the traces that is sampled, of those that begin at the balancer.",
            &value(|otlp: &mut Self| &mut otlp.sample, number(0.0, 1.0)),
        ),
        row(
            "timeout",
            "Time limit of one export.",
            &value(|otlp: &mut Self| &mut otlp.timeout, duration(Duration::from_millis(100), MINUTE)),
        ),
        row(
            "gen_ai",
            "Whether attributes have the names of the conventions for generative AI.",
            &value(|otlp: &mut Self| &mut otlp.gen_ai, switch()),
        ),
        row(
            "service_name",
            "Name of this service in spans.",
            &value(|otlp: &mut Self| &mut otlp.service_name, text("text", plain)),
        ),
    ];

    fn defaults() -> Self {
        OtlpConfig::default()
    }
}

/// Parses the base URL of a collector.
fn collector_url(text: &str) -> ReadResult<UpstreamUrl> {
    let authority = text.split_once("://").map_or("", |(_, rest)| rest.split('/').next().unwrap_or_default());
    if authority.contains('@') {
        return Err("holds a user or password: write them as a header authorization in otlp.header".into());
    }
    url::upstream(text)
}
