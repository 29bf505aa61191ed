//! Why the slices of a service could not be read.

use std::time::Duration;

use super::super::source::{FailureReason, SourceFailure};

/// Why a request to the API server failed, or could not be made.
#[derive(Debug)]
pub(super) enum ApiFailure {
    /// The version of the list or of its page is too old: list again.
    Expired,
    /// The server was not reached, or its answer broke off.
    Unreached(String),
    /// The server did not answer in this time.
    Silent(Duration),
    /// The kubeconfig, or what it names, was not read in this time.
    CredentialsHang(Duration),
    /// The credential plugin did not end in this time.
    PluginHangs(Duration),
    /// The server refused the request.
    Refused { why: String, retry_after: Option<Duration> },
    /// The answer cannot be used.
    Invalid(String),
}

// === impl ApiFailure ===

impl ApiFailure {
    /// Returns the time for which the server asks for no request.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            ApiFailure::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Whether a watch may go on from the last version: no answer says that the server lacks it.
    pub(super) fn keeps_version(&self) -> bool {
        !matches!(self, ApiFailure::Expired | ApiFailure::Refused { .. } | ApiFailure::Invalid(_))
    }
}

impl From<ApiFailure> for SourceFailure {
    fn from(failure: ApiFailure) -> Self {
        let (reason, text) = match failure {
            ApiFailure::Expired => {
                (FailureReason::Invalid, "the list changed faster than it could be read".into())
            }
            ApiFailure::Unreached(why) => (FailureReason::Unreachable, format!("API server: {why}")),
            ApiFailure::Silent(limit) => {
                (FailureReason::Timeout, format!("API server: no answer within {limit:?}"))
            }
            ApiFailure::CredentialsHang(limit) => {
                let what = "the kubeconfig, a file that it names, or the credential plugin";
                (FailureReason::Timeout, format!("{what} gave no answer within {limit:?}"))
            }
            ApiFailure::PluginHangs(limit) => {
                (FailureReason::Timeout, format!("the credential plugin did not end within {limit:?}"))
            }
            ApiFailure::Refused { why, .. } => (FailureReason::Refused, why),
            ApiFailure::Invalid(why) => (FailureReason::Invalid, why),
        };
        SourceFailure::new(reason, text)
    }
}
