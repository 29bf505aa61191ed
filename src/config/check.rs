//! Reads a file into a [`Config`], with flags and the environment over it, and reports every problem.
//!
//! Two steps: [`read`] makes a [`ConfigDraft`] of the file, over which the command line lays flags and
//! variables; [`ConfigDraft::finish`] checks the whole and gives the `Config`. Pure: the environment comes in
//! as a function, and files that the configuration names are not opened.

mod fleet;
mod listed_file;
mod listen;
mod names;
mod routes;
mod warnings;

use super::expand::{EnvLookup, expand};
use super::problem::{ConfigPlace, ConfigProblem};
use super::section::ConfigSection;
use super::setting;
use super::types::{Config, ListenAddress};
use super::values::ReadResult;
use super::yaml::{self, YamlNode};
use names::UpstreamNames;

pub use fleet::upstream_alone;
pub use listed_file::upstream_list;
pub use warnings::warnings;

/// The sections that code of its own reads, since they are lists of maps.
const LISTS: [&str; 4] = ["listen", "upstreams", "routes", "passthrough"];

/// A configuration that is still being put together.
pub struct ConfigDraft {
    pub config: Config,
    pub problems: Vec<ConfigProblem>,
    /// Where the admin address was written, for the message when a listener has the same address.
    admin: ConfigPlace,
    /// Whether upstreams were given, valid or not.
    upstreams_given: bool,
    names: UpstreamNames,
}

/// Checks a file alone.
pub fn check(text: &str, env: EnvLookup<'_>) -> Result<Config, Vec<ConfigProblem>> {
    read(text, env).finish()
}

/// Reads a file, which may be empty.
pub fn read(text: &str, env: EnvLookup<'_>) -> ConfigDraft {
    let mut problems = Vec::new();
    let parsed = yaml::parse(text, &mut problems);
    let is_readable = parsed.is_some();
    let mut root = parsed.unwrap_or_else(YamlNode::null);
    let place = ConfigPlace { path: String::new(), line: None };
    expand(&mut root, &place, env, &mut problems);
    let admin = admin_place(&root, &place);
    let mut config = Config::default();
    let mut names = UpstreamNames::default();
    let mut section = ConfigSection::open(&root, place, &setting::known_keys::<Config>(), &mut problems);
    if let Some(listen) = listen::read(&mut section) {
        config.listen = listen;
    }
    let found = fleet::upstreams(&mut section, &mut names);
    config.upstreams = found.upstreams;
    config.sources = found.sources;
    config.passthrough = fleet::passthrough(&mut section, &mut names);
    setting::read(&mut section, &mut config, &LISTS);
    config.routes = routes::read(&mut section, (config.timeouts, config.retry), &mut names);
    // A file that cannot be read may hold upstreams.
    let upstreams_given = found.is_given || !is_readable;
    ConfigDraft { config, problems, admin, upstreams_given, names }
}

/// The place of `admin.address`, with its line if it was written.
fn admin_place(root: &YamlNode, place: &ConfigPlace) -> ConfigPlace {
    let line = root.entry("admin").and_then(|admin| admin.node.entry("address")).map(|address| address.line);
    place.key("admin", None).key("address", line)
}

// === impl ConfigDraft ===

impl ConfigDraft {
    /// Replaces the listeners of the file by these addresses. `from` is the flag or variable.
    pub fn listen<S: AsRef<str>>(&mut self, from: &str, addresses: &[S]) {
        self.config.listen = listen::from_texts(from, addresses, &mut self.problems);
    }

    /// Replaces the admin address of the file.
    pub fn admin(&mut self, from: &str, address: &str) {
        let place = ConfigPlace::named(from);
        if let Some(address) = self.take(&place, ListenAddress::parse(address)) {
            self.config.admin.address = address;
        }
        self.admin = place;
    }

    /// Replaces the token of the admin listener.
    pub fn admin_token(&mut self, from: &str, token: &str) {
        let token = self.take(&ConfigPlace::named(from), super::values::secret(token));
        self.config.admin.token = token.or(self.config.admin.token.take());
    }

    /// Replaces the Redis of the file.
    pub fn redis(&mut self, from: &str, url: &str) {
        let url = self.take(&ConfigPlace::named(from), super::redis::url(url));
        self.config.redis = url.or(self.config.redis.take());
    }

    /// Replaces the upstreams of the file by these.
    pub fn upstreams<S: AsRef<str>>(&mut self, from: &str, urls: &[S]) {
        self.upstreams_come_later();
        self.config.upstreams = fleet::from_texts(from, urls, &mut self.names, &mut self.problems);
    }

    /// Drops the upstreams of the file, since simulated ones are added later.
    pub fn upstreams_come_later(&mut self) {
        self.config.upstreams.clear();
        self.config.sources.clear();
        self.names.clear();
        self.upstreams_given = true;
    }

    /// Returns the value, or reports its problem at this place.
    pub fn take<T>(&mut self, place: &ConfigPlace, value: ReadResult<T>) -> Option<T> {
        value.map_err(|what| self.problems.push(ConfigProblem::new(place, what))).ok()
    }

    /// Returns the configuration, or every problem in the order of the file.
    pub fn finish(mut self) -> Result<Config, Vec<ConfigProblem>> {
        if !self.upstreams_given {
            let text = "there is none: name them on the command line (vllm-lb http://gpu-0:8000), list them \
                        under upstreams in the file, or try --demo";
            self.problems.push(ConfigProblem::new(&ConfigPlace::named("upstreams"), text));
        }
        self.names.check(&mut self.problems);
        if !self.config.admin.address.is_shareable()
            && self.config.listen.iter().any(|listen| listen.address == self.config.admin.address)
        {
            let text = format!("{} is an address of listen too", self.config.admin.address);
            self.problems.push(ConfigProblem::new(&self.admin, text));
        }
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        self.problems.sort_by_key(|problem| problem.place.line.unwrap_or(usize::MAX));
        Err(self.problems)
    }
}
