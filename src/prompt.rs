//! The facts of a request's body, read in one bounded pass over bytes that may be cut.

pub mod canon;
pub mod chain;
pub mod multipart;
pub mod scan;
pub(crate) mod session;
mod value;
mod work;

pub use value::{MAX_MODEL_NAME_BYTES, ModelField};
