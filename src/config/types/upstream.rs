//! An upstream as it was configured or discovered.

use super::source::DiscoveryOrigin;
use super::upstream_tls::UpstreamTls;
use crate::config::secret::Secret;
use crate::config::url::UpstreamUrl;

/// One vLLM server as it was configured.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamConfig {
    /// Unique; `host:port` unless given.
    pub name: String,
    pub url: UpstreamUrl,
    /// The host and port that requests name, where the URL has the address that a name stands for.
    pub host: Option<String>,
    /// `None`: requested from `GET /v1/models`.
    pub models: Option<Vec<String>>,
    /// Divides the cost; above 0.
    pub weight: f64,
    /// Sent as `Authorization: Bearer` in place of the client's.
    pub api_key: Option<Secret>,
    /// The environment variable with the key, in place of `api_key`; siblings share its name only.
    pub api_key_env: Option<String>,
    /// The number of requests in flight at which the upstream is no candidate.
    pub max_active: Option<u32>,
    pub tls: UpstreamTls,
    /// `None` for an upstream that the operator gave in the file, on the command line or at run time.
    pub discovered: Option<DiscoveryOrigin>,
}

/// The least weight of an upstream.
pub(super) const MIN_WEIGHT: f64 = 0.001;
/// The largest weight of an upstream.
pub(super) const MAX_WEIGHT: f64 = 1000.0;

impl UpstreamConfig {
    /// Returns the nearest weight that an upstream may have.
    pub fn bounded_weight(weight: f64) -> f64 {
        weight.clamp(MIN_WEIGHT, MAX_WEIGHT)
    }

    /// An upstream with every option at its default, named after its host and port.
    pub fn new(url: UpstreamUrl) -> Self {
        UpstreamConfig {
            name: url.authority(),
            url,
            host: None,
            models: None,
            weight: 1.0,
            api_key: None,
            api_key_env: None,
            max_active: None,
            tls: UpstreamTls::default(),
            discovered: None,
        }
    }
}
