//! The admin API, as far as the proxy knows it.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::combinators::UnsyncBoxBody;

/// The body of an answer of the admin API: whole, if it has an exact size, else a stream without an end.
pub(crate) type AdminBody = UnsyncBoxBody<Bytes, Infallible>;

/// The admin API. The assembly passes it in: `proxy` must not import `admin`.
pub(crate) trait AdminService: Send + Sync {
    /// Whether the admin API serves this path.
    fn serves(&self, path: &str) -> bool;
    /// Whether calls of this path show the requests in flight and are not counted among them.
    fn only_watches(&self, path: &str) -> bool;
    fn call(&self, request: http::Request<Bytes>) -> BoxFuture<'_, http::Response<AdminBody>>;
}
