//! The TLS settings of connections to an upstream: trust in the system's authorities, those of a file, or
//! any.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_rustls::TlsConnector;

use super::regular_file::open_regular;
use crate::config::types::UpstreamConfig;
use crate::system_roots::system_roots;

/// The settings of one of our own TLS connections: the connector, and the name that the certificate must
/// have.
pub(super) type Secure = (TlsConnector, ServerName<'static>);

/// The largest file with authorities; those of a system take a quarter of a megabyte.
const MAX_AUTHORITIES_BYTES: u64 = 16 << 20;

/// Returns the file of an upstream's `tls.ca`; `None` without TLS or without a file.
pub(super) fn authorities_file(config: &UpstreamConfig) -> Option<&Path> {
    config.tls.ca.as_deref().filter(|_| config.url.https)
}

/// Builds the TLS settings of an upstream; `None` when its URL is not https.
pub(super) fn secure(
    config: &UpstreamConfig,
    authorities: &[CertificateDer<'static>],
) -> Result<Option<Secure>, String> {
    if !config.url.https {
        return Ok(None);
    }
    let trust = client_config(config, authorities)?;
    let name = config.tls.sni.clone().unwrap_or_else(|| config.url.host.clone());
    let name = ServerName::try_from(name).map_err(|error| format!("tls.sni: {error}"))?;
    Ok(Some((TlsConnector::from(Arc::new(trust)), name)))
}

/// Reads the authorities of a PEM file; an empty file is an error. May wait for a disk.
pub(super) fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let message = |error: &dyn std::fmt::Display| format!("tls.ca {}: {error}", path.display());
    let mut pem = Vec::new();
    let read = open_regular(path).and_then(|file| file.take(MAX_AUTHORITIES_BYTES + 1).read_to_end(&mut pem));
    if read.map_err(|error| message(&error))? as u64 > MAX_AUTHORITIES_BYTES {
        return Err(message(&format!("it has more than {MAX_AUTHORITIES_BYTES} bytes")));
    }
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates.map_err(|error| message(&error))? {
        none if none.is_empty() => Err(message(&"no certificate in the file")),
        some => Ok(some),
    }
}

fn client_config(
    config: &UpstreamConfig,
    authorities: &[CertificateDer<'static>],
) -> Result<ClientConfig, String> {
    let tls = &config.tls;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    if !tls.verify {
        let verifier = Arc::new(AcceptAnyCertificate { provider });
        return Ok(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth());
    }
    let roots = match &tls.ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in authorities {
                roots
                    .add(certificate.clone())
                    .map_err(|error| format!("tls.ca {}: {error}", path.display()))?;
            }
            roots.into()
        }
        None => system_roots(),
    };
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// Accepts every certificate, as configured by `tls.verify: false`.
#[derive(Debug)]
struct AcceptAnyCertificate {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
