//! What the balancer asks of upstreams itself, and how it takes calls of its own: bounded, with the
//! caller's key, and not for whoever has no business here.

mod common;

use common::wire::get;
use common::{Balancer, Options, engine};

// === paths that lead elsewhere ===

/// A server behind us that resolves dots would have taken these for `/server_info`, which is denied.
#[tokio::test(flavor = "multi_thread")]
async fn the_deny_table_cannot_be_walked_around_with_dots() {
    let engine = engine(Options { dev_mode: true, ..Options::default() }).await;
    let balancer = Balancer::over([&engine]).await;
    for path in ["/static/../server_info", "/static/%2e%2e/server_info", "/static/a/%2E./.%2e/server_info"] {
        assert_eq!(balancer.ask(get(path)).await.expect(404).text(), r#"{"detail":"Not Found"}"#, "{path}");
    }
    assert_eq!(engine.stats().received, 0, "none of them was sent on");
}
