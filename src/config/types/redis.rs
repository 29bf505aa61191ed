//! Where siblings meet, and how much they say there.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::secret::Secret;

/// How a Redis is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    pub form: RedisForm,
    pub tls: bool,
    /// One, or all that are named of a cluster or of the sentinels; none for a socket.
    pub hosts: Vec<(String, u16)>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub database: u16,
}

/// How the server that takes commands is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisForm {
    /// It is the one that is named.
    Single,
    /// It listens on a unix socket.
    Socket(PathBuf),
    /// Sentinels tell, by this name.
    Sentinel(String),
    /// Its nodes tell.
    Cluster,
}

/// As it can be written again, with the password masked.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = match (&self.user, &self.password) {
            (None, None) => String::new(),
            (user, password) => {
                let password = password.as_ref().map(|secret| format!(":{secret}")).unwrap_or_default();
                format!("{}{password}@", user.as_deref().unwrap_or_default())
            }
        };
        let scheme = if self.tls { "rediss" } else { "redis" };
        let bracketed = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.into() };
        let hosts: Vec<String> =
            self.hosts.iter().map(|(host, port)| format!("{}:{port}", bracketed(host))).collect();
        let (hosts, database) = (hosts.join(","), self.database);
        match &self.form {
            RedisForm::Single => write!(f, "{scheme}://{user}{hosts}/{database}"),
            RedisForm::Socket(path) => write!(f, "unix://{user}{}?db={database}", path.display()),
            RedisForm::Sentinel(master) => write!(f, "{scheme}+sentinel://{user}{hosts}/{master}/{database}"),
            RedisForm::Cluster => write!(f, "{scheme}-cluster://{user}{hosts}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisOptions {
    /// Between two messages, at the least.
    pub interval: Duration,
    /// Of all keys.
    pub prefix: String,
    /// How long a sibling's gauges count when it is not heard.
    pub gauge_ttl: Duration,
    /// About how many messages are kept, for balancers that start.
    pub stream_length: u64,
}

impl Default for RedisOptions {
    fn default() -> Self {
        RedisOptions {
            interval: Duration::from_millis(20),
            prefix: "vllm-lb:".into(),
            gauge_ttl: Duration::from_secs(3),
            stream_length: 100_000,
        }
    }
}
