//! An upstream as pingora's peer: where to connect, and how.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pingora::protocols::l4::ext::TcpKeepalive;
use pingora::protocols::tls::CaType;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{WrappedX509, parse_x509};
use pingora::{ErrorType, OkOrErr, Result};

use crate::config::types::{UpstreamConfig, UpstreamTls};
use crate::fleet::{Upstream, tls::read_authorities};

/// vLLM's server closes a connection that was idle for 5 s; reusing it later would race with that.
const IDLE: Duration = Duration::from_secs(4);

/// Makes peers; the authorities of `tls.ca` files are read once.
pub struct Peers {
    authorities: HashMap<PathBuf, Arc<CaType>>,
    connect: Duration,
}

impl Peers {
    pub fn new(configs: &[UpstreamConfig], connect: Duration) -> std::result::Result<Self, String> {
        let mut authorities: HashMap<PathBuf, Arc<CaType>> = HashMap::new();
        for config in configs.iter().filter(|config| config.url.https) {
            let UpstreamTls { ca: Some(path), .. } = &config.tls else { continue };
            let read =
                read_authorities(path).map_err(|error| format!("upstream {}: {error}", config.name))?;
            // The fleet has taken the same certificates as authorities, so that they parse.
            let parsed = read.iter().map(|certificate| WrappedX509::new(certificate.to_vec(), parse_x509));
            authorities.insert(path.clone(), parsed.collect());
        }
        Ok(Peers { authorities, connect })
    }

    /// The peer for an attempt on `upstream`. Fails while its name has never been resolved.
    pub fn peer(&self, upstream: &Upstream) -> Result<Box<HttpPeer>> {
        let config = &upstream.config;
        let sni = config.tls.sni.clone().unwrap_or_else(|| config.url.host.clone());
        let mut peer = match &config.url.unix {
            Some(path) => {
                let path = path.to_str().or_err(ErrorType::ConnectError, "socket path is not UTF-8")?;
                HttpPeer::new_uds(path, config.url.https, sni)?
            }
            None => {
                let address = upstream.address().or_err(ErrorType::ConnectError, "name is not resolved")?;
                HttpPeer::new(address, config.url.https, sni)
            }
        };
        let options = &mut peer.options;
        options.connection_timeout = Some(self.connect);
        options.total_connection_timeout = Some(self.connect);
        options.idle_timeout = Some(IDLE);
        options.verify_cert = config.tls.verify;
        options.verify_hostname = config.tls.verify;
        options.ca = config.tls.ca.as_ref().and_then(|path| self.authorities.get(path)).cloned();
        options.tcp_keepalive = Some(TcpKeepalive {
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: Duration::from_secs(60),
        });
        Ok(Box::new(peer))
    }
}
