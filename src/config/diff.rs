//! What has to happen when a configuration takes another's place in a running balancer.
//!
//! Pure: it only compares. What can be taken over live is, all of it; what needs a new process is named.

use super::types::{Config, LogConfig, TraceStore, TracesConfig, UpstreamConfig};

/// The way from one configuration to another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Diff {
    /// All upstreams of the new configuration: those that have not changed are known to be the same.
    pub upsert: Vec<UpstreamConfig>,
    /// Names that the old configuration had and the new one has not. Upstreams that were added at run time
    /// stand in neither, and stay.
    pub remove: Vec<String>,
    /// Sections that are different and taken over.
    pub changed: Vec<&'static str>,
    /// Keys that are different and go on as they were until the next start.
    pub restart: Vec<&'static str>,
}

/// Compares two configurations of one process.
pub fn diff(old: &Config, new: &Config) -> Diff {
    let live = [
        ("admin.token", old.admin.token != new.admin.token),
        ("upstreams", old.upstreams != new.upstreams || old.sources != new.sources),
        ("routes", old.routes != new.routes),
        ("balance", old.balance != new.balance),
        ("peek", old.peek != new.peek),
        ("health", old.health != new.health),
        ("breaker", old.breaker != new.breaker),
        ("timeouts", old.timeouts != new.timeouts),
        ("retry", old.retry != new.retry),
        ("queue", old.queue != new.queue),
        ("limits", old.limits != new.limits),
        ("trusted_proxies", old.trusted_proxies != new.trusted_proxies),
        ("passthrough", old.passthrough != new.passthrough),
        ("sessions", old.sessions != new.sessions),
        ("traces", traces_of(old) != traces_of(new)),
        ("log", LogConfig { format: None, ..old.log } != LogConfig { format: None, ..new.log }),
        ("shutdown", old.shutdown != new.shutdown),
        ("expose", old.expose != new.expose),
    ];
    let restart = [
        ("listen", old.listen != new.listen),
        ("admin.address", old.admin.address != new.admin.address),
        ("redis", old.redis != new.redis),
        ("redis_options", old.redis_options != new.redis_options),
        ("balance.index_blocks", old.index.blocks != new.index.blocks),
        ("balance.block_bytes", old.index.block_bytes != new.index.block_bytes),
        ("threads", old.threads != new.threads),
        ("upgrade_socket", old.upgrade_socket != new.upgrade_socket),
        ("traces.store", old.traces.store != new.traces.store),
        ("log.format", old.log.format != new.log.format),
    ];
    let names = |table: &[(&'static str, bool)]| {
        table.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect()
    };
    let gone = old.upstreams.iter().map(|upstream| &upstream.name);
    let gone = gone.filter(|name| !new.upstreams.iter().any(|upstream| upstream.name == **name));
    Diff {
        upsert: new.upstreams.clone(),
        remove: gone.cloned().collect(),
        changed: names(&live),
        restart: names(&restart),
    }
}

/// The settings of traces that are taken over live.
fn traces_of(config: &Config) -> TracesConfig {
    TracesConfig { store: TraceStore::None, ..config.traces.clone() }
}

/// The new configuration as it can run in this process: what needs a restart stays as it was.
pub fn as_it_runs(old: &Config, new: Config) -> Config {
    let mut runs = new;
    runs.listen.clone_from(&old.listen);
    runs.admin.address = old.admin.address.clone();
    runs.traces.store.clone_from(&old.traces.store);
    runs.redis.clone_from(&old.redis);
    runs.redis_options.clone_from(&old.redis_options);
    runs.index = old.index;
    runs.threads = old.threads;
    runs.upgrade_socket.clone_from(&old.upgrade_socket);
    runs.log.format = old.log.format;
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::check;

    fn config(text: &str) -> Config {
        check(text, &|_| None).unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
    }

    fn between(old: &str, new: &str) -> Diff {
        diff(&config(old), &config(new))
    }

    /// Every key of the file, at another value than its default, with what a reload does about it.
    #[test]
    fn every_key_is_taken_over_or_needs_a_restart() {
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
            ("shutdown: {grace: 9s}", "shutdown"),
            ("expose: true", "expose"),
        ];
        for (text, name) in live {
            let diff = between(base, &format!("{base}{text}"));
            assert_eq!((diff.changed, diff.restart), (vec![name], vec![]), "{text}");
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
            assert_eq!((diff.changed, diff.restart), (vec![], vec![name]), "{text}");
            let runs = as_it_runs(&config(base), config(&format!("{base}{text}")));
            assert_eq!(runs, config(base), "{text}");
        }
        assert_eq!(between(base, base).changed, Vec::<&str>::new());
    }

    #[test]
    fn upstreams_are_those_of_the_new_file_and_leave_with_it() {
        let diff = between(
            "upstreams: [http://a, http://b, {url: http://c, weight: 2}]",
            "upstreams: [http://b, {url: http://c, weight: 3}, http://d]",
        );
        let names: Vec<&str> = diff.upsert.iter().map(|upstream| upstream.name.as_str()).collect();
        assert_eq!(names, ["b:80", "c:80", "d:80"]);
        assert_eq!((diff.remove, diff.changed), (vec!["a:80".to_string()], vec!["upstreams"]));
        let with = |key: &str| format!("upstreams: [{{url: http://a, api_key: {key}}}]");
        let key = between(&with("one"), &with("two"));
        assert_eq!(key.changed, ["upstreams"], "secrets are compared, not their masks");
    }
}
