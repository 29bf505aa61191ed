//! Redis URLs: `local`, `redis://`, `rediss://`, `unix://`, `redis+sentinel://` and
//! `redis-cluster://`.
//!
//! A password is never part of a message. User and password may be percent-encoded or plain: everything
//! before the last `@` belongs to them.

use std::fmt;
use std::path::PathBuf;

use super::problem::seen;
use super::secret::Secret;
use super::url::{decoded, host_and_port, masked};
use super::values::{ReadResult, unix_path};

const REMEDY: &str = "write local, redis://[user:password@]host:port/db, rediss://..., unix:///path?db=0, \
                      redis+sentinel://host,host/master/db or redis-cluster://host,host";

const LOCAL: &str = "redis://localhost:6379";

const DEFAULT_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// How a Redis is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    pub form: RedisTopology,
    pub tls: bool,
    /// One host, several of a cluster or of sentinels, or none for a socket.
    pub hosts: Vec<(String, u16)>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub database: u16,
}

/// How the server that executes commands is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisTopology {
    /// At the host of the URL.
    Single,
    /// On a unix socket.
    Socket(PathBuf),
    /// From sentinels, by the name of the master.
    Sentinel(String),
    /// From the nodes of a cluster.
    Cluster,
}

/// The URL in a form that can be parsed again, with the password masked.
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
            RedisTopology::Single => write!(f, "{scheme}://{user}{hosts}/{database}"),
            RedisTopology::Socket(path) => write!(f, "unix://{user}{}?db={database}", path.display()),
            RedisTopology::Sentinel(master) => {
                write!(f, "{scheme}+sentinel://{user}{hosts}/{master}/{database}")
            }
            RedisTopology::Cluster => write!(f, "{scheme}-cluster://{user}{hosts}"),
        }
    }
}

/// What a scheme stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UrlTopology {
    Single,
    Sentinel,
    Cluster,
}

const SCHEMES: [(&str, UrlTopology); 6] = [
    ("redis", UrlTopology::Single),
    ("rediss", UrlTopology::Single),
    ("redis+sentinel", UrlTopology::Sentinel),
    ("rediss+sentinel", UrlTopology::Sentinel),
    ("redis-cluster", UrlTopology::Cluster),
    ("rediss-cluster", UrlTopology::Cluster),
];

/// Parses a URL, or `local`.
pub fn url(text: &str) -> ReadResult<RedisUrl> {
    let text = if text == "local" { LOCAL } else { text };
    parse(text).map_err(|what| format!("{} {what}: {REMEDY}", seen(&masked(text))))
}

fn parse(text: &str) -> Result<RedisUrl, &'static str> {
    if let Some(rest) = text.strip_prefix("unix:") {
        return socket(rest);
    }
    let (scheme, rest) = text.split_once("://").ok_or("is no redis URL")?;
    let found = SCHEMES.iter().find(|(name, _)| scheme.eq_ignore_ascii_case(name));
    let (name, kind) = found.ok_or("has an unknown scheme")?;
    let (user, rest) = match rest.rsplit_once('@') {
        Some((user, rest)) => (Some(user), rest),
        None => (None, rest),
    };
    if rest.contains(['?', '#']) {
        return Err("has a query or fragment");
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let port = if *kind == UrlTopology::Sentinel { SENTINEL_PORT } else { DEFAULT_PORT };
    let mut hosts = Vec::new();
    for host in authority.split(',') {
        let (host, given) = host_and_port(host)?;
        hosts.push((host, given.unwrap_or(port)));
    }
    if *kind == UrlTopology::Single && hosts.len() > 1 {
        return Err("names several hosts");
    }
    let (form, database) = server(*kind, path.trim_matches('/'))?;
    let (user, password) = user_and_password(user);
    Ok(RedisUrl { form, tls: name.starts_with("rediss"), hosts, user, password, database })
}

/// Parses `///run/redis.sock?db=2` or `//user:password@/run/redis.sock`.
fn socket(rest: &str) -> Result<RedisUrl, &'static str> {
    let bad = "is no unix socket";
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (user, path) = match place.strip_prefix("//").and_then(|place| place.split_once("@/")) {
        Some((user, path)) if !user.starts_with('/') => (Some(user), format!("/{path}")),
        _ => (None, place.into()),
    };
    let path = unix_path(&path).filter(|path| !path.as_os_str().is_empty()).ok_or(bad)?;
    let database = match query.strip_prefix("db=") {
        Some(number) => number.parse().map_err(|_| "has a database that is no number")?,
        None if query.is_empty() => 0,
        None => return Err("has a query other than db"),
    };
    let (user, password) = user_and_password(user);
    Ok(RedisUrl {
        form: RedisTopology::Socket(path),
        tls: false,
        hosts: Vec::new(),
        user,
        password,
        database,
    })
}

fn user_and_password(written: Option<&str>) -> (Option<String>, Option<Secret>) {
    let Some(written) = written else { return (None, None) };
    // Invalid percent-encoding is taken literally.
    let plain = |text: &str| decoded(text).unwrap_or_else(|| text.into());
    let (user, password) = match written.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (written, None),
    };
    let user = Some(plain(user)).filter(|user| !user.is_empty());
    (user, password.filter(|password| !password.is_empty()).map(|password| Secret::new(plain(password))))
}

fn server(kind: UrlTopology, path: &str) -> Result<(RedisTopology, u16), &'static str> {
    let number = |text: &str| if text.is_empty() { Ok(0) } else { text.parse::<u16>() };
    match (kind, path.split_once('/')) {
        (UrlTopology::Single, None) => match number(path) {
            Ok(database) => Ok((RedisTopology::Single, database)),
            Err(_) => Err("has a path that is no database number"),
        },
        (UrlTopology::Single, _) => Err("has a path that is no database number"),
        (UrlTopology::Sentinel, None) if path.is_empty() => Err("does not name the master"),
        (UrlTopology::Sentinel, split) => {
            let (master, database) = split.unwrap_or((path, ""));
            let database = number(database).map_err(|_| "has a database that is no number")?;
            Ok((RedisTopology::Sentinel(master.into()), database))
        }
        (UrlTopology::Cluster, _) if path.is_empty() || path == "0" => Ok((RedisTopology::Cluster, 0)),
        (UrlTopology::Cluster, _) => Err("names a database, which a cluster does not have"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_every_form() {
        let table = [
            ("local", "redis://localhost:6379/0"),
            ("redis://localhost", "redis://localhost:6379/0"),
            ("REDIS://Host/", "redis://host:6379/0"),
            ("redis://user:pass@host:42/2", "redis://user:***@host:42/2"),
            ("redis://:p@ss/word?#@host", "redis://:***@host:6379/0"),
            ("rediss://host:6380/0", "rediss://host:6380/0"),
            ("unix:///run/redis.sock", "unix:///run/redis.sock?db=0"),
            ("unix:/run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
            ("unix://u:p@/run/redis.sock", "unix://u:***@/run/redis.sock?db=0"),
            ("unix:///run/@x/redis.sock", "unix:///run/@x/redis.sock?db=0"),
            ("redis+sentinel://a,b:1/mymaster/1", "redis+sentinel://a:26379,b:1/mymaster/1"),
            ("rediss+sentinel://a/m", "rediss+sentinel://a:26379/m/0"),
            ("redis-cluster://a:7000,b", "redis-cluster://a:7000,b:6379"),
            ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ];
        for (text, shown) in table {
            let read = url(text).unwrap_or_else(|what| panic!("{text} {what}"));
            assert_eq!(read.to_string(), shown, "{text}");
            assert_eq!(url(shown).map(|again| again.to_string()), Ok(shown.into()), "{text}");
        }
    }

    #[test]
    fn parses_users_and_passwords() {
        let table = [
            ("redis://h", None, None),
            ("redis://u@h", Some("u"), None),
            ("redis://:p@h", None, Some("p")),
            ("redis://u:p:q@h", Some("u"), Some("p:q")),
            ("redis://u:p@ss/w?o#rd@h", Some("u"), Some("p@ss/w?o#rd")),
            ("redis://u%3A:p%40ss@h", Some("u:"), Some("p@ss")),
            ("redis://:100%@h", None, Some("100%")),
        ];
        for (text, user, password) in table {
            let read = url(text).unwrap_or_else(|what| panic!("{text} {what}"));
            let found = (read.user.as_deref(), read.password.as_ref().map(Secret::expose));
            assert_eq!(found, (user, password), "{text}");
        }
    }

    #[test]
    fn never_shows_the_password_of_an_invalid_url() {
        let table = [
            "",
            "localhost",
            "http://u:hunter2@host",
            "redis://u:hunter2@",
            "redis://u:hunter2@host:x",
            "redis://u:hunter2@host/db/1",
            "redis://u:hunter2@a,b",
            "redis+sentinel://u:hunter2@a",
            "redis-cluster://u:hunter2@a/3",
            "u:hunter2@host",
            "redis:hunter2@host",
            "unix://u:hunter2@",
            "redis://u:hunter2@host:6379/x",
            "redis://u:hunter2@host?protocol=3",
            "unix://u:hunter2@/run/redis.sock?db=x",
            "unix://u:hunter2@/run/redis.sock?protocol=3",
        ];
        for text in table {
            let message = url(text).expect_err(text);
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
