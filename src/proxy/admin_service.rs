//! The admin API, as far as the proxy knows it.

use bytes::Bytes;
use futures_util::future::BoxFuture;

/// The admin API. The assembly passes it in: `proxy` must not import `admin`.
pub trait AdminService: Send + Sync {
    /// Whether the admin API serves this path.
    fn serves(&self, path: &str) -> bool;
    fn call(&self, request: http::Request<Bytes>) -> BoxFuture<'_, http::Response<Bytes>>;
}
