//! The TLS certificate of a listener, which can be replaced: later handshakes use the new certificate, open
//! connections keep theirs.

use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;

use crate::config::types::ListenTls;
use crate::fleet::regular_file::open_regular;

/// The certificate and the TLS acceptor of a listener.
pub(crate) struct ListenerCertificate {
    files: ListenTls,
    current: Arc<CurrentCertificate>,
    pub(super) acceptor: TlsAcceptor,
}

/// A certificate with its private key.
pub(crate) type CertificatePair = Arc<CertifiedKey>;

/// The certificate for the next handshake.
#[derive(Debug)]
struct CurrentCertificate(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for CurrentCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<CertificatePair> {
        Some(self.0.load_full())
    }
}

impl ListenerCertificate {
    /// Reads the certificate and key files. ALPN selects HTTP/2.
    pub(crate) fn new(files: &ListenTls) -> Result<Arc<Self>, String> {
        let provider = Arc::new(ring::default_provider());
        let current = Arc::new(CurrentCertificate(ArcSwap::from(read(files, &provider)?)));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Ok(Arc::new(ListenerCertificate { files: files.clone(), current, acceptor }))
    }

    /// The file of the certificate.
    pub(crate) fn path(&self) -> &Path {
        &self.files.certificate
    }

    /// Reads the files again; returns the certificate if it differs from the current one.
    pub(crate) fn read_changed(&self) -> Result<Option<CertificatePair>, String> {
        let found = read(&self.files, &ring::default_provider())?;
        Ok((found.cert != self.current.0.load().cert).then_some(found))
    }

    /// Uses `pair` for the next handshakes.
    pub(crate) fn replace(&self, pair: CertificatePair) {
        self.current.0.store(pair);
    }
}

fn read(files: &ListenTls, provider: &CryptoProvider) -> Result<CertificatePair, String> {
    let describe = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let open = |path: &Path| open_regular(path).map_err(|error| describe(path, &error));
    let chain = CertificateDer::pem_reader_iter(open(&files.certificate)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| describe(&files.certificate, &error))?;
    if chain.is_empty() {
        return Err(describe(&files.certificate, &"no certificate in the file"));
    }
    let key =
        PrivateKeyDer::from_pem_reader(open(&files.key)?).map_err(|error| describe(&files.key, &error))?;
    let pair = CertifiedKey::from_der(chain, key, provider);
    pair.map(Arc::new).map_err(|error| describe(&files.certificate, &error))
}
