//! Forms of a PostgreSQL URL: `postgres://user:password@host:port/database?sslmode=require`.
//!
//! Accepts what the database library accepts, and rejects what it would ignore or fail on at the first
//! connection. A password is never part of a message.

use std::net::IpAddr;

use super::problem::seen;
use super::url::{decoded, host_and_port, masked};
use super::values::ReadResult;

const REMEDY: &str = "write postgres://user:password@host:port/database, with / ? # @ and % in a password \
                      percent-encoded";

const SSL_MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

/// Parameters of the query with free values.
const TEXT_PARAMETERS: [&str; 14] = [
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "host",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "statement-cache-capacity",
];

/// Whether a text is meant as a URL of PostgreSQL.
pub(crate) fn is_url(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://")
}

/// Checks a URL; the error reads on after the key.
pub(crate) fn check(text: &str) -> ReadResult<()> {
    let rest = text.split_once("://").map_or("", |(_, rest)| rest);
    checked(rest).map_err(|what| format!("{} {what}: {REMEDY}", seen(&shown(text))))
}

/// The URL without user, password and the values of its parameters.
pub(crate) fn shown(text: &str) -> String {
    let mut shown = masked(text);
    if let Some(at) = shown.find(['?', '#']) {
        shown.replace_range(at + 1.., "***");
    }
    shown
}

fn checked(rest: &str) -> Result<(), String> {
    let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, place) = match authority.rsplit_once('@') {
        Some((user, place)) => (Some(user), place),
        None => (None, authority),
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    if path.contains('#') || query.contains('#') {
        return Err("has a fragment".into());
    }
    let (name, password) = user.unwrap_or_default().split_once(':').unwrap_or_default();
    if [name, password, path].into_iter().any(|text| decoded(text).is_none()) {
        return Err("has a % that begins no percent-encoded byte".into());
    }
    // Without a host the library takes that of the environment, or the socket of this machine.
    if !(place.is_empty() && user.is_none()) {
        check_place(place)?;
    }
    let parameters = query.split('&').filter(|parameter| !parameter.is_empty());
    parameters
        .map(|parameter| parameter.split_once('=').unwrap_or((parameter, "")))
        .try_for_each(check_parameter)
}

/// A host with its port, or the percent-encoded directory of a socket.
fn check_place(place: &str) -> Result<(), String> {
    if !place.to_ascii_lowercase().starts_with("%2f") {
        return host_and_port(place).map(|_| ()).map_err(String::from);
    }
    let (directory, port) = place.split_once(':').unwrap_or((place, "5432"));
    if decoded(directory).is_none() {
        return Err("has a % that begins no percent-encoded byte".into());
    }
    check_port(port)
}

fn check_port(port: &str) -> Result<(), String> {
    let is_number = port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(1..) if is_number => Ok(()),
        _ => Err("has no valid port: 1 to 65535".into()),
    }
}

fn check_parameter((name, value): (&str, &str)) -> Result<(), String> {
    let value = decoded(&value.replace('+', " ")).ok_or_else(|| format!("has no text as {name}"))?;
    match name {
        "port" => check_port(&value),
        "hostaddr" if value.parse::<IpAddr>().is_err() => Err("has no IP address as hostaddr".into()),
        "sslmode" | "ssl-mode" if !SSL_MODES.contains(&value.to_ascii_lowercase().as_str()) => {
            Err(format!("has no {name} of {}", SSL_MODES.join(", ")))
        }
        "statement-cache-capacity" if value.parse::<usize>().is_err() => {
            Err(format!("has no number as {name}"))
        }
        "hostaddr" | "sslmode" | "ssl-mode" => Ok(()),
        _ if TEXT_PARAMETERS.contains(&name) => Ok(()),
        _ if name.starts_with("options[") && name.ends_with(']') => Ok(()),
        _ => Err(format!("has the unknown parameter {}", seen(name))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sqlx::postgres::PgConnectOptions;

    use super::*;

    const RIGHT: [&str; 16] = [
        "postgres://host/db",
        "postgresql://user:password@host:5433/db",
        "postgres://user@host",
        "postgres://",
        "postgres:///db",
        "postgres:///db?host=/run/postgresql",
        "postgres://%2Frun%2Fpostgresql/db",
        "postgres://user@%2Frun%2Fpostgresql:5433/db",
        "postgres://user:p%40ss%2F%3F%23@[::1]:5432/db",
        "postgres://user:p@ss@host/db",
        "postgres://user:password@10.0.0.1/db?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        "postgres://host/db?hostaddr=10.0.0.1&port=5433",
        "postgres://host/db?user=a&password=b&dbname=c",
        "postgres://host/db?application_name=x+y&options=-c%20work_mem%3D64MB",
        "postgres://host/db?options[search_path]=traces",
        "postgres://host/db?statement-cache-capacity=10&",
    ];

    const WRONG: [(&str, &str); 19] = [
        ("postgres://user:hunter2@host:port/db", "port"),
        ("postgres://user:hunter2@host:/db", "port"),
        ("postgres://user:hunter2@host:0/db", "port"),
        ("postgres://user:hunter2@host:65536/db", "port"),
        ("postgres://user:hunter2@host:-1/db", "port"),
        ("postgres://user:hunter2@/db", "host"),
        ("postgres://user:hunter2@ho st/db", "host"),
        ("postgres://a,b/db", "host"),
        ("postgres://[::1/db", "host"),
        ("postgres://user:hun/hunter2@host/db", "port"),
        ("postgres://user:hun#hunter2@host/db", "fragment"),
        ("postgres://host/db#hunter2", "fragment"),
        ("postgres://user:hunter2%@host/db", "%"),
        ("postgres://host/db?port=x", "port"),
        ("postgres://host/db?hostaddr=db.lan", "hostaddr"),
        ("postgres://host/db?sslmode=on", "sslmode"),
        ("postgres://host/db?statement-cache-capacity=x", "number"),
        ("postgres://host/db?connect_timeout=3&password=hunter2", "connect_timeout"),
        ("postgres://%2Frun:x/db", "port"),
    ];

    #[test]
    fn urls_that_the_library_takes_are_accepted() {
        for text in RIGHT {
            assert_eq!(check(text), Ok(()), "{text}");
            assert!(text.parse::<PgConnectOptions>().is_ok(), "{text}");
        }
    }

    #[test]
    fn mistakes_are_named_without_a_password() {
        for (text, said) in WRONG {
            let error = check(text).expect_err(text);
            let (_, what) = error.split_once("\" ").expect("the URL is quoted");
            assert!(what.contains(said) && !error.contains("hunter2"), "{text}: {error}");
        }
    }

    #[test]
    fn a_shown_url_holds_neither_password_nor_parameters() {
        for (text, expected) in [
            ("postgres://user:p@ss@host:5433/db", "postgres://***@host:5433/db"),
            ("postgres://host/db?password=p", "postgres://host/db?***"),
            ("postgres://host/db#p", "postgres://host/db#***"),
            ("postgres://host/db", "postgres://host/db"),
        ] {
            assert_eq!(shown(text), expected);
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_a_url_of_the_library(
            user in "(u(:p(%40|%)?)?@)?",
            place in "(h|%2Fr|\\[::1\\])?(:[0-9x]{1,5})?(/d)?",
            query in "(\\?(port|sslmode|hostaddr|a)=[a-z0-9.%]{0,6})?",
        ) {
            let text = format!("postgres://{user}{place}{query}");
            if check(&text).is_ok() {
                prop_assert!(text.parse::<PgConnectOptions>().is_ok());
            }
        }
    }
}
