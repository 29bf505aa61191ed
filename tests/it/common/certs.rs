//! Certificates of a test's own authority, and a TLS client that trusts it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tempfile::TempDir;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::wire::tcp;
use vllm_lb::config::types::ListenTls;

/// An authority, and a certificate of it for `localhost` and 127.0.0.1.
pub struct Certs {
    pub directory: TempDir,
    pub certificate: String,
    pub key: String,
    authority: String,
}

// === impl Certs ===

impl Certs {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Another name than the certificate's: OpenSSL takes a certificate that names itself as its issuer
        // for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "authority of the tests");
        let made = "rcgen makes keys and certificates";
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().expect(made)).expect(made);
        let key = KeyPair::generate().expect(made);
        let names = vec!["localhost".to_string(), "127.0.0.1".to_string()];
        let leaf = CertificateParams::new(names).expect(made).signed_by(&key, &authority).expect(made);
        let directory = tempfile::tempdir().expect("a directory can be made");
        let certs = Certs {
            directory,
            certificate: leaf.pem(),
            key: key.serialize_pem(),
            authority: authority.pem(),
        };
        for (name, text) in
            [("ca.pem", &certs.authority), ("cert.pem", &certs.certificate), ("key.pem", &certs.key)]
        {
            std::fs::write(certs.path(name), text).expect("the directory can be written");
        }
        certs
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::join(self.directory.path(), name)
    }

    pub fn authority(&self) -> PathBuf {
        self.path("ca.pem")
    }

    pub fn listen(&self) -> ListenTls {
        ListenTls { certificate: self.path("cert.pem"), key: self.path("key.pem") }
    }

    /// Connects with TLS, offering these protocols.
    pub async fn connect(&self, address: &str, protocols: &[&str]) -> TlsStream<tokio::net::TcpStream> {
        let connector = self.connector(protocols);
        let name = ServerName::try_from("localhost").expect("localhost is a name");
        connector.connect(name, tcp(address).await).await.expect("the certificate is believed")
    }

    /// Serves with the certificate.
    pub fn acceptor(&self) -> TlsAcceptor {
        let certificate =
            CertificateDer::from_pem_slice(self.certificate.as_bytes()).expect("rcgen writes PEM");
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("rcgen writes PEM");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().expect("ring has the defaults");
        let config = builder.with_no_client_auth().with_single_cert(vec![certificate], key);
        TlsAcceptor::from(Arc::new(config.expect("the key is the certificate's")))
    }

    fn connector(&self, protocols: &[&str]) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_slice(self.authority.as_bytes());
        roots.add(authority.expect("rcgen writes PEM")).expect("rcgen makes authorities");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().expect("ring has the defaults");
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }
}
