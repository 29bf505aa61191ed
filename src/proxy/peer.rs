//! An upstream as pingora's peer: where to connect, and how.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use pingora::protocols::l4::ext::TcpKeepalive;
use pingora::protocols::tls::CaType;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{WrappedX509, parse_x509};
use pingora::{ErrorType, OkOrErr, Result};

use crate::fleet::Upstream;

/// vLLM's server closes a connection that was idle for 5 s; reusing it later would race with that.
const IDLE: Duration = Duration::from_secs(4);

/// An upstream that does not take what is sent for so long is stuck: nothing else would notice, since the
/// client is not watched while its body has nowhere to go.
const UNREAD: Duration = Duration::from_secs(60);

/// Makes peers, and keeps the authorities of `tls.ca` in pingora's form for as long as their upstream lives.
#[derive(Default)]
pub struct Peers {
    /// Taken for upstreams with a `tls.ca` alone, and never across an await.
    authorities: Mutex<HashMap<usize, Authorities>>,
}

/// Those of one upstream, for as long as it lives.
struct Authorities {
    /// With the settings that they are of: a server whose settings change keeps its id.
    upstream: Weak<Upstream>,
    parsed: Arc<CaType>,
    /// Different where the authorities are.
    group: u64,
}

impl Peers {
    fn authorities(&self, upstream: &Arc<Upstream>) -> Option<(Arc<CaType>, u64)> {
        if upstream.authorities.is_empty() {
            return None;
        }
        let mut known = self.authorities.lock().unwrap_or_else(PoisonError::into_inner);
        let present = Arc::downgrade(upstream);
        if let Some(Authorities { upstream, parsed, group }) = known.get(&upstream.id)
            && upstream.ptr_eq(&present)
        {
            return Some((parsed.clone(), *group));
        }
        known.retain(|_, known| known.upstream.strong_count() > 0);
        // The fleet has taken the same certificates as authorities, so that they parse.
        let parsed = upstream.authorities.iter().map(|der| WrappedX509::new(der.to_vec(), parse_x509));
        let parsed: Arc<CaType> = parsed.collect();
        let mut hasher = DefaultHasher::new();
        upstream.authorities.iter().for_each(|der| der.as_ref().hash(&mut hasher));
        let group = hasher.finish();
        known.insert(upstream.id, Authorities { upstream: present, parsed: parsed.clone(), group });
        Some((parsed, group))
    }

    /// The peer for an attempt on `upstream`. Fails while its name has never been resolved.
    pub fn peer(&self, upstream: &Arc<Upstream>, connect: Duration) -> Result<Box<HttpPeer>> {
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
        let authorities = self.authorities(upstream);
        // Pingora's pool does not look at the authorities: a connection that others have vouched for would
        // be used again.
        peer.group_key = authorities.as_ref().map_or(0, |(_, group)| *group);
        let options = &mut peer.options;
        options.connection_timeout = Some(connect);
        options.total_connection_timeout = Some(connect);
        options.idle_timeout = Some(IDLE);
        options.write_timeout = Some(UNREAD);
        options.verify_cert = config.tls.verify;
        options.verify_hostname = config.tls.verify;
        options.ca = authorities.map(|(parsed, _)| parsed);
        options.tcp_keepalive = Some(TcpKeepalive {
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(10),
            count: 3,
            user_timeout: Duration::from_secs(60),
        });
        Ok(Box::new(peer))
    }
}
