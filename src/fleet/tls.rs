//! Which certificates TLS towards an upstream trusts: the system's authorities, those of a file, or all.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_rustls::TlsConnector;

use crate::config::types::UpstreamConfig;

/// What it takes to open a connection of our own: the connector, and the name that must be proven.
pub(super) type Secure = (TlsConnector, ServerName<'static>);

/// The authorities of an upstream's `tls.ca`; none where there is no file, or no TLS.
pub(super) fn authorities(config: &UpstreamConfig) -> Result<Vec<CertificateDer<'static>>, String> {
    match &config.tls.ca {
        Some(path) if config.url.https => read_authorities(path),
        _ => Ok(Vec::new()),
    }
}

/// How to talk to an upstream whose URL is https; `None` for one without TLS.
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

/// The authorities in a PEM file; an empty file is an error.
fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let say = |error: &dyn std::fmt::Display| format!("tls.ca {}: {error}", path.display());
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| say(&error))?;
    let certificates: Result<Vec<_>, _> = certificates.collect();
    match certificates.map_err(|error| say(&error))? {
        none if none.is_empty() => Err(say(&"no certificate in the file")),
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
        let anyone = Arc::new(Anyone { provider });
        return Ok(builder.dangerous().with_custom_certificate_verifier(anyone).with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(path) => {
            for certificate in authorities {
                roots
                    .add(certificate.clone())
                    .map_err(|error| format!("tls.ca {}: {error}", path.display()))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// `tls.verify: false`: every certificate is accepted, as the operator configured.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
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
