//! Reads the part of a body after the peek, if the route was found by the model in the peeked part.
//!
//! Engines use the last of two models. A second one would bypass the route of the first, so that such a body
//! is rejected before it is complete: no engine can have answered it.
//!
//! Never: hold more than the parser's carry-over between two pieces.

use crate::prompt::multipart::tail::FormTail;
use crate::prompt::scan::tail::DocumentTail;
use crate::reject::Reject;

/// The reader of the rest of a body.
pub(super) enum BodyTail {
    Json(DocumentTail),
    Multipart(Box<FormTail>),
}

// === impl BodyTail ===

impl BodyTail {
    /// Reads the next piece. Fails if the body must be rejected.
    pub(super) fn read(&mut self, piece: &[u8]) -> Result<(), Reject> {
        match self {
            BodyTail::Json(tail) => tail.read(piece),
            BodyTail::Multipart(tail) => tail.read(piece),
        }
        self.check()
    }

    /// Fails if the bytes read so far require a reject.
    pub(super) fn check(&self) -> Result<(), Reject> {
        let (names_model, is_lost) = match self {
            BodyTail::Json(tail) => (tail.names_model(), false),
            BodyTail::Multipart(tail) => (tail.names_model(), tail.is_lost()),
        };
        if names_model {
            return Err(second_model());
        }
        if is_lost { Err(lost_form()) } else { Ok(()) }
    }
}

/// The reject of a body with a second model after the part that decided its route.
pub(super) fn second_model() -> Reject {
    Reject::Field { param: "model".into(), message: "The body names its model more than once.".into() }
}

/// The reject of a form that cannot be parsed reliably, if routing depends on its fields.
pub(super) fn lost_form() -> Reject {
    Reject::Field { param: "body".into(), message: "The parts of the form cannot be followed.".into() }
}
