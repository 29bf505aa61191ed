//! Reads the files that a configuration names, as a start would, and reports those that a start would reject.
//!
//! Never: a change of what a running balancer uses.

use crate::config::types::{Config, Listen};
use crate::fleet::authority_problems;
use crate::proxy::server::certificate::ListenerCertificate;

/// Returns the problems of the listeners' certificates and of the upstreams' authorities.
pub fn problems(config: &Config) -> Vec<String> {
    let mut problems = listener_problems(&config.listen);
    problems.extend(authority_problems(&config.upstreams));
    problems
}

/// Returns the problems of certificates and keys.
pub(super) fn listener_problems(listen: &[Listen]) -> Vec<String> {
    let certificates = listen.iter().filter_map(|listen| Some((listen, listen.tls.as_ref()?)));
    let read = |(listen, tls): (&Listen, _)| {
        let problem = ListenerCertificate::new(tls).err()?;
        Some(format!("listen: tls of {}: {problem}", listen.address))
    };
    certificates.filter_map(read).collect()
}
