//! Which idle connections are used again.

use tokio::net::TcpListener;

use super::*;
use crate::config::types::{Config, UpstreamConfig, UpstreamTls};
use crate::config::url;
use crate::fleet::Fleet;
use crate::observe::Observer;

const LIMIT: Duration = Duration::from_secs(5);

/// A server that accepts connections, and its upstream.
async fn server() -> (TcpListener, Arc<Upstream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let upstream = UpstreamConfig::new(url::upstream(&format!("http://{address}")).unwrap());
    let config = Config { upstreams: vec![upstream], ..Config::default() };
    let (fleet, _keeper) = Fleet::new(&config, Observer::default()).unwrap();
    let upstream = fleet.snapshot().entries[0].upstream.clone();
    upstream.set_address(address);
    (listener, upstream)
}

/// Connections to the former address of a host went on for as long as requests came.
#[tokio::test]
async fn a_connection_to_another_address_is_not_used() {
    let (listener, upstream) = server().await;
    let (there, elsewhere) = (listener.local_addr().unwrap(), "127.0.0.2:9".parse().unwrap());
    let pool = ConnectionPool::default();
    for moved in [false, true] {
        let wire = pool.dial(&upstream, LIMIT).await.unwrap();
        let _accepted = listener.accept().await.unwrap();
        pool.keep(&upstream, wire);
        upstream.set_address(if moved { elsewhere } else { there });
        assert_eq!(pool.idle(&upstream).is_none(), moved);
    }
    upstream.set_address(there);
    let wire = pool.dial(&upstream, LIMIT).await.unwrap();
    let _accepted = listener.accept().await.unwrap();
    upstream.set_address(elsewhere);
    pool.keep(&upstream, wire);
    upstream.set_address(there);
    assert!(pool.idle(&upstream).is_none(), "it was to another address when it became idle");
}

/// Each end of a request from before a reload closed all connections with the new settings.
#[tokio::test]
async fn an_old_request_leaves_connections_of_new_settings_alone() {
    let (listener, old) = server().await;
    let tls = UpstreamTls { verify: false, ..UpstreamTls::default() };
    let new = Arc::new(old.renewed(UpstreamConfig { tls, ..old.config.clone() }).unwrap());
    let pool = ConnectionPool::default();
    let mut wires = Vec::new();
    for _ in 0..3 {
        wires.push(pool.dial(&old, LIMIT).await.unwrap());
        wires.push(pool.dial(&new, LIMIT).await.unwrap());
    }
    let mut accepted = Vec::new();
    for _ in 0..wires.len() {
        accepted.push(listener.accept().await.unwrap());
    }
    let mut next = || wires.remove(0);
    pool.keep(&old, next());
    assert!(pool.idle(&new).is_none(), "it has the old settings");
    pool.keep(&new, next());
    pool.keep(&old, next());
    assert!(pool.idle(&new).is_some(), "the old one was not kept");
    assert!(pool.idle(&new).is_none());
}

#[test]
fn a_lack_of_sockets_is_no_fault_of_the_upstream() {
    for (errno, fault) in [
        (Errno::CONNREFUSED, ConnectFault::Refused),
        (Errno::MFILE, ConnectFault::NoSocket),
        (Errno::NFILE, ConnectFault::NoSocket),
        (Errno::ADDRNOTAVAIL, ConnectFault::NoSocket),
        (Errno::HOSTUNREACH, ConnectFault::Unreached),
        (Errno::TIMEDOUT, ConnectFault::Unreached),
    ] {
        let error = ConnectError::Io(io::Error::from_raw_os_error(errno.raw_os_error()));
        assert_eq!(error.fault(), fault, "{errno:?}");
    }
    assert_eq!(ConnectError::TimedOut(LIMIT).fault(), ConnectFault::Unreached);
}
