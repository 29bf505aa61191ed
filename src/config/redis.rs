//! Forms of a Redis URL: `local`, `redis://`, `rediss://`, `unix://`, `redis+sentinel://` and
//! `redis-cluster://`.
//!
//! Only reads and refuses; connecting is somebody else's. A password is never part of a message.

use super::problem::seen;
use super::url::{host_and_port, masked};
use super::values::{Read, unix_path};

const REMEDY: &str = "write local, redis://[user:password@]host:port/db, rediss://..., unix:///path, \
                      redis+sentinel://host,host/master/db or redis-cluster://host,host";

/// How the nodes of a Redis are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Single,
    Sentinel,
    Cluster,
}

const SCHEMES: [(&str, Form); 6] = [
    ("redis", Form::Single),
    ("rediss", Form::Single),
    ("redis+sentinel", Form::Sentinel),
    ("rediss+sentinel", Form::Sentinel),
    ("redis-cluster", Form::Cluster),
    ("rediss-cluster", Form::Cluster),
];

/// The URL with `local` written out, or the rest of a sentence that says what is wrong.
pub fn url(text: &str) -> Read<String> {
    if text == "local" {
        return Ok("redis://localhost:6379".into());
    }
    let bad = |what: &str| format!("{} {what}: {REMEDY}", seen(&masked(text)));
    if let Some(rest) = text.strip_prefix("unix:") {
        let path = rest.split(['?', '#']).next().unwrap_or(rest);
        let path = path.rsplit_once('@').map_or(path, |(_, path)| path);
        return unix_path(path).map(|_| text.into()).ok_or_else(|| bad("is no unix socket"));
    }
    let (scheme, rest) = text.split_once("://").ok_or_else(|| bad("is no redis URL"))?;
    let found = SCHEMES.iter().find(|(name, _)| scheme.eq_ignore_ascii_case(name));
    let (_, form) = found.ok_or_else(|| bad("has an unknown scheme"))?;
    let rest = rest.split(['?', '#']).next().unwrap_or(rest);
    let (authority, path) = match rest.rfind('@') {
        // A password may hold a slash; what follows the last `@` may not be the user's part.
        Some(at) => split_path(&rest[at + 1..]),
        None => split_path(rest),
    };
    let hosts: Vec<&str> = authority.split(',').collect();
    if *form == Form::Single && hosts.len() > 1 {
        return Err(bad("names several hosts"));
    }
    for host in hosts {
        host_and_port(host).map_err(bad)?;
    }
    check_path(*form, path).map_err(bad)?;
    Ok(text.into())
}

fn split_path(text: &str) -> (&str, &str) {
    let (authority, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    (authority, path.trim_matches('/'))
}

fn check_path(form: Form, path: &str) -> Result<(), &'static str> {
    let is_number = |text: &str| text.is_empty() || text.parse::<u16>().is_ok();
    match (form, path.split_once('/')) {
        (Form::Single, None) if is_number(path) => Ok(()),
        (Form::Single, _) => Err("has a path that is no database number"),
        (Form::Sentinel, None) if path.is_empty() => Err("does not name the master"),
        (Form::Sentinel, None) => Ok(()),
        (Form::Sentinel, Some((_, database))) if is_number(database) => Ok(()),
        (Form::Sentinel, _) => Err("has a database that is no number"),
        (Form::Cluster, _) if path.is_empty() || path == "0" => Ok(()),
        (Form::Cluster, _) => Err("names a database, which a cluster does not have"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let table = [
            "redis://localhost",
            "redis://user:pass@host:42/2",
            "redis://:p@ss/word@host",
            "rediss://host:6380/0",
            "unix:///run/redis.sock",
            "unix:///run/redis.sock?db=2",
            "redis+sentinel://a:26379,b:26379/mymaster/1",
            "redis-cluster://a:7000,b:7000",
            "redis://[::1]:6379/0",
        ];
        for text in table {
            assert_eq!(url(text), Ok(text.to_string()));
        }
        assert_eq!(url("local"), Ok("redis://localhost:6379".into()));
    }

    #[test]
    fn mistakes_never_show_the_password() {
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
        ];
        for text in table {
            let message = url(text).expect_err(text);
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
