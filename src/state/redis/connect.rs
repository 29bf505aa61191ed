//! A connection to the Redis that accepts writes: a single server, the master that sentinels name, or the
//! cluster node of the keys.
//!
//! The server is resolved again after every loss, so that a failover is followed. Every wait has a time
//! limit.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, Cmd, ConnectionAddr, ErrorKind, IntoConnectionInfo,
    Pipeline, RedisConnectionInfo, RedisResult, TlsCertificates, TlsMode, Value,
};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;

use super::failure::RedisFailure;
use super::tls;
use crate::config::types::{RedisOptions, RedisTls, RedisTopology, RedisUrl, SentinelAccess};

/// The time limit of connecting to one host, and of every command that does not block on purpose.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);

/// The time limit of connecting as a whole: a Sentinel or a seed of a cluster may be a host that is off and
/// takes one `COMMAND_TIMEOUT` before the next is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// The time limit for reading the files of certificates.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The most reads at a time. A read of a disk that hangs cannot be ended, and keeps its thread.
const MAX_READS: usize = 4;

static READS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MAX_READS)));

/// The number of retries after a redirection in a cluster; after them the connection is opened again.
const CLUSTER_RETRIES: u32 = 1;

/// A connection to Redis.
#[derive(Clone)]
pub(super) enum RedisLink {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl RedisLink {
    /// Connects; `longest` is the time limit of a single answer.
    pub(super) async fn connect(
        url: &RedisUrl,
        options: &RedisOptions,
        longest: Duration,
    ) -> Result<Self, RedisFailure> {
        let is_own = url.tls && matches!(url.form, RedisTopology::Single);
        let read = read_files(options.tls.clone(), is_own, READ_TIMEOUT).await;
        let (certificates, connector) = read.map_err(RedisFailure::certificates)?;
        let access = RedisAccess { url, sentinel: &options.sentinel, certificates, connector };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, access.connect(longest)).await;
        Ok(connected.map_err(|_| RedisFailure::timeout())??)
    }

    /// Runs one command within `limit`.
    pub(super) async fn call(&mut self, command: &Cmd, limit: Duration) -> Result<Value, RedisFailure> {
        let query = async {
            match self {
                RedisLink::One(link) => command.query_async(link).await,
                RedisLink::Cluster(link) => command.query_async(link).await,
            }
        };
        Ok(tokio::time::timeout(limit, query).await.map_err(|_| RedisFailure::timeout())??)
    }

    /// Runs all commands in one pipeline; fails when any of them fails.
    pub(super) async fn pipe(&mut self, commands: &Pipeline) -> Result<Vec<Value>, RedisFailure> {
        let query = async {
            match self {
                RedisLink::One(link) => commands.query_async(link).await,
                RedisLink::Cluster(link) => commands.query_async(link).await,
            }
        };
        Ok(tokio::time::timeout(COMMAND_TIMEOUT, query).await.map_err(|_| RedisFailure::timeout())??)
    }
}

/// The URL with the files and the users that a connection needs.
struct RedisAccess<'a> {
    url: &'a RedisUrl,
    sentinel: &'a SentinelAccess,
    certificates: TlsCertificates,
    /// The TLS of a single Redis.
    connector: Option<TlsConnector>,
}

/// Reads the files within `limit`; `is_own`: the balancer makes the TLS connection itself.
async fn read_files(
    tls: RedisTls,
    is_own: bool,
    limit: Duration,
) -> Result<(TlsCertificates, Option<TlsConnector>), String> {
    let read = async {
        let turn = READS.clone().acquire_owned().await;
        let read = tokio::task::spawn_blocking(move || {
            // Held as long as the thread, not as the task that waits for it.
            let _turn = turn;
            let connector = is_own.then(|| tls::connector(&tls)).transpose()?;
            Ok((certificates(&tls)?, connector))
        });
        read.await.unwrap_or_else(|error| Err(error.to_string()))
    };
    let late = |_| Err(format!("they could not be read within {limit:?}; check their disk"));
    tokio::time::timeout(limit, read).await.unwrap_or_else(late)
}

/// Reads the files of the certificates; each connection reads them again, since certificates expire.
fn certificates(tls: &RedisTls) -> Result<TlsCertificates, String> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let root_cert = tls.ca.as_ref().map(read).transpose()?;
    let client_tls = match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => {
            Some(ClientTlsConfig { client_cert: read(certificate)?, client_key: read(key)? })
        }
        _ => None,
    };
    Ok(TlsCertificates { client_tls, root_cert })
}

impl RedisAccess<'_> {
    async fn connect(&self, longest: Duration) -> RedisResult<RedisLink> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(COMMAND_TIMEOUT))
            .set_response_timeout(Some(longest));
        match &self.url.form {
            RedisTopology::Single if self.url.tls => self.single_with_tls(config).await,
            RedisTopology::Single | RedisTopology::Socket(_) => {
                let client = self.single()?;
                Ok(RedisLink::One(client.get_multiplexed_async_connection_with_config(&config).await?))
            }
            RedisTopology::Sentinel(master) => {
                let mut client = self.sentinel(master)?;
                Ok(RedisLink::One(client.get_async_connection_with_config(&config).await?))
            }
            RedisTopology::Cluster => {
                Ok(RedisLink::Cluster(self.cluster(longest)?.get_async_connection().await?))
            }
        }
    }

    async fn single_with_tls(&self, config: AsyncConnectionConfig) -> RedisResult<RedisLink> {
        let (Some((host, port)), Some(connector)) = (self.url.hosts.first(), &self.connector) else {
            return Err((ErrorKind::InvalidClientConfig, "the URL has no host").into());
        };
        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_string());
        let name = name.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let connect = async {
            let stream = TcpStream::connect((name.to_str().as_ref(), *port)).await?;
            stream.set_nodelay(true)?;
            connector.connect(name.clone(), stream).await
        };
        let stream = tokio::time::timeout(COMMAND_TIMEOUT, connect).await;
        let stream = stream.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let (link, driver) = MultiplexedConnection::new_with_config(&self.settings(), stream, config).await?;
        // Ends with the last handle on the connection.
        tokio::spawn(driver);
        Ok(RedisLink::One(link))
    }

    fn single(&self) -> RedisResult<Client> {
        let address = match &self.url.form {
            RedisTopology::Socket(path) => vec![ConnectionAddr::Unix(path.clone())],
            _ => self.addresses(),
        };
        let mut found = address.into_iter().map(|address| address.into_connection_info());
        let Some(info) = found.next() else {
            return Err((ErrorKind::InvalidClientConfig, "the URL has no host").into());
        };
        Client::open(info?.set_redis_settings(self.settings()))
    }

    fn sentinel(&self, master: &str) -> RedisResult<SentinelClient> {
        let (url, sentinel) = (self.url, self.sentinel);
        let mut builder = SentinelClientBuilder::new(self.addresses(), master, SentinelServerType::Master)?
            .set_client_to_redis_db(i64::from(url.database));
        if url.tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(self.certificates.clone())
                .set_client_to_sentinel_tls_mode(TlsMode::Secure)
                .set_client_to_sentinel_certificates(self.certificates.clone());
        }
        if let Some(user) = &url.user {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = &url.password {
            builder = builder.set_client_to_redis_password(password.expose());
        }
        if let Some(user) = &sentinel.user {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = &sentinel.password {
            builder = builder.set_client_to_sentinel_password(password.expose());
        }
        builder.build()
    }

    fn cluster(&self, longest: Duration) -> RedisResult<ClusterClient> {
        let url = self.url;
        let mut builder = ClusterClient::builder(self.addresses())
            .connection_timeout(COMMAND_TIMEOUT / 2)
            .response_timeout(longest)
            .retries(CLUSTER_RETRIES);
        if url.tls {
            builder = builder.tls(TlsMode::Secure).certs(self.certificates.clone());
        }
        if let Some(user) = &url.user {
            builder = builder.username(user);
        }
        if let Some(password) = &url.password {
            builder = builder.password(password.expose());
        }
        builder.build()
    }

    fn addresses(&self) -> Vec<ConnectionAddr> {
        let address = |(host, port): &(String, u16)| match self.url.tls {
            true => {
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
            }
            false => ConnectionAddr::Tcp(host.clone(), *port),
        };
        self.url.hosts.iter().map(address).collect()
    }

    fn settings(&self) -> RedisConnectionInfo {
        let url = self.url;
        let mut settings = RedisConnectionInfo::default().set_db(i64::from(url.database));
        if let Some(user) = &url.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &url.password {
            settings = settings.set_password(password.expose());
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reconnecting waited for such a file for ever.
    #[tokio::test]
    async fn a_read_that_hangs_is_left_behind_and_repeated_a_few_times_only() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let pipe = folder.path().join("ca.pem");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .expect("a pipe");
        let tls = RedisTls { ca: Some(pipe.clone()), ..RedisTls::default() };
        for _ in 0..2 * MAX_READS {
            let read = read_files(tls.clone(), false, Duration::from_millis(20)).await;
            let error = read.err().expect("no process writes to the pipe");
            assert!(error.ends_with("check their disk"), "{error}");
        }
        assert_eq!(READS.available_permits(), 0);
        // Their threads end with a writer. For both ends, the pipe opens at once.
        while READS.available_permits() < MAX_READS {
            drop(std::fs::File::options().read(true).write(true).open(&pipe).expect("it is there"));
            tokio::task::yield_now().await;
        }
    }
}
