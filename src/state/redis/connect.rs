//! A connection to the Redis that accepts writes: a single server, the master that sentinels name, or the
//! cluster node of the keys.
//!
//! The server is resolved again after every loss, so that a failover is followed. Every wait has a time
//! limit.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, IntoConnectionInfo, Pipeline, RedisConnectionInfo,
    TlsMode, Value,
};

use super::failure::RedisFailure;
use crate::config::types::{RedisTopology, RedisUrl};

/// The time limit of connecting to one host, and of every command that does not block on purpose.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);

/// The time limit of connecting as a whole: a Sentinel or a seed of a cluster may be a host that is off and
/// takes one `COMMAND_TIMEOUT` before the next is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// The number of retries after a redirection in a cluster; after them the connection is opened again.
const CLUSTER_RETRIES: u32 = 1;

/// A connection to Redis.
#[derive(Clone)]
pub enum RedisLink {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl RedisLink {
    /// Connects; `longest` is the time limit of a single answer.
    pub async fn connect(url: &RedisUrl, longest: Duration) -> Result<Self, RedisFailure> {
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect(url, longest)).await;
        Ok(connected.map_err(|_| RedisFailure::timeout())??)
    }

    /// Runs one command within `limit`.
    pub async fn call(&mut self, command: &Cmd, limit: Duration) -> Result<Value, RedisFailure> {
        let query = async {
            match self {
                RedisLink::One(link) => command.query_async(link).await,
                RedisLink::Cluster(link) => command.query_async(link).await,
            }
        };
        Ok(tokio::time::timeout(limit, query).await.map_err(|_| RedisFailure::timeout())??)
    }

    /// Runs all commands in one pipeline; fails when any of them fails.
    pub async fn pipe(&mut self, commands: &Pipeline) -> Result<Vec<Value>, RedisFailure> {
        let query = async {
            match self {
                RedisLink::One(link) => commands.query_async(link).await,
                RedisLink::Cluster(link) => commands.query_async(link).await,
            }
        };
        Ok(tokio::time::timeout(COMMAND_TIMEOUT, query).await.map_err(|_| RedisFailure::timeout())??)
    }
}

async fn connect(url: &RedisUrl, longest: Duration) -> redis::RedisResult<RedisLink> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(COMMAND_TIMEOUT))
        .set_response_timeout(Some(longest));
    match &url.form {
        RedisTopology::Single | RedisTopology::Socket(_) => {
            let address = match &url.form {
                RedisTopology::Socket(path) => vec![ConnectionAddr::Unix(path.clone())],
                _ => addresses(url),
            };
            let mut found = address.into_iter().map(|address| address.into_connection_info());
            let Some(info) = found.next() else {
                return Err((redis::ErrorKind::InvalidClientConfig, "the URL has no host").into());
            };
            let client = Client::open(info?.set_redis_settings(settings(url)))?;
            Ok(RedisLink::One(client.get_multiplexed_async_connection_with_config(&config).await?))
        }
        RedisTopology::Sentinel(master) => {
            let mut builder = SentinelClientBuilder::new(addresses(url), master, SentinelServerType::Master)?
                .set_client_to_redis_db(i64::from(url.database));
            if url.tls {
                builder = builder
                    .set_client_to_redis_tls_mode(TlsMode::Secure)
                    .set_client_to_sentinel_tls_mode(TlsMode::Secure);
            }
            if let Some(user) = &url.user {
                builder = builder.set_client_to_redis_username(user);
            }
            if let Some(password) = &url.password {
                builder = builder.set_client_to_redis_password(password.expose());
            }
            let mut client = builder.build()?;
            Ok(RedisLink::One(client.get_async_connection_with_config(&config).await?))
        }
        RedisTopology::Cluster => {
            let mut builder = ClusterClient::builder(addresses(url))
                .connection_timeout(COMMAND_TIMEOUT / 2)
                .response_timeout(longest)
                .retries(CLUSTER_RETRIES);
            if url.tls {
                builder = builder.tls(TlsMode::Secure);
            }
            if let Some(user) = &url.user {
                builder = builder.username(user);
            }
            if let Some(password) = &url.password {
                builder = builder.password(password.expose());
            }
            Ok(RedisLink::Cluster(builder.build()?.get_async_connection().await?))
        }
    }
}

fn addresses(url: &RedisUrl) -> Vec<ConnectionAddr> {
    let address = |(host, port): &(String, u16)| match url.tls {
        true => ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None },
        false => ConnectionAddr::Tcp(host.clone(), *port),
    };
    url.hosts.iter().map(address).collect()
}

fn settings(url: &RedisUrl) -> RedisConnectionInfo {
    let mut settings = RedisConnectionInfo::default().set_db(i64::from(url.database));
    if let Some(user) = &url.user {
        settings = settings.set_username(user);
    }
    if let Some(password) = &url.password {
        settings = settings.set_password(password.expose());
    }
    settings
}
