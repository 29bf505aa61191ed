//! Stub: comes with its own change.
use super::{error, error::ApiError, reply::Reply, run::Call};
pub fn tokenize(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
pub fn detokenize(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
