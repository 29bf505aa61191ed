//! The certificate of a listener, which can be read again while it serves: connections that come later get
//! the new one, those that are open keep theirs.

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

/// What it takes to talk TLS on a listener.
pub struct Certificate {
    files: ListenTls,
    present: Arc<Present>,
    pub(super) acceptor: TlsAcceptor,
}

/// A certificate and its key that fit each other.
pub type Pair = Arc<CertifiedKey>;

/// What the next handshake is given.
#[derive(Debug)]
struct Present(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Present {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Pair> {
        Some(self.0.load_full())
    }
}

impl Certificate {
    /// Reads both files. HTTP/2 is agreed on by ALPN.
    pub fn new(files: &ListenTls) -> Result<Arc<Self>, String> {
        let provider = Arc::new(ring::default_provider());
        let present = Arc::new(Present(ArcSwap::from(read(files, &provider)?)));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_cert_resolver(present.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Ok(Arc::new(Certificate { files: files.clone(), present, acceptor }))
    }

    /// What its files hold now, where that is another certificate than the present one.
    pub fn renewed(&self) -> Result<Option<Pair>, String> {
        let found = read(&self.files, &ring::default_provider())?;
        Ok((found.cert != self.present.0.load().cert).then_some(found))
    }

    /// The next handshakes are given this.
    pub fn renew(&self, pair: Pair) {
        self.present.0.store(pair);
    }
}

fn read(files: &ListenTls, provider: &CryptoProvider) -> Result<Pair, String> {
    let say = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| say(&files.certificate, &error))?;
    if chain.is_empty() {
        return Err(say(&files.certificate, &"no certificate in the file"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| say(&files.key, &error))?;
    let pair = CertifiedKey::from_der(chain, key, provider);
    pair.map(Arc::new).map_err(|error| say(&files.certificate, &error))
}
