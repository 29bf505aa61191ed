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

    /// Returns the keys with different values. The values themselves may be secret.
    pub fn changed_keys(&self, other: &Self) -> Vec<&'static str> {
        let keys = [
            ("url", self.url != other.url),
            ("host", self.host != other.host),
            ("models", self.models != other.models),
            ("weight", self.weight != other.weight),
            ("api_key", (&self.api_key, &self.api_key_env) != (&other.api_key, &other.api_key_env)),
            ("max_active", self.max_active != other.max_active),
            ("tls", self.tls != other.tls),
            ("source", self.discovered != other.discovered),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::url;

    #[test]
    fn names_the_keys_that_differ() {
        let one = UpstreamConfig::new(url::upstream("http://a:1").expect("is a URL"));
        let key = UpstreamConfig { api_key_env: Some("KEY".into()), ..one.clone() };
        let other = UpstreamConfig { weight: 2.0, max_active: Some(3), ..one.clone() };
        assert_eq!(one.changed_keys(&other), ["weight", "max_active"]);
        assert_eq!(key.changed_keys(&other), ["weight", "api_key", "max_active"]);
        assert!(one.changed_keys(&one).is_empty());
    }
}
