//! The certificate authorities of the system, shared by all connections.
//!
//! Reading them takes milliseconds, and a copy for each of a thousand upstreams would take hundreds of
//! megabytes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::RootCertStore;

/// The time after which the authorities are read again.
const ROOTS_LIFETIME: Duration = Duration::from_secs(60);

/// The authorities, and when they were read.
static SYSTEM_ROOTS: Mutex<Option<(Instant, Arc<RootCertStore>)>> = Mutex::new(None);

/// Returns the authorities, as they were at most `ROOTS_LIFETIME` ago.
pub(crate) fn system_roots() -> Arc<RootCertStore> {
    let mut known = SYSTEM_ROOTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((read_at, roots)) = &*known
        && read_at.elapsed() < ROOTS_LIFETIME
    {
        return roots.clone();
    }
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let before = known.take().map(|(_, before)| before);
    // Upstreams that come one after the other share one copy, too.
    let roots = before.filter(|before| before.roots == roots.roots).unwrap_or_else(|| Arc::new(roots));
    *known = Some((Instant::now(), roots.clone()));
    roots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_read_once_for_many_connections() {
        let first = system_roots();
        assert!((0..100).all(|_| Arc::ptr_eq(&system_roots(), &first)));
        // Regression: upstreams that were discovered more than a minute apart had a copy each.
        let expired = Instant::now().checked_sub(ROOTS_LIFETIME).map(|since| (since, first.clone()));
        *SYSTEM_ROOTS.lock().expect("no test fails within") = expired;
        assert!(Arc::ptr_eq(&system_roots(), &first), "the authorities are the same");
    }
}
