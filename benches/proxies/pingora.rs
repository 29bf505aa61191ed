//! pingora-proxy as it comes, for benches/proxies.sh: requests go to the upstreams in turn, and nothing is
//! read, counted, retried or edited. It is the lower bound that the product is held to, and the difference
//! is what the product's own code costs.
//!
//! ```text
//! pingora LISTEN UPSTREAM...      addresses, as 127.0.0.1:8000; serves until it is killed
//! ```

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use async_trait::async_trait;
use clap::Parser;
use pingora::prelude::*;
use pingora::server::RunArgs;
use pingora::server::configuration::ServerConf;

/// The product's allocator.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Parser)]
struct Arguments {
    listen: String,
    #[arg(required = true)]
    upstreams: Vec<SocketAddr>,
}

struct RoundRobin {
    upstreams: Vec<SocketAddr>,
    requests: AtomicUsize,
}

#[async_trait]
impl ProxyHttp for RoundRobin {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, _context: &mut ()) -> Result<Box<HttpPeer>> {
        let turn = self.requests.fetch_add(1, Relaxed) % self.upstreams.len();
        Ok(Box::new(HttpPeer::new(self.upstreams[turn], false, String::new())))
    }
}

fn main() {
    let Arguments { listen, upstreams } = Arguments::parse();
    // The default has one thread.
    let mut server = Server::new_with_opt_and_conf(None, ServerConf::default());
    server.bootstrap();
    let proxy = RoundRobin { upstreams, requests: AtomicUsize::new(0) };
    let mut service = http_proxy_service(&server.configuration, proxy);
    service.add_tcp(&listen);
    server.add_service(service);
    server.run(RunArgs::default());
}
