//! Stub: comes with its own change.
use super::{error, error::ApiError, reply::Reply, run::Call};
pub async fn embeddings(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
pub async fn pooling(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
pub async fn classify(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
pub async fn score(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
pub async fn rerank(_: &Call) -> Result<Reply, ApiError> {
    Ok(error::not_found())
}
