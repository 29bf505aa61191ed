//! Ports that a test gives to a server that it starts later, or that no server shall have.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use tokio::net::TcpSocket;

/// The sockets that reserve ports. They live as long as the process, which is one test's under nextest.
static RESERVED: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());

/// A port on 127.0.0.1 that refuses connections until a server binds it by its number, as often as that
/// server ends and starts again.
///
/// A port that is only free at the moment goes to the next test that binds port 0. This one stays bound by a
/// socket that does not listen: the kernel gives it to no other socket that binds port 0 or connects, while a
/// server that sets `SO_REUSEADDR` can bind it and listen. redis-server, PostgreSQL, nginx and tokio set it.
pub fn reserved_port() -> u16 {
    let socket = TcpSocket::new_v4().expect("there is a socket");
    socket.set_reuseaddr(true).expect("a fresh socket takes options");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port is there");
    let port = socket.local_addr().expect("a bound socket has an address").port();
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
    port
}

/// Such a port with its address.
pub fn reserved_address() -> String {
    format!("127.0.0.1:{}", reserved_port())
}
