//! Discovery sources: where upstreams are found, and the settings that discovered upstreams get.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::dns_name::DnsName;
use super::kubernetes::KubernetesService;
use super::upstream_tls::UpstreamTls;
use crate::config::secret::Secret;
use crate::config::url::UpstreamUrl;

/// The interval between two polls, unless the file says another.
pub(super) const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);

/// The interval between two reads of a file, unless the configuration says another.
const DEFAULT_FILE_INTERVAL: Duration = Duration::from_secs(1);

/// A source of upstreams.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscoverySource {
    pub ask: DiscoveryMethod,
    /// The interval between two polls, once the source has answered.
    pub every: Duration,
    /// The models of each upstream of the source; `None`: requested from `GET /v1/models`.
    pub models: Option<Vec<String>>,
    /// The weight of each upstream of the source.
    pub weight: f64,
    pub api_key: Option<Secret>,
    pub api_key_env: Option<String>,
    pub max_active: Option<u32>,
    /// The TLS settings for `https` URLs, both of the upstreams and of the source.
    pub tls: UpstreamTls,
}

/// Where a source finds its upstreams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiscoveryMethod {
    /// A NeMo Gym model server, which is polled.
    Gym(UpstreamUrl),
    /// A file with a list in the form of `upstreams`, which is read again.
    File(ListedFile),
    /// A DNS name, which is looked up again.
    Dns(DnsLookup),
    /// A Kubernetes service: the balancer watches its endpoints.
    Kubernetes(KubernetesService),
}

/// A file with a list of upstreams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedFile {
    /// The path as the configuration holds it.
    pub written: PathBuf,
    /// The path to read: a relative one follows the directory of the configuration.
    pub path: PathBuf,
}

/// A DNS name, and the servers to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsLookup {
    pub name: DnsName,
    /// The DNS servers; empty: those of `/etc/resolv.conf`.
    pub servers: Vec<SocketAddr>,
}

/// Where a discovered upstream comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryOrigin {
    /// The label of the source, from `DiscoveryMethod::label`.
    pub source: String,
    /// A model that the upstream serves, as the source reports.
    pub model: Option<String>,
}

// === impl DiscoverySource ===

impl DiscoverySource {
    /// A source with every option at its default.
    pub fn new(ask: DiscoveryMethod) -> Self {
        DiscoverySource {
            every: ask.default_interval(),
            ask,
            models: None,
            weight: 1.0,
            api_key: None,
            api_key_env: None,
            max_active: None,
            tls: UpstreamTls::default(),
        }
    }
}

// === impl DiscoveryMethod ===

impl DiscoveryMethod {
    /// The key of the file that names the source.
    pub fn key(&self) -> &'static str {
        match self {
            DiscoveryMethod::Gym(_) => "gym",
            DiscoveryMethod::File(_) => "file",
            DiscoveryMethod::Dns(_) => "dns",
            DiscoveryMethod::Kubernetes(_) => "kubernetes",
        }
    }

    /// The value of that key in one line.
    pub fn display(&self) -> String {
        match self {
            DiscoveryMethod::Gym(url) => url.display(),
            DiscoveryMethod::File(file) => file.written.display().to_string(),
            DiscoveryMethod::Dns(lookup) => lookup.name.display(),
            DiscoveryMethod::Kubernetes(service) => service.display(),
        }
    }

    /// The name of the source in logs, metrics and the admin API.
    pub fn label(&self) -> String {
        format!("{} {}", self.key(), self.display())
    }

    /// The URL that holds the TLS settings of the source; `None` where the source has no URL.
    pub fn url(&self) -> Option<&UpstreamUrl> {
        match self {
            DiscoveryMethod::Gym(url) => Some(url),
            DiscoveryMethod::Dns(lookup) => Some(&lookup.name.url),
            DiscoveryMethod::File(_) | DiscoveryMethod::Kubernetes(_) => None,
        }
    }

    fn default_interval(&self) -> Duration {
        match self {
            DiscoveryMethod::File(_) => DEFAULT_FILE_INTERVAL,
            _ => DEFAULT_INTERVAL,
        }
    }
}

// === impl ListedFile ===

impl ListedFile {
    /// A file at this path.
    pub fn new(path: PathBuf) -> Self {
        ListedFile { written: path.clone(), path }
    }
}
