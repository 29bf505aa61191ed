//! What has to happen when a configuration takes another's place in a running balancer.
//!
//! Pure: compares by the rows of the table. The reload applies what it can, and names the keys that need a
//! restart.

use super::setting::{self, ReloadEffect};
use super::types::{Config, UpstreamConfig};

/// The way from one configuration to another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigDiff {
    /// All upstreams of the new configuration, changed or not.
    pub upsert: Vec<UpstreamConfig>,
    /// The names that only the old configuration has. Upstreams that were added at run time are in neither,
    /// and stay.
    pub remove: Vec<String>,
    /// Sections that differ and are applied, and keys of sections that otherwise need a restart.
    pub changed: Vec<String>,
    /// Keys and sections that differ and keep their old values until the next start.
    pub restart: Vec<String>,
}

/// Compares two configurations of one process.
pub fn diff(old: &Config, new: &Config) -> ConfigDiff {
    let (mut changed, mut restart) = (Vec::new(), Vec::new());
    setting::changes(old, new, &mut |found| match found.reload {
        ReloadEffect::AtOnce => changed.push(found.name.to_owned()),
        ReloadEffect::Restart => restart.push(found.name.to_owned()),
    });
    let gone = old.upstreams.iter().map(|upstream| &upstream.name);
    let gone = gone.filter(|name| !new.upstreams.iter().any(|upstream| upstream.name == **name));
    ConfigDiff { upsert: new.upstreams.clone(), remove: gone.cloned().collect(), changed, restart }
}

/// The new configuration as it can run in this process: what needs a restart keeps its old value.
pub fn as_it_runs(old: &Config, mut new: Config) -> Config {
    setting::keep_restart(old, &mut new);
    new
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::check;

    fn config(text: &str) -> Config {
        check(text, &|_| None).unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
    }

    fn between(old: &str, new: &str) -> ConfigDiff {
        diff(&config(old), &config(new))
    }

    /// Keys of every section at another value than the default, with what a reload does about them.
    #[test]
    fn applies_a_key_or_names_it_for_a_restart() {
        let base = "upstreams: [{url: http://a}]\n";
        let live = [
            ("admin: {token: secret}", "admin.token"),
            ("routes: [{model: a, to: b}]", "routes"),
            ("balance: {preset: round-robin}", "balance"),
            ("balance: {backlog: 7}", "balance"),
            ("peek: {bytes: 4KiB}", "peek"),
            ("health: {interval: 9s}", "health"),
            ("health: {metrics: false}", "health"),
            ("breaker: {failures: 9}", "breaker"),
            ("breaker: {max_ejected: 0.3}", "breaker"),
            ("timeouts: {connect: 9s}", "timeouts"),
            ("retry: {attempts: 1}", "retry"),
            ("queue: {wait: 9s}", "queue"),
            ("limits: {connections: 9}", "limits"),
            ("trusted_proxies: [10.0.0.0/8]", "trusted_proxies"),
            ("passthrough: [/sleep]", "passthrough"),
            ("sessions: {bonus: 9}", "sessions"),
            ("log: {level: loud}", "log"),
            ("log: {truncate: 9}", "log"),
            ("log: {requests: true}", "log"),
            ("otlp: {endpoint: \"http://otel:4318\"}", "otlp"),
            ("otlp: {sample: 0.5}", "otlp"),
            ("otlp: {header: {x-key: abc}}", "otlp"),
            ("shutdown: {grace: 9s}", "shutdown"),
            ("expose: true", "expose"),
        ];
        for (text, name) in live {
            let diff = between(base, &format!("{base}{text}"));
            assert_eq!((diff.changed, diff.restart), (vec![name.to_owned()], vec![]), "{text}");
        }
        let restart = [
            ("listen: 127.0.0.1:1", "listen"),
            ("listen: {address: \"0.0.0.0:8000\", tls: {certificate: a, key: b}}", "listen"),
            ("admin: {address: \"127.0.0.1:1\"}", "admin.address"),
            ("redis: local", "redis"),
            ("redis_options: {interval: 5ms}", "redis_options"),
            ("threads: 3", "threads"),
            ("upgrade_socket: /run/x.sock", "upgrade_socket"),
            ("log: {format: yaml}", "log.format"),
        ];
        for (text, name) in restart {
            let diff = between(base, &format!("{base}{text}"));
            assert_eq!((diff.changed, diff.restart), (vec![], vec![name.to_owned()]), "{text}");
            let runs = as_it_runs(&config(base), config(&format!("{base}{text}")));
            assert_eq!(runs, config(base), "{text}");
        }
        assert_eq!(between(base, base).changed, Vec::<&str>::new());
    }

    #[test]
    fn has_the_upstreams_of_the_new_file_and_removes_the_others() {
        let diff = between(
            "upstreams: [http://a, http://b, {url: http://c, weight: 2}]",
            "upstreams: [http://b, {url: http://c, weight: 3}, http://d]",
        );
        let names: Vec<&str> = diff.upsert.iter().map(|upstream| upstream.name.as_str()).collect();
        assert_eq!(names, ["b:80", "c:80", "d:80"]);
        assert_eq!((diff.remove, diff.changed), (vec!["a:80".to_string()], vec!["upstreams".to_string()]));
        let with = |key: &str| format!("upstreams: [{{url: http://a, api_key: {key}}}]");
        let key = between(&with("one"), &with("two"));
        assert_eq!(key.changed, ["upstreams"], "secrets are compared, not their masks");
    }
}
