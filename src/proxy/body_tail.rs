//! Reads the part of a body behind the peek, where the route was found by the model that the peeked part
//! names.
//!
//! Engines use the last of two models. A second one would bypass the route of the first, so that such a body
//! is rejected before it is complete: no engine can have answered it.
//!
//! Never: hold more than the parser's carry-over between two pieces.

use crate::prompt::multipart::FormTail;
use crate::prompt::scan::DocumentTail;
use crate::reject::Reject;

/// See the module.
pub enum BodyTail {
    Json(DocumentTail),
    Multipart(Box<FormTail>),
}

// === impl BodyTail ===

impl BodyTail {
    /// Reads the next piece. Fails where the body is to be refused.
    pub fn read(&mut self, piece: &[u8]) -> Result<(), Reject> {
        match self {
            BodyTail::Json(tail) => tail.read(piece),
            BodyTail::Multipart(tail) => tail.read(piece),
        }
        self.check()
    }

    /// Fails where what was read so far is to be refused.
    pub fn check(&self) -> Result<(), Reject> {
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

/// The refusal of a body that names a second model behind the part by which its route was found.
pub fn second_model() -> Reject {
    Reject::Field { param: "model".into(), message: "The body names its model more than once.".into() }
}

/// The refusal of a form that cannot be followed, where something depends on what it says.
pub fn lost_form() -> Reject {
    Reject::Field { param: "body".into(), message: "The parts of the form cannot be followed.".into() }
}
