//! The answers of the admin API, and the rejections of its calls.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::fleet::FleetChangeError;
use crate::traces::store::StoreError;

/// The status and the error of a rejected call.
pub(super) struct AdminReject(pub StatusCode, pub Value);

/// The answer to a call.
pub(super) type AdminResult = Result<Response<Bytes>, AdminReject>;

impl AdminReject {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        AdminReject(status, json!({"error": error.into()}))
    }

    /// Rejects a call that is written wrongly: status 400.
    pub(super) fn problem(error: impl Into<String>) -> Self {
        AdminReject::new(StatusCode::BAD_REQUEST, error)
    }
}

impl From<FleetChangeError> for AdminReject {
    fn from(refusal: FleetChangeError) -> Self {
        let status = match refusal {
            FleetChangeError::Unknown(_) => StatusCode::NOT_FOUND,
            FleetChangeError::Unusable(_) => StatusCode::BAD_REQUEST,
            FleetChangeError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        AdminReject::new(status, refusal.to_string())
    }
}

impl From<StoreError> for AdminReject {
    fn from(error: StoreError) -> Self {
        match error {
            // The cause lasts until a restart, so the status is one that clients do not retry.
            StoreError::Off => AdminReject::new(StatusCode::NOT_IMPLEMENTED, error.to_string()),
            error => {
                AdminReject::new(StatusCode::SERVICE_UNAVAILABLE, format!("the store of traces: {error}"))
            }
        }
    }
}

/// The answer to a call, rejected or not.
pub(super) fn respond(answered: AdminResult) -> Response<Bytes> {
    answered.unwrap_or_else(|AdminReject(status, body)| answer(status, &body))
}

/// An answer with a JSON body.
pub(super) fn answer(status: StatusCode, body: &Value) -> Response<Bytes> {
    typed_answer(status, "application/json", body.to_string().into())
}

/// An answer with a body of the given content type.
pub(super) fn typed_answer(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Bytes> {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// Rejects the method of a call, and lists those that its path has.
pub(super) fn not_allowed(allow: &'static str) -> Response<Bytes> {
    let mut refusal = answer(StatusCode::METHOD_NOT_ALLOWED, &json!({"detail": "Method Not Allowed"}));
    refusal.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    refusal
}
