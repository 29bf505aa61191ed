//! TLS to a single Redis.
//!
//! The client library reads and parses all authorities of the system at each connection, on a thread that
//! requests need. Here they are read once for many connections. Connections to sentinels and clusters are the
//! library's.

use std::fmt::Display;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use crate::config::types::RedisTls;
use crate::system_roots::system_roots;

/// Builds the TLS settings; reads the files of the settings, since certificates expire.
pub(super) fn connector(tls: &RedisTls) -> Result<TlsConnector, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let roots = match &tls.ca {
        Some(path) => Arc::new(authorities(path)?),
        None => system_roots(),
    };
    let builder = builder.with_root_certificates(roots);
    let config = match (&tls.certificate, &tls.key) {
        (Some(certificate), Some(key)) => {
            let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, &error))?;
            let signed = builder.with_client_auth_cert(certificates(certificate)?, private);
            signed.map_err(|error| unreadable(certificate, &error))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unreadable(path, &error))?;
    }
    Ok(roots)
}

/// Reads the certificates of a PEM file.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_file_iter(path).map_err(|error| unreadable(path, &error))?;
    found.collect::<Result<_, _>>().map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &dyn Display) -> String {
    format!("cannot read {}: {error}", path.display())
}
