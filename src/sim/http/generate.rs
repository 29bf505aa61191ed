//! Stub: comes with its own change.
use super::{error, error::ApiError, reply::Reply, run::Call};
pub async fn create(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
