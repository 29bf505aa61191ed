//! The reasons why a request ends without an upstream's whole answer.

use pingora::{Error, ErrorSource, ErrorType};

use crate::reject::Reject;

/// The reason why a request ends without an upstream's whole answer.
#[derive(Debug)]
pub(super) enum RequestEnd {
    /// The balancer rejects the request.
    Reject(Reject),
    /// The client has disconnected, or has stopped reading.
    Disconnected(Box<Error>),
    /// The upstream failed after the first byte of its answer; the client has received the error.
    Broken(Box<Error>),
}

impl From<Reject> for RequestEnd {
    fn from(reject: Reject) -> Self {
        RequestEnd::Reject(reject)
    }
}

/// A body that breaks the framing is the client's mistake; a connection that ends is its disconnect.
pub(super) fn client_failure(mut error: Box<Error>) -> RequestEnd {
    let gone = matches!(
        error.etype(),
        ErrorType::ConnectionClosed
            | ErrorType::ReadError
            | ErrorType::WriteError
            | ErrorType::H2Error
            | ErrorType::ReadTimedout
    );
    if gone {
        error.esource = ErrorSource::Downstream;
        return RequestEnd::Disconnected(error);
    }
    Reject::Malformed { why: "the body's framing is broken" }.into()
}
