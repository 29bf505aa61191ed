//! Stub: comes with its own change.
use super::{connection::Busy, error, error::ApiError, reply::Reply, run::Call};
pub fn open(_: &Call, _: hyper::upgrade::OnUpgrade, _: std::sync::Arc<Busy>) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
